"""select_every=K: entries join in every K-th step, and the whole budget is spent."""

import copy
import warnings

import pytest
import torch
from dense_masked import DenseMasked
from hypothesis import given
from hypothesis import strategies as st
from short import short
from test_resume import check_resume
from twins import Twins, loss_at

from id3_optim import D3, DeltaSeries, ID3AdamW, Magnitude
from id3_optim.schedules import cosine, front_loaded, one_shot, tabulate, uniform

SCHEDULES = [uniform, cosine, front_loaded(0.2), one_shot]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=short)
@given(st.integers(1, 60), st.integers(0, 1000), st.integers(1, 70))
def test_a_window_has_the_target_of_its_last_step(schedule, total_steps, budget, every):
    plain, windowed = (tabulate(schedule, total_steps, budget, k) for k in (1, every))
    assert len(windowed) == total_steps and windowed[-1] == budget
    for step, target in enumerate(windowed):
        last = min((step // every + 1) * every, total_steps) - 1
        assert target == plain[last]


def test_entries_join_in_every_fourth_step_alone(model, give_gradients):
    optimizer = ID3AdamW(model.parameters(), lr=1e-2, budget=100, total_steps=10, select_every=4)
    counts = []
    for step in range(12):
        give_gradients(step, model.parameters())
        optimizer.step()
        counts.append(optimizer.n_active)
    assert counts == [40, 40, 40, 40, 80, 80, 80, 80, 100, 100, 100, 100]
    assert optimizer.last_selection.step == 8


def test_other_steps_do_not_score(model, give_gradients):
    calls = []

    def heuristic(param, grad):
        calls.append(optimizer.steps_done)
        return grad.abs()

    optimizer = ID3AdamW(
        model.parameters(), lr=1e-2, budget=100, total_steps=9, select_every=3, heuristic=heuristic
    )
    for step in range(9):
        give_gradients(step, model.parameters())
        optimizer.step()
    assert set(calls) == {0, 3, 6}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=short)
def test_parity_with_dense_masking(model, give_gradients, schedule):
    twin = copy.deepcopy(model)
    targets = tabulate(schedule, 50, 250, 8)
    options = {"lr": 1e-2, "budget": 250, "total_steps": 50, "schedule": schedule}
    optimizer = ID3AdamW(model.parameters(), select_every=8, **options)
    oracle = DenseMasked([{"params": list(twin.parameters())}], targets, lr=1e-2)
    for step in range(60):
        give_gradients(step, model.parameters(), twin.parameters())
        optimizer.step()
        oracle.step()
    for touched, mask in zip(optimizer.touched(), oracle.masks(), strict=True):
        assert torch.equal(touched.indices.long(), mask.flatten().nonzero().flatten())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, atol=2e-6)  # the two AdamW round differently


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.05}, {"heuristic": Magnitude()}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_released_gradients_give_the_same_bits(model, dtype, options):
    twins = Twins(model, dtype, select_every=7, **options)
    for step in range(45):
        twins.step(loss_at(step))
    twins.check_same()


def test_resume_at_every_step(model, make, train):
    options = {"total_steps": 9, "select_every": 4}
    check_resume(model, make, train, torch.float32, options, 11)


def test_a_state_of_another_rhythm_is_refused(model, make, train):
    begun, first = make(model, torch.float32, select_every=4)
    train(begun, first, 0, 3)
    _, second = make(begun, torch.float32, select_every=2)
    with pytest.raises(ValueError, match="select_every: expected 2 as in the optimizer, got 4 in the saved"):
        second.load_state_dict(first.state_dict())


def test_a_state_without_the_setting_is_of_every_step(model, make, train):
    begun, first = make(model, torch.float32)
    train(begun, first, 0, 3)
    assert "select_every" not in first.settings()
    with pytest.raises(ValueError, match="select_every: expected 2 as in the optimizer, got 1 in the saved"):
        make(begun, torch.float32, select_every=2)[1].load_state_dict(first.state_dict())


def test_a_series_saves_where_a_selection_passes_a_budget(tmp_path, model, make, train):
    twin, optimizer = make(model, torch.float32, budget=100, total_steps=10, select_every=4)
    series = DeltaSeries(tmp_path, twin, optimizer, [10, 40, 50, 100])
    train(twin, optimizer, 0, 10)
    assert [path.name for path in series.paths] == [f"delta-{n}.safetensors" for n in (40, 80, 100)]


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "4"])
def test_anything_but_a_whole_number_is_refused(value):
    with pytest.raises(ValueError, match="select_every: expected an int of at least 1"):
        ID3AdamW([torch.nn.Parameter(torch.zeros(4))], budget=1, select_every=value)


@pytest.mark.parametrize(
    ("options", "warns"),
    [
        ({"select_every": 100}, True),
        ({"select_every": 3}, True),
        ({"select_every": 2}, False),
        ({"select_every": 100, "schedule": one_shot}, False),
        ({"select_every": 100, "strategy": "static"}, False),
        ({"select_every": 100, "total_steps": 1}, False),
    ],
)
def test_a_budget_that_the_first_step_selects_is_warned_of_once(model, give_gradients, options, warns):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        optimizer = ID3AdamW(model.parameters(), budget=9, **{"total_steps": 3} | options)
        optimizer.set_total_steps(optimizer.total_steps)
        for step in range(3):
            give_gradients(step, model.parameters())
            optimizer.step()
    found = [str(one.message) for one in seen if "select_every" in str(one.message)]
    assert len(found) == warns
    if warns:
        assert found[0].startswith("select_every: expected less than total_steps, 3, got ")


def test_repeat_chooses_anew_in_every_third_step_alone():
    """Between two choices the chosen entries train on; a resumed run chooses at the same steps."""
    torch.manual_seed(0)
    param, grads, copied = torch.nn.Parameter(torch.randn(60)), torch.randn(7, 60), None

    def built(p):
        options = {
            "budget": 10,
            "total_steps": 7,
            "strategy": "repeat",
            "select_every": 3,
            "weight_decay": 0.0,
        }
        return ID3AdamW([p], lr=1e-2, heuristic=D3(1.0, 0.0), **options)

    optimizer = built(param)
    for step, grad in enumerate(grads):
        if step == 5:
            copied = torch.nn.Parameter(param.detach().clone())
            resumed = built(copied)
            resumed.load_state_dict(optimizer.state_dict())
        before = param.detach().clone()
        param.grad = grad
        optimizer.step()
        best = grads[step - step % 3].abs().topk(10).indices
        assert set((param != before).nonzero()[:, 0].tolist()) == set(best.tolist())
        if copied is not None:
            copied.grad = grad
            resumed.step()
            assert torch.equal(copied, param)
