"""ID3 against the method's own toolkit on a real task: the same seed, batches, dropout and settings.

    python -m benchmarks toolkit --model DIR --data FOLDER

Three things are compared. At equal weights, gradients and masks (each step of ID3AdamW's first run): which
entries either chooses. In runs of their own: how many entries of the active sets are the same, step by step,
and the scores at the end. The toolkit is `selective-optimizers` (PyPI) around `torch.optim.AdamW`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from benchmarks.machine import describe
from benchmarks.quality.report import QUALITY_RESULTS, write_pages
from benchmarks.quality.run import RUNS, text_of
from benchmarks.quality.tasks import TASKS, prepare
from id3_optim import ID3AdamW
from id3_optim.cli.compare.trial import Steps
from id3_optim.cli.env import version_of
from id3_optim.cli.settings import Settings
from id3_optim.cli.start import Start, load_start
from id3_optim.cli.tasks import Task, task_of
from id3_optim.cli.train import build_optimizer, fit
from id3_optim.integrations.groups import parameter_groups
from id3_optim.integrations.huggingface import ID3Callback

Masks = list[torch.Tensor]


@dataclass
class Choice:
    """One step's choice at equal weights, gradients and masks.

    differing: entries of ID3AdamW's choice that the toolkit's lacks; surplus: entries that the toolkit chose
    beyond the step's number.
    """

    differing: int
    surplus: int


def toolkit_optimizer(settings: Settings, start: Start) -> torch.optim.Optimizer:
    """The toolkit's ID3 over the same groups: a fresh head is trained whole and counts in its budget."""
    from selective_optimizers.wrap import get_selective_optimizer  # needed to measure, not to report

    groups = [
        {"params": [p for _, p in group["params"]], "choose_all": group.get("dense", False)}
        for group in parameter_groups(start.model, start.fresh)
    ]
    whole = sum(p.numel() for group in groups if group["choose_all"] for p in group["params"])
    return get_selective_optimizer(torch.optim.AdamW, "id3")(
        groups,
        lr=settings.lr,
        budget=settings.budget + whole,
        max_steps=settings.steps,
        eps=settings.eps,
        exp=settings.exp,
        verify=False,
    )


def masks_of(toolkit: torch.optim.Optimizer) -> Masks:
    """The masks of the tensors that the toolkit selects from."""
    return toolkit.param_groups[0]["chosen_masks"]


def active_of(optimizer: ID3AdamW) -> Masks:
    """The same of ID3AdamW: bool, one for each tensor."""
    masks = []
    for entry in optimizer.touched():
        mask = torch.zeros(entry.param.numel(), dtype=torch.bool)
        mask[entry.indices.long()] = True
        masks.append(mask.view(entry.param.shape))
    return masks


def places(masks: Masks) -> np.ndarray:
    """int64 [n]: the set entries' places in all tensors one after the other, ascending."""
    return torch.cat([mask.flatten() for mask in masks]).nonzero()[:, 0].numpy()


class SameStep:
    """Lets the toolkit choose beside an ID3AdamW, from its weights, gradients and masks of each step."""

    def __init__(self, optimizer: ID3AdamW, toolkit: torch.optim.Optimizer, per_step: int):
        self.choices: list[Choice] = []
        self._optimizer, self._toolkit, self._per_step = optimizer, toolkit, per_step
        self._before = [mask.clone() for mask in masks_of(toolkit)]
        optimizer.register_step_pre_hook(self._choose)
        optimizer.register_step_post_hook(self._compare)

    def _choose(self, *_) -> None:
        for mask, before in zip(masks_of(self._toolkit), self._before, strict=True):
            mask.copy_(before)
        self._toolkit.update_chosen()

    def _compare(self, *_) -> None:
        before, now = places(self._before), active_of(self._optimizer)
        ours = np.setdiff1d(places(now), before, assume_unique=True)
        theirs = np.setdiff1d(places(masks_of(self._toolkit)), before, assume_unique=True)
        differing = np.setdiff1d(ours, theirs, assume_unique=True).size
        self.choices.append(Choice(int(differing), int(theirs.size - self._per_step)))
        self._before = now


