"""ID3AdamW against dense masking, and what it promises about the active set."""

import copy

import pytest
import torch
from dense_masked import DenseMasked
from hypothesis import given, settings
from hypothesis import strategies as st

from id3_kernels import available_backends
from id3_optim import D3, Bias, Fisher, ID3AdamW, Magnitude, Random
from id3_optim.schedules import cosine, exponential, one_shot, tabulate, uniform


def close(param, oracle, lr):
    """Spec 1.3: |Δθ| <= 1e-6·|θ| + 2e-5·lr."""
    return bool(((param - oracle).abs() <= 1e-6 * oracle.abs() + 2e-5 * lr).all())


def masks_of(optimizer):
    for param, indices, _ in optimizer.touched():
        mask = torch.zeros(param.numel(), dtype=torch.bool)
        mask[indices.long()] = True
        yield param, mask.view(param.shape)


@pytest.mark.parametrize("exp", [0, 1, 2])
@pytest.mark.parametrize("strategy", ["increment", "static"])
def test_parity_with_dense_masking_over_200_steps(model, give_gradients, exp, strategy):
    twin, lr, steps = copy.deepcopy(model), 1e-2, 200
    groups = (
        [{"params": list(m.parameters())[:3], "weight_decay": 0.1} for m in (model, twin)],
        [{"params": list(m.parameters())[3:], "lr": 3e-3} for m in (model, twin)],
    )
    budget = 250
    targets = tabulate(uniform if strategy == "increment" else one_shot, 150, budget)
    optimizer = ID3AdamW(
        [groups[0][0], groups[1][0]],
        lr=lr,
        budget=budget,
        total_steps=150,
        heuristic=D3(1.0, exp),
        strategy=strategy,
    )
    oracle = DenseMasked([groups[0][1], groups[1][1]], targets, exp=exp, lr=lr)
    for step in range(steps):
        give_gradients(step, model.parameters(), twin.parameters())
        optimizer.step()
        oracle.step()
    for (param, mask), expected, q in zip(
        masks_of(optimizer), oracle.masks(), twin.parameters(), strict=True
    ):
        assert torch.equal(mask, expected)
        assert close(param.detach(), q.detach(), lr)


