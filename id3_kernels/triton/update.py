"""AdamW at the entries alone, for all tensors in one launch.

torch's order of operations, each rounded once to float32. The bias corrections come from tables over the
step number, computed in float64 by the host and kept on the device: no step number has to be read back, nor
a learning rate that lies there.
"""

from __future__ import annotations

import math
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, tables
from .launch import bfloat16_bits, load_any
from .places import owner_of, run_of, runs_of

LONGEST_TABLE = 1 << 22  # beta up to 0.99999; after its last step the bias counts as 0


@triton.jit
def store_any(address, offset, x, mask, code):
    """Store float32 at address + offset as the dtype of `code` (per entry), nearest even."""
    half = x.to(tl.float16)
    bits = bfloat16_bits(x)
    tl.store(address.to(tl.pointer_type(tl.float32)) + offset, x, mask=mask & (code == 0))
    tl.store(address.to(tl.pointer_type(tl.uint16)) + offset, bits, mask=mask & (code == 1))
    tl.store(address.to(tl.pointer_type(tl.float16)) + offset, half, mask=mask & (code == 2))


@triton.jit
def rounded(x, code):
    """x rounded to the dtype of `code` and widened to float32."""
    brain = (bfloat16_bits(x).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return tl.where(code == 0, x, tl.where(code == 1, brain, x.to(tl.float16).to(tl.float32)))


@triton.jit
def gradient_of(g, grad_scale, clip, SCALE: tl.constexpr, CLIP: tl.constexpr, MAXIMIZE: tl.constexpr):
    """The gradient, divided by grad_scale, multiplied by clip, and negated to maximise."""
    if SCALE:
        g = tl.div_rn(g, tl.load(grad_scale) + tl.zeros_like(g))
    if CLIP:
        g = g * tl.load(clip)
    if MAXIMIZE:
        g = -g
    return g


@triton.jit
def exact_weight(stored, master, code):
    """The master; the stored parameter where it is float32 or not the master's rounding."""
    back = rounded(master, code)
    same = (back == stored) | ((back != back) & (stored != stored))
    return tl.where(same & (code != 0), master, stored)


@triton.jit
def next_step(age, at, step, j, live, AGE: tl.constexpr):
    """The step number of the bias correction: the age, which grows by 1, or the step of the tensor."""
    if AGE:
        s = tl.load(age + at, mask=live, other=0) + 1
        tl.store(age + at, s, mask=live)
    else:
        s = tl.load(step + j, mask=live, other=0)
    return s


@triton.jit
def decay_of(lr, weight_decay):
    """float32 1 - lr · weight_decay of float64 numbers."""
    return (1.0 - lr * weight_decay).to(tl.float32)


@triton.jit(  # else a new size compiles anew
    do_not_specialize=["stride", "longest", "longest_root", "n", "n_tensors"]
)
def adamw_kernel(
    params, param_codes, grads, grad_codes, offsets, stride, indices, exp_avg, exp_avg_sq, master, age, step,
    unbiased, roots, longest, longest_root, lr, weight_decay, grad_scale, found_inf, clip, n, n_tensors,
    rest1, beta2, rest2, eps,
    COMPACT: tl.constexpr, MASTER: tl.constexpr, AGE: tl.constexpr, MAXIMIZE: tl.constexpr,
    SCALE: tl.constexpr, FOUND: tl.constexpr, CLIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """rest1, rest2: 1 - beta1, 1 - beta2. lr, weight_decay: of one number. longest: unbiased's last row."""
    own, first = run_of(offsets, stride, n, BLOCK)
    if first >= tl.load(own + n_tensors):
        return
    at = first + tl.arange(0, BLOCK)
    j = owner_of(own, n_tensors, at)
    live = j < n_tensors
    if FOUND:
        live = live & (tl.load(found_inf + tl.zeros_like(j)) == 0)
    source = tl.zeros_like(j) if COMPACT else j
    grad = tl.load(grads + source, mask=live, other=0)
    live = live & (grad != 0)
    index = tl.load(indices + at, mask=live, other=0)
    g = load_any(grad, at if COMPACT else index, live, tl.load(grad_codes + source, mask=live, other=0))
    g = gradient_of(g, grad_scale, clip, SCALE, CLIP, MAXIMIZE)

    param, code = tl.load(params + j, mask=live, other=0), tl.load(param_codes + j, mask=live, other=0)
    stored = load_any(param, index, live, code)
    w = exact_weight(stored, tl.load(master + at, mask=live, other=0.0), code) if MASTER else stored
    rate = tl.load(lr).to(tl.float64)
    w = w * decay_of(rate, tl.load(weight_decay))
    m, v = tl.load(exp_avg + at, mask=live, other=0.0), tl.load(exp_avg_sq + at, mask=live, other=0.0)
    m = m + (g - m) * rest1
    v = v * beta2 + (g * rest2) * g
    s = next_step(age, at, step, j, live, AGE)
    step_size = (rate / tl.load(unbiased + tl.minimum(s, longest), mask=live, other=1.0)).to(tl.float32)
    root = tl.load(roots + tl.minimum(s, longest_root), mask=live, other=1.0)
    w = w - tl.div_rn(step_size * m, tl.div_rn(tl.sqrt_rn(v), root) + eps)
    tl.store(exp_avg + at, m, mask=live)
    tl.store(exp_avg_sq + at, v, mask=live)
    store_any(param, index, w, live, code)
    if MASTER:
        tl.store(master + at, w, mask=live & (code != 0))


def adamw_(params, grads, offsets, *rest):
    """See `table.OPS`. A tensor whose strides are not row-major passes through a copy."""
    launch.check(*params, *grads)
    _adamw(params, [None if g is None else g.contiguous() for g in grads], False, offsets, *rest)


def adamw_compact_(params, values, offsets, *rest):
    """See `table.OPS`."""
    launch.check(*params, values)
    _adamw(params, [values.contiguous()], True, offsets, *rest)


def _adamw(
    params, grads, compact, offsets, indices, exp_avg, exp_avg_sq, master, age, step,
    lr, beta1, beta2, eps, weight_decay, maximize, grad_scale, found_inf, clip, tensor_lr,
):  # fmt: skip
    device, n, block = offsets.device, tables.most_entries(params, indices), 256
    rows = [p.contiguous() for p in params]
    unbiased, roots = unbiased_table(beta1, device), root_table(beta2, device)
    numbers = tables.table(tuple(map(_bits_of, (lr, weight_decay))), device).view(torch.float64)
    lr = numbers if tensor_lr is None else tensor_lr
    scalars = [None if x is None else x.to(device, torch.float32) for x in (grad_scale, found_inf, clip)]
    columns = [column(ts, device) for ts in (rows, grads) for column in (tables.addresses, tables.codes)]
    n_runs, stride = runs_of(offsets)
    launch.run(
        adamw_kernel, n_runs * triton.cdiv(n, block), 4, device, *columns, offsets, stride, indices,
        exp_avg, exp_avg_sq, master, age, step.to(device), unbiased, roots, unbiased.numel() - 1,
        roots.numel() - 1, lr, numbers[1:], *scalars, n, len(params), 1 - beta1, beta2, 1 - beta2, eps,
        compact, master is not None, age is not None, maximize, *(x is not None for x in scalars), block,
    )  # fmt: skip
    launch.carry_back(params, rows)


def _bits_of(x: float) -> int:
    """The bits of a float64: Triton would pass a Python float as float32."""
    return struct.unpack("q", struct.pack("d", x))[0]


def _last_biased_step(beta: float) -> int:
    """The first step s for which 1 - beta^s is 1 in float64, or the last of the longest table."""
    last = 1 if beta == 0 else math.ceil(-54 * math.log(2) / math.log(beta))
    return min(last, LONGEST_TABLE)


@tables.kept(8)
def unbiased_table(beta1: float, device: torch.device) -> Tensor:
    """float64: 1 - beta1^s by the step s from 0; step 0 does not occur.

    Python uses pow of the C library, as every backend does; torch's pow may differ in the last bit. Each beta
    has a table of its own, since a schedule such as OneCycleLR moves the first, whose table is short.
    """
    steps = range(1, _last_biased_step(beta1) + 1)
    return torch.tensor([1.0] + [1 - beta1**s for s in steps], dtype=torch.float64).to(device)


@tables.kept(8)
def root_table(beta2: float, device: torch.device) -> Tensor:
    """float32: likewise sqrt(1 - beta2^s)."""
    steps = range(1, _last_biased_step(beta2) + 1)
    roots = torch.tensor([1.0] + [math.sqrt(1 - beta2**s) for s in steps], dtype=torch.float64)
    return roots.float().to(device)
