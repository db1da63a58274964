"""How a kernel is launched, and how it reads and writes tensors of several dtypes.

A kernel takes a list of tensors as a table of addresses (int64), so one launch serves the whole list. All
entries are cut into tiles of TILE neighbours, and a tensor begins with a new tile. Tile numbers therefore
order as (tensor, flat index) does, and `slot = tile · TILE + place in the tile` names an entry.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import entries

TILE = tl.constexpr(entries.TILE)
ALIGNMENT_BYTES = 16  # of a vector load; an address that is not so aligned is a fault on the device
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@triton.jit
def load_wide(address, offset, mask, CODE: tl.constexpr, ALIGNED: tl.constexpr):
    """float32 values at `address` (int64) + `offset`. ALIGNED: to 16 bytes, with every offset in bounds.

    bfloat16 is widened by its bits, because the conversion of Triton's interpreter loses subnormals.
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
    """`load_wide` with one dtype code and one address per entry."""
    code = code + tl.zeros_like(offset)  # the interpreter cannot combine a scalar condition with a mask
    wide = load_wide(address, offset, mask & (code == 0), 0, False)
    wide = tl.where(code == 1, load_wide(address, offset, mask & (code == 1), 1, False), wide)
    return tl.where(code == 2, load_wide(address, offset, mask & (code == 2), 2, False), wide)


@triton.jit
def bfloat16_bits(x):
    """The bits of the nearest bfloat16, ties to even; the interpreter's conversion truncates."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16)


INTERPRETED = not isinstance(load_wide, triton.runtime.JITFunction)
ON_NVIDIA = not INTERPRETED and torch.version.cuda is not None


def why_unavailable() -> str | None:
    """None where these kernels can run, else one line with the reason."""
    if INTERPRETED or torch.cuda.is_available() or torch.xpu.is_available():
        return None
    return "torch sees no GPU (on CPU tensors, for tests: set TRITON_INTERPRET=1 before the first import)"


def run(kernel, programs: int, warps: int, device: torch.device, *args) -> None:
    """Launches `kernel` with so many programs on `device`, which need not be the current device.

    a·b + c is not contracted: each operation is rounded once, as in every backend.
    """
    if not programs:
        return
    with contextlib.nullcontext() if INTERPRETED else torch.get_device_module(device).device(device):
        kernel[(programs,)](*args, num_warps=warps, enable_fp_fusion=False)


def check(*tensors: Tensor | None, float64: bool = False) -> None:
    """Refuses tensors that these kernels cannot read, and float64 except where values are only moved."""
    for t in tensors:
        if t is None:
            continue
        if t.dtype == torch.float64 and not float64:
            raise ValueError("backend: expected 'cpu' or 'reference' for float64 tensors, got 'triton'")
        if (t.device.type == "cpu") != INTERPRETED:
            expected = "CPU tensors under TRITON_INTERPRET=1" if INTERPRETED else "GPU tensors"
            raise ValueError(f"backend: expected {expected} for 'triton', got a tensor on {t.device}")


def carry_back(tensors: list[Tensor], rows: list[Tensor]) -> None:
    """Copies row-major copies back to their tensors; where `rows[j] is tensors[j]` there is no copy.

    A copy is written back as a whole, because the host does not know where its entries are.
    """
    for t, row in zip(tensors, rows, strict=True):
        if row is not t:
            t.copy_(row)
