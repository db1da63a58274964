"""The methods of `id3_optim.methods` in the Trainer."""

from collections.abc import Callable

import transformers

from .. import methods
from . import tasks
from .settings import Settings
from .start import Start, longest_input
from .tasks import Task


class AfterStep(transformers.TrainerCallback):
    """Calls a function after each optimizer step, before gradients are cleared. It gets the step, from 0."""

    def __init__(self, after_step: Callable[[int], None]) -> None:
        self._after_step = after_step

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._after_step(state.global_step)


def by_method(settings: Settings, start: Start, task: Task) -> methods.Prepared:
    """Makes the model of `start` trainable by `settings.method`, in place. Needs `settings.steps`."""
    head_options = {} if settings.head_lr is None else {"lr": settings.head_lr}
    return methods.prepare(
        settings.method,
        start.model,
        start.fresh,
        budget=settings.budget,
        lr=settings.lr,
        total_steps=settings.steps,
        examples=_examples(settings, start, task) if methods.needs_examples(settings.method) else (),
        seed=settings.seed,
        head_options=head_options,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm or None,
        bias_correction=settings.bias_correction,
        select_every=settings.select_every,
        schedule=methods.schedules.from_name(settings.schedule),
        backend=settings.backend,
    )


def _examples(settings: Settings, start: Start, task: Task) -> list[dict]:
    """Batches of one row of the training texts, as many as a method scores."""
    length = min(settings.max_length, longest_input(start))
    rows = tasks.encode(task.train[: methods.SAMPLES], task, start.tokenizer, length)
    padding, device = tasks.padding_token(start.tokenizer), start.model.device
    batches = [tasks.collate([row], padding) for row in rows]
    return [{name: value.to(device) for name, value in batch.items()} for batch in batches]
