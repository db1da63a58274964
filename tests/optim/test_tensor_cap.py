"""tensor_cap: no tensor gets more than its part of the budget."""

import numpy as np
import pytest
import torch
from dense_masked import d3_float32
from test_resume import check_resume

from id3_optim import D3, ID3AdamW, Magnitude
from id3_optim.schedules import tabulate, uniform

BUDGET, CAP, T = 200, 0.35, 10


def capped(scores, taken, k, most):
    """Flat positions of the k best outside `taken` with at most `most` in each tensor, one by one."""
    owner = np.concatenate([np.full(s.size, j) for j, s in enumerate(scores)])
    flat, counts, chosen = np.concatenate(scores), np.zeros(len(scores), int), []
    np.add.at(counts, owner[taken], 1)
    for place in np.argsort(-flat, kind="stable"):
        if len(chosen) < k and flat[place] > 0 and not taken[place] and counts[owner[place]] < most:
            chosen.append(place)
            counts[owner[place]] += 1
    return chosen


@pytest.mark.parametrize("strategy", ["increment", "static", "repeat"])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_the_best_within_the_cap_join(model, give_gradients, strategy, backend):
    params = list(model.parameters())
    optimizer = ID3AdamW(
        params, lr=1e-2, budget=BUDGET, total_steps=T, tensor_cap=CAP, strategy=strategy, backend=backend
    )
    targets = tabulate(uniform, T, BUDGET) if strategy == "increment" else [BUDGET] * T
    taken = np.zeros(sum(p.numel() for p in params), bool)
    for step in range(T):
        give_gradients(step, params)
        scores = [d3_float32(p, p.grad, 1.0, 2) for p in params]
        if strategy == "repeat":
            taken[:] = False
        taken[capped(scores, taken, targets[step] - taken.sum(), int(CAP * BUDGET))] = True
        optimizer.step()
        indices = [row["indices"] for row in optimizer.active_set.columns(0, [])]
        own = np.split(taken, np.cumsum([p.numel() for p in params])[:-1])
        assert [i.tolist() for i in indices] == [mask.nonzero()[0].tolist() for mask in own]
    assert optimizer.n_active == BUDGET
    assert max(len(i) for i in indices) == int(CAP * BUDGET)  # the cap has bound


@pytest.mark.parametrize("heuristic", [Magnitude(), lambda p, g: g.abs().float()], ids=["pafi", "function"])
def test_other_heuristics_and_two_dtypes(model, give_gradients, heuristic):
    model[2].double()
    optimizer = ID3AdamW(
        model.parameters(), lr=1e-2, budget=BUDGET, total_steps=T, tensor_cap=CAP, heuristic=heuristic
    )
    for step in range(T):
        give_gradients(step, model.parameters())
        optimizer.step()
    counts = [t.indices.numel() for t in optimizer.touched()]
    assert max(counts) == int(CAP * BUDGET) and sum(counts) == BUDGET


def test_what_no_tensor_has_room_for_stays_unspent(model, give_gradients):
    optimizer = ID3AdamW(model.parameters(), lr=1e-2, budget=BUDGET, total_steps=T, tensor_cap=0.1)
    for step in range(T + 2):
        give_gradients(step, model.parameters())
        optimizer.step()
    assert [t.indices.numel() for t in optimizer.touched()] == [20, 20, 20, 20, 20, 17]


def test_a_cap_that_does_not_bind_changes_nothing(model, make, train):
    (plain, first), (twin, second) = make(model), make(model, tensor_cap=0.999)
    train(plain, first, 0, 40)
    train(twin, second, 0, 40)
    assert all(map(torch.equal, plain.parameters(), twin.parameters()))


def test_resume_is_bit_exact(model, make, train):
    options = {"total_steps": 8, "tensor_cap": CAP, "heuristic": D3(1.0, 1.0)}
    check_resume(model, make, train, torch.float32, options, 9)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.5, float("nan"), True, "0.1"])
def test_anything_but_a_share_is_refused(value):
    with pytest.raises(ValueError, match="tensor_cap: expected a number above 0 and below 1"):
        ID3AdamW([torch.nn.Parameter(torch.zeros(4))], budget=1, tensor_cap=value)


def test_released_gradients_are_refused():
    optimizer = ID3AdamW([torch.nn.Parameter(torch.zeros(4))], budget=1, tensor_cap=0.5)
    with pytest.raises(ValueError, match="tensor_cap: does not apply to release_gradients"):
        optimizer.release_gradients()
