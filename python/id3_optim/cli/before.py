"""What the rows of `--also-eval` say of the model before training, to tell what is forgotten."""

from __future__ import annotations

import gc
import tempfile
from dataclasses import replace

from . import fsdp, metrics
from .divergence import FiniteLoss
from .models import load_config
from .settings import Settings
from .start import load_start
from .tasks import Task
from .trainer import make_trainer, trainer_arguments


def measured_before(settings: Settings, task: Task) -> dict[str, float]:
    """`before_` and each metric on the rows of `--also-eval`; {} without the option or where none is fair.

    None is fair of a new head, and of one whose classes are not the task's. With `memory_report` the
    run is measured alone. The model is loaded for this and dropped: what a measurement leaves on a model
    (Accelerate's mark that it is prepared, FSDP2's whole weights) would change how it trains. A method's own
    parts, such as an adapter, are not in it.
    """
    if not task.also or settings.memory_report or not _has_the_classes(settings.model, task):
        return {}
    with tempfile.TemporaryDirectory(prefix="id3-before-") as folder:
        plain = replace(settings, output=folder, release_gradients=False, sparse_backward=False)
        found = _measured(plain, replace(task, train=task.also, eval=task.also, also=[]))
    gc.collect()  # a Trainer is part of cycles, which hold the model
    return found


def _has_the_classes(source: str, task: Task) -> bool:
    """Whether the head that the model comes with, if any, can have learned the task's classes, in order."""
    if not task.labels:
        return True
    known = load_config(source).id2label
    return [known[i] for i in sorted(known)] == list(task.labels)


def _measured(settings: Settings, task: Task) -> dict[str, float]:
    device = trainer_arguments(settings).device
    start = load_start(settings, task, "cpu" if settings.fsdp else device)
    if start.fresh:
        return {}
    if settings.fsdp:
        fsdp.shard(start.model, device)
    trainer = make_trainer(start, task, None, settings, [], FiniteLoss())
    return metrics.picked(trainer.evaluate(metric_key_prefix="before"), "before")
