"""A step that fails, out of memory as a rule, leaves parameters and state as they were, to be tried again."""

import copy
from types import SimpleNamespace

import pytest
import torch
from test_shards import same_gradients, shards, spread

from id3_kernels import table as op_table
from id3_optim import ID3AdamW
from id3_optim.state.active_set import ActiveSet
from id3_optim.step import update


def failing(kernels, broken, calls):
    """The kernels, of which `broken` raises instead of its call number `calls`, the first being 0."""
    left = calls

    def raise_at(function):
        def call(*args):
            nonlocal left
            left -= 1
            if left == -1:
                raise torch.OutOfMemoryError("no memory left")
            return function(*args)

        return call

    table = {name: getattr(kernels, name) for name in op_table.OPS}
    return SimpleNamespace(**table | {broken: raise_at(table[broken])})


def snapshot(twin, optimizer):
    state = optimizer.state_dict()["state"]
    return copy.deepcopy([list(twin.parameters()), state, optimizer.n_active, optimizer.steps_done])


def check_same(one, other):
    for p, q in zip(one[0], other[0], strict=True):
        assert torch.equal(p, q)
    for i, state in one[1].items():
        for name, value in state.items():
            assert value == other[1][i][name] if name == "shape" else torch.equal(value, other[1][i][name])
    assert one[2:] == other[2:]


OPS = ("select_topk", "gather", "join_", "squared_norm")
CASES = [(op, call, shards) for op in OPS for call, shards in ((0, 1), (0, 2), (1, 2))]
CASES += [("adamw_", 0, 1), ("adamw_", 0, 2)]


@pytest.mark.parametrize(("broken", "calls", "n_shards"), CASES)
def test_nothing_has_changed(model, make, monkeypatch, broken, calls, n_shards):
    monkeypatch.setattr(ActiveSet, "shard_for", spread if n_shards == 2 else ActiveSet.shard_for)
    twin, optimizer = make(model, max_grad_norm=1.0)
    straight = make(model, max_grad_norm=1.0)
    for step in range(6):
        same_gradients(step, twin, straight[0])
        if step == 4:
            before = snapshot(twin, optimizer)
            kernels = [shard.kernels for shard in shards(optimizer)]
            table = failing(kernels[0], broken, calls)
            for shard in shards(optimizer):
                shard.kernels = table
            with pytest.raises(torch.OutOfMemoryError):
                optimizer.step()
            for shard, own in zip(shards(optimizer), kernels, strict=True):
                shard.kernels = own
            check_same(before, snapshot(twin, optimizer))
        optimizer.step()
        straight[1].step()
    check_same(snapshot(twin, optimizer), snapshot(*straight))


def no_memory(*_):
    raise torch.OutOfMemoryError("no memory left")


def test_what_was_written_stays_in_the_active_set(model, make, monkeypatch):
    """Beyond the first call nothing can be undone, and nothing is: all that has changed is active."""
    monkeypatch.setattr(ActiveSet, "shard_for", spread)
    twin, optimizer = make(model)
    before = copy.deepcopy(list(twin.parameters()))
    for step in range(3):
        same_gradients(step, twin)
        if step == 2:
            table = failing(shards(optimizer)[0].kernels, "adamw_", 1)
            for shard in shards(optimizer):
                shard.kernels = table
            with pytest.raises(torch.OutOfMemoryError):
                optimizer.step()
        else:
            optimizer.step()
    n_changed = 0
    for p, old, touched in zip(twin.parameters(), before, optimizer.touched(), strict=True):
        changed = (p != old).flatten().nonzero().flatten()
        assert torch.isin(changed, touched.indices).all()
        n_changed += changed.numel()
    assert optimizer.n_active > n_changed > 0 and optimizer.steps_done == 2


def test_no_memory_for_the_moments_of_a_dense_head(model, monkeypatch):
    groups = [
        {"params": list(model[:2].parameters())},
        {"params": list(model[2].parameters()), "dense": True},
    ]
    optimizer = ID3AdamW(groups, budget=20, total_steps=2)
    same_gradients(0, model)
    before = copy.deepcopy(list(model.parameters()))
    with monkeypatch.context() as patched:
        patched.setattr(update, "make_moments", no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.step()
    assert optimizer.n_active == 0
    assert all(map(torch.equal, model.parameters(), before))
    optimizer.step()
    assert (optimizer.n_active, optimizer.steps_done) == (10, 1)


@pytest.mark.parametrize("broken", ["gather", "join_", "squared_norm", "adamw_compact_"])
def test_with_released_gradients_too(model, make, broken):
    options = {"max_grad_norm": 1.0, "release_gradients": True}
    twin, optimizer = make(model, **options)
    straight = make(model, **options)
    for step in range(6):
        same_gradients(step, twin, straight[0])
        if step == 4:
            before = snapshot(twin, optimizer)
            shard = shards(optimizer)[0]
            kernels, shard.kernels = shard.kernels, failing(shard.kernels, broken, 0)
            with pytest.raises(torch.OutOfMemoryError):
                optimizer.step()
            shard.kernels = kernels
            check_same(before, snapshot(twin, optimizer))
        optimizer.step()
        straight[1].step()
    check_same(snapshot(twin, optimizer), snapshot(*straight))


def test_a_step_that_had_no_memory_for_the_state_begins_again(monkeypatch):
    param = torch.nn.Parameter(torch.ones(50))
    param.grad = torch.ones(50)
    optimizer = ID3AdamW([param], budget=5, total_steps=1)
    with monkeypatch.context() as patched:
        patched.setattr(ActiveSet, "reserve", no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.step()
    assert torch.equal(param, torch.ones(50)) and (optimizer.n_active, optimizer.steps_done) == (0, 0)
    optimizer.step()
    assert (optimizer.n_active, optimizer.steps_done) == (5, 1)
