"""state_dict, load_state_dict, pickle and deepcopy: a resumed run is the uninterrupted one, bit for bit."""

import copy
import io
import pickle

import pytest
import torch

from id3_optim import D3, ID3AdamW
from id3_optim.schedules import cosine


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(a, b):
    """Equal values, dtypes and bits, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def check_resume(model, make, train, dtype, options, steps=10):
    """A run that stops at any step and goes on from a file is the uninterrupted one."""
    straight, optimizer = make(model, dtype, **options)
    train(straight, optimizer, 0, steps)
    for stop in range(steps):
        begun, first = make(model, dtype, **options)
        train(begun, first, 0, stop)
        resumed, second = make(begun, dtype, **options)
        second.load_state_dict(through_a_file(first.state_dict()))
        train(resumed, second, stop, steps)
        assert same(second.state_dict(), optimizer.state_dict())
        assert all(map(torch.equal, resumed.parameters(), straight.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strategy", ["increment", "repeat"])
@pytest.mark.parametrize("bias_correction", ["tensor", "entry"])
def test_resume_at_every_step_is_bit_exact(model, make, train, dtype, strategy, bias_correction):
    options = {
        "total_steps": 8,
        "strategy": strategy,
        "bias_correction": bias_correction,
        "max_grad_norm": 1.0,
    }
    check_resume(model, make, train, dtype, options)


def test_resume_with_dense_groups_and_a_scheduler(model, give_gradients):
    def build(parent):
        twin = copy.deepcopy(parent)
        named = list(twin.named_parameters())
        groups = [{"params": named[:4]}, {"params": named[4:], "dense": True, "lr": 1e-3}]
        optimizer = ID3AdamW(groups, lr=1e-2, budget=100, total_steps=6)
        return twin, optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 8)

    def run(twin, optimizer, scheduler, begin, end):
        for step in range(begin, end):
            give_gradients(step, twin.parameters())
            optimizer.step()
            scheduler.step()

    whole = build(model)
    run(*whole, 0, 8)
    half = build(model)
    run(*half, 0, 4)
    rest = build(half[0])
    rest[1].load_state_dict(through_a_file(half[1].state_dict()))
    rest[2].load_state_dict(half[2].state_dict())
    run(*rest, 4, 8)
    assert same(rest[1].state_dict(), whole[1].state_dict())
    assert all(map(torch.equal, rest[0].parameters(), whole[0].parameters()))


def test_loading_its_own_fresh_state_changes_nothing(model, make, train):
    twin, optimizer = make(model, budget=0.02, total_steps=None)
    optimizer.load_state_dict(optimizer.state_dict())
    assert (optimizer.budget, optimizer.total_steps, optimizer.n_entries) == (0.02, None, None)
    optimizer.set_total_steps(5)
    train(twin, optimizer, 0, 5)
    assert optimizer.n_active == int(0.02 * optimizer.n_entries)


def test_total_steps_are_adopted_where_none_are_set(model, make, train):
    begun, first = make(model, total_steps=7)
    train(begun, first, 0, 3)
    _, second = make(begun, total_steps=None)
    second.load_state_dict(first.state_dict())
    assert (second.total_steps, second.steps_done, second.n_active) == (7, 3, first.n_active)


def test_state_is_a_copy_and_indices_survive_bfloat16():
    param = torch.nn.Parameter(torch.zeros(1_300_000, dtype=torch.bfloat16))
    param.grad = torch.zeros_like(param)
    param.grad[1_234_567] = 1.0
    optimizer = ID3AdamW([param], budget=1, total_steps=1)
    optimizer.step()
    state = optimizer.state_dict()
    moment = state["state"][0]["exp_avg"].clone()
    optimizer.step()
    assert torch.equal(state["state"][0]["exp_avg"], moment)
    other = ID3AdamW([param], budget=1, total_steps=1)
    other.load_state_dict(state)
    assert next(other.touched()).indices.tolist() == [1_234_567]
    assert other.state_dict()["state"][0]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("settled", [False, True])
def test_deepcopy_and_pickle_go_on_alike(model, make, train, settled):
    twin, optimizer = make(model)
    train(twin, optimizer, 0, 5)
    if settled:  # no recent run is open
        optimizer.state_dict()
    copies = [copy.deepcopy((twin, optimizer)), pickle.loads(pickle.dumps((twin, optimizer)))]
    train(twin, optimizer, 5, 9)
    for other_model, other in copies:
        train(other_model, other, 5, 9)
        assert all(map(torch.equal, other_model.parameters(), twin.parameters()))
        assert same(other.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"total_steps": 9}, "total_steps: expected 9 as in the optimizer, got 40 in the saved state"),
        ({"budget": 50}, "budget: expected 50 as in the optimizer, got 180 in the saved state"),
        (
            {"heuristic": D3(1.0, 1.0)},
            "heuristic: expected .*'exp': 1.0.* in the optimizer, got .*'exp': 2.0",
        ),
        ({"schedule": cosine}, "schedule: expected .*cosine.* in the optimizer, got .*uniform"),
        (
            {"strategy": "static"},
            "strategy: expected static as in the optimizer, got increment in the saved state",
        ),
    ],
)
def test_another_setting_is_refused_with_both_values(model, make, train, change, message):
    begun, first = make(model)
    train(begun, first, 0, 3)
    _, second = make(begun, **change)
    before = copy.deepcopy(second.state_dict())
    with pytest.raises(ValueError, match=message):
        second.load_state_dict(first.state_dict())
    assert same(second.state_dict(), before)
    if "strategy" not in change and "budget" not in change:
        second.load_state_dict(first.state_dict(), strict=False)
        assert second.n_active == first.n_active


def test_another_model_is_refused(model, make, train):
    begun, first = make(model)
    train(begun, first, 0, 2)
    narrow = torch.nn.Sequential(torch.nn.Linear(41, 60), torch.nn.LayerNorm(60), torch.nn.Linear(60, 17))
    _, second = make(narrow, budget=180)
    with pytest.raises(
        ValueError,
        match=r"state\[0\]: shape: expected \[60, 41\] as in the optimizer, "
        r"got \[60, 40\] in the saved state",
    ):
        second.load_state_dict(first.state_dict())
    _, third = make(model[0], budget=180)
    with pytest.raises(
        ValueError,
        match=r"param_groups\[0\]: expected 2 parameters as in the optimizer, got 6 parameters in the saved",
    ):
        third.load_state_dict(first.state_dict())
    renamed = ID3AdamW([("other." + n, p) for n, p in model.named_parameters()], budget=180, total_steps=40)
    with pytest.raises(
        ValueError,
        match=r"param_groups\[0\]: expected 'other.0.weight' as in the optimizer, got '0.weight' in",
    ):
        renamed.load_state_dict(first.state_dict())
    plain = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="expected a state saved by ID3AdamW"):
        second.load_state_dict(plain.state_dict())


def test_a_damaged_state_is_refused_before_anything_changes(model, make, train):
    begun, first = make(model)
    train(begun, first, 0, 4)
    for damage in ("order", "range", "length", "missing"):
        state = first.state_dict()
        row = next(s for s in state["state"].values() if s["indices"].numel() > 1)
        if damage == "order":
            row["indices"] = row["indices"].flip(0)
        elif damage == "range":
            row["indices"][-1] = 2**30
        elif damage == "length":
            row["exp_avg"] = row["exp_avg"][1:]
        else:
            del row["exp_avg_sq"]
        _, second = make(begun)
        with pytest.raises(ValueError, match=r"state\[\d\]: (indices|exp_avg|exp_avg_sq): expected"):
            second.load_state_dict(state)
        assert second.n_entries is None and second.steps_done == 0


def test_budget_and_n_stay_those_of_the_first_step(model, give_gradients):
    model[0].weight.requires_grad_(False)
    options = {"lr": 1e-2, "budget": 0.1, "total_steps": 6}
    first = ID3AdamW(model.parameters(), **options)
    give_gradients(0, model.parameters())
    first.step()
    model[0].weight.requires_grad_(True)
    give_gradients(1, model.parameters())
    first.step()
    second = ID3AdamW(model.parameters(), **options)
    second.load_state_dict(first.state_dict())
    assert (second.budget, second.n_entries) == (first.budget, first.n_entries) == (121, 1217)
    grown = ID3AdamW(model[2].parameters(), **options)
    give_gradients(0, model.parameters())
    grown.step()
    grown.add_param_group({"params": model[0].parameters()})
    again = ID3AdamW([{"params": model[2].parameters()}, {"params": model[0].parameters()}], **options)
    again.load_state_dict(grown.state_dict())
    assert (again.budget, again.n_entries) == (grown.budget, grown.n_entries) == (103, 3497)


def test_a_head_of_another_size_is_refused(model, give_gradients):
    def build(width):
        head = torch.nn.Linear(17, width)
        groups = [{"params": model.parameters()}, {"params": head.parameters(), "dense": True}]
        return head, ID3AdamW(groups, budget=10, total_steps=3)

    head, first = build(3)
    give_gradients(0, [*model.parameters(), *head.parameters()])
    first.step()
    _, second = build(5)
    with pytest.raises(ValueError, match=r"state\[6\]: exp_avg: shape: expected \[5, 17\] .*, got \[3, 17\]"):
        second.load_state_dict(first.state_dict())
    assert second.n_entries is None


def test_a_state_of_another_dtype_is_refused(model, make, train):
    begun, first = make(model, torch.bfloat16)
    train(begun, first, 0, 2)
    _, second = make(model, torch.float32)
    with pytest.raises(ValueError, match=r"originals: expected torch.float32 .*, got torch.bfloat16"):
        second.load_state_dict(first.state_dict())


def test_other_settings_without_strict(model, make, train):
    begun, first = make(model)
    train(begun, first, 0, 20)
    smaller, second = make(begun, budget=20)
    second.load_state_dict(first.state_dict(), strict=False)
    train(smaller, second, 20, 22)
    assert second.budget == 20 and second.n_active == first.n_active == 90
    other, third = make(begun, strategy="repeat")
    third.load_state_dict(first.state_dict(), strict=False)
    train(other, third, 20, 22)
    assert third.n_active == 180


def test_a_budget_beyond_the_saved_n_is_refused_before_anything_changes(model, make, train):
    begun, first = make(model[0], budget=20)
    train(begun, first, 0, 2)
    twin, second = make(begun, budget=5000)
    before = copy.deepcopy(second.state_dict())
    with pytest.raises(ValueError, match="budget: expected 0 to 2460 entries"):
        second.load_state_dict(first.state_dict(), strict=False)
    assert same(second.state_dict(), before) and second.steps_done == 0
    assert all(map(torch.equal, twin.parameters(), begun.parameters()))


def test_loading_into_a_begun_optimizer_follows_its_parameters(model, make, train):
    twin, optimizer = make(model, torch.float64)
    train(twin, optimizer, 0, 3)
    state = optimizer.state_dict()
    later, other = make(model)
    train(later, other, 0, 2)
    later.double()
    other.load_state_dict(state)
    later.load_state_dict(twin.state_dict())
    train(twin, optimizer, 3, 6)
    train(later, other, 3, 6)
    assert all(map(torch.equal, twin.parameters(), later.parameters()))
