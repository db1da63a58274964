"""Tables in device memory: the addresses of tensors, their tiles and chunks.

The first step builds the tables that depend on shapes and dtypes alone. A later step copies nothing from host
memory: such a copy would synchronise, and a CUDA graph would read the host memory at each replay.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .launch import CODES, TILE

BATCH = 64  # numbers that one launch writes, each of them a parameter of the launch


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph captures the kernels that are launched now."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def made_now(device: torch.device) -> tuple | None:
    """The current stream, and an event behind what it has to do; None where the device is not CUDA."""
    if device.type != "cuda":
        return None
    stream, event = torch.cuda.current_stream(device), torch.cuda.Event()
    event.record(stream)
    return stream, event


def wait_for(made: tuple | None, result: Tensor | tuple, device: torch.device) -> None:
    """Lets the current stream wait for the result that another one made; the host does not wait.

    The result's memory belongs to that stream, which must not write over it before this one has read it.
    """
    if made and made[0] != (current := torch.cuda.current_stream(device)):
        current.wait_event(made[1])
        for t in [result] if isinstance(result, Tensor) else result:
            if isinstance(t, Tensor):
                t.record_stream(current)


class Kept:
    """A function that caches its last results by its arguments; the last argument is the device.

    `most` results are kept, and more of them as long as all take no more than `most_bytes`.
    A result that a CUDA graph was captured with is never dropped, because each replay reads it. A result
    made during a capture is not cached: it has its content only after the graph has run. The current stream
    waits for a result that another stream made; before a capture its user lets the streams wait.
    """

    def __init__(self, make: Callable, most: int, most_bytes: int = 0):
        self.make, self.most, self.most_bytes = make, most, most_bytes
        self.recent, self.in_graphs, self.bytes = OrderedDict(), {}, 0  # bytes: of the recent ones

    def __call__(self, *key):
        captured = capturing(key[-1])
        found = self.in_graphs.get(key) or self.recent.get(key)
        if found is None:
            found = self.make(*key), made_now(key[-1])
            if not captured:
                self._remember(key, found)
        elif captured:
            self.in_graphs[key] = found
        else:
            wait_for(found[1], found[0], key[-1])
            if key in self.recent:
                self.recent.move_to_end(key)
        return found[0]

    def _remember(self, key: tuple, found: tuple) -> None:
        self.recent[key] = found
        self.bytes += bytes_of(found[0])
        while len(self.recent) > self.most and (not self.most_bytes or self.bytes > self.most_bytes):
            _, (oldest, _) = self.recent.popitem(last=False)
            self.bytes -= bytes_of(oldest)


def bytes_of(result: Tensor | tuple) -> int:
    """The memory of a cached result."""
    parts = [result] if isinstance(result, Tensor) else result
    return sum(part.nbytes for part in parts if isinstance(part, Tensor))


def kept(most: int, most_bytes: int = 0) -> Callable[[Callable], Kept]:
    """Decorator: see Kept."""
    return lambda make: Kept(make, most, most_bytes)


@triton.jit(do_not_specialize=range(1, 65))  # else each address compiles a kernel of its own
def write_table_kernel(
    table,
    a00: tl.int64, a01: tl.int64, a02: tl.int64, a03: tl.int64, a04: tl.int64, a05: tl.int64, a06: tl.int64,
    a07: tl.int64, a08: tl.int64, a09: tl.int64, a10: tl.int64, a11: tl.int64, a12: tl.int64, a13: tl.int64,
    a14: tl.int64, a15: tl.int64, a16: tl.int64, a17: tl.int64, a18: tl.int64, a19: tl.int64, a20: tl.int64,
    a21: tl.int64, a22: tl.int64, a23: tl.int64, a24: tl.int64, a25: tl.int64, a26: tl.int64, a27: tl.int64,
    a28: tl.int64, a29: tl.int64, a30: tl.int64, a31: tl.int64, a32: tl.int64, a33: tl.int64, a34: tl.int64,
    a35: tl.int64, a36: tl.int64, a37: tl.int64, a38: tl.int64, a39: tl.int64, a40: tl.int64, a41: tl.int64,
    a42: tl.int64, a43: tl.int64, a44: tl.int64, a45: tl.int64, a46: tl.int64, a47: tl.int64, a48: tl.int64,
    a49: tl.int64, a50: tl.int64, a51: tl.int64, a52: tl.int64, a53: tl.int64, a54: tl.int64, a55: tl.int64,
    a56: tl.int64, a57: tl.int64, a58: tl.int64, a59: tl.int64, a60: tl.int64, a61: tl.int64, a62: tl.int64,
    a63: tl.int64,
):  # fmt: skip
    numbers = (
        a00, a01, a02, a03, a04, a05, a06, a07, a08, a09, a10, a11, a12, a13, a14, a15,
        a16, a17, a18, a19, a20, a21, a22, a23, a24, a25, a26, a27, a28, a29, a30, a31,
        a32, a33, a34, a35, a36, a37, a38, a39, a40, a41, a42, a43, a44, a45, a46, a47,
        a48, a49, a50, a51, a52, a53, a54, a55, a56, a57, a58, a59, a60, a61, a62, a63,
    )  # fmt: skip
    for i in tl.static_range(64):
        tl.store(table + i, numbers[i])


@kept(64)
def table(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """int64: the numbers, sent to the device as parameters of kernels."""
    padded = numbers + (0,) * (-len(numbers) % BATCH)
    out = torch.empty(len(padded), dtype=torch.int64, device=device)
    for i in range(0, len(padded), BATCH):
        launch.run(write_table_kernel, 1, 1, device, out[i : i + BATCH], *padded[i : i + BATCH])
    return out


def address(tensor: Tensor | None) -> int:
    """The address of a tensor's memory; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def addresses(tensors: list[Tensor | None], device: torch.device) -> Tensor:
    """int64 [>= M]: the address of each tensor's memory; 0 for None."""
    if len(tensors) == 1:
        return torch.full((1,), address(tensors[0]), dtype=torch.int64, device=device)
    return table(tuple(map(address, tensors)), device)


