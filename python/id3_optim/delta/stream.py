"""Weight patches: the entries that changed since a step, for a copy of the model on an inference server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..distributed.part import full
from ..pieces import index_dtype
from ..wrappers import check_holds, plain_names, unwrapped
from .patches import Patch, read


class WeightPatch(NamedTuple):
    """New values of one parameter: the fields of vLLM's `SparseWeightPatch` (vllm-project/vllm#40096).

    indices: int32 [n], flat row-major, ascending; int64 for a parameter of 2^31 entries or more. values: [n]
    of the parameter's dtype, absolute. Both are contiguous copies on the parameter's device.
    """

    name: str
    indices: Tensor
    values: Tensor


def weight_patches(model: nn.Module, optimizer: Any, since: int = 0) -> Iterator[WeightPatch]:
    """The patches that turn a copy of the model as it was after `since` steps into the present model.

    optimizer: the ID3AdamW that trains `model`, or a wrapper that holds one. One patch per parameter that
    `optimizer.changed_since(since)` names, under its name in the plain model; a parameter of a dense group
    comes whole, as all its indices. One parameter's copy is alive at a time. Where ranks hold parts of the
    parameters, every rank has to take all patches, and each gets the same ones, of whole tensors.
    Raises ValueError for a trained parameter that the model lacks, or a step that is not done yet.
    """
    names = plain_names(model)
    return (_patch(names, *entry[:2]) for entry in unwrapped(optimizer).changed_since(since))


def _patch(names: dict[int, str], param: Tensor, indices: Tensor | None) -> WeightPatch:
    check_holds(names, [param])
    if indices is None:
        indices = torch.arange(param.numel(), dtype=index_dtype(param), device=param.device)
        return WeightPatch(names[id(param)], indices, full(param.detach()).reshape(-1).clone())
    values = read([Patch(param.detach(), indices, param)])[0].values
    return WeightPatch(names[id(param)], indices.clone(), values)
