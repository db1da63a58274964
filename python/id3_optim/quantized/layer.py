"""A quantised linear layer with sparse entries: its forward and backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from id3_kernels import Entries


class Candidates(NamedTuple):
    """The best entries of one layer in a backward pass, with their scores, gradients and weights."""

    layer: int
    indices: Tensor
    scores: Tensor
    gradients: Tensor
    weights: Tensor


class Layer:
    """A quantised linear layer, and which entries of its weight have which slots of the values.

    uses: how many calls of the layer wait for their backward pass. whole: the sum of their gradients, kept
    where a pass has more than one.
    """

    def __init__(self, number: int, name: str, module: nn.Module, weight: Tensor) -> None:
        self.number, self.name, self.module = number, name, module
        self.shape, self.dtype = tuple(weight.shape), weight.dtype
        self.indices = torch.empty(0, dtype=torch.int32, device=weight.device)
        self.slots = torch.empty(0, dtype=torch.int64, device=weight.device)
        self.originals = weight.new_empty(0)
        self.uses, self.whole = 0, None

    @property
    def entries(self) -> Entries:
        n = self.indices.numel()
        return Entries(torch.tensor([0, n], device=self.indices.device), self.indices)

    def sparse(self, values: Tensor) -> Tensor:
        """The sparse part of the weight, in CSR."""
        rows, columns = self.indices.long() // self.shape[1], self.indices.long() % self.shape[1]
        counts = torch.bincount(rows, minlength=self.shape[0])
        begins = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return torch.sparse_csr_tensor(
            begins, columns, values[self.slots], self.shape, check_invariants=False
        )

    def join(self, new: Candidates, first_slot: int) -> None:
        slots = torch.arange(first_slot, first_slot + new.indices.numel(), device=self.slots.device)
        self.indices, order = torch.cat([self.indices, new.indices]).sort()
        self.slots = torch.cat([self.slots, slots])[order]
        self.originals = torch.cat([self.originals, new.weights.to(self.dtype)])[order]

    def summed(self, whole: Tensor) -> Tensor:
        """The gradient of the weight in this pass, from that of one call."""
        if self.whole is not None:
            whole = self.whole.add_(whole)
        elif self.uses > 1:
            self.whole = whole
        return whole


class Hook:
    """A layer's forward hook. An object, so that a copy of the model has a copy of its entries, too."""

    def __init__(self, layer: Layer, values: nn.Parameter, backward: Callable[..., None]) -> None:
        self._layer, self._values, self._backward = layer, values, backward

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inside = torch._C._current_graph_task_id() >= 0  # of a backward pass, which computes a call again
        self._layer.uses += torch.is_grad_enabled() and not inside
        return Added.apply(output, args[0], self._values, self._layer, self._backward)


class Added(torch.autograd.Function):
    """The output of a quantised layer and the product of its input with the sparse part."""

    @staticmethod
    def forward(ctx, output, inputs, values, layer, backward):
        ctx.layer, ctx.backward_of_entries = layer, backward
        ctx.save_for_backward(inputs, values)
        if layer.indices.numel() == 0:
            return output.clone()
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        with torch.autocast(output.device.type, enabled=False):
            added = (layer.sparse(values.detach()) @ rows.t()).t()
        return output + added.reshape(output.shape).to(output.dtype)

    @staticmethod
    def backward(ctx, grad):
        inputs, values = ctx.saved_tensors
        layer = ctx.layer
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        given = grad.reshape(-1, grad.shape[-1]).float()
        through = None
        with torch.autocast(grad.device.type, enabled=False):
            ctx.backward_of_entries(layer, given, rows)
            if ctx.needs_input_grad[1] and layer.indices.numel():
                transposed = layer.sparse(values.detach()).to_sparse_coo().t().to_sparse_csr()
                through = (transposed @ given.t()).t().reshape(inputs.shape).to(inputs.dtype)
        return grad, through, None, None, None
