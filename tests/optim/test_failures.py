"""A step that fails, out of memory as a rule, leaves parameters and state as they were, to be tried again."""

import copy
from types import SimpleNamespace

import pytest
import torch
from test_shards import same_gradients, spread

from id3_kernels.ops import SCHEMAS
from id3_optim import ID3AdamW
from id3_optim import optimizer as module


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

    table = {name: getattr(kernels, name) for name in SCHEMAS}
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


CASES = [("select_topk", 0), ("select_topk", 1), ("gather", 0), ("gather", 1), ("join_", 0), ("join_", 1)]
CASES += [("squared_norm", 0), ("squared_norm", 1), ("adamw_", 0)]


@pytest.mark.parametrize(("broken", "calls"), CASES)
@pytest.mark.parametrize("shards", [1, 2])
def test_nothing_has_changed(model, make, monkeypatch, broken, calls, shards):
    if calls >= shards:
        pytest.skip("is called once for each shard")
    monkeypatch.setattr(module, "adopt", spread if shards == 2 else module.adopt)
    twin, optimizer = make(model, max_grad_norm=1.0)
    straight = make(model, max_grad_norm=1.0)
    for step in range(6):
        same_gradients(step, twin, straight[0])
        if step == 4:
            before = snapshot(twin, optimizer)
            kernels = [shard.kernels for shard in optimizer._shards]
            table = failing(kernels[0], broken, calls)
            for shard in optimizer._shards:
                shard.kernels = table
            with pytest.raises(torch.OutOfMemoryError):
                optimizer.step()
            for shard, own in zip(optimizer._shards, kernels, strict=True):
                shard.kernels = own
            check_same(before, snapshot(twin, optimizer))
        optimizer.step()
        straight[1].step()
    check_same(snapshot(twin, optimizer), snapshot(*straight))


@pytest.mark.parametrize("broken", ["gather", "join_", "squared_norm", "adamw_compact_"])
def test_with_released_gradients_too(model, make, broken):
    options = {"max_grad_norm": 1.0, "release_gradients": True}
    twin, optimizer = make(model, **options)
    straight = make(model, **options)
    for step in range(6):
        same_gradients(step, twin, straight[0])
        if step == 4:
            before = snapshot(twin, optimizer)
            shard = optimizer._shards[0]
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
        patched.setattr(module, "reserve", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("none")))
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.step()
    assert torch.equal(param, torch.ones(50)) and (optimizer.n_active, optimizer.steps_done) == (0, 0)
    optimizer.step()
    assert (optimizer.n_active, optimizer.steps_done) == (5, 1)
