"""ID3AdamW inside `transformers.Trainer`, by public arguments and callbacks alone.

    args = TrainingArguments(…, learning_rate=1e-3, max_grad_norm=0)
    pair = id3_optimizer(args, fresh, budget=0.005, max_grad_norm=1.0)
    trainer = Trainer(model, args, optimizer_cls_and_kwargs=pair, callbacks=[ID3Callback()], …)
    report_first(trainer)  # for W&B, TensorBoard, MLflow, …

An optimizer that exists goes in by `optimizers=(ID3AdamW(parameter_groups(model, fresh), …), None)`. Set
`max_grad_norm=0` in TrainingArguments and give the optimizer its own `max_grad_norm`: the Trainer clips by
the norm of all N gradients, so that the update of an active entry would depend on gradients of frozen
entries.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..delta import save_delta
from ..optimizer import ID3AdamW
from ..wrappers import unwrapped
from .groups import fresh_parameters as fresh_parameters
from .groups import parameter_groups as parameter_groups
from .run import numbers_to_log, take_total_steps

if TYPE_CHECKING:
    from transformers import Trainer

DELTA_NAME = "delta.safetensors"
# Argument of ID3AdamW: the fields of TrainingArguments that set it.
_FROM_ARGUMENTS = {
    "lr": "learning_rate",
    "betas": "adam_beta1 and adam_beta2",
    "eps": "adam_epsilon",
    "weight_decay": "weight_decay",
}
_DEFAULT_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")


def id3_optimizer(
    args: TrainingArguments,
    fresh: Iterable[str] = (),
    groups: Callable[..., list[dict]] = parameter_groups,
    **options: Any,
) -> tuple[Callable, dict[str, Any]]:
    """The pair for the Trainer's `optimizer_cls_and_kwargs`.

    The Trainer builds the optimizer when training begins, from the model of that moment: the result of
    `model_init`, or a model with SFTTrainer's adapter. Learning rate, betas, eps and weight decay (of active
    entries, biases and norms too) come from `args`, and `total_steps` from the run, by ID3Callback.

    fresh: names of parameters to train whole. groups: (model, fresh) → param groups; `adapter_groups` for
    PEFT. options: ID3AdamW's further arguments, `budget` among them.
    Raises TypeError for an option that ID3AdamW does not have, ValueError for an option that contradicts
    `args` or is out of range.
    """
    for name, argument in _FROM_ARGUMENTS.items():
        if name in options:
            raise ValueError(f"{name}: expected it in TrainingArguments ({argument}), got {options[name]}")
    if options.get("max_grad_norm") is not None and args.max_grad_norm > 0:
        both = f"{args.max_grad_norm} there and {options['max_grad_norm']} for the optimizer"
        raise ValueError(f"max_grad_norm: expected TrainingArguments(max_grad_norm=0), got {both}: both clip")
    if args.optim not in _DEFAULT_OPTIMIZERS:
        raise ValueError(
            f"optim: expected TrainingArguments' default beside ID3AdamW, got {args.optim.value}"
        )
    options |= {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2)}
    options |= {"eps": args.adam_epsilon, "weight_decay": args.weight_decay}
    # The Trainer builds the optimizer late; this one checks the options now.
    ID3AdamW([("checked", torch.nn.Parameter(torch.zeros(1)))], **options)

    def build(model: torch.nn.Module, **kwargs: Any) -> ID3AdamW:
        return ID3AdamW(groups(model, fresh), **kwargs)

    return lambda: build, options


class ID3Callback(TrainerCallback, ExportableState):
    """Sets the optimizer's `total_steps`, logs its numbers, and saves a delta in every checkpoint.

    The number of steps is the Trainer's own (epochs, accumulation, the last partial batch), read when
    training begins. An optimizer that already has a `total_steps` keeps it. A run resumed with a different
    number of steps is refused (ValueError), since its budget was spent over the first number.

    The Trainer's history gets `run.numbers_to_log`. The reporters of `report_to` get these numbers after
    `report_first(trainer)`; without that call a warning is given.

    save_deltas: write `delta.safetensors` into each checkpoint folder, once per run or node as the Trainer
    saves; not in a hyper-parameter search. delta_options: arguments for `save_delta`, such as
    `originals=True`.
    """

    def __init__(self, save_deltas: bool = True, **delta_options: Any) -> None:
        self.save_deltas, self.delta_options = save_deltas, delta_options
        self.total_steps_from_run = False
        self.reports_first = False  # see `report_first`

    def state(self) -> dict:
        """The callback's state in the Trainer's checkpoints."""
        arguments = {"save_deltas": self.save_deltas, **self.delta_options}
        return {"args": arguments, "attributes": {"total_steps_from_run": self.total_steps_from_run}}

    def on_init_end(self, args, state, control, **kwargs):
        self.total_steps_from_run = False  # a value from an earlier Trainer is void

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        if args.report_to and not self.reports_first and state.is_world_process_zero:
            warnings.warn(
                f"ID3Callback: its numbers do not reach {args.report_to} without report_first(trainer)",
                stacklevel=2,
            )
        # A checkpoint written without this callback lacks its state, which the Trainer needs to save.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        from_run = saved["attributes"]["total_steps_from_run"]
        self.total_steps_from_run = take_total_steps(unwrapped(optimizer), state.max_steps, from_run)

    def on_log(self, args, state, control, logs=None, optimizer=None, **kwargs):
        if "loss" not in logs:
            return
        numbers = numbers_to_log(unwrapped(optimizer))
        logs.update(numbers)
        # The Trainer has already copied `logs` into its history.
        state.log_history[-1].update(numbers)

    def on_save(self, args, state, control, model=None, optimizer=None, **kwargs):
        if self.save_deltas and args.should_save and not state.is_hyper_param_search:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            save_delta(folder / DELTA_NAME, model, optimizer, **self.delta_options)


def report_first(trainer: Trainer) -> None:
    """Moves the Trainer's ID3Callback before its other callbacks; call it before training.

    The Trainer puts the reporters of `report_to` before the callbacks of `callbacks=`, so that they would
    send a log before it has ID3's numbers. A callback cannot change that order.
    Raises ValueError where the Trainer has no ID3Callback.
    """
    callbacks = trainer.callback_handler.callbacks
    ours = [callback for callback in callbacks if isinstance(callback, ID3Callback)]
    if not ours:
        raise ValueError("trainer: expected an ID3Callback among its callbacks, got none")
    callbacks[:] = ours + [callback for callback in callbacks if callback not in ours]
    for callback in ours:
        callback.reports_first = True


class StepClock(TrainerCallback):
    """Host seconds of every training step, without loading the batch, and of its optimizer step.

    On a GPU the host runs ahead of the device: the sum over a run is right, the time of a single step is not.
    """

    def __init__(self) -> None:
        self.step_seconds: list[float] = []
        self.optimizer_seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self._began = time.perf_counter()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._backward_done = time.perf_counter()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.optimizer_seconds.append(time.perf_counter() - self._backward_done)

    def on_step_end(self, args, state, control, **kwargs):
        self.step_seconds.append(time.perf_counter() - self._began)
