"""Layers whose backward pass makes no gradient of the weight, and norms that keep less for theirs.

A layer's class is replaced by a subclass that differs in `forward` alone, so that names, state dicts and
`isinstance` stay. Its copies and pickles are plain layers.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .functions import linear, lookup, recomputed
from .weight import Weight


class _Sparse:
    """What the classes share. plain: the class that is replaced; sparse_weight: it takes the gradient."""

    plain: type[nn.Module]
    sparse_weight: Weight

    def __reduce_ex__(self, protocol: int):
        state = {name: value for name, value in self.__dict__.items() if name != "sparse_weight"}
        return object.__new__, (self.plain,), state

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        if not isinstance(self, _Sparse):  # it is plain again, and something has kept this method
            return type(self).forward(self, *inputs, **named)
        site = getattr(self, "sparse_weight", None)
        trained = torch.is_grad_enabled() and self.weight.requires_grad and not torch.jit.is_tracing()
        strided = all(map(_is_strided, (*inputs, *named.values())))
        if trained and strided and site is not None and site.of(self.weight):
            return self.sparse_forward(*inputs, **named)
        return super().forward(*inputs, **named)


def _is_strided(x: Any) -> bool:
    return not isinstance(x, Tensor) or (x.layout == torch.strided and not x.is_nested)


def _subclass(*bases: type, plain: type[nn.Module]) -> type[nn.Module]:
    """In the module of the plain class, by which torch.fx knows a layer."""
    return type(f"Sparse{plain.__name__}", bases, {"plain": plain, "__module__": plain.__module__})


class _Linear(_Sparse):
    def sparse_forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias, self.sparse_weight, False)


class _Conv1D(_Sparse):
    def sparse_forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, self.sparse_weight, True)


class _Embedding(_Sparse):
    def sparse_forward(self, input: Tensor) -> Tensor:
        return lookup(input, self.weight, self.padding_idx, self.sparse_weight)


class _ScaledEmbedding(_Embedding, nn.Embedding):
    """Below a class whose forward pass scales what nn.Embedding's gives: the lookup alone is another one."""


class _RMSNorm(_Sparse):
    """Written as separate operations, it keeps its input and, for the weight, its normalised input too.

    A step that selects is where memory is highest; there the second is computed again.
    """

    def sparse_forward(self, *inputs: Any, **named: Any) -> Tensor:
        plain = super(_Sparse, self).forward
        if self.sparse_weight.release.selects():
            return recomputed(plain, *inputs, **named)
        return plain(*inputs, **named)


@cache
def norm_class(plain: type[nn.Module]) -> type[nn.Module] | None:
    """The subclass for an RMSNorm of a model of transformers; None for every other class: torch's own norms,
    and those of kernel libraries, keep no second tensor."""
    return _subclass(_RMSNorm, plain, plain=plain) if _of_transformers(plain, "RMSNorm") else None


@cache
def sparse_class(plain: type[nn.Module]) -> type[nn.Module] | None:
    """The subclass for nn.Linear, nn.Embedding, transformers' Conv1D and its models' scaled embeddings; None
    for every other class, their subclasses too, which may do anything with the weight."""
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    for known, mixin in ((nn.Linear, _Linear), (nn.Embedding, _Embedding), (conv1d, _Conv1D)):
        if plain is known:
            return _subclass(mixin, plain, plain=plain)
    if _of_transformers(plain, "ScaledWordEmbedding") and issubclass(plain, nn.Embedding):
        return _subclass(plain, _ScaledEmbedding, plain=plain)
    return None


def _of_transformers(plain: type[nn.Module], ending: str) -> bool:
    return plain.__module__.startswith("transformers.models.") and plain.__name__.endswith(ending)
