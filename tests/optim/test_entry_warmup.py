"""entry_warmup=W: a learning rate of each entry's own, which rises over its first W updates."""

import copy
import itertools

import pytest
import torch
from test_resume import check_resume, same
from twins import Twins, loss_at

from id3_optim import ID3AdamW, load_delta, save_delta

BETAS, EPS, LR, DECAY = (0.9, 0.999), 1e-8, 1e-2, 0.1


class Oracle:
    """AdamW in float64 with a learning rate for each entry; entries join when the optimizer says so."""

    def __init__(self, params, steps, by_entry):
        self.theta = [p.detach().double().clone() for p in params]
        self.m, self.v, self.age = ([torch.zeros_like(t) for t in self.theta] for _ in range(3))
        self.count, self.steps, self.by_entry = [0] * len(self.theta), steps, by_entry

    def step(self, grads, masks):
        for j, (grad, mask) in enumerate(zip(grads, masks, strict=True)):
            if grad is None:
                continue
            self.count[j] += 1
            self.age[j] += mask
            g, age = grad.double(), self.age[j].clamp(min=1)
            lr = LR * (age / self.steps).clamp(max=1)
            m = BETAS[0] * self.m[j] + (1 - BETAS[0]) * g
            v = BETAS[1] * self.v[j] + (1 - BETAS[1]) * g * g
            n = age if self.by_entry else torch.tensor(float(self.count[j]), dtype=torch.float64)
            step = (m / (1 - BETAS[0] ** n)) / ((v / (1 - BETAS[1] ** n)).sqrt() + EPS)
            theta = self.theta[j] * (1 - lr * DECAY) - lr * step
            for old, new in ((self.theta, theta), (self.m, m), (self.v, v)):
                old[j] = torch.where(mask, new, old[j])


def masks_of(optimizer):
    for touched in optimizer.touched():
        mask = torch.zeros(touched.param.numel(), dtype=torch.bool)
        mask[touched.indices.long()] = True
        yield mask.view(touched.param.shape)


@pytest.mark.parametrize("bias_correction", ["tensor", "entry"])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_each_entry_has_the_learning_rate_of_its_age(model, give_gradients, bias_correction, backend):
    params = list(model.parameters())
    oracle = Oracle(params, 5, bias_correction == "entry")
    optimizer = ID3AdamW(
        params, lr=LR, weight_decay=DECAY, budget=200, total_steps=20, entry_warmup=5, backend=backend,
        bias_correction=bias_correction,
    )  # fmt: skip
    for step in range(24):
        give_gradients(step, params)
        if step % 3 == 1:
            params[2].grad = None  # its entries do not age
        grads = [None if p.grad is None else p.grad.clone() for p in params]
        optimizer.step()
        oracle.step(grads, list(masks_of(optimizer)))
    for p, theta in zip(params, oracle.theta, strict=True):
        # Float32 beside float64, and after each step one rounding more.
        assert torch.allclose(p.double(), theta, rtol=0, atol=24 * 2**-23)


def test_the_first_updates_are_small_and_later_ones_are_adamws():
    """With a constant gradient AdamW moves an entry by lr at each step of its own count."""
    param = torch.nn.Parameter(torch.zeros(1))
    options = {"lr": 0.5, "weight_decay": 0.0, "bias_correction": "entry"}
    optimizer = ID3AdamW([param], budget=1, total_steps=1, entry_warmup=4, **options)
    positions = [0.0]
    for _ in range(6):
        param.grad = torch.ones(1)
        optimizer.step()
        positions.append(param.item())
    moved = [a - b for a, b in itertools.pairwise(positions)]
    assert moved == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5, 0.5], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_old_entries_have_the_bits_of_a_run_without_warm_up(model, make, train, dtype):
    plain, first = make(model, dtype, strategy="static", bias_correction="entry")
    train(plain, first, 0, 6)
    warm, second = make(plain, dtype, strategy="static", bias_correction="entry", entry_warmup=4)
    second.load_state_dict(first.state_dict(), strict=False)
    train(plain, first, 6, 9)
    train(warm, second, 6, 9)
    assert all(map(torch.equal, warm.parameters(), plain.parameters()))
    assert same(first.state_dict()["state"], second.state_dict()["state"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{"entry_warmup": 3}, {"entry_warmup": 3, "bias_correction": "entry"}])
def test_resume_at_every_step_is_bit_exact(model, make, train, dtype, options):
    options = options | {"total_steps": 8, "max_grad_norm": 1.0}
    check_resume(model, make, train, dtype, options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_released_gradients_give_the_same_bits(model, dtype):
    twins = Twins(model, dtype, entry_warmup=6, max_grad_norm=0.05)
    for step in range(30):
        twins.step(loss_at(step))
    twins.check_same()


def test_the_master_takes_part(model, make, train):
    """bfloat16 weights are the rounded float32 run's for the same first gradients."""
    low, optimizer = make(model, torch.bfloat16, entry_warmup=5)
    train(low, optimizer, 0, 3)
    for state, p in zip(optimizer.state_dict()["state"].values(), low.parameters(), strict=True):
        held = p.detach().flatten()[state["indices"].long()]
        assert torch.equal(state["master"].bfloat16(), held)


def test_a_weight_set_by_hand_is_the_weight_that_is_updated():
    params = [torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16)) for _ in range(2)]
    for p, begin in zip(params, (1.0, 2.0), strict=True):
        optimizer = ID3AdamW([p], lr=1e-2, budget=4, total_steps=1, entry_warmup=8)
        with torch.no_grad():
            p.fill_(begin)
        for step in range(2):
            if step == 1:
                with torch.no_grad():
                    p.fill_(2.0)
            p.grad = torch.ones_like(p)
            optimizer.step()
    assert torch.equal(*params)


def test_the_delta_of_a_run_is_exact(tmp_path, model, make, train):
    twin, optimizer = make(model, torch.float32, entry_warmup=7)
    train(twin, optimizer, 0, 20)
    save_delta(tmp_path / "delta", twin, optimizer, originals=True)
    base = copy.deepcopy(model)
    undo = load_delta(tmp_path / "delta").apply(base)
    assert all(map(torch.equal, base.parameters(), twin.parameters()))
    undo.revert()
    assert all(map(torch.equal, base.parameters(), model.parameters()))


def test_settings_name_it_only_where_it_is_used(model, make, train):
    assert "entry_warmup" not in make(model)[1].settings()
    twin, optimizer = make(model, entry_warmup=3)
    assert optimizer.settings()["entry_warmup"] == 3
    train(twin, optimizer, 0, 1)
    message = "entry_warmup: expected 0 as in the optimizer, got 3 in the saved state"
    with pytest.raises(ValueError, match=message):
        make(model)[1].load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("value", [-1, 1.0, True, "3"])
def test_anything_but_a_whole_number_is_refused(value):
    with pytest.raises(ValueError, match="entry_warmup: expected an int of at least 0"):
        ID3AdamW([torch.nn.Parameter(torch.zeros(4))], budget=1, entry_warmup=value)
