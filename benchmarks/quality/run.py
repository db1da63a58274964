"""Runs the grids and writes their results as JSON.

    python -m benchmarks quality --model DIR --data FOLDER
    python -m benchmarks quality --model DIR --part main --task banking77
    python -m benchmarks quality --export

Stop it at any moment; the same command goes on, on another machine from the JSON files. All parts on a task
share their runs. `--export` writes what has ended so far.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from benchmarks.quality.base import make_base
from benchmarks.quality.parts import PARTS, Part, with_rates
from benchmarks.quality.report import QUALITY_RESULTS, write_pages
from benchmarks.quality.tasks import TASKS, Task, prepare
from benchmarks.render import ROOT
from id3_optim.cli import budget
from id3_optim.cli import main as id3_optim_main
from id3_optim.cli.compare.grid import Plan, relevant
from id3_optim.cli.compare.methods import read_method
from id3_optim.cli.compare.store import Store
from id3_optim.cli.compare.summary import exported

RUNS = ROOT / "runs" / "quality"


def command(options: argparse.Namespace, name: str, task_name: str, files: tuple[Path, Path]) -> list[str]:
    """The words of `id3-optim compare` for a part on a task."""
    part, task = PARTS[name], TASKS[task_name]
    given = ["compare", *model_and_rows(options, task, files), "--task", task.kind]
    given += ["--max-length", task.length, "--batch-size", task.batch]
    given += ["--results", results_of(options, name, task_name), "--metric", task.metric]
    given += ["--methods", *(with_rates(method, part) for method in methods_of(options, part))]
    given += ["--budgets", *part.budgets, "--seeds", *range(options.seeds or part.seeds)]
    for setting, steps in lengths(options, part, task).items():
        given += [f"--{setting.replace('_', '-')}", steps]
    given += ["--group-by-length"]
    given += ["--jobs", 1, "--threads", os.cpu_count()] if part.timed else ["--jobs", options.jobs]
    return [*map(str, given), *(["--cpu"] if options.cpu else [])]


def lengths(options: argparse.Namespace, part: Part, task: Task) -> dict[str, int]:
    """How many steps, by the settings of `id3-optim compare`."""
    steps = options.steps or part.steps or task.steps
    tune = max(1, options.steps // 2) if options.steps else task.tune
    every = {"eval_every": max(1, steps // task.evaluations), "log_every": max(1, steps // 50)}
    return {"steps": steps, "tune_steps": tune, **every}


def model_and_rows(options: argparse.Namespace, task: Task, files: tuple[Path, Path]) -> list[object]:
    """The options that differ between classifiers and the causal model, which `make_base` has made."""
    given = ["--train", files[0], "--eval", files[1]]
    if task.kind == "causal-lm":
        base = options.runs / "base"
        return ["--model", base, *given, "--also-eval", base / "kept.jsonl"]
    given += ["--text-column", *task.text, "--label-column", task.label]
    return ["--model", options.model, "--pooling", "mean", *given]


def methods_of(options: argparse.Namespace, part: Part) -> tuple[str, ...]:
    return tuple(m for m in part.methods if not options.method or m in options.method)


def grids(options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """(part, task), the main part first."""
    for name, part in PARTS.items():
        if not options.part or name in options.part:
            yield from ((name, task) for task in part.tasks if not options.task or task in options.task)


def results_of(options: argparse.Namespace, name: str, task: str) -> Path:
    """The file of a task's runs, which all parts share; times of a machine have one of their own."""
    return options.runs / f"{'time-' if PARTS[name].timed else ''}{task}.sqlite"


def restore(options: argparse.Namespace, name: str, task: str) -> None:
    """Takes the runs of a task's JSON files into its file of results: times of another machine stay away."""
    if PARTS[name].timed:
        return
    with Store(results_of(options, name, task)) as store:
        for part in (part for part in PARTS if not PARTS[part].timed):
            if (path := options.output / f"{part}-{task}.json").is_file():
                store.restore(json.loads(path.read_text())["runs"])


def whole(plan: Plan, part: Part, steps: dict[str, int]) -> Plan:
    """The grid of a whole part, whose runs have these `lengths`, from any grid on the same task."""
    own = dict(steps)
    plan = replace(plan, tune_steps=own.pop("tune_steps"), settings=replace(plan.settings, **own))
    methods = tuple(read_method(with_rates(method, part)) for method in part.methods)
    budgets, seeds = tuple(map(budget, part.budgets)), tuple(range(part.seeds))
    return replace(plan, methods=methods, budgets=budgets, seeds=seeds, against=methods[0].name)


def export(options: argparse.Namespace, name: str, task: str) -> Path | None:
    """Writes the JSON of a part on a task, whole or not; None where it has no results."""
    source = results_of(options, name, task)
    if not source.is_file():
        return None
    with Store(source, create=False) as store:
        plan = whole(store.plan(), PARTS[name], lengths(options, PARTS[name], TASKS[task]))
        results = store.results(plan)
    used = {trial: results[trial] for trial in relevant(plan, results)}
    if not used:
        return None
    report = {"part": name, "task": task, "rows_subset": TASKS[task].rows, **exported(plan, used)}
    if PARTS[name].causal:
        report["base"] = json.loads((options.runs / "base" / "base.json").read_text())
    if PARTS[name].timed:
        report["machine"] = describe(plan.threads)
    path = options.output / f"{name}-{task}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text_of(report))
    return path


def text_of(report: dict[str, Any]) -> str:
    """JSON with a line for each row and run."""
    lists = ("rows", "runs")
    fields = [f"{json.dumps(name)}: {json.dumps(report[name])}" for name in report if name not in lists]
    for name in lists:
        items = ",\n".join(json.dumps(item) for item in report[name])
        fields.append(f"{json.dumps(name)}: [\n{items}\n]")
    return "{" + ",\n".join(fields) + "}\n"


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
            restore(options, name, task)
            if PARTS[name].causal:
                make_base(options.runs / "base")
            print(f"{name}, {task}: {PARTS[name].about}", flush=True)
            if status := id3_optim_main(command(options, name, task, files)):
                return status
        export(options, name, task)
    if not options.no_pages:
        write_pages(options.output)
    return 0
