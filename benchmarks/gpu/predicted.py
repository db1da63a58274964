"""`python -m benchmarks gpu-predicted`: how fast the streaming kernels can be, from their machine code alone.

It compiles for each GPU, counts the instructions of the loops on their fast path with active entries (see
`machine_code`), and divides the time to issue them by the time to read the entries. Above 100 % a kernel is
bound by instructions, and reaches that much less of the bandwidth. Latency, tails and caches are left out.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu.compiled import (
    CSRC,
    KERNELS,
    TRITON_KINDS,
    Stream,
    compile_cuda,
    cuda_streams,
    nvcc,
    triton_stream,
)
from benchmarks.render import ROOT, replace_block, table

PAGE = ROOT / "docs" / "gpu.md"
MARKERS = "<!-- predicted:begin -->", "<!-- predicted:end -->"


class Gpu(NamedTuple):
    """bytes_per_s: of a good copy. fma, alu, mufu: lanes per clock of a multiprocessor; it issues 128."""

    architecture: str
    multiprocessors: int
    clock: float
    bytes_per_s: float
    fma: int
    alu: int = 64
    mufu: int = 16


GPUS = {
    "A100": Gpu("sm_80", 108, 1.41e9, 1.75e12, 64),
    "H200": Gpu("sm_90", 132, 1.755e9, 4.3e12, 128),
    "B200": Gpu("sm_100", 148, 1.85e9, 7.2e12, 128),
}
ISSUED, THREADS, REGISTERS = 128, 2048, 65536  # per clock, and what a multiprocessor holds


def issue_load(stream: Stream, gpu: Gpu) -> float:
    """The time to issue the instructions over the time to read the entries, at the copy's rate."""
    return _load(stream, gpu, stream.loop.issued, ISSUED)


def load(stream: Stream, gpu: Gpu) -> float:
    """The same of the busiest: the issue, or one pipe."""
    pipes = {"fma": gpu.fma, "alu": gpu.alu, "mufu": gpu.mufu}
    of_pipes = (_load(stream, gpu, stream.loop.on(pipe), lanes) for pipe, lanes in pipes.items())
    return max(issue_load(stream, gpu), *of_pipes)


def _load(stream: Stream, gpu: Gpu, count: int, lanes: int) -> float:
    entries_per_s = gpu.bytes_per_s / stream.entry_bytes
    return stream.per_entry(count) * entries_per_s / (gpu.multiprocessors * gpu.clock * lanes)


def bytes_in_flight(stream: Stream) -> int:
    """Per multiprocessor, as far as registers allow threads."""
    threads = min(THREADS, REGISTERS // (-(-stream.registers // 8) * 8) // 32 * 32)
    block = 32 if stream.kernel == "Triton" else 256
    return min(threads // block, 32) * block * stream.loop.lane_bytes


def streams(gpu: Gpu, folder: Path) -> list[Stream]:
    """Every streaming kernel, compiled for `gpu`."""
    found = []
    for source in KERNELS:
        found += cuda_streams(source, *compile_cuda(CSRC / "cuda" / f"{source}.cu", gpu.architecture, folder))
    for exp in TRITON_KINDS:
        found += [triton_stream(exp, dtype, gpu.architecture, folder) for dtype in ("float32", "bfloat16")]
    return sorted(found, key=lambda s: (s.kernel, s.dtype, s.exp))


def report(shown: tuple[str, ...]) -> str:
    """The table of the page: sm_90's code, and the predicted share of the bandwidth on every GPU."""
    with tempfile.TemporaryDirectory() as folder:
        found = {name: streams(gpu, Path(folder)) for name, gpu in GPUS.items()}
    of = {name: {s[:3]: s for s in rows} for name, rows in found.items()}
    header = ["stream, exp, dtype", "registers", "spilled", "code", "in flight", "instructions per entry"]
    header += ["issue load", *(f"{name}: of the copy" for name in GPUS)]
    lines = []
    for s in found["H200"]:
        if s.exp not in shown:
            continue
        sizes = [f"{n / 1e3:.0f} KB" for n in (s.code_bytes, bytes_in_flight(s))]
        counted = f"{s.per_entry(s.loop.issued):.1f}", f"{issue_load(s, GPUS['H200']):.0%}"
        shares = [_share(of[name].get(s[:3]), gpu) for name, gpu in GPUS.items()]
        first = f"{s.kernel}, {s.exp}, {s.dtype}", f"{s.registers}", f"{s.spills} B"
        lines.append([*first, *sizes, *counted, *shares])
    return table(header, lines)


def _share(stream: Stream | None, gpu: Gpu) -> str:
    return "–" if stream is None else f"{min(1.0, 1 / load(stream, gpu)):.0%}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu-predicted", description=__doc__)
    parser.add_argument("--exp", nargs="+", default=["0", "½", "1", "2"], help="default: 0 ½ 1 2")
    parser.add_argument("--update-page", action="store_true", help="write the table into docs/gpu.md")
    options = parser.parse_args(arguments)
    if nvcc() is None or os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("nvcc: expected a CUDA compiler and no TRITON_INTERPRET; pip install nvidia-cuda-nvcc")
    text = report(tuple(options.exp))
    print(text)
    if options.update_page:
        replace_block(PAGE, MARKERS, text)
