"""The `transformers.Trainer` of a training run: its arguments, its rows, and its loop."""

from functools import partial
from pathlib import Path

import torch
import transformers

from . import fsdp, metrics, tasks
from .failures import first_line
from .output import UNFINISHED
from .processes import exchanges
from .settings import Settings
from .start import Start, check_tokens, longest_input
from .tasks import Encoded, Task
from .watched_trainer import ExchangingTrainer, WatchedTrainer

# By `--lr-scheduler`; each has a warm-up.
_SCHEDULERS = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def trainer_arguments(settings: Settings) -> transformers.TrainingArguments:
    """The Trainer's arguments: a warm-up before the schedule of the rate, no clipping under ID3AdamW.

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
    known = transformers.TrainingArguments.__dataclass_fields__  # older releases have the other name
    name = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in known)
    checkpointing = {name: True} if settings.checkpointing else {}
    arguments = transformers.TrainingArguments(
        output_dir=str(Path(settings.output) / UNFINISHED),
        num_train_epochs=settings.epochs,
        max_steps=settings.steps or -1,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=4 * settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.lr,
        lr_scheduler_type=_SCHEDULERS[settings.lr_scheduler],
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
        **checkpointing,
    )
    return on_one_gpu(arguments)


def on_one_gpu(arguments: transformers.TrainingArguments) -> transformers.TrainingArguments:
    """The arguments, so that a process that sees several GPUs uses one.

    The Trainer would use all of them by nn.DataParallel, which takes that many times --batch-size rows and
    copies the model's weights in each forward pass. Mutates the arguments.
    """
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def idle_gpus(device: torch.device, processes: int) -> list[str]:
    """A line where other GPUs than `device` are left alone."""
    seen = torch.cuda.device_count()
    if device.type != "cuda" or processes > 1 or seen < 2:
        return []
    return [f"one of {seen} GPUs is used; all: torchrun --nproc-per-node {seen} -m id3_optim.cli train"]


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
    """The Trainer of `fit`, with the encoded rows of all files."""
    kind = fsdp.ShardedTrainer if settings.fsdp else WatchedTrainer
    kind = ExchangingTrainer if exchanges(settings) else kind
    rows = {"--train": task.train, "--eval": task.eval, "--also-eval": task.also}
    files = {option: encoded(own, start, task, settings) for option, own in rows.items() if own}
    trainer = kind(
        watch,
        settings.group_by_length,
        model=start.model,
        args=trainer_arguments(settings),
        train_dataset=files["--train"].rows,
        eval_dataset=by_length(files["--eval"]),
        data_collator=partial(tasks.collate, pad_token_id=tasks.padding_token(start.tokenizer)),
        optimizers=(optimizer, None),
        callbacks=callbacks,
        preprocess_logits_for_metrics=metrics.reduce_logits(task.kind),
        compute_metrics=metrics.metrics(task.kind, task.labels),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    if task.also:
        trainer.also_eval = by_length(files["--also-eval"])
    trainer.notes = [n for name, inputs in files.items() for n in cut_notes(name, inputs, start, settings)]
    trainer.notes += idle_gpus(trainer.args.device, trainer.args.world_size)
    return trainer


def encoded(rows: list, start: Start, task: Task, settings: Settings) -> Encoded:
    """Rows as the model's inputs. Raises ValueError for tokens that it lacks."""
    inputs = tasks.encode(rows, task, start.tokenizer, min(settings.max_length, longest_input(start)))
    check_tokens(settings.model, start.model, inputs.rows)
    return inputs


def cut_notes(option: str, inputs: Encoded, start: Start, settings: Settings) -> list[str]:
    """A line where rows of a file were cut, with the reason for it."""
    longest, given = longest_input(start), settings.max_length
    reason = "--max-length" if given <= longest else "the model takes no more"
    count, size = f"{inputs.cut} of {len(inputs.rows)}", min(given, longest)
    return [f"{option}: {count} rows are cut to {size} tokens ({reason})"] if inputs.cut else []


def by_length(inputs: Encoded) -> list[dict]:
    """Rows to measure on, so that those of similar length share a batch, which halves the padding; no metric
    depends on their order."""
    return sorted(inputs.rows, key=lambda row: len(row["input_ids"]))
