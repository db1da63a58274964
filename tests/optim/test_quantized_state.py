"""`QuantizedSparse`: copies, states of other models, layers that are called twice, mixed precision."""

import copy

import pytest
import torch
from int8_model import Int8Linear, dequantize
from torch import nn

from id3_optim import D3, ID3AdamW
from id3_optim.quantized import QuantizedSparse

STEPS = 6


class Twice(nn.Module):
    """A layer that is called twice, between two that are called once."""

    def __init__(self):
        super().__init__()
        self.first, self.shared, self.last = (nn.Linear(*size) for size in ((20, 16), (16, 16), (16, 5)))

    def forward(self, x):
        x = self.shared(torch.tanh(self.first(x)))
        return self.last(torch.tanh(self.shared(torch.tanh(x))))


def quantized(seed=0):
    torch.manual_seed(seed)
    model = Twice()
    for name, layer in list(model.named_children()):
        setattr(model, name, Int8Linear(layer))
    return model


def dequantized(model):
    twin = Twice()
    for name, layer in model.named_children():
        getattr(twin, name).load_state_dict({"weight": dequantize(layer), "bias": layer.bias.detach()})
        getattr(twin, name).bias.requires_grad_(False)
    return twin


def made(model=None, budget=0.05, **options):
    model = model or quantized()
    sparse = QuantizedSparse(model, budget, **({"total_steps": STEPS, "dequantize": dequantize} | options))
    return model, sparse, torch.optim.AdamW([sparse.values], lr=1e-2, weight_decay=0)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(7, n, generator=generator) for n in (20, 5)]


def train(model, sparse, optimizer, first=0, last=STEPS, loss=None):
    for step in range(first, last):
        x, y = batch(step)
        (loss(model, x, y) if loss else (model(x) - y).square().mean()).backward()
        sparse.join()
        optimizer.step()
        optimizer.zero_grad()
    return model, sparse, optimizer


def test_a_layer_that_is_called_twice_is_scored_by_both_calls():
    model, sparse, optimizer = made()
    twin = dequantized(model)
    named = [(n, p) for n, p in twin.named_parameters() if p.requires_grad]
    options = {"weight_decay": 0, "budget": 0.05, "total_steps": STEPS, "heuristic": D3(1.0, 2.0)}
    theirs = ID3AdamW(named, lr=1e-2, **options)
    for step in range(STEPS):
        train(model, sparse, optimizer, step, step + 1)
        x, y = batch(step)
        (twin(x) - y).square().mean().backward()
        theirs.step()
        theirs.zero_grad()
        held = sparse.state_dict()["layers"]
        for touched, (name, _) in zip(theirs.touched(), named, strict=True):
            assert held[name]["indices"].tolist() == touched.indices.tolist(), (step, name)


def test_accumulation_with_a_layer_that_is_called_twice():
    """The last pass chooses, by its own gradient."""
    one, two = made(select_every=STEPS), made(select_every=STEPS)
    x, y = batch(1)
    (one[0](x) - y).square().mean().backward()
    for scale in (0.0, 1.0):
        (two[0](x) - y).square().mean().mul(scale).backward()
    one[1].join()
    two[1].join()
    pairs = zip(one[1].state_dict()["layers"].values(), two[1].state_dict()["layers"].values(), strict=True)
    assert all(torch.equal(a["indices"], b["indices"]) for a, b in pairs) and one[1].n_active


def test_a_copy_is_a_copy():
    model, sparse, optimizer = train(*made(), last=3)
    x, _ = batch(9)
    lone, before = copy.deepcopy(model), model(x).detach()
    together = copy.deepcopy((model, sparse, optimizer))
    train(model, sparse, optimizer, 3)
    assert torch.equal(lone(x), before) and not torch.equal(model(x), before)
    lone(x).sum().backward()
    assert sparse.values.grad is None or not sparse.values.grad.any()
    train(*together, 3)
    assert torch.equal(together[1].values, sparse.values) and torch.equal(together[0](x), model(x))
    sparse.remove()
    assert torch.equal(lone(x), before) and not torch.equal(model(x), together[0](x))


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (lambda: quantized(1), {}, "state: expected the dequantised weights of the fingerprint"),
        (quantized, {"total_steps": 60}, "total_steps: expected 6, as saved, got 60"),
        (quantized, {"select_every": 2}, "select_every: expected 1, as saved, got 2"),
        (quantized, {"heuristic": D3(1.0, 1.0)}, "exp: expected 2.0, as saved, got 1.0"),
        (quantized, {"budget": 7}, "state: expected layers as those of the model"),
    ],
)
def test_a_state_of_another_model_or_run_is_refused(model, options, message):
    saved = train(*made())[1].state_dict()
    other, sparse, _ = made(model(), **options)
    x, _ = batch(9)
    before = other(x)
    with pytest.raises(ValueError, match=message):
        sparse.load_state_dict(saved)
    assert torch.equal(other(x), before) and sparse.n_active == 0


def test_entries_that_join_begin_at_the_base():
    """After a step back the optimizer's moments would move slots that are free again."""
    model, sparse, optimizer = train(*made(), last=2)
    early = copy.deepcopy(sparse.state_dict())
    train(model, sparse, optimizer, 2)
    sparse.load_state_dict(early)
    for step in range(2, STEPS):
        x, y = batch(step)
        (model(x) - y).square().mean().backward()
        held = sparse.n_active
        sparse.join()
        assert not sparse.values[held : sparse.n_active].any()
        optimizer.step()
        optimizer.zero_grad()


def test_under_autocast():
    def loss(model, x, y):
        with torch.autocast("cpu", torch.bfloat16):
            return (model(x) - y).square().mean()

    model, sparse, _ = train(*made(), loss=loss)
    straight = train(*made())[1]
    assert sparse.n_active == straight.n_active == sparse.budget
    x, y = batch(0)
    assert (loss(model, x, y) - loss(train(*made())[0], x, y)).abs() < 0.01
