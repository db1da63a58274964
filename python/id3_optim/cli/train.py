"""The training run behind `id3-optim train`: a pre-trained transformer, a budget, `transformers.Trainer`."""

import contextlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers

from ..backward.handle import sparse_backward
from ..delta import load_delta, save_delta
from ..delta.series import DeltaSeries
from ..estimate import MemoryWatch
from ..heuristics import D3, Bias, Magnitude, Random
from ..integrations.groups import parameter_groups
from ..integrations.huggingface import DELTA_NAME, ID3Callback, StepClock
from ..masks import Mask, indices_of, mask_of, trained_entries
from ..optimizer import ID3AdamW
from ..ranks import writes_files
from ..relative import Relative
from . import fsdp, metrics, tasks
from .before import measured_before
from .by_method import AfterStep, prepare_method, total_steps
from .checkpoints import (
    Checkpoints,
    check_same_run,
    newest_checkpoint,
    run_record,
    tokens_hash,
    weights_hash,
)
from .divergence import FiniteLoss
from .estimate import predicted_memory
from .interrupt import Interrupt
from .output import check_paths, holding, publishing, remove_unfinished
from .progress import ProgressBar, reporters
from .report import summarise
from .settings import Settings, check_settings, optimizer_options, resolved_budget
from .start import Start, load_start
from .stopping import stopping
from .tasks import Task
from .trainer import make_trainer, run_trainer, trainer_arguments


@dataclass
class Run:
    """The results of a training run. history: the Trainer's log; clock: seconds of every step."""

    metrics: dict[str, float]
    history: list[dict]
    clock: StepClock


def _entries_of(mask: Mask, budget: int) -> int:
    """How many entries a mask has. Raises ValueError for more than the budget."""
    entries = sum(indices.numel() for indices in indices_of(mask).values())
    if entries > budget:
        raise ValueError(f"--budget: expected at least the {entries} entries of the mask, got {budget}")
    return entries


def build_optimizer(settings: Settings, start: Start, mask: Mask | None = None) -> torch.optim.Optimizer:
    """ID3AdamW with the fresh parameters as a dense group, or torch's AdamW on all parameters.

    mask: the entries to train from the first step on, in place of a choice.
    """
    head_options = {} if settings.head_lr is None else {"lr": settings.head_lr}
    if settings.optimizer == "adamw":
        params = [p for p in start.model.parameters() if p.requires_grad]
        if head_options:
            params = parameter_groups(start.model, start.fresh, **head_options)
        options = {"lr": settings.lr, "weight_decay": settings.weight_decay, "fused": not settings.fsdp}
        optimizer = torch.optim.AdamW(params, **options)
        if settings.fsdp:  # ID3AdamW takes over whole states by itself
            optimizer.register_load_state_dict_pre_hook(fsdp.split_moments)
        return optimizer
    d3 = D3(eps=settings.eps, exp=settings.exp)
    heuristics = {
        "d3": d3,
        "d3-relative": Relative(d3),
        "magnitude": Magnitude(),
        "random": Random(settings.seed),
        "bias": Bias(),
    }
    groups = parameter_groups(start.model, start.fresh, **head_options)
    budget = resolved_budget(settings, sum(parameter.numel() for _, parameter in groups[0]["params"]))
    if mask is not None:  # a larger budget would search for more in every step
        budget = _entries_of(mask, budget)
    return ID3AdamW(
        groups,
        lr=settings.lr,
        # Resolved before the first step, so that a budget out of range is refused before the training.
        budget=budget,
        heuristic=heuristics[settings.heuristic] if mask is None else mask_of(mask, start.model),
        strategy=settings.strategy if mask is None else "static",
        **optimizer_options(settings),
    )


def prepare(
    settings: Settings, task: Task, progress: ProgressBar | None = None
) -> tuple[Start, torch.optim.Optimizer, list[transformers.TrainerCallback]]:
    """The model before training, its optimizer, and the callbacks that `fit` needs for them.

    With `reuse_mask` a first run, which `progress` watches, gives the entries to train; with `mask` a delta.
    """
    arguments = trainer_arguments(settings)
    mask = load_delta(settings.mask) if settings.mask else None
    if settings.reuse_mask:
        mask = _mask_of_a_run(settings, task, progress)
    start = load_start(settings, task, "cpu" if settings.fsdp else arguments.device)
    if settings.fsdp:
        fsdp.shard(start.model, arguments.device)
    callbacks = [ID3Callback(originals=settings.originals)] if settings.optimizer == "id3" else []
    if settings.method is None:
        optimizer = build_optimizer(settings, start, mask)
    else:
        ready = prepare_method(settings, task, start, arguments)
        optimizer, start.merge = ready.optimizer, ready.merge
        callbacks += [AfterStep(ready.after_step)] if ready.after_step else []
    if settings.sparse_backward:
        sparse_backward(start.model, optimizer)
    return start, optimizer, callbacks


def _mask_of_a_run(settings: Settings, task: Task, progress: ProgressBar | None) -> dict[str, torch.Tensor]:
    """The entries that a whole run has trained, by name. Nothing of it is written.

    It measures along the way as `settings` say, since that moves torch's generator, and so dropout.
    """
    with tempfile.TemporaryDirectory(prefix="id3-first-run-") as folder:
        settings = replace(settings, output=folder, reuse_mask=False, report_to=())
        task = replace(task, also=[])
        start, optimizer, callbacks = prepare(settings, task)
        fit(start, task, optimizer, settings, callbacks, progress=progress, stops=False)
    return trained_entries(start.model, optimizer)


