"""sparse_backward in graphs and models that are used in other ways than one backward pass per step."""

import copy

import pytest
import torch
from sparse_twins import SparseTwins
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from id3_optim import ID3AdamW, sparse_backward

EVERY = [1, 4]
# Magnitudes of gradients show with a large eps.
OPTIONS = {"budget": 0.3, "total_steps": 10, "eps": 1e-2}


def _net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 5))


def _inputs(seed):
    return torch.randn(8, 12, generator=torch.Generator().manual_seed(seed))


def _twins(model, every, **options):
    return SparseTwins(model, select_every=every, **OPTIONS | options)


def _run(twins, losses_of, steps=8):
    """losses_of(model, step) may call backward itself; what it returns is passed backward."""
    for step in range(steps):
        twins.step(lambda model, step=step: losses_of(model, step))
    twins.check_close(1e-6)


# --- passes that are not for the weights ------------------------------------------------------------------


@pytest.mark.parametrize("every", EVERY)
def test_a_pass_for_the_input_alone_counts_for_nothing(every):
    def losses(model, step):
        x = _inputs(step).requires_grad_()
        (toward,) = torch.autograd.grad(model(x).mean(), x)
        model(x).sum().backward(inputs=[x])
        return model(x.detach() + 0.1 * toward.sign()).square().mean()

    _run(_twins(_net(), every), losses)


def test_a_step_after_such_a_pass_changes_nothing():
    net = _net()
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = ID3AdamW(net.named_parameters(), **OPTIONS)
    sparse_backward(net, optimizer)
    x = _inputs(0).requires_grad_()
    torch.autograd.grad(net(x).mean(), x)
    optimizer.step()
    assert optimizer.n_active == 0 and all(map(torch.equal, net.parameters(), before))


def test_a_gradient_that_is_asked_for_is_whole():
    net, plain = _net(), _net()
    optimizer = ID3AdamW(net.named_parameters(), **OPTIONS)
    sparse_backward(net, optimizer)
    mine, expected = (
        torch.autograd.grad(m(_inputs(0)).mean(), [m[0].weight, m[2].weight]) for m in (net, plain)
    )
    assert all(map(torch.equal, mine, expected))


@pytest.mark.parametrize("use", ["autograd.grad", "a hook", "a gradient"])
def test_a_whole_gradient_between_selections_is_refused_and_training_goes_on(use):
    """Where the forward pass kept a part of the input; nothing is left of the pass that failed."""
    twins = _twins(_net(), 4, budget=0.02)
    loss_at = lambda model, step: model(_inputs(step)).square().mean()  # noqa: E731
    for step in range(3):
        twins.step(lambda model, step=step: loss_at(model, step))
        if step == 0:
            model, optimizer = twins.sparse
            weight, loss = model[0].weight, loss_at(model, 100)
            hook = weight.register_hook(lambda grad: grad) if use == "a hook" else None
            weight.grad = torch.ones_like(weight) if use == "a gradient" else None
            with pytest.raises(RuntimeError, match=REQUESTED):
                torch.autograd.grad(loss, weight) if use == "autograd.grad" else loss.backward()
            if hook is not None:
                hook.remove()
            optimizer.zero_grad()
    twins.check_close(1e-6)


REQUESTED = (
    r"^sparse_backward: expected no use of the whole gradient of 0\.weight \(autograd\.grad, a hook, a "
    r"gradient that is there already\) in a step without selection, got one: compute it in a step that "
    r"selects, or after remove\(\)$"
)


