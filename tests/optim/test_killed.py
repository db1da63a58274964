"""A rank that is killed while all save: afterwards the older or the newer checkpoint loads, never a mix."""

from pathlib import Path

import pytest
import torch
from torchrun import launch


def run(*arguments):
    return launch(Path(__file__).parent / "killed_run.py", *arguments, timeout=100)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    done = run(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "end.pt")


@pytest.mark.parametrize(
    ("where", "rank"),
    [("before", 1), ("half", 0), ("half", 1), ("written", 1), ("metadata", 0), ("rename", 0)],
)
def test_a_killed_rank_leaves_a_checkpoint_that_is_whole(straight, tmp_path, where, rank):
    done = run(tmp_path, where, rank)
    assert done.returncode != 0 and "SIGKILL" in done.stderr, done.stderr[-3000:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-5", "step-8.unfinished"]
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["end.pt", "step-5", "step-8"]
    end = torch.load(tmp_path / "end.pt")
    assert all(torch.equal(end[name], value) for name, value in straight.items())
