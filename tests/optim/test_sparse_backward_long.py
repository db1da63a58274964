"""300 steps that select in every 16th: sparse_backward beside released gradients."""

import copy

import pytest
import torch
from sparse_twins import SparseTwins
from test_resume import through_a_file
from test_sparse_backward import Net, ids_of

from id3_optim import ID3AdamW, sparse_backward

STEPS, EVERY = 300, 16
OPTIONS = {"lr": 1e-2, "budget": 0.05, "total_steps": 280, "select_every": EVERY, "max_grad_norm": 1.0}


def loss_at(step):
    def loss(net):
        ids = ids_of(step, (8, 16))
        return torch.nn.functional.cross_entropy(net(ids).flatten(0, 1), ids.flatten() % 7)

    return loss


def test_the_losses_are_those_of_released_gradients():
    twins = SparseTwins(Net(), **OPTIONS)
    curves = [twins.step(loss_at(step)) for step in range(STEPS)]
    for one, other in curves:
        assert other == pytest.approx(one, rel=1e-4)
    assert curves[-1][1] < 0.5 * curves[0][1]
    twins.check_same_entries()
    assert twins.sparse[1].n_active == twins.sparse[1].budget


def test_of_the_same_gradients_the_same_entries_join():
    """The twins' weights differ by rounding between two selections, so both select at the same weights."""
    twins = SparseTwins(Net(), **OPTIONS)
    (net, optimizer), (twin, released) = twins.sparse, twins.released
    for step in range(STEPS):
        if step % EVERY == 0:
            twin.load_state_dict(net.state_dict())
        twins.step(loss_at(step))
        if step % EVERY == 0:
            twins.check_same_entries()
            chosen, expected = optimizer.last_selection, released.last_selection
            assert chosen.step == expected.step and torch.equal(chosen.scores, expected.scores)
    assert optimizer.n_active == optimizer.budget


@pytest.mark.parametrize("stop", [37, 160, 161, 290])
def test_a_resumed_run_has_the_same_bits(stop):
    def build(net):
        optimizer = ID3AdamW(net.named_parameters(), **OPTIONS)
        return net, optimizer

    def run(net, optimizer, steps):
        for step in steps:
            loss_at(step)(net).backward()
            optimizer.step()
            if step == stop - 1:
                saved.append(copy.deepcopy((net.state_dict(), optimizer.state_dict())))

    saved = []
    straight = build(Net())
    sparse_backward(*straight)
    run(*straight, range(STEPS))
    resumed = build(Net())
    for thing, state in zip(resumed, saved[0], strict=True):
        thing.load_state_dict(through_a_file(state))
    sparse_backward(*resumed)
    run(*resumed, range(stop, STEPS))
    assert all(map(torch.equal, resumed[0].parameters(), straight[0].parameters()))
