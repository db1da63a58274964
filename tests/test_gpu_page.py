"""The example of docs/gpu.md, on a GPU as it stands; elsewhere with a recording in the graph's place."""

import contextlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).parent.parent
(BLOCK,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "gpu.md").read_text(), re.DOTALL)


def on_the_cpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "optim"))
    from replayed import Recording

    nothing = SimpleNamespace(wait_stream=lambda other: None)
    for name, stand_in in {
        "Stream": lambda: nothing,
        "current_stream": lambda: nothing,
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": Recording,
        "graph": lambda graph: graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return BLOCK.replace('"cuda"', '"cpu"')


def test_the_example(monkeypatch, capsys):
    on_gpu = torch.cuda.is_available()
    block = BLOCK if on_gpu else on_the_cpu(monkeypatch)
    exec(compile(block, "gpu.md", "exec"), {"__name__": "__main__"})
    steps = 100 if on_gpu else 101  # a recording runs what it records, a capture does not
    budget = int(0.02 * (64 * 64 + 64 + 64 * 8 + 8))
    assert capsys.readouterr().out.split() == [str(steps), str(budget)]
    sys.modules.pop("replayed", None)
