"""Runs the grids, each resumable from its file in `runs/quality`, and writes their results as JSON.

    python -m benchmarks quality --model DIR --data FOLDER
    python -m benchmarks quality --model DIR --part main --task banking77
    python -m benchmarks quality --export

Stop it at any moment; the same command goes on. `--export` writes what has ended so far.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from benchmarks.quality.parts import PARTS, Part, with_rates
from benchmarks.quality.report import QUALITY_RESULTS, write_pages
from benchmarks.quality.tasks import TASKS, prepare
from benchmarks.render import ROOT
from id3_optim.cli import main as id3_optim_main

RUNS = ROOT / "runs" / "quality"


def command(options: argparse.Namespace, name: str, task_name: str, files: tuple[Path, Path]) -> list[str]:
    """The words of `id3-optim compare` for a part on a task."""
    part, task = PARTS[name], TASKS[task_name]
    steps = options.steps or task.steps
    given = ["compare", "--model", options.model, "--pooling", "mean", "--task", "classification"]
    given += ["--train", files[0], "--eval", files[1], "--text-column", *task.text]
    given += ["--label-column", task.label, "--max-length", task.length, "--batch-size", task.batch]
    given += ["--results", options.runs / f"{name}-{task_name}.sqlite", "--metric", task.metric]
    given += ["--methods", *(with_rates(method, part.tuned) for method in methods_of(options, part))]
    given += ["--budgets", *part.budgets, "--seeds", *range(options.seeds or part.seeds)]
    given += ["--steps", steps, "--tune-steps", max(1, steps // 2), "--eval-every", max(1, steps // 10)]
    given += ["--log-every", max(1, steps // 50), "--jobs", options.jobs]
    return [*map(str, given), *(["--cpu"] if options.cpu else [])]


def methods_of(options: argparse.Namespace, part: Part) -> tuple[str, ...]:
    return tuple(m for m in part.methods if not options.method or m in options.method)


def grids(options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """(part, task), the main part first."""
    for name, part in PARTS.items():
        if not options.part or name in options.part:
            yield from ((name, task) for task in part.tasks if not options.task or task in options.task)


def export(options: argparse.Namespace, name: str, task: str) -> Path | None:
    """Writes the JSON of a grid, whole or not; None where it has no results."""
    from id3_optim.cli.compare.grid import relevant
    from id3_optim.cli.compare.store import Store
    from id3_optim.cli.compare.summary import exported

    source = options.runs / f"{name}-{task}.sqlite"
    if not source.is_file():
        return None
    with Store(source, create=False) as store:
        plan = store.plan()
        results = store.results(plan)
        used = relevant(plan, results)
        report = exported(plan, {trial: results[trial] for trial in used})
    report = {"part": name, "task": task, "rows_subset": TASKS[task].rows, **report}
    path = options.output / f"{name}-{task}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    return path


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks quality", description=__doc__)
    parser.add_argument("--model", help="folder or hub name of MiniLM-L6, or of another encoder")
    parser.add_argument("--data", type=Path, help="folder with CoLA, MRPC, SST-2 and banking77")
    parser.add_argument("--part", nargs="+", choices=PARTS, help="default: all, the main one first")
    parser.add_argument("--task", nargs="+", choices=TASKS, help="default: all of a part")
    parser.add_argument("--method", nargs="+", help="only these of a part's methods")
    parser.add_argument("--seeds", type=int, help="how many (default: the part's)")
    parser.add_argument("--steps", type=int, help="of a run (default: the task's)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--cpu", action="store_true", help="use the CPU, even if there is a GPU")
    parser.add_argument("--runs", type=Path, default=RUNS, help="where the grids go on from")
    parser.add_argument("--output", type=Path, default=QUALITY_RESULTS, help="folder of the JSON files")
    parser.add_argument("--export", action="store_true", help="run nothing: write what has ended so far")
    parser.add_argument("--no-pages", action="store_true", help="leave README and docs/evidence.md alone")
    options = parser.parse_args(arguments)
    if options.model is None and not options.export:
        parser.error("--model: expected a model with a run, got none; --export needs none")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs the grids one after the other; returns the exit status of the first that failed, else 0."""
    options = _parse(arguments)
    options.runs.mkdir(parents=True, exist_ok=True)
    for name, task in grids(options):
        if not options.export:
            files = prepare(task, options.data, options.runs / "data")
            print(f"{name}, {task}: {PARTS[name].about}", flush=True)
            if status := id3_optim_main(command(options, name, task, files)):
                return status
        export(options, name, task)
    if not options.no_pages:
        write_pages(options.output)
    return 0
