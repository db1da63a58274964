"""`python -m benchmarks ranks`: an optimizer step of two processes that hold half of a model each.

Beside it, in turns: one process that has one half as its whole model, and two such processes at a time that
know nothing of each other, which share the machine's memory and nothing else. One thread for each process.
"""

import argparse
import json
import tempfile
from datetime import timedelta
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from benchmarks.machine import describe, results_path
from benchmarks.ours import Ours
from benchmarks.render import RESULTS, Bar, bar_rows, bars_table, table
from benchmarks.shapes import MODELS, Inputs, make_inputs

RANKS, EXP, BUDGET = 2, 1.0, 0.0017
KINDS = {"one": "one process, half of the model", "apart": "two, each with a half of its own"}
KINDS |= {"ranks": "two ranks, one model"}
_PATIENCE = timedelta(minutes=5)


def half(model: str, rank: int) -> Inputs:
    """One process's rows of each tensor."""
    inputs = make_inputs(model)
    weights, grads = ([t.chunk(RANKS)[rank].clone() for t in row] for row in (inputs.weights, inputs.grads))
    return Inputs(model, weights, grads)


def shared(inputs: Inputs) -> Inputs:
    """The same tensors as this rank's part of all ranks' model."""
    mesh = init_device_mesh("cpu", (RANKS,))
    both = (inputs.weights, inputs.grads)
    weights, grads = ([DTensor.from_local(t, mesh, [Shard(0)]) for t in row] for row in both)
    return Inputs(inputs.model, weights, grads)


def optimizer_of(inputs: Inputs) -> Ours:
    """Half of the budget is active from the first step on; a thousand steps would add the rest."""
    start = int(BUDGET * inputs.n_entries) // 2
    return Ours(inputs, start, max(1, start // 1000), EXP)


def process(rank: int, kind: str, options: argparse.Namespace, folder: str) -> None:
    """Writes into the folder: median seconds of a step, all active entries, bytes of this process's state."""
    torch.set_num_threads(1)
    inputs = half(options.model, rank)
    if kind != "one":  # two apart have a group to begin each step together
        dist.init_process_group("gloo", f"file://{folder}/meet-{kind}", _PATIENCE, RANKS, rank)
    ours = optimizer_of(shared(inputs) if kind == "ranks" else inputs)
    ours.step()
    seconds = []
    for _ in range(options.steps):
        if kind != "one":
            dist.barrier()
        begin = perf_counter()
        ours.step()
        seconds.append(perf_counter() - begin)
    torch.save((median(seconds), ours.active(), ours.state_bytes()), f"{folder}/{kind}-{rank}.pt")
    if kind != "one":
        dist.destroy_process_group()


def run(kind: str, options: argparse.Namespace) -> tuple[float, torch.Tensor, int]:
    """The slowest process's median seconds, the first one's active entries, the largest state in bytes."""
    processes = 1 if kind == "one" else RANKS
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(process, (kind, options, folder), nprocs=processes)
        found = [torch.load(f"{folder}/{kind}-{rank}.pt") for rank in range(processes)]
    seconds, active, state_bytes = zip(*found, strict=True)
    return max(seconds), active[0], max(state_bytes)


def check(options: argparse.Namespace, active: torch.Tensor) -> int:
    """Bytes of the state of one process with the whole model. AssertionError where it chose other entries."""
    whole = optimizer_of(make_inputs(options.model))
    for _ in range(1 + options.steps):
        whole.step()
    assert torch.equal(active, whole.active()), "the ranks chose other entries"
    return whole.state_bytes()


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Median milliseconds of a step by kind, over rounds in turns; bytes of a rank's and of a whole state."""
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    state_bytes = {}
    for turn in range(options.rounds):
        for kind, row in seconds.items():
            taken, active, state_bytes[kind] = run(kind, options)
            row.append(taken)
            if kind == "ranks" and turn == 0:
                state_bytes["whole"] = check(options, active)
    medians = {kind: round(1e3 * median(row), 3) for kind, row in seconds.items()}
    return {"median_ms": medians, "state_bytes": state_bytes}


def bars_of(results: dict) -> list[Bar]:
    medians, state = results["median_ms"], results["state_bytes"]
    share = state["ranks"] / state["whole"]
    return [
        Bar(
            "two ranks of half a model / one process with half: time", 1.3, medians["ranks"] / medians["one"]
        ),
        Bar("one of two ranks / one process with the whole model: state", 1.05 / RANKS, share),
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks ranks", description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="DeBERTa-v3-base")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "ranks")
    options = parser.parse_args(arguments)
    results = {"machine": describe(1), "model": options.model, **measure(options)}
    results["bars"] = bar_rows(bars_of(results))
    path = results_path(options.output, results["machine"])
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(table(["", "ms"], [[about, f"{results['median_ms'][kind]:.2f}"] for kind, about in KINDS.items()]))
    print(bars_table(results["bars"]))


if __name__ == "__main__":
    main()
