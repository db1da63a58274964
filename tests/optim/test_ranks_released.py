"""Released gradients under FSDP2 and HSDP: the bits of whole ones, with accumulation, clipping, scaling."""

import pytest
from test_ranks import run

CHECKS = {
    2: ["bits fsdp", "accumulation fsdp", "overflow fsdp", "plain fsdp"],
    4: ["bits hsdp", "overflow hsdp"],
}


@pytest.mark.parametrize("n", CHECKS)
def test_hooks_take_reduced_gradients(tmp_path, n):
    for errors in run(tmp_path, n, CHECKS[n], "released_run.py"):
        assert set(errors.values()) == {None}, errors
