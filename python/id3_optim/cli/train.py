"""The training run behind `id3-optim train`: a pre-trained transformer, a budget, `transformers.Trainer`."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import transformers

from .. import schedules
from ..backward.handle import sparse_backward
from ..delta import save_delta
from ..delta.series import DeltaSeries
from ..estimate import MemoryWatch
from ..heuristics import D3, Bias, Magnitude, Random
from ..integrations.groups import parameter_groups
from ..integrations.huggingface import DELTA_NAME, ID3Callback, StepClock
from ..optimizer import ID3AdamW
from ..ranks import writes_files
from . import fsdp, metrics, tasks
from .by_method import AfterStep, prepare_method
from .checkpoints import (
    Checkpoints,
    check_same_run,
    newest_checkpoint,
    run_record,
    weights_hash,
)
from .divergence import FiniteLoss, WatchedTrainer
from .estimate import predicted_memory
from .failures import first_line
from .interrupt import Interrupt
from .output import UNFINISHED, begin, check_paths, publishing, remove_unfinished
from .progress import ProgressBar, reporters
from .report import summarise
from .settings import Settings, check_settings, notes, resolved_budget
from .start import Start, check_tokens, load_start, longest_input
from .stopping import stopping
from .tasks import Task


@dataclass
class Run:
    """The results of a training run. history: the Trainer's log; clock: seconds of every step."""

    metrics: dict[str, float]
    history: list[dict]
    clock: StepClock


def trainer_arguments(settings: Settings) -> transformers.TrainingArguments:
    """The Trainer's arguments: linear decay after a short warm-up, no clipping under ID3AdamW.

    The Trainer would clip by the norm of all N gradients; ID3AdamW clips by the norm of the active entries'
    (`max_grad_norm`). Even at 0 the Trainer measures the norm of all gradients for its log; the report
    counts that time as forward and backward. A machine without an accelerator trains on the CPU.

    Raises ValueError for bfloat16 on a GPU that lacks it.
    """
    cpu = settings.cpu or not torch.accelerator.is_available()
    if settings.bf16 and not cpu and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise ValueError(
            f"--bf16: expected a GPU with bfloat16, or --cpu, got {torch.cuda.get_device_name()}"
        )
    return transformers.TrainingArguments(
        output_dir=str(Path(settings.output) / UNFINISHED),
        num_train_epochs=settings.epochs,
        max_steps=settings.steps or -1,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=4 * settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.lr,
        lr_scheduler_type="linear",
        warmup_steps=settings.warmup,
        max_grad_norm=0.0 if settings.optimizer == "id3" else settings.max_grad_norm,
        bf16=settings.bf16,
        use_cpu=cpu,
        seed=settings.seed,
        logging_steps=settings.log_every,
        save_strategy="no" if settings.save_every is None else "steps",
        save_steps=settings.save_every or 500,
        eval_strategy="no" if settings.eval_every is None else "steps",
        eval_steps=settings.eval_every,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available() and not cpu,
        remove_unused_columns=False,
    )


