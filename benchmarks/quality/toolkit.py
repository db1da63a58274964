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
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks.machine import describe
from benchmarks.quality.report import QUALITY_RESULTS, write_pages
from benchmarks.quality.run import RUNS, text_of
from benchmarks.quality.tasks import TASKS, prepare
from benchmarks.rivals import toolkit_id3
from id3_optim import ID3AdamW
from id3_optim.cli.compare.trial import Steps
from id3_optim.cli.env import version_of
from id3_optim.cli.settings import Settings
from id3_optim.cli.start import Start, load_start
from id3_optim.cli.tasks import Task, task_of
from id3_optim.cli.train import build_optimizer, fit
from id3_optim.integrations.groups import parameter_groups
from id3_optim.integrations.huggingface import ID3Callback

COMPARED = [name for name, task in TASKS.items() if task.kind == "classification"]


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
    groups = [
        {"params": [p for _, p in group["params"]], "choose_all": group.get("dense", False)}
        for group in parameter_groups(start.model, start.fresh)
    ]
    whole = sum(p.numel() for group in groups if group["choose_all"] for p in group["params"])
    return toolkit_id3(
        groups,
        lr=settings.lr,
        budget=settings.budget + whole,
        max_steps=settings.steps,
        eps=settings.eps,
        exp=settings.exp,
    )


def chosen_by(toolkit: torch.optim.Optimizer) -> torch.Tensor:
    """bool [N]: the entries that the toolkit trains, of all tensors one after the other; no whole head."""
    return torch.cat([mask.flatten() for mask in toolkit.param_groups[0]["chosen_masks"]])


def active_of(optimizer: ID3AdamW) -> torch.Tensor:
    """The same of ID3AdamW."""
    masks = []
    for entry in optimizer.touched():
        masks.append(torch.zeros(entry.param.numel(), dtype=torch.bool))
        masks[-1][entry.indices.long()] = True
    return torch.cat(masks)


class Joins:
    """The step at which each entry joined: int16 [N], -1 for one that is not active. Neither set shrinks."""

    def __init__(self) -> None:
        self.at, self.steps = torch.empty(0, dtype=torch.int16), 0

    def see(self, active: torch.Tensor) -> None:
        """Takes the active set, bool [N], after one more step."""
        if self.steps == 0:
            self.at = torch.full(active.shape, -1, dtype=torch.int16)
        self.at[active & (self.at < 0)] = self.steps
        self.steps += 1

    def sizes(self) -> torch.Tensor:
        """int64 [steps]: how many entries are active after each step."""
        return self.at[self.at >= 0].long().bincount(minlength=self.steps).cumsum(0)

    def shared(self, other: Joins) -> list[float]:
        """The part of this set that the other one has too, after each step."""
        both = torch.maximum(self.at, other.at)[(self.at >= 0) & (other.at >= 0)].long()
        return (both.bincount(minlength=self.steps).cumsum(0) / self.sizes()).tolist()


class SameStep:
    """Lets the toolkit choose beside an ID3AdamW, from its weights, gradients and masks of each step."""

    def __init__(self, optimizer: ID3AdamW, toolkit: torch.optim.Optimizer, per_step: int):
        self.choices: list[Choice] = []
        self._optimizer, self._toolkit, self._per_step = optimizer, toolkit, per_step
        self._before = chosen_by(toolkit)
        optimizer.register_step_pre_hook(self._choose)
        optimizer.register_step_post_hook(self._compare)

    def _choose(self, *_) -> None:
        masks = self._toolkit.param_groups[0]["chosen_masks"]
        parts = self._before.split([mask.numel() for mask in masks])
        for mask, before in zip(masks, parts, strict=True):
            mask.copy_(before.view(mask.shape))
        self._toolkit.update_chosen()

    def _compare(self, *_) -> None:
        now, theirs = active_of(self._optimizer), chosen_by(self._toolkit) & ~self._before
        differing = (now & ~self._before & ~theirs).sum()
        self.choices.append(Choice(int(differing), int(theirs.sum() - self._per_step)))
        self._before = now


def run(settings: Settings, task: Task, kind: str, same_step: bool) -> tuple[dict, Joins, list[Choice]]:
    """One run of `kind`, "id3" or "toolkit": its metrics, when its entries joined, and the choices of
    `SameStep`, which is beside an ID3 with `same_step`."""
    with tempfile.TemporaryDirectory(prefix="id3-toolkit-") as folder:
        settings = replace(settings, output=folder)
        start = load_start(settings, task)
        if kind == "id3":
            optimizer = build_optimizer(settings, start)
            beside = toolkit_optimizer(settings, start) if same_step else None
            watched = beside and SameStep(optimizer, beside, settings.budget // settings.steps)
            return *_fit(settings, task, start, optimizer, active_of), watched.choices if watched else []
        return *_fit(settings, task, start, toolkit_optimizer(settings, start), chosen_by), []


def _fit(
    settings: Settings, task: Task, start: Start, optimizer: torch.optim.Optimizer, active: Callable
) -> tuple[dict, Joins]:
    joins, callbacks = Joins(), [ID3Callback()] if isinstance(optimizer, ID3AdamW) else []
    watch = Steps(lambda: joins.see(active(optimizer)))
    measured = fit(start, task, optimizer, settings, callbacks, progress=watch).metrics
    return measured, joins


def compare(settings: Settings, task: Task, seeds: int, metric: str) -> list[dict]:
    """Both kinds of runs with each seed; the first seed's choices at equal weights too."""
    found = []
    for seed in range(seeds):
        given = replace(settings, seed=seed)
        measured, ours, choices = run(given, task, "id3", same_step=seed == 0)
        their_own, theirs, _ = run(given, task, "toolkit", same_step=False)
        found.append(
            {
                "seed": seed,
                "id3": measured[f"eval_{metric}"],
                "toolkit": their_own[f"eval_{metric}"],
                "shared": ours.shared(theirs),
                "surplus": int(theirs.sizes()[-1] - ours.sizes()[-1]),
                "choices": [asdict(choice) for choice in choices],
            }
        )
        last = found[-1]
        print(f"seed {seed}: {last['id3']:.4f} and {last['toolkit']:.4f}, shared {last['shared'][-1]:.4f}")
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
    parser.add_argument("--data", type=Path, required=True, help="folder with SST-2 or another task")
    parser.add_argument("--task", choices=COMPARED, default="sst2", help="(default: %(default)s)")
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
    metric = TASKS[options.task].metric
    runs = compare(settings, task_of(settings), options.seeds, metric)
    given = {name: getattr(settings, name) for name in ("budget", "steps", "lr", "eps", "exp")}
    versions = ", ".join(
        f"{name} {version_of(name)}" for name in ("id3-optim", "torch", "selective-optimizers")
    )
    report = {"part": "toolkit", "task": options.task, "metric": metric, **given, "versions": versions}
    report |= {"machine": describe(torch.get_num_threads()), "rows": [], "runs": runs}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"toolkit-{options.task}.json").write_text(text_of(report))
    if not options.no_pages:
        write_pages(options.output)
