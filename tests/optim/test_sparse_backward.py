"""sparse_backward beside released gradients: the same entries, and values that differ by rounding alone."""

import copy

import pytest
import torch
from sparse_twins import SparseTwins
from torch import nn
from transformers.pytorch_utils import Conv1D

from id3_optim import D3, ID3AdamW, Magnitude, Random, sparse_backward

RHYTHMS = [1, 4]


class Net(nn.Module):
    """An embedding, linear layers with and without bias, a transposed one and a norm; 2-d to 4-d inputs."""

    def __init__(self, padding_idx=None):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 24, padding_idx=padding_idx)
        self.up, self.norm = nn.Linear(24, 40, bias=False), nn.LayerNorm(40)
        self.mix, self.down = Conv1D(24, 40), nn.Linear(24, 7)

    def forward(self, ids):
        return self.down(self.mix(self.norm(self.up(self.embed(ids)))).tanh())


def ids_of(step, shape=(3, 8)):
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(step))


def loss_at(step, shape=(3, 8)):
    return lambda net: (net(ids_of(step, shape)).float() * torch.linspace(0.1, 2, 7)).square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_where_every_step_selects_all_bits_are_those_of_released_gradients(dtype):
    twins = SparseTwins(Net(), dtype)
    for step in range(40):
        twins.step(loss_at(step))
    twins.check_same()
    assert twins.sparse[1].n_active == twins.sparse[1].budget


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("shape", [(5,), (3, 8), (2, 3, 4), (2, 3, 2, 2)], ids=str)
def test_every_layer_and_rank_of_input(shape, backend):
    twins = SparseTwins(Net(), select_every=4, backend=backend, max_grad_norm=0.5)
    for step in range(45):
        one, other = twins.step(loss_at(step, shape))
        assert other == pytest.approx(one, rel=1e-5)
    twins.check_close(1e-5)


@pytest.mark.parametrize("options", [
    {"strategy": "static"}, {"heuristic": D3(1.0, 0.5)}, {"heuristic": Magnitude()}, {"heuristic": Random(3)},
    {"bias_correction": "entry"}, {"select_every": 1, "heuristic": Magnitude()},
], ids=str)  # fmt: skip
def test_methods(options):
    twins = SparseTwins(Net(), **{"select_every": 4} | options)
    for step in range(20):
        twins.step(loss_at(step))
    twins.check_close(1e-5)


def test_bfloat16_sums_in_float32():
    """A dense gradient is rounded to bfloat16; the active entries' own is not."""
    torch.manual_seed(0)
    layer = nn.Linear(32, 16, bias=False).bfloat16()
    optimizer = ID3AdamW(layer.named_parameters(), budget=64, total_steps=1, select_every=8)
    sparse_backward(layer, optimizer)
    x, dy = torch.randn(128, 32).bfloat16(), torch.randn(128, 16).bfloat16()
    layer(x).backward(dy)
    optimizer.step()
    layer(x).backward(dy)
    exact = (dy.double().t() @ x.double()).flatten()
    shard = optimizer._unmasking.active.shards[0]
    got = shard.arrays["gradient"][:64].double()
    errors = got - exact[next(optimizer.touched()).indices.long()]
    assert errors.abs().max() < 1e-4 * exact.abs().max()


@pytest.mark.parametrize("every", RHYTHMS)
@pytest.mark.parametrize("select_from", ["last", "max"])
def test_accumulation(every, select_from):
    twins = SparseTwins(Net(), select_every=every, select_from=select_from, max_grad_norm=0.1)
    for step in range(12):
        twins.step(lambda net, step=step: [loss_at(8 * step + i)(net) / 8 for i in range(8)])
    twins.check_close(1e-5)


@pytest.mark.parametrize("every", RHYTHMS)
def test_padding_tokens(every):
    twins = SparseTwins(Net(padding_idx=3), select_every=every, budget=0.5)
    padding = twins.sparse[0].embed.weight[3].clone()
    for step in range(8):
        twins.step(loss_at(step, (4, 30)))
    twins.check_close(1e-5)
    assert torch.equal(twins.sparse[0].embed.weight[3], padding)