def test_everything_active_is_plain_adamw(model, give_gradients):
    twin = copy.deepcopy(model)
    optimizer = ID3AdamW(model.parameters(), lr=1e-2, budget=1.0, total_steps=1)
    plain = torch.optim.AdamW(twin.parameters(), lr=1e-2, foreach=False)
    for step in range(200):
        give_gradients(step, model.parameters(), twin.parameters())
        optimizer.step()
        plain.step()
    assert optimizer.n_active == optimizer.n_entries
    assert all(
        close(p.detach(), q.detach(), 1e-2)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_backend_trains_to_the_same_bits(model, make, train, backend, dtype):
    reason = available_backends()[backend]
    if reason:
        pytest.skip(reason)
    expected_model, expected = make(model, dtype, total_steps=6, backend="reference")
    twin, optimizer = make(model, dtype, total_steps=6, backend=backend)
    train(expected_model, expected, 0, 8)
    train(twin, optimizer, 0, 8)
    for p, q in zip(twin.parameters(), expected_model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("strategy", ["increment", "static", "repeat"])
@pytest.mark.parametrize("heuristic", [D3(1.0, 2.0), Magnitude(), lambda param, grad: grad.float().abs()])
def test_entries_outside_keep_their_bits(model, make, train, dtype, strategy, heuristic):
    twin, optimizer = make(model, dtype, strategy=strategy, heuristic=heuristic, total_steps=10)
    before = [p.detach().clone() for p in twin.parameters()]
    train(twin, optimizer, 0, 12)
    changed = 0
    for (param, mask), (_, _, originals), old in zip(
        masks_of(optimizer), optimizer.touched(), before, strict=True
    ):
        assert torch.equal(param[~mask], old[~mask])
        assert torch.equal(originals, old[mask])
        changed += int((param[mask] != old[mask]).sum())
    assert changed > 100
    assert optimizer.n_active == optimizer.budget == 180


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    budget=st.integers(0, 60),
    total=st.integers(1, 25),
    past=st.integers(0, 4),
    schedule=st.sampled_from([uniform, cosine, one_shot, exponential(3.0)]),
)
def test_the_active_set_follows_the_schedule(budget, total, past, schedule):
    param = torch.nn.Parameter(torch.linspace(-1, 1, 60))
    optimizer = ID3AdamW([param], budget=budget, total_steps=total, schedule=schedule)
    targets = tabulate(schedule, total, budget)
    held = set()
    for step in range(total + past):
        param.grad = torch.randn(60, generator=torch.Generator().manual_seed(step)) + 3.0
        optimizer.step()
        now = set(next(optimizer.touched()).indices.tolist())
        assert len(now) == optimizer.n_active == targets[min(step, total - 1)]
        assert held <= now
        held = now


def test_what_could_not_be_selected_is_asked_for_again():
    param = torch.nn.Parameter(torch.ones(100))
    optimizer = ID3AdamW([param], budget=40, total_steps=10)
    for step in range(10):
        param.grad = torch.zeros(100)
        param.grad[: 2 if step < 4 else 100] = 1.0
        optimizer.step()
        # 4 a step: two are there, then nothing, then at most four times the schedule's largest increment
        assert optimizer.n_active == [2, 2, 2, 2, 18, 24, 28, 32, 36, 40][step]


def test_selection_is_global_over_dtypes_and_ties_go_to_the_lowest_position():
    params = [
        torch.nn.Parameter(torch.zeros(4, dtype=d)) for d in (torch.float32, torch.bfloat16, torch.float32)
    ]
    optimizer = ID3AdamW(params, budget=6, total_steps=1, heuristic=D3(1.0, 1.0))
    for p, g in zip(params, ([1, 2, 1, 1], [1, 2, 1, 1], [3, 1, 1, 1]), strict=True):
        p.grad = torch.tensor(g, dtype=p.dtype)
    optimizer.step()
    assert [t.indices.tolist() for t in optimizer.touched()] == [[0, 1, 2, 3], [1], [0]]
    newest = optimizer.last_selection
    assert (newest.step, newest.count, newest.threshold) == (0, 6, 1.0)
    assert newest.scores.tolist() == [1, 2, 1, 1, 2, 3]


def test_a_step_that_selects_nothing_does_not_read_the_rest(model, make, train):
    twin, optimizer = make(model, budget=10, total_steps=2)
    train(twin, optimizer, 0, 2)
    params = list(twin.parameters())
    for (p, mask), row in zip(masks_of(optimizer), params, strict=True):
        row.grad = torch.where(mask, 1.0, torch.nan).to(p.dtype)
        with torch.no_grad():
            row[~mask] = torch.nan
    optimizer.step()
    assert optimizer.n_active == 10
    assert sum(int(p.isfinite().sum()) for p in params) == 10


def test_first_update_of_a_late_entry_by_bias_correction():
    moved = {}
    for how in ("tensor", "entry"):
        param = torch.nn.Parameter(torch.ones(2))
        optimizer = ID3AdamW(
            [param], lr=1e-3, weight_decay=0.0, budget=2, total_steps=200, bias_correction=how
        )
        for step in range(200):
            param.grad = torch.tensor([1.0, 1.0 if step > 150 else 0.0])
            before = param.detach().clone()
            optimizer.step()
        moved[how] = (before - param.detach())[1].item() / 1e-3
    assert moved["entry"] == pytest.approx(1.0, rel=1e-3)
    assert moved["tensor"] > 1.2  # zero moments under an old tensor's bias correction overshoot


def test_master_weights_keep_what_bfloat16_rounds_away(model, make, train):
    twin, optimizer = make(model, torch.bfloat16, lr=1e-5, budget=1.0, total_steps=1, weight_decay=0.0)
    exact, reference = make(model, torch.float32, lr=1e-5, budget=1.0, total_steps=1, weight_decay=0.0)
    with torch.no_grad():
        for p, q in zip(exact.parameters(), twin.parameters(), strict=True):
            p.copy_(q)
    for step in range(30):
        for p, q in zip(twin.parameters(), exact.parameters(), strict=True):
            p.grad = torch.full_like(p, 0.5 + 0.25 * (step % 3))
            q.grad = p.grad.float()
        optimizer.step()
        reference.step()
    for i, q in enumerate(exact.parameters()):
        assert torch.equal(optimizer.state_dict()["state"][i]["master"], q.detach().reshape(-1))
    assert all(
        torch.equal(p, q.bfloat16()) for p, q in zip(twin.parameters(), exact.parameters(), strict=True)
    )


def test_the_parameter_wins_over_a_stale_master():
    param = torch.nn.Parameter(torch.zeros(8, dtype=torch.bfloat16))
    optimizer = ID3AdamW([param], lr=1e-3, weight_decay=0.0, budget=8, total_steps=1)
    for _ in range(2):
        param.grad = torch.ones_like(param)
        optimizer.step()
    with torch.no_grad():
        param[3] = 5.0  # an EMA, a loaded checkpoint, a delta
    param.grad = torch.ones_like(param)
    optimizer.step()
    master = optimizer.state_dict()["state"][0]["master"]
    assert master[3] == pytest.approx(5.0 - 1e-3)
    assert param[3] == 5.0 and (master[[0, 1, 2, 4]] < 0).all()


def test_fisher_and_bias_and_random_choose_what_they_say(model, make, train):
    scores = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    fisher, optimizer = make(model, strategy="static", heuristic=Fisher(scores), budget=50)
    train(fisher, optimizer, 0, 1)
    cutoff = torch.cat([s.flatten() for s in scores.values()]).sort(descending=True).values[49]
    for (_, mask), score in zip(masks_of(optimizer), scores.values(), strict=True):
        assert torch.equal(mask, score >= cutoff)
    bitfit, optimizer = make(model, strategy="static", heuristic=Bias(), budget=137)
    train(bitfit, optimizer, 0, 1)
    for (_, mask), (name, _) in zip(masks_of(optimizer), model.named_parameters(), strict=True):
        assert mask.all() if name.endswith("bias") else not mask.any()
    chosen = []
    for seed in (1, 1, 2):
        twin, optimizer = make(model, strategy="static", heuristic=Random(seed), budget=300)
        train(twin, optimizer, 0, 1)
        chosen.append([t.indices.tolist() for t in optimizer.touched()])
    assert chosen[0] == chosen[1] != chosen[2]


def test_repeat_keeps_the_moments_of_those_that_stay():
    param = torch.nn.Parameter(torch.ones(4))
    optimizer = ID3AdamW([param], budget=2, total_steps=9, strategy="repeat", heuristic=D3(1.0, 0.0))
    for g in ([3.0, 2.0, 1.0, 0.0], [3.0, 1.0, 2.0, 0.0]):
        param.grad = torch.tensor(g)
        optimizer.step()
    state = optimizer.state_dict()["state"][0]
    assert state["indices"].tolist() == [0, 2] and state["ever_indices"].tolist() == [0, 1, 2]
    assert state["exp_avg"].tolist() == pytest.approx([0.1 * 3 * 1.9, 0.2])
    assert param[3] == 1.0 and (param[:3] != 1.0).all()
