"""A model and its copy, one trained with dense gradients and one with released ones."""

import copy

import torch

from id3_optim import ID3AdamW


class Twins:
    """`dense` and `released`: (model, optimizer) pairs that start alike."""

    def __init__(self, model, dtype=torch.float32, select_from="last", groups=None, **options):
        options = {"lr": 1e-2, "budget": 0.05, "total_steps": 40} | options
        groups = groups or (lambda model: list(model.named_parameters()))

        def pair(**more):
            twin = copy.deepcopy(model).to(dtype)
            return twin, ID3AdamW(groups(twin), **options, **more)

        self.dense = pair()
        self.released = pair(release_gradients=True, select_from=select_from)

    def step(self, losses_of, backward=torch.Tensor.backward):
        """One step of both on losses_of(model), a loss or one for each micro-batch."""
        for model, optimizer in (self.dense, self.released):
            losses = losses_of(model)
            for loss in losses if isinstance(losses, list | tuple) else [losses]:
                backward(loss)
            optimizer.step()
            optimizer.zero_grad()

    def check_same(self):
        """The same entries, parameters, state and counts, bit for bit."""
        (model, dense), (twin, released) = self.dense, self.released
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p.nan_to_num(7.0), q.nan_to_num(7.0)) and torch.equal(p.isnan(), q.isnan())
        states = [optimizer.state_dict()["state"] for optimizer in (dense, released)]
        assert states[0].keys() == states[1].keys()
        for i, state in states[0].items():
            assert state.keys() == states[1][i].keys()
            for name, value in state.items():
                other = states[1][i][name]
                assert torch.equal(value, other) if name != "shape" and value.isfinite().all() else True, name
        assert same_selection(dense.last_selection, released.last_selection)
        assert dense.steps_done == released.steps_done


def same_selection(one, other):
    """Equal steps, thresholds and scores; with several dtypes their order is each path's own."""
    if one is None or other is None:
        return one is other
    scores = [selection.scores.double().sort().values for selection in (one, other)]
    return (one.step, one.threshold) == (other.step, other.threshold) and torch.equal(*scores)


def batch(step, rows=8, width=40):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(step))


def loss_at(step, rows=8):
    """A loss of the model of conftest.py on the batch of this step, with gradients of many sizes."""

    def loss(model):
        x = batch(step, rows).to(next(model.parameters()).dtype)
        return (model(x) * torch.linspace(0.1, 3, 17, dtype=x.dtype)).square().mean()

    return loss
