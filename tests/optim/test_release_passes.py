"""Which backward passes released gradients can come from: each kind gives the dense bits, or says no."""

import copy
import gc
import pickle

import pytest
import torch
from parameters import Tied
from twins import Twins, batch, loss_at

from id3_optim import ID3AdamW


def test_tied_weights_receive_one_gradient_in_a_pass():
    twins = Twins(Tied(), budget=0.5, total_steps=5)
    for step in range(6):
        x = torch.arange(20).roll(step)
        twins.step(lambda net, x=x: torch.nn.functional.cross_entropy(net(x), x.roll(1)))
    twins.check_same()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("whole", [True, False])
def test_compiled_models(model, whole):
    torch.compiler.reset()
    twins = Twins(model, total_steps=5)
    for step in range(6):
        for net, optimizer in (twins.dense, twins.released):
            if whole:
                compiled = torch.compile(net, backend="aot_eager")
            else:
                layers = [torch.compile(layer, backend="aot_eager") for layer in net]
                compiled = torch.nn.Sequential(*layers)
            compiled(batch(step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    twins.check_same()


def test_tensors_without_a_gradient_are_left_alone(model):
    twins = Twins(model, budget=0.5, total_steps=4, weight_decay=0.5, max_grad_norm=0.1)
    for step in range(8):
        used = [step % 3 != 0, step % 3 != 1, True]

        def loss(net, step=step, used=used):
            x = batch(step)
            for layer, trains in zip(net, used, strict=True):
                frozen = {name: p.detach() for name, p in layer.named_parameters()}
                x = torch.func.functional_call(layer, {} if trains else frozen, (x,))
            return x.square().mean()

        twins.step(loss)
    twins.check_same()
    steps = [state["step"].item() for state in twins.released[1].state_dict()["state"].values()]
    assert steps == [5, 5, 5, 5, 8, 8]


def test_a_tensor_used_by_an_earlier_micro_batch_alone(model):
    """It trains by its sum, and nothing of it is chosen."""
    net, optimizer = Twins(model, budget=100, total_steps=1).released
    loss_at(0)(net).backward()
    x = torch.nn.functional.layer_norm(batch(1) @ net[0].weight.detach().T, (60,))
    net[2](x).square().mean().backward()
    optimizer.step()
    counts = [t.indices.numel() for t in optimizer.touched()]
    assert counts[:4] == [0, 0, 0, 0] and sum(counts) == 100
    assert [s["step"].item() for s in optimizer.state_dict()["state"].values()] == [1] * 6


def test_a_graph_kept_for_a_second_pass(model):
    twins = Twins(model, strategy="static")
    twins.step(loss_at(0))

    def twice(loss):
        loss.backward(retain_graph=True)
        loss.backward()

    twins.step(loss_at(1), twice)
    twins.check_same()


def test_a_differentiable_backward_leaves_no_graph_behind(model):
    twins = Twins(model)
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # else torch warns once per process, perhaps in another test
    try:
        with pytest.warns(UserWarning, match="create_graph"):
            twins.step(loss_at(0), lambda loss: loss.backward(create_graph=True))
    finally:
        torch.set_warn_always(before)
    twins.step(loss_at(1))
    twins.check_same()


def test_zero_grad_forgets_what_hooks_took(model):
    twins = Twins(model)
    for step in range(3):
        loss_at(100 + step)(twins.released[0]).backward()
        twins.released[1].zero_grad()
        twins.step(loss_at(step))
    twins.check_same()


def test_the_models_zero_grad_is_not_seen(model):
    """What hooks took before it counts in the next step, which takes it all."""
    twins = Twins(model, strategy="static")
    twins.step(loss_at(0))
    loss_at(1)(twins.released[0]).backward()
    twins.released[0].zero_grad()
    loss_at(1)(twins.dense[0]).backward()
    twins.step(loss_at(2))
    twins.check_same()


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise OSError("out of something")


def fail(net, step):
    x = Fails.apply(net[1](net[0](batch(step))))
    with pytest.raises(OSError, match="out of something"):
        net[2](x).square().mean().backward()


def test_a_pass_that_failed_leaves_nothing_in_the_next(model):
    twins = Twins(model, total_steps=4)
    for step in range(4):
        fail(twins.released[0], 100 + step)
        if step == 2:
            with pytest.raises(RuntimeError, match="got one that failed"):
                twins.released[1].step()
        if step % 2:
            twins.released[1].zero_grad()
        twins.step(loss_at(step))
    twins.check_same()


def test_frozen_and_unfrozen(model):
    """A tensor unfrozen later keeps a whole gradient until the step that hooks it."""
    model[0].weight.requires_grad_(False)
    twins = Twins(model, groups=lambda net: list(net.parameters()), total_steps=6)
    for step in range(6):
        for net, _ in (twins.dense, twins.released):
            net[0].weight.requires_grad_(step >= 2)
            net[2].weight.requires_grad_(step != 4)
        twins.step(loss_at(step))
    twins.check_same()
    net, _ = twins.released
    loss_at(9)(net).backward()
    assert net[0].weight.grad is None


def test_gradients_assigned_by_hand(model, give_gradients):
    twins = Twins(model)
    for step in range(5):
        give_gradients(step, twins.dense[0].parameters(), twins.released[0].parameters())
        twins.dense[1].step()
        twins.released[1].step()
    twins.check_same()
    assert all(p.grad is None for p in twins.released[0].parameters())


def test_a_closure(model):
    net, optimizer = Twins(model, total_steps=30, budget=0.3).released

    def closure():
        optimizer.zero_grad()
        loss = loss_at(0)(net)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(30)]
    assert losses[-1] < losses[0]


def test_resumed_between_dense_and_released(model):
    twins = Twins(model)
    for step in range(5):
        twins.step(loss_at(step))
    states = [optimizer.state_dict() for _, optimizer in (twins.released, twins.dense)]
    for (_, optimizer), state in zip((twins.dense, twins.released), states, strict=True):
        optimizer.load_state_dict(state)
    for step in range(5, 45):
        twins.step(loss_at(step))
    twins.check_same()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("begun", [False, True])
def test_copies_hook_their_own_parameters(model, copied, begun):
    """Also in the middle of an accumulation."""
    twins = Twins(model)
    for step in range(3):
        twins.step(loss_at(step))
    if begun:
        for net, _ in (twins.dense, twins.released):
            loss_at(7)(net).backward()
    first, twins.released = twins.released, copied(twins.released)
    loss_at(50)(first[0]).backward()
    if begun:
        for _, optimizer in (twins.dense, twins.released):
            optimizer.step()
            optimizer.zero_grad()
    for step in range(3, 10):
        twins.step(loss_at(step))
    twins.check_same()


def test_hooks_go_with_their_optimizer(model):
    optimizer = ID3AdamW(model.parameters(), budget=50, total_steps=5, release_gradients=True)
    assert all(len(p._post_accumulate_grad_hooks) == 1 for p in model.parameters())
    optimizer.remove_hooks()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    loss_at(0)(model).backward()
    assert model[0].weight.grad is not None
    optimizer.step()
    assert optimizer.n_active == 10 and not any(p._post_accumulate_grad_hooks for p in model.parameters())
    optimizer = ID3AdamW(model.parameters(), budget=50, total_steps=5, release_gradients=True)
    loss_at(0)(model).backward()
    del optimizer
    gc.collect()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_group_added_between_steps_is_hooked(model):
    twins = Twins(model, groups=lambda net: list(net[0].parameters()), budget=0.3, total_steps=6)
    for step in range(8):
        if step == 3:
            for net, optimizer in (twins.dense, twins.released):
                optimizer.add_param_group({"params": list(net[2].parameters()), "lr": 5e-3})
        twins.step(loss_at(step))
        for net, _ in (twins.dense, twins.released):
            net.zero_grad()
    twins.check_same()
    loss_at(0)(twins.released[0]).backward()
    assert twins.released[0][2].weight.grad is None
