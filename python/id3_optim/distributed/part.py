"""The part of a tensor that this rank holds: torch's DTensor, read without any communication.

A part is a block of the tensor (FSDP2, tensor parallelism and both together make no other), so that the order
of its entries is the order of the whole tensor's.
"""

from __future__ import annotations

import math
import sys
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import pieces

UNBOUNDED = 1 << 62  # a block as large as any


class Level(NamedTuple):
    """One dimension of a block that is narrower than the tensor's; sizes count entries.

    whole, local: a slice of the tensor, and of the block, over this dimension and those behind it.
    begin, span: where the block begins in the slice of the tensor, and how far it reaches.
    """

    whole: int
    begin: int
    span: int
    local: int


EVERYTHING = Level(UNBOUNDED, 0, UNBOUNDED, UNBOUNDED)  # a dimension that is not split


class Part(NamedTuple):
    """levels: from the outermost split dimension. axes: the ranks of each group that splits the tensor.

    layout says the same on all ranks: the shape of the whole tensor, of the mesh, and the placements.
    """

    levels: tuple[Level, ...]
    axes: tuple[tuple[int, ...], ...]
    layout: str


def is_split(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which this rank may hold a part."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def any_split(groups: list[dict]) -> bool:
    """Whether a parameter of the param groups is a DTensor, so that all ranks save together."""
    return any(is_split(p) for group in groups for p in group["params"])


def reshard(model: nn.Module) -> None:
    """Puts the split parameters back where FSDP2 has left the whole ones, as after a forward pass alone.

    Mutates model. Communicates nothing.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules() if fsdp is not None else ():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def local(tensor: Tensor) -> Tensor:
    """The plain tensor that this rank holds of it; another tensor as it is."""
    if not is_split(tensor):
        return tensor
    with torch.no_grad():
        held = tensor.to_local()
    return held.wait() if hasattr(held, "wait") else held  # a collective that made it may still run


def full(tensor: Tensor) -> Tensor:
    """The whole tensor on every rank, each of which has to call this."""
    return tensor.full_tensor() if is_split(tensor) else tensor


def like(tensor: Tensor, param: Tensor) -> Tensor:
    """A gradient or score, placed as its parameter is: sums over ranks that are outstanding are made."""
    if not is_split(tensor) or not is_split(param) or tensor.placements == param.placements:
        return tensor
    return tensor.redistribute(param.device_mesh, param.placements)


def local_gradient(param: Tensor) -> Tensor | None:
    """What this rank holds of the parameter's gradient, None without one.

    Where its placements differ from the parameter's, all ranks redistribute it.
    """
    return None if param.grad is None else local(like(param.grad, param))


def as_split(tensor: Tensor, param: Tensor) -> Tensor:
    """A tensor that every rank holds whole, split as the parameter of its shape is."""
    if not is_split(param) or is_split(tensor):
        return tensor
    return type(param).from_local(
        block_of(tensor, param).contiguous(),
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )


def block_of(tensor: Tensor, param: Tensor) -> Tensor:
    """This rank's part of a tensor of the parameter's shape that every rank holds whole."""
    if not is_split(param):
        return tensor
    for dim, (size, begin) in enumerate(zip(*_block(param), strict=True)):
        tensor = tensor.narrow(dim, min(begin, tensor.shape[dim]), size)
    return tensor


def part_of(param: Tensor) -> Part:
    """Which block of the tensor this rank holds; `check_part` tells whether it is one."""
    if not is_split(param):
        return Part((), (), str(tuple(param.shape)))
    mesh, (sizes, begins), levels = param.device_mesh, _block(param), []
    for dim, (size, begin) in enumerate(zip(sizes, begins, strict=True)):
        if size != param.shape[dim]:
            inner = math.prod(param.shape[dim + 1 :])
            block = (param.shape[dim] * inner, begin * inner, size * inner, math.prod(sizes[dim:]))
            levels.append(Level(*block))
    axes = [
        tuple(torch.distributed.get_process_group_ranks(mesh.get_group(i)))
        for i, placement in enumerate(param.placements)
        if not placement.is_replicate() and mesh.size(i) > 1
    ]
    layout = f"{tuple(param.shape)} {tuple(mesh.shape)} {param.placements}"
    return Part(tuple(levels), tuple(axes), layout)


def check_part(name: str, param: Tensor) -> None:
    """Raises ValueError for a DTensor that is a sum over ranks, or of which this rank holds no block."""
    _check_placements(name, param)
    expected, got = tuple(_block(param)[0]), tuple(local(param).shape)
    if expected != got:
        raise ValueError(
            f"{name}: expected a local part of shape {expected} by {param.placements}, got {got}; use "
            "distribute_tensor or fully_shard"
        )
    if math.prod(got) > pieces.LARGEST:
        raise ValueError(
            f"{name}: expected a local part of at most {pieces.LARGEST} entries, got {math.prod(got)}; split "
            "it over more ranks"
        )


def _check_placements(name: str, param: Tensor) -> None:
    shards = []
    for i, placement in reversed(list(enumerate(param.placements))):
        if placement.is_partial():
            raise ValueError(
                f"{name}: expected Shard or Replicate placements, got {placement}; call redistribute() first"
            )
        if placement.is_replicate() or param.device_mesh.size(i) == 1:
            continue
        behind = math.prod(size for dim, size in shards if dim == placement.dim)
        if getattr(placement, "split_factor", 1) not in (1, behind):
            raise ValueError(
                f"{name}: expected parts that are blocks, got {param.placements}; use fully_shard after "
                "parallelize_module"
            )
        shards.append((placement.dim, param.device_mesh.size(i)))


def _block(param: Tensor) -> tuple[list[int], list[int]]:
    """(sizes, begins) of this rank's block."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, begins = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    return list(sizes), list(begins)