@pytest.mark.parametrize("every", RHYTHMS)
def test_an_empty_batch_has_a_gradient_of_zeros(every):
    twins = SparseTwins(Net(), select_every=every)
    for step in range(6):
        shape = (0, 8) if step in (2, 4) else (3, 8)
        twins.step(lambda net, step=step, shape=shape: net(ids_of(step, shape)).square().sum())
    twins.check_close(1e-5)


@pytest.mark.parametrize("every", RHYTHMS)
def test_autocast(every):
    def loss(step):
        def under_autocast(net):
            with torch.autocast("cpu", torch.bfloat16):
                y = net(ids_of(step))
                assert y.dtype == torch.bfloat16
            return y.float().square().mean()

        return under_autocast

    twins = SparseTwins(Net(), select_every=every)
    for step in range(4 if every == 1 else 8):
        twins.step(loss(step))
    twins.check_same() if every == 1 else twins.check_close(2e-2)  # a whole gradient is rounded to bfloat16


def test_frozen_layers_and_inputs_that_need_a_gradient():
    net = Net()
    net.up.requires_grad_(False)
    twins = SparseTwins(net, select_every=4, groups=lambda m: [p for p in m.parameters() if p.requires_grad])
    for step in range(8):
        twins.step(loss_at(step))
    twins.check_close(1e-5)
    assert type(twins.sparse[0].up) is nn.Linear


def test_unfreezing_in_the_middle():
    def step_of(net, step):
        net.up.requires_grad_(step >= 5)
        return loss_at(step)(net)

    twins = SparseTwins(Net(), select_every=4)
    for step in range(12):
        twins.step(lambda net, step=step: step_of(net, step))
    twins.check_close(1e-5)


# --- tensors used more than once -------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.body, self.head = (
            nn.Embedding(50, 24),
            nn.Linear(24, 24),
            nn.Linear(24, 50, bias=False),
        )
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.body(self.embed(ids)))


@pytest.mark.parametrize("every", RHYTHMS)
def test_a_tied_weight_is_whole_in_steps_that_select_alone(every):
    twins = SparseTwins(Tied(), select_every=every)
    for step in range(9):
        twins.step(lambda net, step=step: net(ids_of(step)).square().mean())
    twins.check_close(1e-5)
    ways = {way.name: (way.way, way.reason) for way in twins.handle.ways}
    assert ways["embed.weight"] == ("sparse", "whole in steps that select: shared by embed and head")
    assert ways["body.weight"] == ("sparse", "")


def test_a_tied_weight_of_a_run_that_goes_on_between_two_selections():
    """The first backward pass after a load finds out that its step selects nothing."""
    losses = [lambda net, step=step: net(ids_of(step)).square().mean() for step in range(6)]
    twins = SparseTwins(Tied(), select_every=4)
    for loss in losses[:2]:
        twins.step(loss)
    net = copy.deepcopy(twins.sparse[0])
    optimizer = ID3AdamW(list(net.named_parameters()), lr=1e-2, budget=0.05, total_steps=40, select_every=4)
    optimizer.load_state_dict(twins.sparse[1].state_dict())
    sparse_backward(net, optimizer)
    twins.sparse = net, optimizer
    for loss in losses[2:]:
        twins.step(loss)
    twins.check_close(1e-5)


@pytest.mark.parametrize("every", RHYTHMS)
@pytest.mark.parametrize("kept", [False, True], ids=["", "earlier losses kept"])
def test_a_layer_called_twice_in_a_pass(every, kept):
    losses = []

    def twice(step):
        def loss(net):
            value = net(ids_of(step)).square().mean() + net(ids_of(step + 100)).square().mean()
            losses.append(value if kept else None)
            return value

        return loss

    twins = SparseTwins(Net(), select_every=every)
    for step in range(9):
        twins.step(twice(step))
    twins.check_close(1e-5)


def test_a_weight_used_outside_its_layer_too_is_refused():
    net = Net()
    optimizer = ID3AdamW(net.named_parameters(), budget=50, total_steps=5)
    sparse_backward(net, optimizer)
    h = net.up(net.embed(ids_of(0)))
    loss = h.square().mean() + (h @ net.up.weight).square().mean()
    with pytest.raises(RuntimeError, match=r"up\.weight received its gradient in two parts"):
        loss.backward()