def codes(tensors: list[Tensor | None], device: torch.device) -> Tensor:
    """int64 [>= M]: the dtype code of each tensor; 0 for None."""
    return table(tuple(0 if t is None else CODES[t.dtype] for t in tensors), device)


def most_entries(tensors: list[Tensor | None], indices: Tensor) -> int:
    """An upper bound, known to the host, for the entries of the tensors; None is a tensor of unknown size."""
    n = indices.numel()
    return n if any(t is None for t in tensors) else min(n, sum(t.numel() for t in tensors))


class Span(NamedTuple):
    """What the cut of one tensor depends on; a list of spans is the key of a cached layout.

    numel: 0 for a tensor without gradient. aligned: whether every address is a multiple of 16.
    """

    numel: int
    param_code: int
    grad_code: int
    aligned: bool


class Launch(NamedTuple):
    """The chunks [begin, end) of the chunk table, which have one kind and which one launch reads."""

    param_code: int
    grad_code: int
    full: bool
    begin: int
    end: int


class Layout(NamedTuple):
    """A list of tensors cut into tiles and chunks, as tables in device memory.

    first_tile, first_slot: int64 [M + 1], the first tile and slot of each tensor. numels: int32 [M]. Per
    chunk: owner int32, tile int64 (its first), offset int64 (its first entry in the tensor), length int32.
    """

    tiles: int
    chunk: int
    launches: tuple[Launch, ...]
    first_tile: Tensor
    first_slot: Tensor
    numels: Tensor
    owner: Tensor
    tile: Tensor
    offset: Tensor
    length: Tensor


# Hooks need two layouts for each size of tensor, a step a few of all tensors, whose tables are larger.
@kept(8, most_bytes=1 << 28)
def layout(spans: tuple[Span, ...], device: torch.device) -> Layout:
    """The chunk table of a list of tensors, built once per list.

    One launch reads the full chunks of aligned tensors, and a second, masked launch the rest: one kernel for
    both would need four times the registers.
    """
    tile = TILE.value
    numels = np.array([s.numel for s in spans], dtype=np.int64)
    first_tile = np.concatenate([[0], (-(-numels // tile)).cumsum()]).astype(np.int64)
    # Small chunks for small models: with large ones the last wave of programs would be mostly empty.
    chunk = 4096 if first_tile[-1] * tile < 1 << 30 else 16384
    groups: dict[tuple, list[np.ndarray]] = {}
    for j, span in enumerate(spans):
        offset = np.arange(0, span.numel, chunk)
        length = (span.numel - offset).clip(max=chunk)
        rows = np.stack([np.full_like(offset, j), first_tile[j] + offset // tile, offset, length])
        n_full = span.numel // chunk if span.aligned else 0
        for full, part in ((True, rows[:, :n_full]), (False, rows[:, n_full:])):
            if part.shape[1]:
                groups.setdefault((span.param_code, span.grad_code, full), []).append(part)
    launches, begin = [], 0
    for kind, parts in groups.items():
        end = begin + sum(part.shape[1] for part in parts)
        launches.append(Launch(*kind, begin, end))
        begin = end
    parts = [np.zeros((4, 0), np.int64)] + [part for parts in groups.values() for part in parts]
    columns = (first_tile, first_tile * tile, numels, *np.concatenate(parts, 1))
    dtypes = (torch.int64, torch.int64, torch.int32, torch.int32, torch.int64, torch.int64, torch.int32)
    on_device = (torch.tensor(c, dtype=d).to(device) for c, d in zip(columns, dtypes, strict=True))
    return Layout(int(first_tile[-1]), chunk, tuple(launches), *on_device)
