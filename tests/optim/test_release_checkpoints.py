"""Released gradients under gradient checkpoints, reentrant or not: the dense bits, or an error."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from twins import Twins, loss_at

from id3_optim import ID3AdamW


class OwnCheckpoint(torch.autograd.Function):
    """What some training libraries write themselves: forward again, and a backward pass, in backward."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.save_for_backward(x)
        ctx.layer = layer
        return layer(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.layer(x)
        torch.autograd.backward(y, grad)
        return x.grad, None


def run_layer(layer, x, how):
    if how == "plain":
        return layer(x)
    return (
        OwnCheckpoint.apply(x, layer)
        if how == "own"
        else checkpoint(layer, x, use_reentrant=how == "reentrant")
    )


class Blocks(torch.nn.Module):
    """Blocks under checkpoints; `outside` says which layers with parameters are not."""

    def __init__(self, outside: str):
        super().__init__()
        self.outside, self.how = outside, "plain"
        self.first, self.last = torch.nn.Linear(40, 30), torch.nn.Linear(30, 17)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(30, 30) for _ in range(3))

    def forward(self, x):
        x = run_layer(
            self.first, x.clone().requires_grad_(), "plain" if "first" in self.outside else self.how
        )
        for block in self.blocks:
            x = run_layer(block, x, self.how).tanh()
        return run_layer(self.last, x, "plain" if "last" in self.outside else self.how)


@pytest.mark.parametrize("outside", ["first and last", "first", "last", "nothing"])
@pytest.mark.parametrize("how", ["not reentrant", "reentrant", "own"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_gradient_checkpoints(outside, how, micro_batches):
    """Reentrant ones run passes within the pass. The dense twin sees the last micro-batch alone."""
    twins = Twins(Blocks(outside), budget=300, total_steps=3)
    twins.released[0].how = how
    for step in range(3):
        for i in range(micro_batches):
            loss_at(10 * step + i)(twins.released[0]).backward()
        twins.released[1].step()
        last = 10 * step + micro_batches - 1
        if step == 0 or micro_batches == 1:  # later steps differ: active entries have the sum of gradients
            loss_at(last)(twins.dense[0]).backward()
            twins.dense[1].step()
            twins.dense[1].zero_grad()
            twins.check_same()


def test_a_tied_weight_under_reentrant_checkpoints_is_refused():
    net = Blocks("first and last")
    net.how, net.blocks[2].weight = "reentrant", net.blocks[0].weight
    optimizer = ID3AdamW(net.named_parameters(), budget=50, total_steps=5, release_gradients=True)
    with pytest.raises(RuntimeError, match=r"blocks\.0\.weight received its gradient in two parts"):
        loss_at(0)(net).backward()
    net.how = "not reentrant"
    optimizer.zero_grad()
    loss_at(0)(net).backward()
    optimizer.step()
    assert optimizer.n_active == 10
