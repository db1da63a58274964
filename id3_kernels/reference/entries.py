"""Sets of entries, and the values at entries."""

from __future__ import annotations

import torch
from torch import Tensor

from ..entries import Entries, sort_keys


def union(a_offsets, a_indices, b_offsets, b_indices):
    a, b = Entries(a_offsets, a_indices), Entries(b_offsets, b_indices)
    n_a, n_b = a_indices.numel(), b_indices.numel()
    both = torch.cat([sort_keys(a, n_a), sort_keys(b, n_b)])
    merged, position = torch.unique(both, sorted=True, return_inverse=True)
    edges = torch.arange(a_offsets.numel(), device=a_offsets.device) << 32
    offsets = torch.searchsorted(merged, edges)
    indices = padded((merged & 0xFFFFFFFF).to(torch.int32), n_a + n_b)
    return offsets, indices, position[:n_a].clone(), position[n_a:].clone()


def join_(arrays, offsets, b_offsets, b_indices, b_values):
    n, n_new = int(offsets[-1]), int(b_offsets[-1])
    held, new = Entries(offsets, arrays[0]), Entries(b_offsets, b_indices)
    position = torch.searchsorted(sort_keys(held, n), sort_keys(new, n_new))
    position += torch.arange(n_new, device=position.device)
    stays = torch.ones(n + n_new, dtype=torch.bool, device=position.device)
    stays[position] = False
    held_values = [array[:n].clone() for array in arrays]  # before the first write: nothing may fail half-way
    for array, old, values in zip(arrays, held_values, [b_indices, *b_values], strict=True):
        array[: n + n_new][stays] = old
        array[position] = 0 if values is None else values[:n_new]
    offsets.add_(b_offsets)


def gather(tensors, offsets, indices):
    parts = [read(t, i) for t, i in zip(tensors, Entries(offsets, indices).lists(), strict=True)]
    return padded(torch.cat(parts), indices.numel()) if parts else torch.empty(0, device=indices.device)


def scatter_(tensors, offsets, indices, values):
    bounds = offsets.tolist()
    for j, t in enumerate(tensors):
        write(t, indices[bounds[j] : bounds[j + 1]], values[bounds[j] : bounds[j + 1]])


def padded(values: Tensor, length: int) -> Tensor:
    """The values, then zeros up to `length`."""
    out = values.new_zeros(length)
    out[: values.numel()] = values
    return out


def read(tensor: Tensor, index: Tensor) -> Tensor:
    """The values of a tensor of any strides at flat indices."""
    index = index.to(torch.int64)
    if tensor.is_contiguous():
        return tensor.view(-1)[index]
    return tensor[torch.unravel_index(index, tensor.shape)]


def write(tensor: Tensor, index: Tensor, values: Tensor) -> None:
    """Writes values to a tensor of any strides at flat indices."""
    index = index.to(torch.int64)
    if tensor.is_contiguous():
        tensor.view(-1)[index] = values
    else:
        tensor[torch.unravel_index(index, tensor.shape)] = values
