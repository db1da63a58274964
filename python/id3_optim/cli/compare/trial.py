"""One run of a comparison: `id3-optim train`'s own training, without files that stay."""

from __future__ import annotations

import contextlib
import random
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers

from ...analysis import allocation
from ...wrappers import plain_names
from ..before import measured_before
from ..divergence import Diverged
from ..env import version_of
from ..report import summarise
from ..settings import Settings
from ..start import Start
from ..tasks import Task
from ..train import fit, prepare

_SPLIT = 0  # seeds the choice of the rows kept aside: the same in every run


class Outcome(NamedTuple):
    """report: of `id3-optim train`, less what every run shares; `metrics` is empty for a run that diverged.

    active: int64[n], the sorted places of the entries that ID3AdamW trained; None for other optimizers.
    """

    report: dict[str, Any]
    active: np.ndarray | None


class Steps(transformers.TrainerCallback):
    """Calls a function after each step, in place of a progress bar."""

    def __init__(self, on_step: Callable[[], None]) -> None:
        self._on_step = on_step

    def on_step_end(self, args, state, control, **kwargs):
        self._on_step()

    def note(self, line: str) -> None:
        """Does nothing: every run of a grid would say the same."""

    def close(self) -> None:
        """Does nothing."""


def held_out(task: Task, share: float) -> Task:
    """The task with a share of its training rows to measure on, and the rest to train on."""
    order = list(range(len(task.train)))
    random.Random(_SPLIT).shuffle(order)
    n = round(share * len(order))
    if not 0 < n < len(order):
        raise ValueError(f"--held-out: expected a share that splits {len(order)} rows, got {share}")
    aside, kept = sorted(order[:n]), sorted(order[n:])
    return replace(task, train=[task.train[i] for i in kept], eval=[task.train[i] for i in aside], also=[])


def run_trial(settings: Settings, task: Task, threads: int, on_step: Callable[[], None]) -> Outcome:
    """Trains and measures. The same arguments give the same numbers on the same machine, times aside.

    threads: of torch, on a CPU. on_step: called after each optimizer step.
    """
    with _threads(threads), tempfile.TemporaryDirectory(prefix="id3-compare-") as folder:
        settings = replace(settings, output=folder)
        before = measured_before(settings, task)
        try:
            start, optimizer, callbacks = prepare(settings, task, Steps(on_step))
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            run = fit(start, task, optimizer, settings, callbacks, progress=Steps(on_step), stops=False)
            run.metrics |= before
        except Diverged as error:
            return Outcome({"metrics": {}, "diverged": str(error), "history": []}, None)
        report = _of_this_run(summarise(settings, start, optimizer, run)) | _memory()
        report |= {"trained": trained_entries(start, optimizer)} | _selected(start.model, optimizer)
        return Outcome(report, places(start.model, optimizer))


def trained_entries(start: Start, optimizer: torch.optim.Optimizer) -> int:
    """Entries that training may have changed, of the model and of what a method added; no fresh head."""
    groups = optimizer.param_groups
    whole = [p for group in groups if group.get("dense", True) for p in group["params"]]
    fresh = sum(p.numel() for name, p in start.model.named_parameters() if name in start.fresh)
    return getattr(optimizer, "n_active", 0) + sum(p.numel() for p in whole) - fresh


@contextlib.contextmanager
def _threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _of_this_run(report: dict[str, Any]) -> dict[str, Any]:
    names = ("metrics", "entries", "optimizer_bytes", "step_ms", "steps", "history")
    versions = ", ".join(f"{name} {version_of(name)}" for name in ("id3-optim", "torch", "transformers"))
    return {name: report[name] for name in names} | {"versions": versions}


def _memory() -> dict[str, int]:
    return {"gpu_peak_bytes": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {}


def _selected(model: torch.nn.Module, optimizer) -> dict[str, Any]:
    """The active entries by role and layer, as plain numbers; {} for an optimizer that selects none."""
    if not hasattr(optimizer, "touched"):
        return {}
    allocated = allocation(model, optimizer)
    counts = {"active": allocated.active.tolist(), "entries": allocated.entries.tolist()}
    return {"allocation": {"roles": allocated.roles, "layers": allocated.layers, **counts}}


def places(model: torch.nn.Module, optimizer) -> np.ndarray | None:
    """int64[n]: hash of the parameter's name << 32 | flat index of every active entry, sorted.

    By name, so that runs that select from other parameters can be compared. None for an optimizer that
    selects none.
    """
    if not hasattr(optimizer, "touched"):
        return None
    hashes = {number: zlib.crc32(name.encode()) >> 1 for number, name in plain_names(model).items()}
    found = [(hashes[id(e.param)] << 32) | e.indices.long().cpu() for e in optimizer.touched()]
    return torch.cat(found).sort().values.numpy() if found else np.empty(0, np.int64)
