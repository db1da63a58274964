"""What a step allocates for a moment and what a method keeps, each in its own process (Linux only)."""

import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.cases import Case
from benchmarks.ours import Ours
from benchmarks.rivals import DenseAdamW, DenseMasking, Toolkit
from benchmarks.shapes import MODELS, make_inputs

METHODS = ("id3", "dense", "dense_plain", "toolkit", "adamw")


def supported() -> bool:
    return Path("/proc/self/clear_refs").exists()


def _status_bytes(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def _peak_above_resident(run) -> int:
    """Bytes by which the process grew at most while `run` ran."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    run()
    return max(0, _status_bytes("VmHWM") - before)


def _build(name: str, case: Case):
    """The method at the case's |Λ|, its step and its prepare; it does not matter which entries are active."""
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


def _measure_here(name: str, model: str) -> dict[str, object]:
    method, step, prepare = _build(name, Case(model))
    for _ in range(2):
        step()
        if prepare is not None:
            prepare()
    peak = _peak_above_resident(step)
    return {"model": model, "method": name, "peak_bytes": peak, "state_bytes": method.state_bytes()}


def measure_memory(models: list[str], threads: int) -> list[dict[str, object]]:
    """Per model and method: bytes a step takes for a moment (`peak_bytes`), bytes kept (`state_bytes`)."""
    # Freed blocks go back to the system at once: none of a step's memory hides in the allocator.
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    env = os.environ | allocator | {"OMP_NUM_THREADS": str(threads)}
    rows = []
    for model in models:
        for name in METHODS:
            command = [sys.executable, "-m", "benchmarks.memory", name, model]
            done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    return rows


def step_bound_bytes(model: str) -> int:
    """N/64 + 8·M + 32·|Λ|: what a step of ours may take beyond its state, but for O(k)."""
    _, tensors, n = MODELS[model]
    return n // 64 + 8 * tensors + 32 * Case(model).counts()[2]


if __name__ == "__main__":
    print(json.dumps(_measure_here(*sys.argv[1:])))
