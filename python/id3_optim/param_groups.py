"""What the param groups of an optimizer hold: parameters by position, their names, N, and AdamW's numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .distributed.part import local
from .pieces import Rows, pieces_of
from .state.layout import moved

# Of a group; other keys are a user's own.
OPTIONS = ("lr", "betas", "eps", "weight_decay", "maximize", "dense")


class Member(NamedTuple):
    """A parameter, its position among all parameters of all groups, and the number of its group."""

    position: int
    group: int
    param: Tensor


def members(groups: list[dict[str, Any]], dense: bool, since: int = 0) -> Iterator[Member]:
    """The parameters of the dense groups, or of all other groups, in the order of their positions.

    since: the number of the first group that counts.
    """
    position = 0
    for i, group in enumerate(groups):
        if i >= since and group["dense"] == dense:
            yield from (Member(position + j, i, p) for j, p in enumerate(group["params"]))
        position += len(group["params"])


class Piece(NamedTuple):
    """A parameter, or the rows of it that are one of its pieces. number: that of the tensor where each piece
    counts, which orders the entries; without pieces it is the parameter's position."""

    number: int
    rows: Rows | None
    member: Member


def in_pieces(rows: Iterable[Member], extra: int) -> Iterator[Piece]:
    """Each parameter, or its pieces. extra: how many more than one the parameters before them have in all."""
    for member in rows:
        ranges = pieces_of(f"parameter {member.position}", local(member.param).shape) or [None]
        for i, own in enumerate(ranges):
            yield Piece(member.position + extra + i, own, member)
        extra += len(ranges) - 1


def selectable(groups: list[dict[str, Any]]) -> Iterator[Tensor]:
    """The parameters that compete for the budget: those of no dense group."""
    return (member.param for member in members(groups, dense=False))


def parameter_names(groups: list[dict[str, Any]]) -> list[str] | None:
    """The parameters' names by position, or None for an optimizer of parameters without names."""
    if "param_names" not in groups[0]:
        return None
    return [name for group in groups for name in group["param_names"]]


def named_parameters(groups: list[dict[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    """Every parameter with its name, or with its place in the groups where it has none."""
    for i, group in enumerate(groups):
        unnamed = (f"param_groups[{i}]['params'][{j}]" for j in range(len(group["params"])))
        yield from zip(group.get("param_names", unnamed), group["params"], strict=False)


def trainable_entries(groups: list[dict[str, Any]]) -> int:
    """N: the entries of all parameters that require gradients and are in no dense group."""
    return sum(p.numel() for p in selectable(groups) if p.requires_grad)


def numbers_of(
    group: dict[str, Any], device: torch.device
) -> tuple[tuple[float, float, float, float, float], Tensor | None]:
    """(lr, beta1, beta2, eps, weight_decay) of a param group; and the learning rate as a tensor on
    `device` where the group has it on a GPU: no host reads it there."""
    lr, tensor_lr = group["lr"], None
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        lr, tensor_lr = 0.0, lr if lr.device == device else moved(lr, device)
    numbers = float(lr), *map(float, group["betas"]), float(group["eps"]), float(group["weight_decay"])
    return numbers, tensor_lr
