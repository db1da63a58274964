"""An integer hash in torch ops: for the random mask, and for the fingerprint of entries."""

import torch
from torch import Tensor

# splitmix64 (Steele, Lea, Flood 2014): its increment and two multipliers, as signed 64-bit integers.
INCREMENT = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - 2**64
_MULTIPLIER_2 = 0x94D049BB133111EB - 2**64
SLICE = 1 << 20  # entries hashed at once: 8 MiB of int64 per temporary

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(values: Tensor) -> Tensor:
    """The same memory as signed integers of the same width (2, 4 or 8 bytes)."""
    return values.view(_BITS[values.element_size()])


def shifted_right(z: Tensor, bits: int) -> Tensor:
    """The logical shift z >> bits: torch's shift of int64 tensors is arithmetic and copies the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def mix64(z: Tensor) -> Tensor:
    """splitmix64's output function of an int64 tensor; multiplications wrap modulo 2^64. Mutates nothing."""
    z = (z ^ shifted_right(z, 30)) * _MULTIPLIER_1
    z = (z ^ shifted_right(z, 27)) * _MULTIPLIER_2
    return z ^ shifted_right(z, 31)
