"""The device that is measured, and how: events around each run, caches flushed, medians.

Without a GPU everything runs on the CPU, to see that it runs; such times mean nothing.
"""

import importlib.metadata as metadata
import subprocess
import time
from collections.abc import Callable

import torch

from benchmarks.machine import software
from benchmarks.measure import summary
from id3_kernels import available_backends

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
BACKENDS = ("cuda", "triton") if ON_GPU else ("reference" if available_backends()["cpu"] else "cpu",)
_FLUSHED_BYTES = (256 << 20) if ON_GPU else 1  # larger than every L2 cache
_WARM_UP = 3  # runs that load and compile


def wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def timed(run: Callable[[], object], rounds: int, before: Callable[[], object] = lambda: None) -> dict:
    """p20, median and p80 of `run` in milliseconds, on the device; `before` is not timed.

    No synchronisation between rounds, as in training, where the backward pass is still running.
    """
    flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device=DEVICE)
    for _ in range(_WARM_UP):
        before()
        run()
    wait()
    return summary([seconds() for seconds in [_one(run, before, flushed) for _ in range(rounds)]])


def _one(run, before, flushed: torch.Tensor) -> Callable[[], float]:
    """Starts one run; the returned function waits for its end and gives its seconds."""
    before()
    flushed.zero_()
    if not ON_GPU:
        began = time.perf_counter()
        run()
        took = time.perf_counter() - began
        return lambda: took
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()

    def seconds() -> float:
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return seconds


def timed_on_host(run: Callable[[], object], rounds: int, after: Callable[[], object] = lambda: None) -> dict:
    """p20, median and p80 on the host: the time until `run` returns while the GPU has no other work."""
    seconds = []
    for _ in range(rounds + _WARM_UP):
        wait()
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
        after()
    wait()
    return summary(seconds[_WARM_UP:])


def peak_bytes(run: Callable[[], object]) -> int | None:
    """Bytes of `run`'s peak above the allocation before and after it; None without a GPU."""
    if not ON_GPU:
        return None
    wait()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    wait()
    return torch.cuda.max_memory_allocated() - max(before, torch.cuda.memory_allocated())


def give_back() -> None:
    if ON_GPU:
        torch.cuda.empty_cache()


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return lines[0] if lines else "unknown"


def describe() -> dict[str, object]:
    """The GPU, its driver and the versions of what runs on it."""
    versions = {name: _version(name) for name in ("triton", "transformers", "peft")}
    gpu = torch.cuda.get_device_properties(0) if ON_GPU else None
    return {
        "gpu": gpu.name if gpu else "none",
        "is_gpu": ON_GPU,
        "memory_gib": round(gpu.total_memory / 2**30, 1) if gpu else None,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        **versions,
        "backends": available_backends(),
        **software(),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
