"""What every kernel here shares: which dtypes, how tensors reach a kernel, how it is launched.

A kernel sees a list of tensors as a table of addresses (int64), so that one launch serves them all. The
flat space of all entries is cut into tiles of 256; a tensor begins a new tile, so a tile number orders as
(tensor, flat index) does, and `slot = tile · 256 + position` names an entry.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import entries

TILE = tl.constexpr(entries.TILE)
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


def carry_back(tensors: list[Tensor], rows: list[Tensor]) -> None:
    """Carry what was written to row-major copies to the tensors; `rows[j] is tensors[j]` is no copy.

    All of it, as the host does not know where the entries lie: the others keep their bits.
    """
    for t, row in zip(tensors, rows, strict=True):
        if row is not t:
            t.copy_(row)
