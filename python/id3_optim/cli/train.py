"""The training run behind `id3-optim train`: a pre-trained transformer, a budget, `transformers.Trainer`."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint

from .. import schedules
from ..delta import save_delta
from ..delta.series import DeltaSeries
from ..estimate import MemoryWatch, estimate_from_config
from ..heuristics import D3, Bias, Magnitude, Random
from ..integrations.groups import parameter_groups
from ..integrations.huggingface import DELTA_NAME, ID3Callback, StepClock
from ..optimizer import ID3AdamW
from . import tasks
from .models import load_pretrained
from .report import summarise
from .tasks import Task


@dataclass(frozen=True)
class Settings:
    """The options of `id3-optim train`; the command's help explains each."""

    model: str
    train: str
    eval: str
    output: str
    task: str | None = None
    text_column: tuple[str, ...] = ("text",)
    label_column: str = "label"
    max_length: int = 256
    optimizer: str = "id3"
    budget: int | float = 0.005
    heuristic: str = "d3"
    eps: float = 1.0
    exp: float = 2.0
    strategy: str = "increment"
    schedule: str = "uniform"
    bias_correction: str = "tensor"
    epochs: float = 3.0
    steps: int | None = None
    lr: float = 1e-3
    head_lr: float | None = None
    weight_decay: float = 0.0
    warmup: float = 0.05
    max_grad_norm: float = 1.0
    batch_size: int = 16
    accumulate: int = 1
    seed: int = 42
    bf16: bool = False
    release_gradients: bool = False
    memory_report: bool = False
    backend: str | None = None
    cpu: bool = False
    delta_only: bool = False
    originals: bool = False
    save_every: int | None = None
    keep: int | None = None
    resume: bool = False
    save_at: tuple[int | float, ...] = ()
    log_every: int = 10


@dataclass
class Start:
    """A model before training; `fresh` names its parameters that no checkpoint held."""

    model: torch.nn.Module
    tokenizer: object
    fresh: set[str]


@dataclass
class Run:
    """The results of a training run. history: the Trainer's log; clock: seconds of every step."""

    metrics: dict[str, float]
    history: list[dict]
    clock: StepClock


class ProgressBar(transformers.TrainerCallback):
    """One line: loss, active entries, entries changed."""

    def on_train_begin(self, args, state, control, **kwargs):
        self._bar = tqdm(total=state.max_steps, unit="step", dynamic_ncols=True)

    def on_step_end(self, args, state, control, **kwargs):
        self._bar.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            counts = {"active": logs.get("n_active"), "changed": logs.get("n_changed")}
            shown = {name: f"{count:,}" for name, count in counts.items() if count is not None}
            self._bar.set_postfix(loss=f"{logs['loss']:.3f}", **shown)

    def on_train_end(self, args, state, control, **kwargs):
        self._bar.close()


def trainer_arguments(settings: Settings) -> transformers.TrainingArguments:
    """The Trainer's arguments: linear decay after a short warm-up, no clipping under ID3AdamW.

    The Trainer would clip by the norm of all N gradients; ID3AdamW clips by the norm of the active entries'
    (`max_grad_norm`). Even at 0 the Trainer measures the norm of all gradients for its log; the report
    counts that time as forward and backward.
    """
    return transformers.TrainingArguments(
        output_dir=settings.output,
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
        use_cpu=settings.cpu,
        seed=settings.seed,
        logging_steps=settings.log_every,
        save_strategy="no" if settings.save_every is None else "steps",
        save_steps=settings.save_every or 500,
        save_total_limit=settings.keep,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available() and not settings.cpu,
        remove_unused_columns=False,
    )


def load_start(settings: Settings, task: Task, device: torch.device | str = "cpu") -> Start:
    """Loads model and tokenizer; the seed fixes the numbers of a new head.

    With `bf16` and ID3 the weights are bfloat16 (each active entry owns a float32 master), except for fresh
    parameters, which are float32. Without ID3 the weights are float32 and the arithmetic alone is bfloat16.
    """
    transformers.set_seed(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    low = settings.bf16 and settings.optimizer == "id3"
    options = {"dtype": torch.bfloat16 if low else torch.float32}
    if task.kind == "classification":
        labels = dict(enumerate(task.labels))
        options |= {"id2label": labels, "label2id": {label: i for i, label in labels.items()}}
        options |= {"num_labels": len(labels), "ignore_mismatched_sizes": True}
    auto = AutoModelForSequenceClassification if task.kind == "classification" else AutoModelForCausalLM
    model, fresh = load_pretrained(auto, settings.model, **options)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tasks.padding_token(tokenizer)
    model.config.architectures = [type(model).__name__]
    # The optimizer chooses its backend by the parameters' device.
    return Start(model.to(device), tokenizer, fresh)


def build_optimizer(settings: Settings, start: Start) -> torch.optim.Optimizer:
    """ID3AdamW with the fresh parameters as a dense group, or torch's AdamW on all parameters."""
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(
            [p for p in start.model.parameters() if p.requires_grad],
            lr=settings.lr,
            weight_decay=settings.weight_decay,
        )
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
        budget=schedules.resolve_budget(settings.budget, entries),
        heuristic=heuristics[settings.heuristic],
        strategy=settings.strategy,
        schedule=schedules.from_name(settings.schedule),
        bias_correction=settings.bias_correction,
        max_grad_norm=settings.max_grad_norm or None,
        backend=settings.backend,
        release_gradients=settings.release_gradients,
    )


