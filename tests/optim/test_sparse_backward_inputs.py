"""What a layer keeps of its input between two selections: the features that active entries use."""

import pytest
import torch
from sparse_twins import SparseTwins
from torch import nn
from transformers.pytorch_utils import Conv1D

from id3_optim import ID3AdamW, sparse_backward

OPTIONS = {"budget": 40, "total_steps": 4, "select_every": 100, "lr": 1e-2}


def _layer(kind):
    torch.manual_seed(0)
    return nn.Linear(64, 48) if kind == "linear" else Conv1D(48, 64)


def _kept(net, x):
    """Shapes of the tensors of x's dtype that a forward pass saves, without the weights."""
    held = {p.data_ptr() for p in net.parameters()}
    shapes = []

    def pack(t):
        if t.data_ptr() not in held:
            shapes.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        net(x)
    return shapes


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_features_of_active_entries_alone_are_kept(kind):
    net = _layer(kind)
    optimizer = ID3AdamW([("weight", net.weight)], **OPTIONS)
    net.bias.requires_grad_(False)
    sparse_backward(net, optimizer)
    x = torch.randn(8, 64)
    net(x).square().mean().backward()
    optimizer.step()
    (entry,) = optimizer.touched()
    used = (entry.indices % 64 if kind == "linear" else entry.indices // 48).unique().numel()
    assert 0 < used < 40
    assert _kept(net, x) == [(8, used)]


def test_an_input_that_is_held_anyway_is_kept_whole():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 48, bias=False), nn.Linear(64, 48, bias=False)

        def forward(self, x):
            return self.a(x) + self.b(x)

    net, x = Twice(), torch.randn(8, 64)
    optimizer = ID3AdamW(net.named_parameters(), **OPTIONS)
    sparse_backward(net, optimizer)
    net(x).square().mean().backward()
    optimizer.step()
    assert _kept(net, x) == [(8, 64), (8, 64)]
    view = torch.randn(9, 64)[1:]
    assert _kept(net.a, view) == [(8, 64)]


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_released_gradients(kind, dtype):
    twins = SparseTwins(
        nn.Sequential(_layer(kind), nn.Tanh(), nn.Linear(48, 3)),
        dtype,
        **OPTIONS | {"total_steps": 24, "select_every": 8},
    )
    for step in range(24):
        x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(step)).to(dtype)
        twins.step(lambda model, x=x: [model(x).square().mean(), model(x + 1).square().mean()])
    twins.check_close(1e-5 if dtype == torch.float32 else 2e-2)


def test_features_follow_the_active_set():
    net = _layer("linear")
    optimizer = ID3AdamW(
        net.named_parameters(), **OPTIONS | {"total_steps": 9, "select_every": 3, "budget": 60}
    )
    sparse_backward(net, optimizer)
    widths = []
    for step in range(9):
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step))
        if step % 3:
            widths.append(_kept(net, x)[0][1])
        net(x).square().mean().backward()
        optimizer.step()
    assert widths[0] == widths[1] < widths[2] == widths[3] < widths[4]


def test_an_active_set_that_was_loaded_after_the_forward_pass_is_refused():
    """Another set than the forward pass has kept features for, that is."""
    runs = []
    for seed in (0, 1):
        net = _layer("linear")
        optimizer = ID3AdamW(net.named_parameters(), **OPTIONS)
        sparse_backward(net, optimizer)
        torch.manual_seed(seed)
        net(torch.randn(8, 64)).square().mean().backward()
        optimizer.step()
        runs.append((net, optimizer, optimizer.state_dict()))
    (net, optimizer, own), (_, _, other) = runs
    for state in (own, other):
        optimizer.load_state_dict(own)
        loss = net(torch.randn(8, 64)).square().mean()
        optimizer.load_state_dict(state)
        if state is own:
            loss.backward()
            continue
        with pytest.raises(RuntimeError, match="more than the forward pass kept"):
            loss.backward()


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
def test_a_sparse_input_goes_through_a_plain_layer(layout):
    twins = SparseTwins(nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)), select_every=4)
    for step in range(8):
        x = torch.randn(6, 12, generator=torch.Generator().manual_seed(step)).relu().to_sparse(layout=layout)
        twins.step(lambda net, x=x: net(x).square().sum())
    twins.check_close(1e-6)


def test_an_input_by_its_name():
    for layer, name in ((nn.Linear(12, 8), "input"), (Conv1D(8, 12), "x"), (nn.Embedding(12, 8), "input")):
        optimizer = ID3AdamW(layer.named_parameters(), budget=5, total_steps=4)
        sparse_backward(layer, optimizer)
        x = torch.arange(6) if isinstance(layer, nn.Embedding) else torch.randn(6, 12)
        layer(**{name: x}).sum().backward()
        assert type(layer).__name__.startswith("Sparse") and layer.weight.grad is None
