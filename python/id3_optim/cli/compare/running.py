"""From the options of `id3-optim compare` to results: the plan, and the loop over what is missing."""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .. import tasks
from ..checkpoints import run_record
from ..settings import Settings
from ..start import check_model
from ..tasks import Task
from ..train import prepare
from .grid import (
    Cell,
    Plan,
    Results,
    Trial,
    all_runs,
    all_steps,
    is_loss,
    key,
    missing,
    relevant,
    score,
    settings_of,
)
from .store import Store
from .summary import shown_budget
from .workers import runner

# Of each kind of task; the first one is the default.
_METRICS = {
    "classification": ("accuracy", "matthews", "loss"),
    "regression": ("pearson", "spearman", "loss"),
    "token-classification": ("f1", "precision", "recall", "accuracy", "loss"),
    "causal-lm": ("token_loss", "perplexity", "loss"),
}


def plan_of(arguments: argparse.Namespace, settings: Settings, store: Store) -> tuple[Plan, Task]:
    """The grid of the options, and the rows of both files. Raises ValueError where these do not fit."""
    task = tasks.task_of(settings)
    check_model(settings.model, task, settings.pooling)
    metrics = _METRICS[task.kind]
    if arguments.metric not in (None, *metrics):
        raise ValueError(f"--metric: expected one of {', '.join(metrics)}, got {arguments.metric}")
    plan = Plan(
        settings,
        tuple(arguments.methods),
        tuple(arguments.budgets),
        tuple(sorted(rate for rates in arguments.lr for rate in rates)),
        tuple(arguments.seeds),
        arguments.tune_steps or max(1, settings.steps // 2),
        arguments.held_out,
        arguments.metric or metrics[0],
        arguments.against or arguments.methods[0].name,
        arguments.threads or store.threads() or max(1, _cores() // arguments.jobs),
        _facts(settings, task),
    )
    return plan, task


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _facts(settings: Settings, task: Task) -> dict[str, Any]:
    """Hashes of what the runs read, and the kind of device: results of other ones are not taken."""
    record = run_record(settings, task)
    flipped = run_record(settings, replace(task, train=task.eval))
    also = run_record(settings, replace(task, train=task.also)) if task.also else {}
    on_cpu = settings.cpu or not torch.accelerator.is_available()
    device = "cpu" if on_cpu else torch.accelerator.current_accelerator().type
    return {
        **{name: record[name] for name in ("texts", "labels")},
        **{f"eval_{name}": flipped[name] for name in ("texts", "labels")},
        **{f"also_{name}": also[name] for name in ("texts", "labels") if also},
        "model": _model_hash(settings.model),
        "device": device,
    }


def _model_hash(source: str) -> str:
    """A hash of a folder's configuration, weights and tokenizer; of a hub's model the name."""
    if not Path(source).is_dir():
        return source
    digest = hashlib.sha256()
    for path in sorted(Path(source).iterdir()):
        if path.suffix in (".json", ".jinja", ".safetensors", ".bin", ".txt", ".model"):
            digest.update(path.name.encode())
            with open(path, "rb") as file:
                while block := file.read(1 << 24):
                    digest.update(block)
    return digest.hexdigest()


def run_missing(plan: Plan, task: Task, store: Store, jobs: int) -> dict[Trial, dict[str, Any]]:
    """Runs what the grid lacks and stores each run as it ends; returns all its results.

    Interrupted at any moment, the next call goes on with the runs that the file has.
    """
    results, running = store.results(plan), set()
    check_begins(plan, task, results)
    with Display(plan, results) as display, runner(plan, task, plan.threads, jobs) as runs:
        while True:
            waiting = [trial for trial in missing(plan, results) if trial not in running]
            for trial in waiting[: runs.free]:
                display.begin(trial)
                runs.begin(trial)
                running.add(trial)
            if not running:
                return {trial: results[trial] for trial in relevant(plan, results)}
            trial, outcome = runs.finished(display.step)
            store.add(key(plan, trial), trial, outcome.report, outcome.active)
            results[trial] = outcome.report
            running.remove(trial)
            display.end(trial, outcome.report)


def check_begins(plan: Plan, task: Task, results: Results) -> None:
    """Raises ValueError for a method that cannot begin, before the runs of those that can."""
    first: dict[Cell, Trial] = {}
    for trial in missing(plan, results):
        first.setdefault(trial.cell, trial)
    for cell, trial in first.items():
        with tempfile.TemporaryDirectory(prefix="id3-compare-") as folder:
            settings = replace(settings_of(plan, trial), output=folder, reuse_mask=False)
            try:
                prepare(settings, task)
            except ValueError as error:
                raise ValueError(
                    f"--methods {cell.method}: expected a method that can begin, got {error}"
                ) from None


class Display:
    """One line for the whole grid: steps and time left, the newest run, runs done, the best score so far."""

    def __init__(self, plan: Plan, results: dict[Trial, dict[str, Any]]) -> None:
        self._plan, self._runs, self._best = plan, all_runs(plan), None
        used = relevant(plan, results)
        self._done = len(used)
        self._steps: dict[Trial, int] = {}  # of the runs that have not ended
        done = sum(trial.steps for trial in used)
        self._bar = tqdm(total=all_steps(plan), initial=done, unit="step", dynamic_ncols=True)
        for trial in used:
            self._see(trial, results[trial])

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def begin(self, trial: Trial) -> None:
        self._steps[trial] = 0
        stage = "tuning" if trial.tuning else f"seed {trial.seed}"
        budget = "" if trial.budget is None else f" {shown_budget(trial.budget)}"
        self._bar.set_description(f"{trial.method}{budget}, lr {trial.lr:.3g}, {stage}", refresh=False)
        self._show()

    def step(self, trial: Trial) -> None:
        self._steps[trial] += 1
        self._bar.update(1)

    def end(self, trial: Trial, report: dict[str, Any]) -> None:
        self._bar.update(trial.steps - self._steps.pop(trial))  # a run that diverged stops early
        self._done += 1
        self._see(trial, report)
        self._show()

    def _see(self, trial: Trial, report: dict[str, Any]) -> None:
        value = score(self._plan, report)
        if value is None or trial.tuning:
            return
        better = min if is_loss(self._plan.metric) else max
        self._best = value if self._best is None else better(self._best, value)

    def _show(self) -> None:
        shown = {"runs": f"{self._done}/{self._runs}"}
        if self._best is not None:
            shown["best"] = f"{self._best:.4f}"
        self._bar.set_postfix(shown)
