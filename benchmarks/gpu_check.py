"""`make gpu-check`: tests and measures on a machine with a GPU and no network, after a build in place.

Parts, each of use by itself: tests, sanitize, bench. Every part writes into one JSON as it ends, and the
table comes last. On a machine without a GPU `--part bench --quick` runs the same code on the CPU, to see that
it runs; its times mean nothing.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from id3_kernels import Entries, available_backends, reference
from id3_kernels.backend import kernels_for
from id3_optim import D3, ID3AdamW

ROOT = Path(__file__).parent.parent
PARTS = ("tests", "sanitize", "bench")
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
FLUSHED_BYTES = 256 << 20  # more than any L2 cache holds
EPS, SHARE, STEPS = 1.0, 0.001, 3000
CAPTURED = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}


def llama_shapes(layers: int, hidden: int, inner: int, vocabulary: int) -> list[tuple[int, ...]]:
    """The tensors of a Llama without grouped queries, embeddings untied."""
    layer = [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner), (hidden,), (hidden,)]
    return [(vocabulary, hidden), *(layer * layers), (hidden,), (vocabulary, hidden)]


def deberta_shapes() -> list[tuple[int, ...]]:
    from benchmarks.shapes import deberta

    return [shape for _, shape in deberta()]


CASES = {
    "184M float32": (deberta_shapes, torch.float32),
    "184M bfloat16": (deberta_shapes, torch.bfloat16),
    "1.3B bfloat16": (lambda: llama_shapes(24, 2048, 5504, 32000), torch.bfloat16),
    "6.7B bfloat16": (lambda: llama_shapes(32, 4096, 11008, 32000), torch.bfloat16),
}
QUICK = {"0.2M float32": (lambda: llama_shapes(2, 64, 172, 500), torch.float32)}


def median_ms(run: Callable[[], object], rounds: int, before: Callable[[], object] = lambda: None) -> float:
    """The median milliseconds of `run` with cold caches, by events on a GPU; `before` is not timed."""
    flushed = torch.empty(FLUSHED_BYTES if ON_GPU else 1, dtype=torch.int8, device=DEVICE)
    times = []
    for _ in range(rounds + 3):
        before()
        flushed.zero_()
        if ON_GPU:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            began = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times[3:])  # the first ones load and compile


def copy_bytes_per_ms(rounds: int) -> float:
    """Bytes read and written by a device-to-device copy, per millisecond: the ceiling of this very run."""
    source = torch.empty((4 << 30) if ON_GPU else (1 << 22), dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / median_ms(lambda: target.copy_(source), rounds)


def make(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """Parameters with gradients, both with heavy tails, never zeros."""
    generator, params = torch.Generator(DEVICE).manual_seed(0), []
    for shape in shapes:
        weight, grad = (torch.randn(shape, generator=generator, device=DEVICE, dtype=dtype) for _ in range(2))
        params.append(torch.nn.Parameter(weight.mul_(0.04)))
        params[-1].grad = grad.mul_(torch.randn((), generator=generator, device=DEVICE).exp() * 1e-4)
    return params


def check_selection(kernels, params, active: Entries, k: int) -> None:
    """Selection must be the reference's on a part of the list before it is timed."""
    few = [p.detach() for p in params[-4:]]
    grads = [p.grad for p in params[-4:]]
    arguments = (few, grads, *Entries.empty(4, DEVICE), torch.tensor([k], device=DEVICE), k, EPS, 1.0)
    got, expected = kernels.select_topk(*arguments), reference.select_topk(*arguments)
    assert all(map(torch.equal, got, expected)), "selection differs from the reference"


