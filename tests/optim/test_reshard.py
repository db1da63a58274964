"""Checkpoints of torch.distributed.checkpoint: saved by any ranks, continued by any others, bit for bit."""

import pytest
from test_ranks import run

SPLITS = {1: ["fsdp"], 2: ["fsdp", "tp"], 4: ["fsdp", "hsdp", "both"]}


def errors_of(folder, n, checks):
    folder /= f"{checks[0].replace(' ', '-')}-of-{n}"
    folder.mkdir()
    return run(folder, n, checks, "reshard_run.py")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a checkpoint, plain and flattened, of every way to split."""
    folder = tmp_path_factory.mktemp("reshard")
    for n, splits in SPLITS.items():
        for errors in errors_of(folder, n, [f"save {split}" for split in splits]):
            assert set(errors.values()) == {None}, errors
    return folder


@pytest.mark.parametrize("n", SPLITS)
def test_any_ranks_go_on_from_any_other(saved, n):
    checks = [f"resume {split}" for split in SPLITS[n]] + ["resume_plain fsdp"]
    for errors in errors_of(saved, n, checks):
        assert set(errors.values()) == {None}, errors