def fit(
    start: Start,
    task: Task,
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    callbacks: Sequence[transformers.TrainerCallback] = (),
    checkpoint: Path | None = None,
    progress: ProgressBar | None = None,
    stops: bool = True,
) -> Run:
    """Trains `start.model` in place and evaluates it. The same settings give the same batches and dropout.

    callbacks: added to a progress bar and a clock. ID3AdamW needs `ID3Callback` among them, or its
    `total_steps` set. checkpoint: to go on from; its record must be that of this run (ValueError).
    progress: a callback with `note` and `close`, in place of the bar. stops: whether Ctrl-C waits for the end
        of a step and a checkpoint of it, or ends the run at once.
    Raises `divergence.Diverged` where the loss or the weights leave the finite numbers, and KeyboardInterrupt
    after Ctrl-C, with a checkpoint of the step that it came in.
    """
    clock, watch = StepClock(), FiniteLoss()
    record = run_record(settings, task) | {"weights": weights_hash(start.model, start.fresh)}
    if checkpoint:  # before the texts are encoded
        check_same_run(checkpoint, record)
    checkpoints = Checkpoints(settings, record, watch)
    # The watch refuses to save weights that are not finite; `checkpoints` moves what the Trainer saved.
    progress, interrupt = progress or ProgressBar(), Interrupt()
    callbacks = [watch, *callbacks, progress, clock, checkpoints, interrupt, *reporters(settings)]
    trainer = make_trainer(start, task, optimizer, settings, callbacks, watch)
    if settings.save_every or checkpoint:
        record["tokens"] = tokens_hash(trainer.train_dataset)
    if checkpoint:
        check_same_run(checkpoint, record)
    for note in trainer.notes:
        progress.note(note)
    with contextlib.closing(progress), interrupt.listening() if stops else contextlib.nullcontext():
        run_trainer(trainer, checkpoint)
    if interrupt.stopped:
        raise KeyboardInterrupt
    measured = trainer.evaluate()
    watch.check_end(start.model, trainer.state.global_step, measured["eval_loss"])
    if trainer.also_eval:
        measured |= trainer.evaluate(trainer.also_eval, metric_key_prefix="also")
    checkpoints.remove_old()
    remove_unfinished(Path(settings.output))
    return Run(metrics.picked(measured, "eval", "also"), trainer.state.log_history, clock)


def write_model(settings: Settings, start: Start, optimizer) -> None:
    """Writes the tuned model, or its delta beside the configuration that `id3-optim apply` reads.

    The first process writes; where parameters are split, the other ones give their parts.
    """
    gathers = settings.fsdp and not settings.delta_only
    whole = {"state_dict": fsdp.whole_weights(start.model)} if gathers else {}
    if not writes_files():
        if settings.fsdp and settings.delta_only:
            save_delta(Path(settings.output) / DELTA_NAME, start.model, optimizer, settings.originals)
        return
    with publishing(Path(settings.output)) as folder:
        start.tokenizer.save_pretrained(folder)
        if not settings.delta_only:
            start.model.save_pretrained(folder, **whole)
            return
        start.model.config.save_pretrained(folder)
        save_delta(folder / DELTA_NAME, start.model, optimizer, settings.originals)


def notes(settings: Settings) -> list[str]:
    """What a run would otherwise do without a word."""
    if settings.optimizer == "id3" and settings.budget == 0:
        return [
            "--budget 0: no entry of the model is trained; parameters that are new in it (a head) alone are"
        ]
    return []


def train(settings: Settings) -> tuple[dict, Start, torch.optim.Optimizer]:
    """The whole run: read, load, train, evaluate, write. Returns the report, the model, its optimizer."""
    check_settings(settings)
    check_paths(settings)
    checkpoint = newest_checkpoint(settings)
    task = tasks.task_of(settings)
    if checkpoint:  # before the model is loaded; `fit` compares the weights too
        check_same_run(checkpoint, run_record(settings, task))
    if task.eval == task.train:
        print("--eval has the rows of --train: the metrics say nothing about other texts")
    for note in notes(settings):
        print(note)
    before = measured_before(settings, task)
    watch = MemoryWatch() if settings.memory_report else None
    if watch:  # before the run, which a failure would lose
        predicted = predicted_memory(settings, total_steps(settings, task, trainer_arguments(settings)))
    start, optimizer, callbacks = prepare(settings, task)
    if start.fresh:
        print(f"new in this model, so trained whole (dense): {', '.join(sorted(start.fresh))}")
    if watch:
        callbacks.append(watch)
    with holding(settings), stopping(Path(settings.output)):
        if settings.save_at:
            own = start.model, optimizer, settings.save_at
            DeltaSeries(settings.output, *own, originals=settings.originals)
        run = fit(start, task, optimizer, settings, callbacks, checkpoint)
        run.metrics |= before
        report = summarise(settings, start, optimizer, run)
        if start.merge is not None:
            start.merge()
        write_model(settings, start, optimizer)
    if watch:
        report["memory"] = {"predicted": predicted, "measured": watch.measured}
    return report, start, optimizer