def fit(
    start: Start,
    task: Task,
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    callbacks: Sequence[transformers.TrainerCallback] = (),
) -> Run:
    """Trains `start.model` in place and evaluates it. The same settings give the same batches and dropout.

    callbacks: added to a progress bar and a clock. ID3AdamW needs `ID3Callback` among them, or its
    `total_steps` set.
    """
    length = min(settings.max_length, start.tokenizer.model_max_length)
    # Rows of similar length share a batch, which halves the padding; no metric depends on their order.
    to_measure = sorted(
        tasks.encode(task.eval, task, start.tokenizer, length), key=lambda row: len(row["input_ids"])
    )
    clock = StepClock()
    trainer = transformers.Trainer(
        model=start.model,
        args=trainer_arguments(settings),
        train_dataset=tasks.encode(task.train, task, start.tokenizer, length),
        eval_dataset=to_measure,
        data_collator=partial(tasks.collate, pad_token_id=tasks.padding_token(start.tokenizer)),
        optimizers=(optimizer, None),
        callbacks=[*callbacks, ProgressBar(), clock],
        preprocess_logits_for_metrics=tasks.reduce_logits(task.kind),
        compute_metrics=tasks.metrics(task.kind),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=newest_checkpoint(settings))
    measured = trainer.evaluate()
    names = ("eval_accuracy", "eval_token_loss", "eval_perplexity", "eval_loss")
    metrics = {name: float(measured[name]) for name in names if name in measured}
    return Run(metrics, trainer.state.log_history, clock)


def newest_checkpoint(settings: Settings) -> str | None:
    """The newest checkpoint with `resume`, else None. Raises ValueError where there is no checkpoint."""
    if not settings.resume:
        return None
    folder = get_last_checkpoint(settings.output) if Path(settings.output).is_dir() else None
    if folder is None:
        raise ValueError(f"--resume: expected a checkpoint of --save-every in {settings.output}, got none")
    return folder


def write_model(settings: Settings, start: Start, optimizer) -> Path:
    """Writes the tuned model, or its delta beside the configuration that `id3-optim apply` reads."""
    output = Path(settings.output)
    start.tokenizer.save_pretrained(output)
    if not settings.delta_only:
        start.model.save_pretrained(output)
        return output
    start.model.config.save_pretrained(output)
    save_delta(output / DELTA_NAME, start.model, optimizer, settings.originals)
    return output / DELTA_NAME


def train(settings: Settings) -> tuple[dict, Start, torch.optim.Optimizer]:
    """The whole run: read, load, train, evaluate, write. Returns the report, the model, its optimizer."""
    if settings.optimizer != "id3" and (settings.delta_only or settings.save_at):
        option = "--delta-only" if settings.delta_only else "--save-at"
        raise ValueError(f"--optimizer: expected id3 with {option}, got {settings.optimizer}, which changes "
                         "every entry")  # fmt: skip
    newest_checkpoint(settings)  # raises before the model is loaded
    task = tasks.read_task(
        settings.train,
        settings.eval,
        kind=settings.task,
        text_columns=list(settings.text_column),
        label_column=settings.label_column,
    )
    watch = MemoryWatch() if settings.memory_report else None
    predicted = predicted_memory(settings) if watch else {}  # before the run, which a failure would lose
    start = load_start(settings, task, trainer_arguments(settings).device)
    if start.fresh:
        print(f"new in this model, so trained whole (dense): {', '.join(sorted(start.fresh))}")
    optimizer = build_optimizer(settings, start)
    callbacks = [ID3Callback(originals=settings.originals)] if settings.optimizer == "id3" else []
    if settings.save_at:
        DeltaSeries(settings.output, start.model, optimizer, settings.save_at, originals=settings.originals)
    if watch:
        callbacks.append(watch)
    run = fit(start, task, optimizer, settings, callbacks)
    write_model(settings, start, optimizer)
    report = summarise(settings, start, optimizer, run)
    if watch:
        report["memory"] = {"predicted": predicted, "measured": watch.measured}
    return report, start, optimizer


def predicted_memory(settings: Settings) -> dict[str, int]:
    """Bytes by kind for batches of texts of `max_length`, from the model's configuration alone."""
    options = {"batch": settings.batch_size, "length": settings.max_length, "bf16": settings.bf16}
    options |= {"static": settings.strategy != "increment"}
    if settings.steps:
        options["steps"] = settings.steps
    report = estimate_from_config(settings.model, settings.budget, **options)
    return report["released" if settings.release_gradients else "dense"]
