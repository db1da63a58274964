"""`id3-optim train --method`: a method of `id3_optim.methods` with the settings of the command line."""

import random
from functools import partial

import transformers

from .. import method_table, methods
from ..heuristics import D3
from ..methods import Prepared
from . import tasks
from .settings import Settings, optimizer_options
from .start import Start, longest_input
from .tasks import Task


class AfterStep(transformers.TrainerCallback):
    """Calls `after_step` of a method with the number of each step, while the gradients are there."""

    def __init__(self, after_step):
        self._after_step = after_step

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._after_step(state.global_step)


def prepare_method(
    settings: Settings, task: Task, start: Start, arguments: transformers.TrainingArguments
) -> Prepared:
    """Makes `start.model` trainable by the method, in place."""
    options, d3 = optimizer_options(settings), D3(settings.eps, settings.exp)
    name = settings.method.partition("+")[0]
    if name in ("id3", "repeat-d3", "static-d3"):
        options["heuristic"] = d3
    elif method_table.needs_running(name):
        options["heuristic"] = method_table.SELECTIVE[name][0](d3)
    return methods.prepare(
        settings.method,
        start.model,
        sorted(start.fresh),
        budget=settings.budget,
        lr=settings.lr,
        total_steps=total_steps(settings, task, arguments),
        examples=examples_of(settings, task, start) if method_table.needs_examples(settings.method) else (),
        seed=settings.seed,
        head_options={} if settings.head_lr is None else {"lr": settings.head_lr},
        leave_out=settings.leave_out,
        **options,
    )


def total_steps(settings: Settings, task: Task, arguments: transformers.TrainingArguments) -> int:
    """How many steps the Trainer will take."""
    batches = -(-len(task.train) // (arguments.train_batch_size * arguments.world_size))
    per_epoch = -(-batches // settings.accumulate)
    return settings.steps or int(-(-settings.epochs * per_epoch // 1))


def examples_of(settings: Settings, task: Task, start: Start) -> list[dict]:
    """Batches of one training row each, on the model's device; which rows, the seed decides."""
    rows = random.Random(settings.seed).sample(task.train, min(methods.SAMPLES, len(task.train)))
    length = min(settings.max_length, longest_input(start))
    collate = partial(tasks.collate, pad_token_id=tasks.padding_token(start.tokenizer))
    device = next(start.model.parameters()).device
    encoded = tasks.encode(rows, task, start.tokenizer, length).rows
    return [{name: value.to(device) for name, value in collate([row]).items()} for row in encoded]
