"""`ID3AdamW(process_group=…)` in two processes: the entries and values of averaged gradients, and messages.

One group of processes runs all checks of a program, since to start them takes longer than to run them.
"""

import functools

import pytest
import torch
from test_ranks import run

from id3_optim import ID3AdamW
from id3_optim.distributed.replicas import checksum

CHECKS = {
    "replicas_run.py": [
        *("dense", "released", "heuristics", "mixed", "missing", "nothing"),
        *("accumulation", "released_accumulation", "sparse", "sparse_accumulation", "ddp", "traffic"),
    ],
    "replicas_weather_run.py": [
        *("overflow", "other_scaler", "resume", "other_state", "copies", "different", "other_layers"),
        *("no_sync_last", "refused", "split_parameters", "out_of_memory"),
    ],
}


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """Program -> the errors of each process; it runs when they are first asked for."""
    return functools.cache(lambda script: run(tmp_path_factory.mktemp("replicas"), 2, CHECKS[script], script))


@pytest.mark.parametrize(
    ("script", "check"), [(script, check) for script in CHECKS for check in CHECKS[script]]
)
def test_replicas(errors, script, check):
    for found in errors(script):
        assert found[check] is None, found[check]


def test_on_a_gpu_the_host_knows_where_active_entries_lie(monkeypatch):
    """What replicas send there has bounds that need no answer of the device, and few entries too many."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(40, 50)) for _ in range(2)]
    optimizer = ID3AdamW(params, budget=2000, total_steps=400)
    for step in range(300):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        (shard,) = optimizer.active_set.shards
        if step % 100 == 99:
            shard.settle()
        exact = shard.stretches()
        with monkeypatch.context() as patch:
            patch.setattr(shard, "device", torch.device("cuda"))
            known = shard.stretches()
        assert len(known) == len(exact) == 2 - (step % 100 == 99)
        for inner, outer in zip(exact, known, strict=True):
            assert inner.start == outer.start and inner.stop <= outer.stop
        covered = sum(stretch.stop - stretch.start for stretch in known)
        assert covered <= optimizer.n_active + shard.arrays["indices"].numel() // 32


def test_a_checksum_of_nothing():
    """An active set without entries has empty tensors."""
    full, empty = torch.arange(5.0), torch.empty(0)
    device = torch.device("cpu")
    assert checksum([full, empty], device) != checksum([full], device) != checksum([], device)
