"""A model spread over several devices: its shards, here all on the CPU, choose and train as one would."""

import pytest
import torch

from id3_optim import D3, Magnitude
from id3_optim.state.active_set import ActiveSet

VARIANTS = {
    "plain": {},
    "clipped": {"max_grad_norm": 0.5},
    "static": {"strategy": "static"},
    "repeat": {"strategy": "repeat"},
    "magnitude": {"heuristic": Magnitude()},
    "root": {"heuristic": D3(1e-3, 0.5)},
    "capturable": {"capturable": True},
    "released": {"release_gradients": True},
    "released, max": {"release_gradients": True, "select_from": "max", "max_grad_norm": 0.5},
}


def spread(active, position, p):
    """As `ActiveSet.shard_for`, a shard for every other tensor, as a model split between two GPUs has."""
    while len(active.shards) < 2:
        active.new_shard(p.device, p.dtype)
    return active.shards[position % 2]


def shards(optimizer):
    return optimizer._unmasking.active.shards


def same_gradients(step, *models):
    """Quantised, so that many scores tie across the shards."""
    generator = torch.Generator().manual_seed(step)
    for row in zip(*(model.parameters() for model in models), strict=True):
        g = torch.randint(-3, 4, row[0].shape, generator=generator) / 4
        for p in row:
            p.grad = g.to(p.dtype)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_bits_as_on_one_device(model, make, monkeypatch, variant):
    for p in model.parameters():  # ties in the scores need ties in the weights
        p.data = (p.data * 16).round() / 16
    one = make(model, budget=150, total_steps=8, **VARIANTS[variant])
    two = make(model, budget=150, total_steps=8, **VARIANTS[variant])
    for step in range(10):
        same_gradients(step, one[0], two[0])
        monkeypatch.undo()
        one[1].step()
        monkeypatch.setattr(ActiveSet, "shard_for", spread)
        two[1].step()
        assert one[1].n_active == two[1].n_active
        assert torch.equal(one[1].last_selection.scores, two[1].last_selection.scores)
        for (p, indices, originals), other in zip(one[1].touched(), two[1].touched(), strict=True):
            assert torch.equal(p, other.param) and torch.equal(indices, other.indices)
            assert originals is None or torch.equal(originals, other.originals)
    assert len(shards(two[1])) == 2 and one[1].n_active == 150
    states, others = (optimizer.state_dict()["state"] for _, optimizer in (one, two))
    for i, state in states.items():
        for name, value in state.items():
            assert torch.equal(value, others[i][name]) if name != "shape" else value == others[i][name], (
                i,
                name,
            )


def test_shards_on_the_cpu_grow_as_they_fill(model, make, monkeypatch):
    monkeypatch.setattr(ActiveSet, "shard_for", spread)
    twin, optimizer = make(model, budget=1000, total_steps=20)
    for step in range(20):
        same_gradients(step, twin)
        optimizer.step()
        held = sum(shard.arrays["indices"].numel() for shard in shards(optimizer))
        assert optimizer.n_active == 50 * (step + 1) <= held <= 2 * optimizer.n_active + 100
