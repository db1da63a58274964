"""sparse_backward put on, taken off and put on again; transforms, which see plain layers."""

import gc

import pytest
import torch
from torch import nn

from id3_optim import ID3AdamW, sparse_backward

OPTIONS = {"budget": 0.3, "total_steps": 10}


def _net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 5))


def _inputs(seed):
    return torch.randn(8, 12, generator=torch.Generator().manual_seed(seed))


# --- transforms ---------------------------------------------------------------------------------------------


def test_transforms_and_traces_see_a_plain_layer():
    net, plain = _net(), _net()
    optimizer = ID3AdamW(net.named_parameters(), **OPTIONS)
    sparse_backward(net, optimizer)
    x = _inputs(0)

    def gradients(model):
        params = dict(model.named_parameters())
        loss = lambda params: torch.func.functional_call(model, params, (x,)).sum()  # noqa: E731
        return torch.func.grad(loss)(params)

    mine, expected = gradients(net), gradients(plain)
    assert all(torch.equal(mine[name], expected[name]) for name in expected)
    assert torch.equal(torch.func.vmap(net)(x), torch.func.vmap(plain)(x))
    assert torch.equal(torch.jit.trace(net, (x,))(x), plain(x))


# --- attached, taken off, attached again -----------------------------------------------------------------


def test_the_same_optimizer_begins_anew_and_an_old_handle_takes_nothing_off():
    net = _net()
    optimizer = ID3AdamW(net.named_parameters(), **OPTIONS)
    old = sparse_backward(net, optimizer)
    new = sparse_backward(net, optimizer)
    old.remove()
    assert hasattr(net[0], "sparse_weight")
    new.remove()
    assert type(net[0]) is nn.Linear


def test_a_second_optimizer_after_the_first_is_gone():
    net = _net()
    optimizer = ID3AdamW(net.named_parameters(), **OPTIONS)
    sparse_backward(net, optimizer)
    del optimizer
    gc.collect()
    sparse_backward(net, ID3AdamW(net.named_parameters(), **OPTIONS))


def test_hooks_that_were_removed_are_set_again():
    net = _net()
    optimizer = ID3AdamW(net.named_parameters(), release_gradients=True, **OPTIONS)
    optimizer.remove_hooks()
    sparse_backward(net, optimizer)
    net(_inputs(0)).sum().backward()
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("select_from", ["max", "nonsense"])
def test_another_select_from_than_the_optimizers_is_refused(select_from):
    net = _net()
    optimizer = ID3AdamW(net.named_parameters(), release_gradients=True, **OPTIONS)
    with pytest.raises(ValueError, match="select_from: expected 'last' as the optimizer has it"):
        sparse_backward(net, optimizer, select_from)
