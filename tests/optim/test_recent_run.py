"""Entries join a recent run that is merged when it is full: the bits of one run, whatever the share."""

import copy

import pytest
import torch
from test_failures import failing, snapshot
from test_shards import VARIANTS, same_gradients, shards, spread

from id3_optim.state import shard as module
from id3_optim.state.active_set import ActiveSet

ONE_RUN = 10**9
JOINING = {name: options for name, options in VARIANTS.items() if name != "repeat"}
JOINING |= {"by entry": {"bias_correction": "entry"}, "no originals": {"keep_originals": False}}


def step(monkeypatch, share, optimizer):
    monkeypatch.setattr(module, "RECENT_SHARE", share)
    optimizer.step()


def check_same(one, two):
    for p, q in zip(one[0].parameters(), two[0].parameters(), strict=True):
        assert torch.equal(p, q)
    assert one[1].n_active == two[1].n_active
    states, others = (optimizer.state_dict()["state"] for _, optimizer in (one, two))
    for i, state in states.items():
        for name, value in state.items():
            same = value == others[i][name] if name == "shape" else torch.equal(value, others[i][name])
            assert same, (i, name)


@pytest.mark.parametrize("share", [1, 2, 3, 8])
@pytest.mark.parametrize("variant", JOINING)
def test_the_same_bits_as_in_one_run(model, make, monkeypatch, variant, share):
    options = {"budget": 300, "total_steps": 12} | JOINING[variant]
    one, two = make(model, **options), make(model, **options)
    runs = set()
    for t in range(14):
        same_gradients(t, one[0], two[0])
        if t % 3 == 2:
            one[0][1].weight.grad = two[0][1].weight.grad = None
        step(monkeypatch, ONE_RUN, one[1])
        step(monkeypatch, share, two[1])
        runs.add(len(shards(two[1])[0].offsets))
        assert len(shards(one[1])[0].offsets) == 1
        assert one[1].n_active == two[1].n_active
        if t in (4, 9):  # reading the state merges the runs; a step without that goes on with two
            check_same(one, two)
    check_same(one, two)
    whole = variant == "capturable" or (variant == "static" and share > 1)
    assert (2 in runs) == (not whole), runs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(model, make, monkeypatch, dtype):
    one, two = (make(model, dtype, budget=300, total_steps=12, max_grad_norm=1.0) for _ in range(2))
    for t in range(12):
        same_gradients(t, one[0], two[0])
        step(monkeypatch, ONE_RUN, one[1])
        step(monkeypatch, 2, two[1])
    check_same(one, two)


def test_shards_that_grow(model, make, monkeypatch):
    """Without a capacity for the whole budget, which several shards on the CPU have not."""
    monkeypatch.setattr(ActiveSet, "shard_for", spread)
    one, two = (make(model, budget=1000, total_steps=20) for _ in range(2))
    for t in range(20):
        same_gradients(t, one[0], two[0])
        step(monkeypatch, ONE_RUN, one[1])
        step(monkeypatch, 2, two[1])
    check_same(one, two)


def test_copied_resumed_and_extended_between_joins(model, make, monkeypatch):
    options = {"budget": 300, "total_steps": 12, "release_gradients": False}
    one, two = make(model, **options), make(model, **options)
    for t in range(12):
        same_gradients(t, one[0], two[0])
        step(monkeypatch, ONE_RUN, one[1])
        step(monkeypatch, 2, two[1])
        if t == 3:
            assert len(shards(two[1])[0].offsets) == 2
            two = copy.deepcopy(two)
        if t == 6:
            twin = make(two[0], **options)
            twin[1].load_state_dict(two[1].state_dict())
            two = twin
        if t == 8:
            for _, optimizer in (one, two):
                fresh = torch.nn.Parameter(torch.ones(5))
                fresh.grad = torch.ones(5)
                optimizer.add_param_group({"params": [("fresh", fresh)]})
    check_same(one, two)


@pytest.mark.parametrize("broken", ["gather", "join_", "squared_norm", "adamw_"])
@pytest.mark.parametrize("at", [3, 4, 5, 6])
def test_a_step_that_fails_is_undone(model, make, monkeypatch, broken, at):
    options = {"budget": 300, "total_steps": 12, "max_grad_norm": 1.0}
    twin, optimizer = make(model, **options)
    straight = make(model, **options)
    monkeypatch.setattr(module, "RECENT_SHARE", 3)
    for t in range(9):
        same_gradients(t, twin, straight[0])
        if t == at:
            before = snapshot(*copy.deepcopy((twin, optimizer)))
            shard = shards(optimizer)[0]
            own, shard.kernels = shard.kernels, failing(shard.kernels, broken, 0)
            with pytest.raises(torch.OutOfMemoryError):
                optimizer.step()
            shard.kernels = own
            after = snapshot(*copy.deepcopy((twin, optimizer)))
            assert before[2:] == after[2:]
            for i, state in before[1].items():
                for name, value in state.items():
                    assert name == "shape" or torch.equal(value, after[1][i][name]), (i, name)
        optimizer.step()
        straight[1].step()
    check_same((twin, optimizer), straight)
