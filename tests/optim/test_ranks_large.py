"""DTensors of more entries than int32 counts, over 2 processes: the bits of one process.

`large_ranks_run.py` has what each process runs.
"""

import pytest
from test_ranks import run

CHECKS = [
    f"{check} {split}"
    for split, checks in {
        "fsdp": ("bits", "many", "deltas", "released", "resumed", "refused"),
        "tp": ("bits", "many", "deltas", "resumed"),
    }.items()
    for check in checks
]


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    return run(tmp_path_factory.mktemp("large"), 2, CHECKS, script="large_ranks_run.py")


@pytest.mark.parametrize("check", CHECKS)
def test_ranks_do_what_one_process_does(errors, check):
    for found in errors:
        assert found[check] is None, found[check]
