"""Bytes that a step allocates for a moment, and that a method keeps; a process for each (Linux only)."""

import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.cases import Case
from benchmarks.ours import Ours
from benchmarks.rivals import DenseAdamW, DenseMasking, Toolkit
from benchmarks.shapes import MODELS, make_inputs

METHODS = ("id3", "dense", "dense_plain", "toolkit", "adamw")
# glibc returns freed blocks to the system at once: no step's memory hides in the allocator.
EAGER_FREE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
_CLEAR_REFS = Path("/proc/self/clear_refs")


def supported() -> bool:
    return _CLEAR_REFS.exists()


def resident_bytes(peak: bool = False) -> int:
    """Resident memory of this process: the present one, or the largest since `forget_peak`."""
    field = "VmHWM" if peak else "VmRSS"
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def forget_peak() -> None:
    gc.collect()
    _CLEAR_REFS.write_text("5")


def _peak_above_resident(run: Callable[[], object]) -> int:
    """Bytes by which the process grew at most while `run` ran."""
    forget_peak()
    before = resident_bytes()
    run()
    return max(0, resident_bytes(peak=True) - before)


def _build(name: str, case: Case):
    """The method at the case's |Λ|, its step and its prepare; any entries may be the active ones."""
    n, _, start, k = case.counts()
    inputs = make_inputs(case.model)
    if name == "id3":
        method = Ours(inputs, start, k, case.exp)
        return method, method.step, None
    if name == "adamw":
        method = DenseAdamW(inputs)
        return method, method.step, None
    method = (Toolkit if name == "toolkit" else DenseMasking)(inputs, k, case.exp)
    method.start(torch.linspace(0, n - 1, start, dtype=torch.float64).long())
    return method, method.step_plain if name == "dense_plain" else method.step, method.prepare


def measure_in_process(name: str, model: str) -> dict[str, object]:
    """One method's row, measured in the calling process."""
    method, step, prepare = _build(name, Case(model))
    for _ in range(2):
        step()
        if prepare is not None:
            prepare()
    peak = _peak_above_resident(step)
    return {"model": model, "method": name, "peak_bytes": peak, "state_bytes": method.state_bytes()}


def measure_memory(models: list[str], threads: int) -> list[dict[str, object]]:
    """Per model and method: bytes a step takes for a moment (`peak_bytes`), bytes kept (`state_bytes`)."""
    env = os.environ | EAGER_FREE | {"OMP_NUM_THREADS": str(threads)}
    rows = []
    for model in models:
        for name in METHODS:
            command = [sys.executable, "-m", "benchmarks.memory", name, model]
            done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    return rows


def step_bound_bytes(model: str) -> int:
    """N/64 + 8·M + 32·|Λ|: the limit on a step's bytes beyond its state, O(k) left out."""
    _, tensors, n = MODELS[model]
    return n // 64 + 8 * tensors + 32 * Case(model).counts()[2]


if __name__ == "__main__":
    print(json.dumps(measure_in_process(*sys.argv[1:])))