def test_a_whole_gradient_between_selections_is_there_where_the_input_was_kept():
    """Of an embedding, and of a layer whose input is a view, which nothing is saved by copying."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(9, 12), nn.Unflatten(1, (2, 6)), nn.Linear(6, 5))
    plain = copy.deepcopy(net)
    optimizer = ID3AdamW(net.named_parameters(), select_every=4, **OPTIONS | {"budget": 20, "lr": 0.0})
    sparse_backward(net, optimizer)
    ids = torch.tensor([1, 3, 1, 8])
    net(ids).square().mean().backward()
    optimizer.step()
    assert optimizer.n_active
    mine, expected = (
        torch.autograd.grad(m(ids).square().mean(), [m[0].weight, m[2].weight]) for m in (net, plain)
    )
    assert all(map(torch.equal, mine, expected))


# --- graphs that are kept ---------------------------------------------------------------------------------


@pytest.mark.parametrize("every", EVERY)
def test_a_graph_that_is_kept_for_a_pass_over_two_losses(every):
    def losses(model, step):  # virtual adversarial training
        x = _inputs(step).requires_grad_()
        loss = model(x).square().mean()
        (toward,) = torch.autograd.grad(loss, x, retain_graph=True)
        return loss + model((x + 0.1 * toward.sign()).detach()).square().mean()

    _run(_twins(_net(), every), losses)


@pytest.mark.parametrize("every", EVERY)
def test_a_pass_that_goes_through_an_earlier_graph_again(every):
    def losses(model, step):
        first = model(_inputs(step)).square().mean()
        first.backward(retain_graph=True)
        return first + model(_inputs(step + 100)).square().mean()

    _run(_twins(_net(), every), losses)


@pytest.mark.parametrize("every", EVERY)
def test_truncated_backpropagation_through_time(every):
    torch.manual_seed(0)
    model = nn.ModuleDict({"cell": nn.Linear(12, 12), "out": nn.Linear(12, 5)})

    def losses(model, step):
        h = _inputs(step)
        for _ in range(3):
            h = torch.tanh(model["cell"](h))
            model["out"](h).square().mean().backward(retain_graph=True)
        return model["out"](h).mean()

    _run(_twins(model, every), losses)


# --- checkpoints --------------------------------------------------------------------------------------------


class _Shared(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.first, self.again = nn.Linear(12, 12, bias=False), nn.Linear(12, 12, bias=False)
        if tied:
            self.first.weight = self.again.weight

    def forward(self, x):
        x = self.first(x)
        for _ in range(3):
            x = checkpoint(lambda x: torch.tanh(self.again(x)), x, use_reentrant=True)
        return x


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_weight_used_twice_under_reentrant_checkpoints_is_refused(tied, sparse):
    """Though no layer outside the checkpoints shows that their passes belong together."""
    net = _Shared(tied)
    optimizer = ID3AdamW(net.named_parameters(), release_gradients=True, **OPTIONS)
    if sparse:
        sparse_backward(net, optimizer)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        net(_inputs(0).requires_grad_()).square().mean().backward()


class _Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x):
        return self.c(checkpoint(lambda x: torch.tanh(self.b(x)).tanh(), self.a(x), use_reentrant=False))


def test_checkpoints_in_a_run_that_goes_on_between_two_selections():
    options = OPTIONS | {"budget": 3, "total_steps": 40, "select_every": 4}

    def trained(net, optimizer, steps):
        sparse_backward(net, optimizer)
        for step in steps:
            net(_inputs(step)).square().mean().backward()
            optimizer.step()
        return net, optimizer

    straight = trained(net := _Checkpointed(), ID3AdamW(net.named_parameters(), **options), range(6))
    first = trained(net := _Checkpointed(), ID3AdamW(net.named_parameters(), **options), range(2))
    net = _Checkpointed()
    net.load_state_dict(first[0].state_dict())
    optimizer = ID3AdamW(net.named_parameters(), **options)
    optimizer.load_state_dict(first[1].state_dict())
    resumed = trained(net, optimizer, range(2, 6))
    assert all(map(torch.equal, resumed[0].parameters(), straight[0].parameters()))


def test_checkpoints_where_the_first_step_selects_nothing():
    _run(_twins(_Checkpointed(), 1, budget=3, total_steps=40), lambda m, step: m(_inputs(step)).mean())


# --- outputs, gradients and weights that others touch -------------------------------------------------------


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize("every", EVERY)
def test_a_loss_that_does_not_depend_on_the_output_gives_no_gradient(every):
    def losses(model, step):
        hidden = model[0](_inputs(step))
        return model[2](_Blocked.apply(hidden) if step % 2 else hidden).square().mean()

    _run(_twins(_net(), every, lr=1e-1, weight_decay=0.1), losses)


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("shape", [(8, 12), (2, 4, 12)])
def test_operations_in_place_on_the_output(every, kind, shape):
    torch.manual_seed(0)
    first = nn.Linear(12, 16) if kind is nn.Linear else Conv1D(16, 12)
    net = nn.Sequential(first, nn.ReLU(inplace=True), nn.Linear(16, 5))
    _run(_twins(net, every), lambda model, step: model(_inputs(step).reshape(shape)).square().mean())


@pytest.mark.parametrize("every", EVERY)
def test_a_hook_on_the_weight_sees_and_changes_the_whole_gradient(every):
    twins, shapes = _twins(_net(), every), []
    for model, _ in (twins.released, twins.sparse):
        model[0].weight.register_hook(lambda grad: shapes.append(grad.shape) or grad * 100)
    _run(twins, lambda model, step: model(_inputs(step)).square().mean())
    assert len(shapes) == 16 and set(shapes) == {(16, 12)}


@pytest.mark.parametrize("every", EVERY)
def test_a_gradient_that_is_there_already_is_added_to(every):
    def losses(model, step):
        model[0].weight.grad = torch.ones_like(model[0].weight)
        return model(_inputs(step)).square().mean()

    _run(_twins(_net(), every), losses)


@pytest.mark.parametrize("every", EVERY)
def test_an_embedding_that_scales_by_frequency(every):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(20, 8, scale_grad_by_freq=True), nn.Linear(8, 3))
    twins = _twins(net, every)
    assert twins.handle.ways[0].way == "released"
    _run(twins, lambda model, step: model(torch.tensor([[1, 1, 1, 2], [3, 1, 4, step]])).square().mean())


def test_layers_without_entries():
    net = nn.Sequential(nn.Linear(12, 0), nn.Linear(0, 4))
    _run(_twins(net, 1), lambda model, step: model(_inputs(step)).square().mean(), steps=2)
