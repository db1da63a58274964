"""The autograd Functions of layers whose backward pass makes no gradient of the weight."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.utils.checkpoint import checkpoint

from ..step.products import Product, Rows
from .weight import Weight

_BREAKS = "sparse_backward breaks the graph at each layer that it changes: use fullgraph=False"
_NOTHING = nullcontext()


@torch.compiler.disable(reason=_BREAKS)
def linear(input: Tensor, weight: Tensor, bias: Tensor | None, site: Weight, transposed: bool) -> Tensor:
    """input @ weightᵀ + bias for a weight [out, in], input @ weight + bias for one [in, out] (transposed).

    input [..., in] of the weight's dtype, or under autocast of any. `site` takes the weight's gradient.
    """
    if _transforms():
        return _transposed(input, weight, bias) if transposed else F.linear(input, weight, bias)
    return _Linear.apply(input, weight, bias, site, transposed)


@torch.compiler.disable(reason=_BREAKS)
def lookup(ids: Tensor, weight: Tensor, padding_idx: int | None, site: Weight) -> Tensor:
    """The rows of `weight` [entries, columns] at ids (integers of any shape), whose gradient `site` takes."""
    if _transforms():
        return F.embedding(ids, weight, padding_idx)
    return _Lookup.apply(ids, weight, padding_idx, site)


@torch.compiler.disable(reason=_BREAKS)
def recomputed(forward: Callable[..., Tensor], *inputs: Any, **named: Any) -> Tensor:
    """The result of a forward pass without random numbers, which the backward pass computes again."""
    if _transforms():
        return forward(*inputs, **named)
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **named)


def _transforms() -> bool:
    """Whether torch.func (grad, vmap, jvp) runs, which does not know these Functions."""
    return torch._C._functorch.peek_interpreter_stack() is not None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, input, weight, bias, site, transposed):
        ctx.set_materialize_grads(False)
        device = input.device.type
        operands = [input, weight, bias]
        if torch.is_autocast_enabled(device) and input.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
            operands = [None if x is None else x.to(dtype) for x in operands]
        x, w, b = operands
        with _plain_arithmetic(device):
            output = _transposed(x, w, b) if transposed else F.linear(x, w, b)
        ctx.site, ctx.use, ctx.transposed, ctx.shape = site, site.begin_use(ctx), transposed, input.shape
        # Under autocast x may be a copy, which nothing else holds.
        ctx.needed, kept = site.keep(x, input if x is input else None, transposed)
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, kept)
        return _own(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        _check_once()
        weight, x = ctx.saved_tensors
        needs_input, _, needs_bias = ctx.needs_input_grad[:3]
        grads = [None] * 5
        if grad is None:  # the loss does not depend on the output
            return tuple(grads)
        with _plain_arithmetic(grad.device.type):
            dy = grad.reshape(-1, grad.shape[-1])
            if needs_input:
                w = weight.to(dy.dtype)
                grads[0] = (dy @ (w.t() if ctx.transposed else w)).reshape(ctx.shape)
            parts = Product(x, dy, ctx.needed) if ctx.transposed else Product(dy, x, ctx.needed)
            grads[1] = ctx.site.take(ctx, parts)
            if needs_bias:
                grads[2] = dy.sum(0)
        return tuple(grads)


def _plain_arithmetic(device: str) -> AbstractContextManager:
    """No autocast. To leave one that is not there would take an eighth of a layer's time in Python."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _NOTHING


def _transposed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[1])


def _own(output: Tensor) -> Tensor:
    """The output as no view, since operations in place refuse views that a Function returns."""
    return torch.ops.aten._unsafe_view(output, output.shape) if output._is_view() else output


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, ids, weight, padding_idx, site):
        ctx.set_materialize_grads(False)
        ctx.site, ctx.use, ctx.padding_idx = site, site.begin_use(ctx), padding_idx
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight, padding_idx)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        _check_once()
        (ids,) = ctx.saved_tensors
        if grad is None:
            return (None,) * 4
        dy = grad.reshape(-1, grad.shape[-1])
        ids = ids.reshape(-1).long()
        if ctx.padding_idx is not None:
            dy = dy.masked_fill((ids == ctx.padding_idx)[:, None], 0)
        return None, ctx.site.take(ctx, Rows(ids, dy)), None, None


def _check_once() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("sparse_backward: does not apply to create_graph=True: dW is not recorded")
