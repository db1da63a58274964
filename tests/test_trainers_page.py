"""The Python of docs/trainers.md runs as it stands there, each block after the first one."""

import re
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the page is about the extras `hf`, `peft`, `trl`, `lightning`")

PAGE = Path(__file__).parent.parent / "docs" / "trainers.md"
SECTIONS = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
FIRST, *_ = re.findall(r"```python\n(.*?)```", SECTIONS[0], re.DOTALL)
BLOCKS = {s.splitlines()[0]: re.findall(r"```python\n(.*?)```", s, re.DOTALL) for s in SECTIONS[1:]}


@pytest.fixture(autouse=True)
def fresh_state():
    """Accelerate keeps precision and device for the process; the next block wants its own."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


TRAINERS = ["transformers.Trainer", "PEFT", "TRL", "Accelerate", "Lightning"]


@pytest.mark.parametrize("section", [*TRAINERS, "Streaming to an inference server"])
def test_snippet(section, tmp_path, monkeypatch, capsys):
    (block,) = BLOCKS[section]
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for source in (FIRST, block):
        exec(compile(source, str(PAGE), "exec"), names)
    said = capsys.readouterr().out.splitlines()[-1]
    assert said and said != "False"


def test_every_example_on_the_page_exists():
    named = set(re.findall(r"\]\((\.\./[^)]*)\)", PAGE.read_text()))
    assert len(named) > 5 and all((PAGE.parent / name).exists() for name in named)
