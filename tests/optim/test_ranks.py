"""Parameters that FSDP2, HSDP and tensor parallelism split over 2 and 4 processes: the bits of one process.

One group of processes runs all checks of `ranks_run.py`, since to start them takes longer than to run them.
"""

import functools
import json
from pathlib import Path

import pytest
from torchrun import launch

CHECKS = {
    2: {
        "fsdp": [
            "bits",
            "heuristics",
            "strategies",
            "large",
            "clipping",
            "missing",
            "not_finite",
            "loss_scale",
            "accumulation",
            "traffic",
        ],
        "tp": ["bits", "heuristics", "clipping", "deltas"],
    },
    4: {
        "fsdp": ["bits", "deltas", "refused", "traffic"],
        "hsdp": ["bits", "large", "strategies", "clipping"],
        "tp": ["bits"],
        "both": ["bits", "deltas", "heuristics", "large", "clipping", "loss_scale", "not_finite"],
    },
}
CHECKS = {n: [f"{c} {split}" for split, names in rows.items() for c in names] for n, rows in CHECKS.items()}


def run(folder, n, names, script="ranks_run.py", timeout=150):
    """The errors of each of n processes by check."""
    done = launch(Path(__file__).parent / script, folder, ",".join(names), processes=n, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(n)]


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """Number of processes -> the errors of each; they run when they are first asked for."""
    return functools.cache(lambda n: run(tmp_path_factory.mktemp("ranks"), n, CHECKS[n]))


@pytest.mark.parametrize(("n", "check"), [(n, check) for n, names in CHECKS.items() for check in names])
def test_ranks_do_what_one_process_does(errors, n, check):
    for found in errors(n):
        assert found[check] is None, found[check]
