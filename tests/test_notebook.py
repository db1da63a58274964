"""examples/quickstart.ipynb runs cell by cell, as a reader runs it, and shows what its text says."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="the notebook needs the extra `plot`")

from id3_optim import load_delta

NOTEBOOK = Path(__file__).parent.parent / "examples/quickstart.ipynb"


@pytest.fixture(scope="module")
def cells():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_it_is_saved_without_results_and_as_jupyter_reads_it(cells):
    whole = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (whole["nbformat"], whole["metadata"]["kernelspec"]["language"]) == (4, "python")
    assert len({cell["id"] for cell in cells}) == len(cells) > 10
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    for cell in code:
        compile(
            "".join(cell["source"]), NOTEBOOK.name, "exec"
        )  # no commands of a notebook, which Python lacks


def test_its_cells_run_in_order(cells, tmp_path, monkeypatch, capsys):
    import matplotlib

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(matplotlib, "rcParams", matplotlib.rcParams.copy())
    matplotlib.use("agg")
    names = {"__name__": "__main__"}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), NOTEBOOK.name, "exec"), names)
            assert capsys.readouterr().out.strip()
    assert names["after"] > names["before"] + 0.1
    assert names["changed"] == names["optimizer"].n_active == int(0.005 * names["optimizer"].n_entries)
    assert names["same"] and names["restored"] and "expected the base with fingerprint" in names["refused"]
    assert names["sizes"]["tuned.safetensors"] < names["sizes"]["model.pt"] / 20
    assert load_delta("tuned.safetensors").inspect()["entries"] == names["changed"]
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert torch.isfinite(torch.tensor(names["losses"])).all()
