"""What every kernel here shares: which dtypes, how tensors reach a kernel, how it is launched.

A kernel sees a list of tensors as a table of addresses (int64), so that one launch serves them all. The
flat space of all entries is cut into tiles of 256; a tensor begins a new tile, so a tile number orders as
(tensor, flat index) does, and `slot = tile · 256 + position` names an entry.
"""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = tl.constexpr(256)
ALIGNMENT_BYTES = 16  # of a vector load; a wrong promise to the compiler is a fault on the device
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@triton.jit
def load_wide(address, offset, mask, CODE: tl.constexpr, ALIGNED: tl.constexpr):
    """float32 values at `address` (int64) + `offset`. ALIGNED: to 16 bytes, and no offset is out of bounds.

    bfloat16 is widened by its bits: the interpreter's own conversion loses subnormals.
    """
    if CODE == 0:
        pointer = address.to(tl.pointer_type(tl.float32))
    elif CODE == 1:
        pointer = address.to(tl.pointer_type(tl.uint16))
    else:
        pointer = address.to(tl.pointer_type(tl.float16))
    if ALIGNED:
        raw = tl.load(tl.multiple_of(pointer, 16) + offset, eviction_policy="evict_first")
    else:
        raw = tl.load(pointer + offset, mask=mask, other=0)
    if CODE == 1:
        return (raw.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return raw.to(tl.float32)


@triton.jit
def load_any(address, offset, mask, code):
    """As `load_wide`, with a dtype code and an address that may differ by entry."""
    code = code + tl.zeros_like(offset)  # the interpreter can not combine a scalar condition with a mask
    wide = load_wide(address, offset, mask & (code == 0), 0, False)
    wide = tl.where(code == 1, load_wide(address, offset, mask & (code == 1), 1, False), wide)
    return tl.where(code == 2, load_wide(address, offset, mask & (code == 2), 2, False), wide)


@triton.jit
def bfloat16_bits(x):
    """The bits of the nearest bfloat16, ties to even. The interpreter's own conversion truncates."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16)


INTERPRETED = not isinstance(load_wide, triton.runtime.JITFunction)


def why_unavailable() -> str | None:
    """None where these kernels can run, else one line that says why not."""
    if INTERPRETED or torch.cuda.is_available() or torch.xpu.is_available():
        return None
    return "torch sees no GPU (on CPU tensors, for tests: set TRITON_INTERPRET=1 before the first import)"


def run(kernel, programs: int, warps: int, device: torch.device, *args) -> None:
    """Launch `kernel` with one program per block, on `device` whatever the current one is.

    a·b + c is never contracted: each operation is rounded once, as in every other backend.
    """
    if not programs:
        return
    with contextlib.nullcontext() if INTERPRETED else torch.get_device_module(device).device(device):
        kernel[(programs,)](*args, num_warps=warps, enable_fp_fusion=False)


def check(*tensors: Tensor | None, float64: bool = False) -> None:
    """Refuse memory that these kernels can not read, and float64 unless it is only moved."""
    for t in tensors:
        if t is None:
            continue
        if t.dtype == torch.float64 and not float64:
            raise ValueError("triton backend: float64 is not supported, use cpu or reference")
        if (t.device.type == "cpu") != INTERPRETED:
            where = "CPU tensors under TRITON_INTERPRET=1" if INTERPRETED else "GPU tensors"
            raise ValueError(f"triton backend: expected {where}, got a tensor on {t.device}")


# --- tables in device memory -------------------------------------------------------------------------


@functools.lru_cache(maxsize=32)
def table(values: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """The numbers as a 1-D tensor on the device. The content is the key, so a kept copy can not be stale."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def addresses(tensors: list[Tensor | None], device: torch.device) -> Tensor:
    """int64 [M]: where each tensor's memory begins; 0 for None."""
    if len(tensors) == 1:  # a fill takes its number along: nothing is copied, nobody waits
        address = 0 if tensors[0] is None else tensors[0].data_ptr()
        return torch.full((1,), address, dtype=torch.int64, device=device)
    return table(tuple(0 if t is None else t.data_ptr() for t in tensors), device)


def codes(tensors: list[Tensor | None], device: torch.device) -> Tensor:
    """int32 [M]: the dtype code of each tensor; 0 for None."""
    return table(tuple(0 if t is None else CODES[t.dtype] for t in tensors), device, torch.int32)


def owners(offsets: Tensor, n: int) -> Tensor:
    """int32 [n]: the tensor of each entry; the number of tensors for what lies behind the last entry."""
    positions = torch.arange(n, device=offsets.device)
    return torch.searchsorted(offsets[1:], positions, right=True, out_int32=True)


class Span(NamedTuple):
    """How one tensor is to be streamed; a list of them is the key under which a layout is kept.

    numel: 0 where there is no gradient. aligned: whether every address is a multiple of 16.
    """

    numel: int
    param_code: int
    grad_code: int
    aligned: bool


class Launch(NamedTuple):
    """The chunks [begin, end) of the chunk table, which are of one kind and streamed by one launch."""

    param_code: int
    grad_code: int
    full: bool
    begin: int
    end: int


class Layout(NamedTuple):
    """A list of tensors cut into tiles and chunks; the tensors here lie in device memory.

    first_tile: int64 [M + 1], the first tile of each tensor. numels: int32 [M]. Per chunk: owner int32,
    tile int64 (its first), offset int64 (its first entry in the tensor), length int32.
    """

    tiles: int
    chunk: int
    launches: tuple[Launch, ...]
    first_tile: Tensor
    numels: Tensor
    owner: Tensor
    tile: Tensor
    offset: Tensor
    length: Tensor


@functools.lru_cache(maxsize=64)  # one for each shape of a model, and a few for all of it
def layout(spans: tuple[Span, ...], device: torch.device) -> Layout:
    """The chunk table of a list of tensors, built once per list.

    Full chunks of aligned tensors come apart from the rest, which a second, masked launch reads: both in
    one kernel would quadruple its registers.
    """
    tile = TILE.value
    numels = torch.tensor([s.numel for s in spans], dtype=torch.int64)
    first_tile = torch.cat([numels.new_zeros(1), (-(-numels // tile)).cumsum(0)])
    # Small models get small chunks, so that the last wave of programs is not mostly empty.
    chunk = 4096 if int(first_tile[-1]) * tile < 1 << 30 else 16384
    groups: dict[tuple, list[Tensor]] = {}
    for j, span in enumerate(spans):
        offset = torch.arange(0, span.numel, chunk)
        length = (span.numel - offset).clamp(max=chunk)
        rows = torch.stack([torch.full_like(offset, j), first_tile[j] + offset // tile, offset, length])
        n_full = span.numel // chunk if span.aligned else 0
        for full, part in ((True, rows[:, :n_full]), (False, rows[:, n_full:])):
            if part.shape[1]:
                groups.setdefault((span.param_code, span.grad_code, full), []).append(part)
    launches, begin = [], 0
    for kind, parts in groups.items():
        end = begin + sum(part.shape[1] for part in parts)
        launches.append(Launch(*kind, begin, end))
        begin = end
    parts = [numels.new_zeros(4, 0)] + [part for parts in groups.values() for part in parts]
    owner, first, offset, length = torch.cat(parts, 1).unbind()
    tables = (first_tile, numels.int(), owner.int(), first.clone(), offset.clone(), length.int())
    return Layout(int(first_tile[-1]), chunk, tuple(launches), *(x.to(device) for x in tables))
