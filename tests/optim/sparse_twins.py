"""A model trained with released gradients beside its copy trained with sparse_backward."""

import copy

import torch

from id3_optim import ID3AdamW, sparse_backward


class SparseTwins:
    """`released` and `sparse`: (model, optimizer) pairs that start alike."""

    def __init__(self, model, dtype=torch.float32, select_from="last", groups=None, **options):
        options = {"lr": 1e-2, "budget": 0.05, "total_steps": 40} | options
        groups = groups or (lambda model: list(model.named_parameters()))
        twins = [copy.deepcopy(model).to(dtype) for _ in range(2)]
        optimizers = [ID3AdamW(groups(twin), **options) for twin in twins]
        optimizers[0].release_gradients(select_from)
        self.handle = sparse_backward(twins[1], optimizers[1], select_from)
        self.released, self.sparse = zip(twins, optimizers, strict=True)

    def step(self, losses_of, backward=torch.Tensor.backward):
        """One step of both on losses_of(model), a loss or one for each micro-batch; returns both losses."""
        seen = []
        for model, optimizer in (self.released, self.sparse):
            losses = losses_of(model)
            losses = losses if isinstance(losses, list | tuple) else [losses]
            for loss in losses:
                backward(loss)
            seen.append(sum(loss.item() for loss in losses))
            optimizer.step()
            optimizer.zero_grad()
            assert all(p.grad is None for p in model.parameters())
        return seen

    def check_same_entries(self):
        for one, other in zip(self.released[1].touched(), self.sparse[1].touched(), strict=True):
            assert torch.equal(one.indices, other.indices)

    def check_close(self, tolerance):
        """The same entries, and parameters alike to rounding: sums over tokens have another order."""
        self.check_same_entries()
        for p, q in zip(self.released[0].parameters(), self.sparse[0].parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)

    def check_same(self):
        """The same bits of parameters and state."""
        self.check_same_entries()
        for p, q in zip(self.released[0].parameters(), self.sparse[0].parameters(), strict=True):
            assert torch.equal(p, q)
        states = [optimizer.state_dict()["state"] for _, optimizer in (self.released, self.sparse)]
        for i, state in states[0].items():
            for name, value in state.items():
                other = states[1][i][name]
                assert torch.equal(value, other) if name != "shape" else value == other, (i, name)
