"""Sparse entries beside quantised weights: the algorithm against a dense one on the dequantised weights."""

import copy

import pytest
import torch
from int8_model import Int8Linear, dequantize
from torch import nn

from id3_optim import ID3AdamW, Magnitude
from id3_optim.quantized import QuantizedSparse

STEPS = 6


def pair():
    """A model of quantised layers, and its twin with the dequantised weights."""
    torch.manual_seed(0)
    linears = [nn.Linear(20, 30), nn.Linear(30, 12), nn.Linear(12, 5)]
    quantized = nn.Sequential(
        Int8Linear(linears[0]), nn.Tanh(), Int8Linear(linears[1]), Int8Linear(linears[2])
    )
    for linear, at in zip(linears, (0, 2, 3), strict=True):
        linear.weight.data = dequantize(quantized[at])
        linear.bias.requires_grad_(False)
    return quantized, nn.Sequential(linears[0], nn.Tanh(), *linears[1:])


def batches():
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(7, n, generator=generator) for n in (20, 5)] for _ in range(STEPS)]


def run(model, sparse, optimizer, rows):
    """The losses of a training loop."""
    losses = []
    for x, y in rows:
        losses.append((model(x) - y).square().mean())
        losses[-1].backward()
        sparse.join()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def test_training_is_id3_on_the_dequantised_weights():
    model, twin = pair()
    sparse = QuantizedSparse(model, 0.05, STEPS, dequantize=dequantize)
    ours = torch.optim.AdamW([sparse.values], lr=1e-2, weight_decay=0)
    named = [(n, p) for n, p in twin.named_parameters() if p.requires_grad]
    theirs = ID3AdamW(named, lr=1e-2, weight_decay=0, budget=0.05, total_steps=STEPS)
    for x, y in batches():
        for net in (model, twin):
            (net(x) - y).square().mean().backward()
        sparse.join()
        ours.step()
        ours.zero_grad()
        theirs.step()
        theirs.zero_grad()
        assert sparse.n_active == theirs.n_active
    changes = sparse.delta().changes
    for touched, (name, param) in zip(theirs.touched(), named, strict=True):
        assert touched.indices.tolist() == (changes[name].indices.tolist() if name in changes else [])
        if name in changes:
            held = param.detach().reshape(-1)[touched.indices.long()]
            # the products and what AdamW adds to are rounded at other places
            torch.testing.assert_close(changes[name].values, held, rtol=1e-4, atol=1e-5)


def test_the_delta_makes_the_trained_model_out_of_the_dequantised_one():
    model, twin = pair()
    sparse = QuantizedSparse(model, 40, STEPS, dequantize=dequantize)
    optimizer = torch.optim.AdamW([sparse.values], lr=1e-2, weight_decay=0)
    before = copy.deepcopy(twin)
    losses = run(model, sparse, optimizer, batches() * 3)
    assert sparse.n_active == 40 and losses[-1] < losses[0]
    x = batches()[0][0]
    with sparse.delta().applied(twin):
        torch.testing.assert_close(twin(x), model(x), rtol=1e-5, atol=1e-5)
    assert all(map(torch.equal, twin.parameters(), before.parameters()))
    sparse.remove()
    torch.testing.assert_close(model(x), twin(x), rtol=1e-6, atol=1e-6)


def test_the_additive_form_continues_on_the_quantised_base():
    def start():
        model, _ = pair()
        sparse = QuantizedSparse(model, 40, STEPS, dequantize=dequantize)
        return model, sparse, torch.optim.AdamW([sparse.values], lr=1e-2, weight_decay=0)

    whole, half, resumed = start(), start(), start()
    run(*whole, batches())
    run(*half, batches()[:3])
    resumed[1].load_state_dict(half[1].state_dict())
    resumed[2].load_state_dict(half[2].state_dict())
    run(*resumed, batches()[3:])
    assert torch.equal(whole[1].values, resumed[1].values)
    other, _ = pair()
    with pytest.raises(ValueError, match="state: expected layers as those of the model"):
        QuantizedSparse(other, 7, STEPS, dequantize=dequantize).load_state_dict(half[1].state_dict())


def test_a_model_that_is_not_quantised_is_refused():
    with pytest.raises(ValueError, match="model: expected quantised linear layers"):
        QuantizedSparse(nn.Linear(3, 3), 2, 2)


def test_another_heuristic_is_refused():
    with pytest.raises(ValueError, match="heuristic: expected D3, got Magnitude"):
        QuantizedSparse(pair()[0], 2, 2, heuristic=Magnitude(), dequantize=dequantize)


def test_entries_join_in_each_third_step_alone():
    model, _ = pair()
    sparse = QuantizedSparse(model, 30, STEPS, select_every=3, dequantize=dequantize)
    optimizer = torch.optim.AdamW([sparse.values], lr=1e-2, weight_decay=0)
    counts = []
    for row in batches():
        run(model, sparse, optimizer, [row])
        counts.append(sparse.n_active)
    assert counts == [15, 15, 15, 30, 30, 30]


def bitsandbytes(bits):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is no extra of this package")
    if bits == 4:
        return lambda i, o: bnb.nn.Linear4bit(i, o, quant_type="nf4", compute_dtype=torch.float32)
    return lambda i, o: bnb.nn.Linear8bitLt(i, o, has_fp16_weights=False)


@pytest.mark.parametrize("kind", ["bitsandbytes 4", "bitsandbytes 8", "torchao int8"])
def test_the_packages_themselves(kind):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64))
    model = copy.deepcopy(dense)
    if kind == "torchao int8":
        quantization = pytest.importorskip(
            "torchao.quantization", reason="torchao is no extra of this package"
        )
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    else:
        build = bitsandbytes(int(kind[-1]))
        for at in (0, 2):
            layer = build(dense[at].in_features, dense[at].out_features)
            layer.load_state_dict(dense[at].state_dict())
            model[at] = layer.to("cpu")
    for p in model.parameters():
        p.requires_grad_(False)
    x, y = torch.randn(16, 64), torch.randn(16, 64)
    plain = model(x)
    sparse = QuantizedSparse(model, 0.02, STEPS)
    torch.testing.assert_close(model(x), plain)
    optimizer = torch.optim.AdamW([sparse.values], lr=1e-2, weight_decay=0)
    losses = run(model, sparse, optimizer, [(x, y)] * 3 * STEPS)
    assert sparse.n_active == sparse.budget and losses[-1] < 0.98 * losses[0]
    delta = sparse.delta()
    base = copy.deepcopy(dense)
    for at in (0, 2):
        base[at].weight.data = sparse._dequantize(model[at]).float().reshape(dense[at].weight.shape)
    with delta.applied(base, cast=True):
        torch.testing.assert_close(base(x), model(x), rtol=2e-2, atol=2e-2)  # the 8-bit layers round x, too


def test_selection_in_no_step_is_refused():
    with pytest.raises(ValueError, match="select_every: expected an int of at least 1, got 0"):
        QuantizedSparse(pair()[0], 0.1, STEPS, select_every=0, dequantize=dequantize)
