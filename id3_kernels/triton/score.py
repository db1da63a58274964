"""The D3 score |g| / (|θ| + ε)^exp (equation 1 of the ID3 paper), each operation rounded once."""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, tables
from .launch import load_wide

SMALLEST_NORMAL = tl.constexpr(1.1754943508222875e-38)
LOWEST_KEY = tl.constexpr(0x00800000)  # the bits of the smallest normal float32
INFINITE_KEY = tl.constexpr(0x7F800000)

# Exponents that need no pow: every backend gives the same bits for them.
KINDS = {0.0: "g", 0.5: "g/√d", 1.0: "g/d", 2.0: "g/dd", -0.5: "g·√d", -1.0: "g·d", -2.0: "g·dd"}


def kind_of(exp: float) -> str:
    """The formula of an exponent; "pow" where KINDS has none."""
    return KINDS.get(float(exp), "pow")


@tables.kept(8)
def exponent(exp: float, device: torch.device) -> Tensor:
    """float64 [1]: Triton would pass a Python float as float32."""
    return torch.full((1,), exp, dtype=torch.float64, device=device)


@triton.jit
def d3(g, theta, eps, exponent, KIND: tl.constexpr):
    """float32 score of g = |gradient| and θ, before subnormals are dropped; KIND "given": g is the score.

    "pow" is 2^(exp·log2 d) in float64, so the last bit may differ from another backend's pow.
    """
    d = tl.abs(theta) + eps
    if KIND == "g/√d":
        return tl.div_rn(g, tl.sqrt_rn(d))
    elif KIND == "g/d":
        return tl.div_rn(g, d)
    elif KIND == "g/dd":
        return tl.div_rn(g, d * d)
    elif KIND == "g·√d":
        return g * tl.sqrt_rn(d)
    elif KIND == "g·d":
        return g * d
    elif KIND == "g·dd":
        return g * (d * d)
    elif KIND == "pow":
        power = tl.exp2(tl.load(exponent) * tl.log2(d.to(tl.float64)))
        return (g.to(tl.float64) / power).to(tl.float32)
    else:
        return g


@triton.jit
def reciprocal(d):
    """1 / d within an ulp, of the hardware."""
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [d], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def reciprocal_root(d):
    """1 / √d within an ulp or two, of the hardware."""
    return tl.inline_asm_elementwise(
        "rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [d], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def quotient(g, d):
    """`quotient_by` of csrc/formulas/division.h."""
    r = reciprocal(d)
    r = tl.fma(r, tl.fma(-d, r, tl.full(d.shape, 1.0, tl.float32)), r)
    q = g * r
    return tl.fma(r, tl.fma(-d, q, g), q)


@triton.jit
def root(d):
    """`root_by` of csrc/formulas/division.h."""
    r = reciprocal_root(d)
    s = d * r
    return tl.fma(tl.fma(-s, s, d), 0.5 * r, s)


@triton.jit
def quick_d3(g, d, KIND: tl.constexpr):
    """`d3` of g and d = |θ| + ε, exact between the bounds of `quick_bounds`; for NVIDIA's GPUs."""
    if KIND == "g/√d":
        return quotient(g, root(d))
    elif KIND == "g/d":
        return quotient(g, d)
    else:
        return quotient(g, d * d)


QUICK_KINDS = ("g/√d", "g/d", "g/dd")  # products are quick as they are
HIGH_KEY = tl.constexpr(0x7E800000)  # the bits of 2^126
HIGH_SCORE = 2.0**126


def quick_bounds(exp: float, eps: float) -> tuple[int, float]:
    """(low, widest): a tile's largest quick score is exact where its key is from `low` on and below HIGH_KEY,
    and no d is above `widest`. `with_bounds` of csrc/cuda/stream.h says why.
    """
    low = max(2.0**-98 / eps**exp, 2.0**-120) if eps >= 2.0**-50 else HIGH_SCORE
    return struct.unpack("i", struct.pack("f", min(low, HIGH_SCORE)))[0], 2.0**60


@triton.jit
def key(score, g):
    """The bits of the score, in the order of scores; 0 where g is subnormal or the score is not finite.

    Subnormal scores remain: `normal_key` drops them, and one call after a maximum suffices.
    """
    bits = score.to(tl.int32, bitcast=True)
    return tl.where((g >= SMALLEST_NORMAL) & (bits < INFINITE_KEY), bits, 0)


@triton.jit
def normal_key(key):
    """The key, or 0 where the score is subnormal and cannot be selected."""
    return tl.where(key >= LOWEST_KEY, key, 0)


@triton.jit
def d3_score_kernel(
    param, grad, out, numel, eps, exponent,
    KIND: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    g = tl.abs(load_wide(tl.load(grad), at, inside, GRAD, False))
    theta = g if KIND == "g" else load_wide(tl.load(param), at, inside, PARAM, False)
    score = d3(g, theta, eps, exponent, KIND)
    subnormal = (g < SMALLEST_NORMAL) | (score < SMALLEST_NORMAL)
    tl.store(out + at, tl.where(subnormal, 0.0, score), mask=inside)


def d3_score(param: Tensor, grad: Tensor, eps: float, exp: float) -> Tensor:
    """float32 scores in the parameter's shape, row-major. Other strides are read through a copy."""
    launch.check(param, grad)
    param, grad, device = param.contiguous(), grad.contiguous(), param.device
    out = torch.empty(param.shape, dtype=torch.float32, device=device)
    block = 1024
    launch.run(
        d3_score_kernel, triton.cdiv(out.numel(), block), 4, device,
        tables.addresses([param], device), tables.addresses([grad], device), out, out.numel(), eps,
        exponent(exp, device), kind_of(exp), launch.CODES[param.dtype], launch.CODES[grad.dtype], block,
    )  # fmt: skip
    return out
