"""Data parallelism without DistributedDataParallel: what the replicas of a model send each other."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from id3_kernels.hashing import SLICE, mix64

from .many_ranks import ManyRanks, called

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Replicas:
    """The processes of one group, each of which holds the whole model and sees its own part of each batch.

    Every replica has to call each method in the same order. Means are sums of the parts 1/size, as in
    DistributedDataParallel. `ranks` are the same processes, for lists of entries.
    """

    def __init__(self, group: torch.distributed.ProcessGroup):
        members = torch.distributed.get_process_group_ranks(group)
        self._group, self._members = group, members
        self.size, self.rank = len(members), torch.distributed.get_rank(group)
        self.ranks = ManyRanks({tuple(members): group})

    def __deepcopy__(self, memo: dict) -> Replicas:
        return self  # a process group has no copies

    def average_(self, tensors: list[Tensor]) -> None:
        """Makes each tensor its mean over the replicas, in one message for each device and dtype.

        Of n entries a replica sends 2 · n · (size - 1) / size by a ring.
        """
        kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for tensor in tensors:
            if tensor.numel():
                kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
        for alike in kinds.values():
            alone = len(alike) == 1 and alike[0].is_contiguous()
            packed = alike[0] if alone else torch.cat([tensor.reshape(-1) for tensor in alike])
            packed /= self.size
            self._call("the mean of the gradients", torch.distributed.all_reduce, packed)
            if not alone:
                parts = packed.split([tensor.numel() for tensor in alike])
                for tensor, part in zip(alike, parts, strict=True):
                    tensor.copy_(part.view(tensor.shape))

    def scattered(self, block: Tensor) -> tuple[int, Tensor]:
        """(begin, mean [m]): the mean over the replicas of the m entries of block [n] from `begin` on.

        Each replica gets another stretch, perhaps an empty one. Of n entries it sends n · (size - 1) / size.
        """
        share = -(-block.numel() // self.size)
        begin = share * self.rank
        sent = torch.nn.functional.pad(block / self.size, (0, share * self.size - block.numel()))
        mean = block.new_empty(share)
        self._call("the search for entries", _reduce_scatter(), mean, sent)
        return begin, mean[: max(0, block.numel() - begin)]

    def mean_on(self, rank: int, tensor: Tensor) -> Tensor | None:
        """The mean over the replicas, on the replica `rank` alone; None on each other one."""
        mean = tensor / self.size
        destination = self._members[rank]
        self._call("the search for entries", torch.distributed.reduce, mean, dst=destination)
        return mean if rank == self.rank else None

    def share(self, flags: list[Tensor]) -> None:
        """Sets each one-element tensor to the largest of all, on all replicas."""
        home = flags[0].device
        self.check_at("the overflow of a loss scale", home)
        most = torch.stack([flag.reshape(()).to(home) for flag in flags]).amax().reshape(1)
        self._call("the overflow of a loss scale", torch.distributed.all_reduce, most, op=_max())
        for flag in flags:
            flag.copy_(most.reshape(flag.shape))

    def check_at(self, point: str, device: torch.device) -> None:
        """Raises RuntimeError on all replicas where one of them is at another point of its program.

        What is sent next has other sizes there, which torch.distributed answers by ending the process, or by
        wrong numbers. Sends 16 bytes; the host waits for the answer.
        """
        digest = int.from_bytes(hashlib.blake2b(point.encode(), digest_size=7).digest(), "little")
        row = torch.tensor([digest, -digest]).to(device)
        self._call("the comparison of steps", torch.distributed.all_reduce, row, op=_max())
        if row.tolist() != [digest, -digest]:
            raise RuntimeError(
                f"process_group: expected all {self.size} replicas at the same point, got {point} here and "
                "another one elsewhere; with hooks (release_gradients, sparse_backward) each replica has to "
                "use the same layers in the same order in a backward pass that selects"
            )

    def any_of(self, flags: list[bool], device: torch.device) -> list[bool]:
        """Which flags are set on any replica. Sends a byte for each; the host waits for the answer."""
        row = torch.tensor(flags, dtype=torch.uint8).to(device)
        self._call("the comparison of steps", torch.distributed.all_reduce, row, op=_max())
        return [bool(flag) for flag in row.tolist()]

    def _call(self, purpose: str, collective: Callable, *arguments: Any, **options: Any) -> None:
        called(purpose, collective, *arguments, **options, group=self._group)


def checksum(tensors: Iterable[Tensor], device: torch.device) -> int:
    """A number of the bits of all tensors and of their order. Synchronises with a GPU."""
    total = torch.zeros((), dtype=torch.int64, device=device)
    for tensor in tensors:
        for part in tensor.detach().reshape(-1).split(SLICE):
            odd = 1 + 2 * torch.arange(part.numel(), device=part.device)  # of an empty part too
            bits = part.view(_BITS[part.element_size()])
            total = mix64(total + (bits * odd).sum().to(device))  # wraps modulo 2^64
    return int(total) % 2**64


def _max() -> torch.distributed.ReduceOp:
    return torch.distributed.ReduceOp.MAX


def _reduce_scatter() -> Callable:
    """torch's collective, under its name since torch 2.13 where there is one."""
    found = getattr(torch.distributed, "reduce_scatter_single", None)
    return found or torch.distributed.reduce_scatter_tensor