def build_optimizer(settings: Settings, start: Start) -> torch.optim.Optimizer:
    """ID3AdamW with the fresh parameters as a dense group, or torch's AdamW on all parameters."""
    if settings.optimizer == "adamw":
        params = [p for p in start.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(params, lr=settings.lr, weight_decay=settings.weight_decay)
        if settings.fsdp:  # ID3AdamW takes over whole states by itself
            optimizer.register_load_state_dict_pre_hook(fsdp.split_moments)
        return optimizer
    heuristics = {
        "d3": D3(eps=settings.eps, exp=settings.exp),
        "magnitude": Magnitude(),
        "random": Random(settings.seed),
        "bias": Bias(),
    }
    head_options = {} if settings.head_lr is None else {"lr": settings.head_lr}
    groups = parameter_groups(start.model, start.fresh, **head_options)
    entries = sum(parameter.numel() for _, parameter in groups[0]["params"])
    return ID3AdamW(
        groups,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        # Resolved before the first step, so that a budget out of range is refused before the training.
        budget=resolved_budget(settings, entries),
        heuristic=heuristics[settings.heuristic],
        strategy=settings.strategy,
        schedule=schedules.from_name(settings.schedule),
        select_every=settings.select_every,
        bias_correction=settings.bias_correction,
        max_grad_norm=settings.max_grad_norm or None,
        backend=settings.backend,
        release_gradients=settings.release_gradients,
    )


def prepare(
    settings: Settings, task: Task
) -> tuple[Start, torch.optim.Optimizer, list[transformers.TrainerCallback]]:
    """The model before training, its optimizer, and the callbacks that `fit` needs for them."""
    arguments = trainer_arguments(settings)
    start = load_start(settings, task, "cpu" if settings.fsdp else arguments.device)
    if settings.fsdp:
        fsdp.shard(start.model, arguments.device)
    callbacks = [ID3Callback(originals=settings.originals)] if settings.optimizer == "id3" else []
    if settings.method is None:
        optimizer = build_optimizer(settings, start)
    else:
        ready = prepare_method(settings, task, start, arguments)
        optimizer, start.merge = ready.optimizer, ready.merge
        callbacks += [AfterStep(ready.after_step)] if ready.after_step else []
    if settings.sparse_backward:
        sparse_backward(start.model, optimizer)
    return start, optimizer, callbacks


def fit(
    start: Start,
    task: Task,
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    callbacks: Sequence[transformers.TrainerCallback] = (),
    checkpoint: Path | None = None,
    progress: ProgressBar | None = None,
) -> Run:
    """Trains `start.model` in place and evaluates it. The same settings give the same batches and dropout.

    callbacks: added to a progress bar and a clock. ID3AdamW needs `ID3Callback` among them, or its
    `total_steps` set. checkpoint: to go on from; its record must be that of this run (ValueError).
    progress: a callback with `close`, in place of the bar.
    Raises `divergence.Diverged` where the loss or the weights leave the finite numbers, and KeyboardInterrupt
    after Ctrl-C, with a checkpoint of the step that it came in.
    """
    clock, watch = StepClock(), FiniteLoss()
    record = run_record(settings, task) | {"weights": weights_hash(start.model, start.fresh)}
    if checkpoint:
        check_same_run(checkpoint, record)
    checkpoints = Checkpoints(settings, record, watch)
    # The watch refuses to save weights that are not finite; `checkpoints` moves what the Trainer saved.
    progress, interrupt = progress or ProgressBar(), Interrupt()
    callbacks = [watch, *callbacks, progress, clock, checkpoints, interrupt, *reporters(settings)]
    trainer = make_trainer(start, task, optimizer, settings, callbacks, watch)
    with contextlib.closing(progress), interrupt.listening():
        run_trainer(trainer, checkpoint)
    if interrupt.stopped:
        raise KeyboardInterrupt
    measured = trainer.evaluate()
    watch.check_end(start.model, trainer.state.global_step, measured["eval_loss"])
    checkpoints.remove_old()
    remove_unfinished(Path(settings.output))
    found = (f"eval_{name}" for name in metrics.NAMES)
    measured = {name: float(measured[name]) for name in found if name in measured}
    return Run(measured, trainer.state.log_history, clock)


def run_trainer(trainer: WatchedTrainer, checkpoint: Path | None) -> None:
    """Trains, from a checkpoint where one is given. Raises ValueError for one that does not load."""
    try:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    except Exception as error:  # each kind of file has its own kinds of errors
        if checkpoint is None or trainer.watch.begun:
            raise
        reason = first_line(error).partition(". ")[0]  # torch goes on with how to load unsafe files
        raise ValueError(f"--resume: expected {checkpoint} to load, got {reason}") from error


def make_trainer(start, task, optimizer, settings, callbacks, watch) -> WatchedTrainer:
    """The Trainer of `fit`, with the encoded rows of both files."""
    length = min(settings.max_length, longest_input(start))
    train, eval = (tasks.encode(rows, task, start.tokenizer, length) for rows in (task.train, task.eval))
    check_tokens(settings.model, start.model, [*train, *eval])
    # Rows of similar length share a batch, which halves the padding; no metric depends on their order.
    eval = sorted(eval, key=lambda row: len(row["input_ids"]))
    kind = fsdp.ShardedTrainer if settings.fsdp else WatchedTrainer
    trainer = kind(
        watch,
        model=start.model,
        args=trainer_arguments(settings),
        train_dataset=train,
        eval_dataset=eval,
        data_collator=partial(tasks.collate, pad_token_id=tasks.padding_token(start.tokenizer)),
        optimizers=(optimizer, None),
        callbacks=callbacks,
        preprocess_logits_for_metrics=metrics.reduce_logits(task.kind),
        compute_metrics=metrics.metrics(task.kind, task.labels),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


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
    watch = MemoryWatch() if settings.memory_report else None
    predicted = predicted_memory(settings) if watch else {}  # before the run, which a failure would lose
    start, optimizer, callbacks = prepare(settings, task)
    if start.fresh:
        print(f"new in this model, so trained whole (dense): {', '.join(sorted(start.fresh))}")
    begin(settings)
    if settings.save_at:
        DeltaSeries(settings.output, start.model, optimizer, settings.save_at, originals=settings.originals)
    if watch:
        callbacks.append(watch)
    with stopping(Path(settings.output)):
        run = fit(start, task, optimizer, settings, callbacks, checkpoint)
        report = summarise(settings, start, optimizer, run)
        if start.merge is not None:
            start.merge()
        write_model(settings, start, optimizer)
    if watch:
        report["memory"] = {"predicted": predicted, "measured": watch.measured}
    return report, start, optimizer
