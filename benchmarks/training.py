"""`python -m benchmarks training`: whole training steps of full fine-tuning, LoRA, SHiRA and ID3.

Forward, backward and step, interleaved in a process, and that in several processes, since where a process has
its memory moves a method by some percent in all its rounds; peak memory in a fresh process for each method.
Needs transformers and peft.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.machine import describe, multiplies_bfloat16, results_path
from benchmarks.memory import EAGER_FREE, forget_peak, resident_bytes
from benchmarks.methods import MODELS, Method, batch, built, methods_of, random_model
from benchmarks.render import RESULTS, bars_table
from benchmarks.training_report import SPARSE, TRAINING_PAGES, bars_of, draw, tables

CASES = (
    ("MiniLM", "float32", 512),
    ("MiniLM", "float32", 2048),
    ("GPT-2", "float32", 512),
    ("GPT-2", "float32", 2048),
    ("Llama", "float32", 512),
    ("Llama", "float32", 2048),
    ("Llama", "bfloat16", 512),
)


def check(methods: dict[str, Method], dtype: torch.dtype) -> None:
    """AssertionError where ID3's variants differ after one step on the same batch.

    Released gradients give the dense bits. A sparse backward pass multiplies in other blocks, so that scores
    differ by rounding: of the entries 99.9 % are the same, and the weights are close.
    """
    ours = [methods[name] for name in ("dense", "released", "sparse")]
    dense, released, sparse = ({*_places(method)} for method in ours)
    assert dense == released and len(dense & sparse) >= 0.999 * len(dense), "another choice of entries"
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for one, other, third in zip(*(method.model.parameters() for method in ours), strict=True):
        assert torch.equal(one, other), "released gradients changed the result"
        torch.testing.assert_close(third, one, rtol=tolerance, atol=tolerance)


def _places(method: Method) -> list[tuple[int, int]]:
    """(number of the tensor, flat index) of every active entry."""
    touched = enumerate(method.optimizer.touched())
    return [(i, index) for i, entry in touched for index in entry.indices.tolist()]


def times_in_process(model: str, dtype: str, tokens: int, rounds: int) -> dict[str, object]:
    """Milliseconds of a step by method; `<name>_select`: of a step that selects, of a sparse method."""
    start = random_model(model, getattr(torch, dtype))
    methods = {name: built(start, name) for name in methods_of(model)}
    losses = {name: method.step(batch(start, tokens, 0)) for name, method in methods.items()}
    first = losses.pop("full")
    assert all(abs(loss - first) < 0.02 * abs(first) for loss in losses.values()), losses
    check(methods, getattr(torch, dtype))
    seconds: dict[str, list[float]] = {}
    names = sorted(methods)
    for turn in range(rounds + 1):
        ids = batch(start, tokens, 1 + turn)
        for name in random.sample(names, len(names)):  # each behind another one
            for kind in ("", "_select") if name in SPARSE else ("",):  # the first step has selected
                begin = time.perf_counter()
                methods[name].step(ids)
                seconds.setdefault(name + kind, []).append(time.perf_counter() - begin)
    row = {"model": model, "dtype": dtype, "tokens": tokens, "rounds": rounds}
    row["entries"] = sum(p.numel() for p in start.parameters())
    return row | {"ms": {name: round(statistics.median(s[1:]) * 1e3, 2) for name, s in seconds.items()}}


def pooled(rows: list[dict[str, object]]) -> dict[str, object]:
    """One row of several processes' rows: medians of their medians."""
    times = [row["ms"] for row in rows]
    ms = {name: round(statistics.median(own[name] for own in times), 2) for name in times[0]}
    return rows[0] | {"processes": len(rows), "ms": ms}


def memory_in_process(model: str, dtype: str, tokens: int, method: str) -> dict[str, object]:
    """Bytes of four steps above the process with the model alone."""
    torch.nn.Linear(64, 64)(torch.ones(4, 64)).sum().backward()  # threads and libraries
    start = random_model(model, getattr(torch, dtype))
    before = resident_bytes()
    trained = built(start, method)
    copied = sum(p.nbytes for p in start.parameters())
    ids, peaks = batch(start, tokens, 0), []
    for _ in range(4):
        forget_peak()
        trained.step(ids)
        peaks.append(resident_bytes(peak=True) - before - copied)
    # A sparse method's steps 0 and 2 select; what a step between needs is that of the larger of 1 and 3.
    row = {"model": model, "dtype": dtype, "tokens": tokens, "method": method}
    return row | {"peak_bytes": max(peaks[1:]), "between_bytes": max(peaks[1], peaks[3])}


def _fresh(options: argparse.Namespace, case: tuple[str, str, int], method: str | None) -> dict[str, object]:
    """The measurement in a process of its own; one of memory returns freed blocks to the system at once."""
    env = os.environ | {"OMP_NUM_THREADS": str(options.threads)} | (EAGER_FREE if method else {})
    command = [sys.executable, "-m", "benchmarks.training", "--in-process", json.dumps([*case, method])]
    command += [f"--rounds={options.rounds}", f"--threads={options.threads}"]
    done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks training", description=__doc__)
    parser.add_argument("--model", action="append", choices=MODELS, help="default: all")
    parser.add_argument("--tokens", type=int, action="append", help="of a batch; default: 512 and 2048")
    parser.add_argument("--rounds", type=int, default=3, help="in each process; default: %(default)s")
    parser.add_argument("--processes", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS / "training")
    parser.add_argument("--resume", action="store_true", help="measure the cases that the results lack")
    parser.add_argument("--report", type=Path, metavar="JSON", help="measure nothing; render this file again")
    parser.add_argument("--update-pages", action="store_true", help="put the tables into README and the page")
    parser.add_argument("--in-process", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    if options.in_process:
        *case, method = json.loads(options.in_process)
        row = memory_in_process(*case, method) if method else times_in_process(*case, options.rounds)
        print(json.dumps(row))
        return
    path = options.report or measure(options)
    results = json.loads(path.read_text())
    draw(results, path.with_suffix(".png"))
    if options.update_pages:
        TRAINING_PAGES.update(results, path.with_suffix(".png"))
    print(tables(results), bars_table(results["bars"]), sep="\n\n")


def _earlier(path: Path, machine: dict[str, object]) -> dict[str, object]:
    """Results to go on from. SystemExit where another machine, torch or number of threads gave them."""
    results = json.loads(path.read_text())
    for name in machine.keys() - {"commit", "date"}:
        if (saved := results["machine"].get(name)) != machine[name]:
            sys.exit(f"--resume: expected results of {name} {machine[name]}, got {saved} in {path}")
    return results


def measure(options: argparse.Namespace) -> Path:
    """Measures every case, and writes the results file after each."""
    machine = describe(options.threads)
    path = results_path(options.output, machine)
    results: dict[str, object] = {"machine": machine, "times": [], "memory": []}
    if options.resume and path.exists():
        results = _earlier(path, machine)
    done = {(row["model"], row["dtype"], row["tokens"]) for row in results["times"]}
    models, tokens = options.model or MODELS, options.tokens or (512, 2048)
    cases = [case for case in CASES if case[1] != "bfloat16" or multiplies_bfloat16()]
    cases = [case for case in cases if case not in done]
    for case in (case for case in cases if case[0] in models and case[2] in tokens):
        results["times"].append(pooled([_fresh(options, case, None) for _ in range(options.processes)]))
        for method in methods_of(case[0]):
            results["memory"].append(_fresh(options, case, method))
        results["bars"] = bars_of(results)
        path.write_text(json.dumps(results, indent=1) + "\n")
    return path


if __name__ == "__main__":
    main()
