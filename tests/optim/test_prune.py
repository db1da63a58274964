"""prune: entries that have moved least give their place to new ones."""

import copy

import pytest
import torch
from test_resume import check_resume

from id3_optim import (
    ID3AdamW,
    Prune,
    WeightReceiver,
    WeightStream,
    load_delta,
    save_delta,
    weight_patches,
)
from id3_optim.schedules import front_loaded

T, BUDGET = 12, 120
OPTIONS = {"budget": BUDGET, "total_steps": T, "prune": Prune(3, 0.25)}


def active_of(optimizer):
    return [set(t.indices.tolist()) for t in optimizer.touched()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_has_moved_least_leaves_and_gets_its_value_back(model, make, give_gradients, dtype):
    twin, optimizer = make(model, dtype, schedule=front_loaded(0.25), **OPTIONS)
    base = [p.detach().clone() for p in twin.parameters()]
    ages, pruned = [{} for _ in base], []
    for step in range(T + 4):
        if step in (3, 6, 9):
            states = optimizer.state_dict()["state"]
            distances = []
            for j, (p, first) in enumerate(zip(twin.parameters(), base, strict=True)):
                state = states[j]
                for row, i in enumerate(state["indices"].tolist()):
                    own = state["master"][row] if "master" in state else p.detach().flatten()[i]
                    if ages[j][i] >= 3:
                        moved = abs(own.item() - first.flatten()[i].item())
                        distances.append((moved, j, i))
            expected = {(j, i) for _, j, i in sorted(distances)[: int(0.25 * optimizer.n_active)]}
            assert expected
        before = active_of(optimizer)
        give_gradients(step, twin.parameters())
        optimizer.step()
        after = active_of(optimizer)
        left = {(j, i) for j in range(len(base)) for i in before[j] - after[j]}
        if step in (3, 6, 9):
            again = expected - left  # chosen anew at once
            assert left <= expected and all(i in after[j] for j, i in again)
            pruned.append(len(left))
        else:
            assert not left
        for j, own in enumerate(after):
            fresh = own - before[j] | ({i for k, i in again if k == j} if step in (3, 6, 9) else set())
            ages[j] = {i: 1 if i in fresh else ages[j][i] + 1 for i in own}
        for p, first, own in zip(twin.parameters(), base, after, strict=True):
            frozen = torch.ones(p.numel(), dtype=torch.bool)
            frozen[list(own)] = False
            assert torch.equal(p.detach().flatten()[frozen], first.flatten()[frozen])
        assert optimizer.n_active <= BUDGET
    assert optimizer.n_active == BUDGET and len(pruned) == 3 and all(pruned)


def test_the_budget_is_full_after_each_pruning(model, make, train):
    twin, optimizer = make(model, strategy="static", **OPTIONS)
    for step in range(T):
        train(twin, optimizer, step, step + 1)
        assert optimizer.n_active == BUDGET
        assert (optimizer.last_selection.step == step) == (step in (0, 3, 6, 9))
    assert optimizer.last_selection.count == BUDGET // 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("more", [{}, {"bias_correction": "entry", "entry_warmup": 2, "tensor_cap": 0.5}])
def test_resume_at_every_step_is_bit_exact(model, make, train, dtype, more):
    check_resume(model, make, train, dtype, OPTIONS | more, T + 1)


def test_two_dtypes_compete(model, give_gradients):
    model[2].bfloat16()
    optimizer = ID3AdamW(model.parameters(), lr=1e-2, strategy="static", **OPTIONS)
    for step in range(4):
        give_gradients(step, model.parameters())
        optimizer.step()
    assert optimizer.n_active == BUDGET and optimizer.last_selection.count == BUDGET // 4


def test_the_delta_holds_the_active_entries_alone_and_is_exact(tmp_path, model, make, train):
    twin, optimizer = make(model, **OPTIONS)
    train(twin, optimizer, 0, T)
    save_delta(tmp_path / "delta", twin, optimizer, originals=True)
    delta, base = load_delta(tmp_path / "delta"), copy.deepcopy(model)
    assert delta.inspect()["entries"] == BUDGET
    assert delta.settings["prune"] == {"every": 3, "share": 0.25}
    undo = delta.apply(base)
    assert all(map(torch.equal, base.parameters(), twin.parameters()))
    undo.revert()
    assert all(map(torch.equal, base.parameters(), model.parameters()))


def test_young_entries_stay():
    """With a uniform schedule the entries of the last two steps have moved least."""
    param = torch.nn.Parameter(torch.zeros(8))
    optimizer = ID3AdamW([param], lr=1.0, weight_decay=0.0, budget=8, total_steps=8, prune=Prune(4, 0.9))
    grads = torch.tensor([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    for step in range(5):
        param.grad = grads.clone()
        if step == 4:
            param.grad[:4] = 0  # what leaves does not come back
        optimizer.step()
    # At step 4 entries 0 to 3 had 4, 3, 2 and 1 updates: entry 0 alone is old enough.
    (touched,) = optimizer.touched()
    assert touched.indices.tolist() == [1, 2, 3, 4, 5] and param[0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "repeat"}, "prune: does not apply to strategy 'repeat'"),
        ({"keep_originals": False}, "prune: needs keep_originals=True"),
        ({"release_gradients": True}, "prune: does not apply to release_gradients"),
        ({"capturable": True}, "capturable: does not apply to prune"),
        ({"select_every": 2}, "prune: expected every to be a multiple of select_every, 2, .*, got 3"),
    ],
)
def test_what_does_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        ID3AdamW([torch.nn.Parameter(torch.zeros(4))], **OPTIONS, **options)


def test_values_out_of_range():
    for every in (0, 1.5, True):
        with pytest.raises(ValueError, match="prune: every: expected an int of at least 1"):
            Prune(every)
    for share in (0.0, 1.0, "x"):
        with pytest.raises(ValueError, match="prune: share: expected a number above 0 and below 1"):
            Prune(3, share)
    with pytest.raises(TypeError, match=r"prune: expected Prune\(every, share\) or None, got 3"):
        ID3AdamW([torch.nn.Parameter(torch.zeros(4))], budget=1, prune=3)


def test_a_stream_sends_what_has_left(model, make, train):
    twin, optimizer = make(model, **OPTIONS)
    copied = copy.deepcopy(twin)
    stream, receiver = WeightStream(twin, optimizer), WeightReceiver(copied)
    for step in range(T):
        train(twin, optimizer, step, step + 1)
        update = stream.next()
        receiver.apply_patch(update)
        stream.acknowledge(update)
        assert all(map(torch.equal, copied.parameters(), twin.parameters()))


def test_changes_since_a_step_are_not_known(model, make, train):
    twin, optimizer = make(model, **OPTIONS)
    train(twin, optimizer, 0, 2)
    with pytest.raises(ValueError, match="changed_since: does not apply to prune"):
        weight_patches(twin, optimizer, since=1)


@pytest.mark.parametrize("frozen", [0, 4])
def test_a_frozen_tensor_keeps_its_entries(model, make, give_gradients, frozen):
    """Its entries stand still, so that they would be the first to leave."""
    options = OPTIONS | {"prune": Prune(3, 0.75)}
    twin, optimizer = make(model, schedule=front_loaded(0.25), **options)
    params = list(twin.parameters())
    for step in range(T):
        if step == 4:
            held = active_of(optimizer)
            kept = params[frozen].detach().clone()
        give_gradients(step, params)
        if step >= 4:
            params[frozen].grad = None
        optimizer.step()
    assert held[frozen] and active_of(optimizer)[frozen] == held[frozen]
    assert torch.equal(params[frozen], kept) and active_of(optimizer) != held