def measure_case(name: str, shapes, dtype: torch.dtype, bytes_per_ms: float, rounds: int) -> list[dict]:
    params = make(shapes, dtype)
    n = sum(p.numel() for p in params)
    budget = int(SHARE * n)
    k = max(budget // STEPS, 1)
    floor_ms = 2 * n * dtype.itemsize / bytes_per_ms
    row = {"case": name, "n": n, "k": k, "floor_ms": floor_ms}
    rows = []
    for backend in ("cuda", "triton") if ON_GPU else ("cpu",):
        if available_backends()[backend]:
            rows.append(row | {"method": backend, "skipped": available_backends()[backend]})
            continue
        rows.append(row | measure_backend(backend, params, budget, k, rounds))
    adamw = torch.optim.AdamW(params, fused=True)
    rows.append(row | {"method": "AdamW(fused=True)", "step_ms": median_ms(adamw.step, rounds)})
    return rows


def measure_backend(backend: str, params, budget: int, k: int, rounds: int) -> dict:
    optimizer = ID3AdamW(
        params, lr=1e-6, budget=budget, total_steps=STEPS, heuristic=D3(EPS, 1.0), backend=backend
    )
    optimizer.step()
    shard, kernels = optimizer._shards[0], kernels_for(DEVICE, backend)
    grads, wanted = [p.grad for p in params], (torch.tensor([k], device=DEVICE), k)
    check_selection(kernels, params, shard.active, k)
    cpu_began = time.perf_counter()
    optimizer.step()
    host_ms = 1e3 * (time.perf_counter() - cpu_began)
    return {
        "method": backend,
        "select_ms": median_ms(
            lambda: kernels.select_topk(shard.params, grads, *shard.active, *wanted, EPS, 1.0), rounds
        ),
        "step_ms": median_ms(optimizer.step, rounds),
        "host_ms_of_one_step": host_ms,
        "n_active": optimizer.n_active,
        "peak_bytes": torch.cuda.max_memory_allocated() if ON_GPU else None,
    }


def part_tests(options) -> dict:
    command = [sys.executable, "-m", "pytest", "tests/kernels", "-q", "-p", "no:cacheprovider", "-x"]
    command += [
        "--deselect",
        "tests/kernels/test_triton_compile.py",
        "--deselect",
        "tests/kernels/test_cuda_compile.py",
    ]
    command += ["-k", "cuda or triton"]
    ran = subprocess.run(command, cwd=ROOT, **CAPTURED)
    return {"ok": ran.returncode == 0, "tail": ran.stdout[-4000:]}


def part_sanitize(options) -> dict:
    """compute-sanitizer over the smallest selection tests; "skipped" where the tool does not run here."""
    results = {}
    tests = ["tests/kernels/test_crafted.py", "-k", "cuda", "-q", "-p", "no:cacheprovider"]
    for tool in ("memcheck", "racecheck", "initcheck"):
        command = [
            "compute-sanitizer",
            "--tool",
            tool,
            "--error-exitcode",
            "9",
            sys.executable,
            "-m",
            "pytest",
        ]
        try:
            ran = subprocess.run([*command, *tests], cwd=ROOT, timeout=150, **CAPTURED)
        except (FileNotFoundError, subprocess.TimeoutExpired) as error:
            results[tool] = {"skipped": type(error).__name__}
            continue
        results[tool] = {"ok": ran.returncode == 0, "tail": ran.stdout[-1500:]}
    return results


def part_bench(options) -> dict:
    rounds = 5 if options.quick else 30
    bytes_per_ms = copy_bytes_per_ms(rounds)
    rows = []
    for name, (shapes, dtype) in (QUICK if options.quick else CASES).items():
        try:
            rows += measure_case(name, shapes(), dtype, bytes_per_ms, rounds)
        except torch.OutOfMemoryError as error:
            rows.append({"case": name, "method": "all", "skipped": str(error).splitlines()[0]})
        if ON_GPU:
            torch.cuda.empty_cache()
    return {"copy_tb_per_s": bytes_per_ms / 1e9, "rows": rows}


def machine() -> dict:
    import platform

    from benchmarks.machine import _commit

    gpu = torch.cuda.get_device_name() if ON_GPU else "none"
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}
    return {"gpu": gpu, **versions, "commit": _commit(), "backends": available_backends()}


def table(results: dict) -> str:
    lines = [f"{part}: {results[part].get('ok', results[part])}" for part in PARTS[:2] if part in results]
    bench = results.get("bench")
    if bench:
        lines.append(
            f"copy {bench['copy_tb_per_s']:.2f} TB/s; multiples of the floor (θ and g read once at that rate)"
        )
    for row in bench["rows"] if bench else []:
        if "skipped" in row:
            lines.append(f"{row['case']:>16} {row['method']:<18} skipped: {row['skipped']}")
            continue
        times = {name: row[name] for name in ("select_ms", "step_ms") if name in row}
        shown = ", ".join(f"{n} {ms:.3f} ({ms / row['floor_ms']:.2f}×)" for n, ms in times.items())
        lines.append(f"{row['case']:>16} {row['method']:<18} floor {row['floor_ms']:.3f} ms, {shown}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--part", choices=PARTS, nargs="+", default=PARTS, help="default: all")
    parser.add_argument("--quick", action="store_true", help="a toy model, to see that it runs")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "gpu-check.json")
    options = parser.parse_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(options.output.read_text()) if options.output.exists() else {}
    for part in options.part:
        began = time.perf_counter()
        results[part] = globals()[f"part_{part}"](options)
        results[part]["seconds"] = round(time.perf_counter() - began, 1)
        results["machine"] = machine()
        options.output.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
