"""What the ranks that hold the parts of the parameters tell each other: candidates, sums, and whole columns.

The ranks form a grid, and each of its axes is a group of torch.distributed that splits some parameter. Ranks
that hold the same parts (HSDP, DistributedDataParallel) lie on no common axis: they decide the same without
any message.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ..ranks import OneProcess
from .blocks import Blocks
from .choice import NO_PLACE, Boundary, boundary
from .part import Part, is_split, part_of


class ManyRanks:
    """The collective operations of a run whose parameters are split. Every rank calls each in the same order.

    axes: the ranks of each group -> the group, in the same order on all ranks.
    """

    alone = False

    def __init__(self, axes: dict[tuple[int, ...], torch.distributed.ProcessGroup]):
        self._axes = axes
        self.size = math.prod(len(ranks) for ranks in axes)

    def __deepcopy__(self, memo: dict) -> ManyRanks:
        return self  # a process group has no copies

    @property
    def first(self) -> bool:
        """Whether this rank is the first of all."""
        return all(torch.distributed.get_rank() == ranks[0] for ranks in self._axes)

    def blocks(self, parts: list[Part], device: torch.device) -> Blocks:
        """The tables of a shard's tensors."""
        return Blocks(parts, [self._first(part) for part in parts], device)

    def gather(self, place: Tensor, score: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
        """The candidates of all ranks, at most `capacity` of each: place int64 (padding: NO_PLACE), score.

        Sends 12 bytes per candidate (16 where the scores are float64), in one message.
        """
        room = capacity - place.numel()
        place = torch.nn.functional.pad(place, (0, room), value=NO_PLACE)
        words = [place.view(torch.int32), torch.nn.functional.pad(score, (0, room)).view(torch.int32)]
        rows = self.rows(torch.cat(words), "the choice of entries")
        return rows[:, : 2 * capacity].flatten().view(torch.int64), rows[:, 2 * capacity :].flatten().view(
            score.dtype
        )

    def boundary(self, place: Tensor, score: Tensor, k: Tensor, bits: int) -> Boundary:
        """Which of the entries of all ranks are the best k, without a list of them. place: below 2 ** bits;
        NO_PLACE pads.

        Sends 16 KiB for every 11 bits of score and place.
        """
        rounds = boundary(place, score, k.reshape(()), bits)
        counts = next(rounds)
        while True:
            try:
                counts = rounds.send(self.total(counts, "the choice of entries"))
            except StopIteration as end:
                return end.value

    def whole(
        self, place: Tensor, columns: dict[str, Tensor], purpose: str = "the state of all ranks"
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The entries of all ranks in order of place. No two ranks give one place; each gives any number."""
        n, columns = place.numel(), {"place": place, **columns}
        counts = self.rows(place.new_tensor([n]), purpose).flatten().tolist()
        packed = [c.contiguous().view(torch.uint8).view(n, c.element_size()) for c in columns.values()]
        packed = torch.nn.functional.pad(torch.cat(packed, 1), (0, 0, 0, max(counts) - n))
        rows = self.rows(packed, purpose)
        rows = torch.cat([row[:n] for row, n in zip(rows, counts, strict=True)])
        widths = [c.element_size() for c in columns.values()]
        parts = [part.contiguous().view(-1) for part in rows.split(widths, 1)]
        found = {name: part.view(c.dtype) for (name, c), part in zip(columns.items(), parts, strict=True)}
        place, order = found.pop("place").sort()
        return place, {name: column[order] for name, column in found.items()}

    def rows(self, row: Tensor, purpose: str) -> Tensor:
        """[ranks, n]: every rank's row, of the same n on each, in one order."""
        rows = row[None]
        for ranks, group in self._axes.items():
            found = rows.new_empty(len(ranks) * rows.shape[0], *row.shape)
            called(purpose, _all_gather(), found, rows.contiguous(), group=group)
            rows = found
        return rows

    def total(self, numbers: Tensor, purpose: str) -> Tensor:
        """The sum over ranks of integers."""
        found = numbers.clone()
        for group in self._axes.values():
            called(purpose, torch.distributed.all_reduce, found, group=group)
        return found

    def speaks_for(self, param: Tensor) -> bool:
        """Whether this rank is the first of those that hold the same part of a parameter."""
        return self._first(part_of(param))

    def share(self, flags: list[Tensor]) -> None:
        """Sets each one-element tensor to the largest of all ranks."""
        for flag in flags:
            flag.copy_(self.rows(flag.reshape(1), "the overflow of a loss scale").amax().reshape(flag.shape))

    def _first(self, part: Part) -> bool:
        rank = torch.distributed.get_rank()
        return all(rank == ranks[0] for ranks in self._axes if ranks not in part.axes)


def called(purpose: str, collective: Callable, *arguments: Any, **options: Any) -> None:
    """Calls one of torch's collectives; an error, a timeout too, says what the ranks waited for."""
    try:
        collective(*arguments, **options)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise RuntimeError(
            f"{purpose}: expected an answer of every rank, got an error of torch.distributed ({reason}); "
            "look for the rank that failed first"
        ) from error


def _all_gather() -> Callable:
    """torch's collective, under its name since torch 2.13 where there is one."""
    found = getattr(torch.distributed, "all_gather_single", None)
    return found or torch.distributed.all_gather_into_tensor


def ranks_of(named: Iterable[tuple[str, Tensor]]) -> OneProcess | ManyRanks:
    """The ranks that hold parts of these parameters. Communicates nothing.

    Raises ValueError where the groups that split them form no grid.
    """
    axes: dict[tuple[int, ...], torch.distributed.ProcessGroup] = {}
    for name, param in named:
        if is_split(param):
            by_ranks, part = _groups(param.device_mesh), part_of(param)
            axes |= {ranks: by_ranks[ranks] for ranks in part.axes if ranks not in axes}
            _check_grid(name, axes)
    return ManyRanks(axes) if axes else OneProcess()


def holders_of(named: Iterable[tuple[str, Tensor]]) -> OneProcess | ManyRanks:
    """`ranks_of`, and the ranks beside them that hold the same parts: all of the parameters' meshes."""
    axes: dict[tuple[int, ...], torch.distributed.ProcessGroup] = {}
    for mesh in {id(p.device_mesh): p.device_mesh for _, p in named if is_split(p)}.values():
        axes |= _groups(mesh)
    return ManyRanks(axes) if axes else OneProcess()


def _groups(
    mesh: torch.distributed.device_mesh.DeviceMesh,
) -> dict[tuple[int, ...], torch.distributed.ProcessGroup]:
    """The ranks of each dimension's group -> the group."""
    groups = (mesh.get_group(i) for i in range(mesh.ndim))
    return {tuple(torch.distributed.get_process_group_ranks(group)): group for group in groups}


def _check_grid(name: str, axes: dict) -> None:
    for one, other in combinations(axes, 2):
        if len(set(one) & set(other)) > 1:
            raise ValueError(
                f"{name}: expected the dimensions of one mesh for all parameters, got ranks {list(other)} "
                f"beside {list(one)}; shard all parameters over one mesh"
            )
