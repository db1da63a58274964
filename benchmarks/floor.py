"""The bare streaming read: the time that no method which looks at every gradient can beat."""

import os
import sys
from functools import cache
from pathlib import Path

import torch
from torch.utils.cpp_extension import load


@cache
def _load() -> None:
    # ninja may lie beside this Python and not be on the PATH.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    load(
        name="id3_bench_floor",
        sources=[str(Path(__file__).with_name("floor.cpp"))],
        extra_cflags=["-O3", "-march=native", "-fopenmp"],
        extra_ldflags=["-fopenmp"],
        is_python_module=False,
    )


def bare_read(tensors: list[torch.Tensor], prefetch: bool) -> int:
    """Read the contiguous `tensors` once, with torch's threads; returns their largest 32-bit word.

    prefetch: requests lines 2 KiB ahead. Which way is faster depends on the processor and on where its
        pages lie.
    """
    _load()
    return torch.ops.id3_bench.bare_read(tensors, prefetch)
