"""Split parameters beside training: references, scores, checkpoints, deltas, replicas that differ."""

import functools

import pytest
from test_ranks import run

CHECKS = {
    2: ["reference", "fisher", "logged", "later", "grown", "frozen", "refusals"],
    4: ["reference hsdp", "differ", "stages"],
}
CHECKS = {n: [c if " " in c else f"{c} fsdp" for c in names] for n, names in CHECKS.items()}


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """Number of processes -> the errors of each."""

    @functools.cache
    def of(n):
        return run(tmp_path_factory.mktemp("ranks"), n, CHECKS[n], "ranks_use_run.py")

    return of


@pytest.mark.parametrize(("n", "check"), [(n, check) for n, names in CHECKS.items() for check in names])
def test_ranks_do_what_one_process_does(errors, n, check):
    for found in errors(n):
        assert found[check] is None, found[check]