def run(
    settings: Settings, task: Task, kind: str, same_step: bool
) -> tuple[float, list[np.ndarray], list[Choice]]:
    """One run of `kind`, "id3" or "toolkit": its score, the active set after each step, and the choices of
    `SameStep`, which is beside an ID3 with `same_step`."""
    with tempfile.TemporaryDirectory(prefix="id3-toolkit-") as folder:
        settings = Settings(**asdict(settings) | {"output": folder})
        start = load_start(settings, task)
        if kind == "id3":
            optimizer = build_optimizer(settings, start)
            beside = toolkit_optimizer(settings, start) if same_step else None
            watched = beside and SameStep(optimizer, beside, settings.budget // settings.steps)
            found, masks = _fit(settings, task, start, optimizer, lambda: active_of(optimizer))
            return found, masks, watched.choices if watched else []
        optimizer = toolkit_optimizer(settings, start)
        return *_fit(settings, task, start, optimizer, lambda: masks_of(optimizer)), []


def _fit(
    settings: Settings, task: Task, start: Start, optimizer: torch.optim.Optimizer, masks: Callable[[], Masks]
) -> tuple[float, list[np.ndarray]]:
    sets: list[np.ndarray] = []
    callbacks = [ID3Callback()] if isinstance(optimizer, ID3AdamW) else []
    watch = Steps(lambda: sets.append(places(masks())))
    measured = fit(start, task, optimizer, settings, callbacks, progress=watch).metrics
    return measured["eval_accuracy"], sets


def shared(ours: list[np.ndarray], theirs: list[np.ndarray]) -> list[float]:
    """The share of our active set that the other one has, after each step."""
    return [np.intersect1d(a, b, assume_unique=True).size / a.size for a, b in zip(ours, theirs, strict=True)]


def grew(sets: list[np.ndarray]) -> list[int]:
    """How many entries joined at each step, less those that left."""
    return [sets[0].size, *(int(b.size - a.size) for a, b in pairwise(sets))]


def compare(settings: Settings, task: Task, seeds: int) -> list[dict]:
    """Both kinds of runs with each seed; the first seed's choices at equal weights too."""
    found = []
    for seed in range(seeds):
        given = Settings(**asdict(settings) | {"seed": seed})
        score, ours, choices = run(given, task, "id3", same_step=seed == 0)
        their_score, theirs, _ = run(given, task, "toolkit", same_step=False)
        found.append(
            {
                "seed": seed,
                "id3": score,
                "toolkit": their_score,
                "shared": shared(ours, theirs),
                "surplus": sum(grew(theirs)) - sum(grew(ours)),
                "choices": [asdict(choice) for choice in choices],
            }
        )
        print(f"seed {seed}: {score:.4f} and {their_score:.4f}, shared {found[-1]['shared'][-1]:.4f}")
    return found


def _settings(options: argparse.Namespace) -> Settings:
    task = TASKS[options.task]
    train, evaluate = prepare(options.task, options.data, options.runs / "data")
    return Settings(
        model=options.model,
        train=str(train),
        eval=str(evaluate),
        output="",
        task=task.kind,
        text_column=task.text,
        label_column=task.label,
        max_length=task.length,
        pooling="mean",
        budget=options.per_step * options.steps,  # the toolkit gives every step the remainder's entry too
        steps=options.steps,
        lr=options.lr,
        max_grad_norm=0.0,  # which the toolkit has not
        batch_size=task.batch,
        group_by_length=True,
        cpu=True,
    )


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks toolkit", description=__doc__)
    parser.add_argument("--model", required=True, help="folder or hub name of MiniLM-L6")
    parser.add_argument("--data", type=Path, help="folder with SST-2 (default: this project's examples)")
    parser.add_argument("--task", choices=TASKS, default="sst2", help="of classes, with accuracy")
    parser.add_argument("--per-step", type=int, default=128, help="entries that join at each step")
    parser.add_argument("--steps", type=int, default=200, help="of each run")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate")
    parser.add_argument("--runs", type=Path, default=RUNS, help="where the rows are written")
    parser.add_argument("--output", type=Path, default=QUALITY_RESULTS, help="folder of the JSON file")
    parser.add_argument("--no-pages", action="store_true", help="leave README and docs/evidence.md alone")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Runs, writes `toolkit-TASK.json`, and renews the pages."""
    options = _parse(arguments)
    settings = _settings(options)
    runs = compare(settings, task_of(settings), options.seeds)
    given = {name: getattr(settings, name) for name in ("budget", "steps", "lr", "eps", "exp")}
    versions = ", ".join(
        f"{name} {version_of(name)}" for name in ("id3-optim", "torch", "selective-optimizers")
    )
    report = {"part": "toolkit", "task": options.task, **given, "versions": versions}
    report |= {"machine": describe(torch.get_num_threads()), "rows": [], "runs": runs}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"toolkit-{options.task}.json").write_text(text_of(report))
    if not options.no_pages:
        write_pages(options.output)
