"""ID3AdamW inside `transformers.Trainer`, by public arguments and callbacks alone.

    args = TrainingArguments(…, learning_rate=1e-3, max_grad_norm=0)
    pair = id3_optimizer(args, fresh, budget=0.005, max_grad_norm=1.0)
    trainer = Trainer(model, args, optimizer_cls_and_kwargs=pair, callbacks=[ID3Callback()], …)
    report_first(trainer)  # for W&B, TensorBoard, MLflow, …

or `optimizers=(ID3AdamW(parameter_groups(model, fresh), …), None)`. Give TrainingArguments
`max_grad_norm=0` and the optimizer its own `max_grad_norm`: the Trainer clips by the norm of all N
gradients, so that how far an active entry moves would depend on entries that never train.
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
# What ID3AdamW takes from the arguments, and where it stands there.
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

    The Trainer builds the optimizer when training begins, from the model as it is then: one that
    `model_init` made, or that SFTTrainer has put an adapter on. Learning rate, betas, eps and weight decay
    (of active entries, biases and norms too) come from `args`; `total_steps` from the run, by ID3Callback.

    fresh: names of parameters to train whole. groups: (model, fresh) → param groups; `adapter_groups` for
    PEFT. options: ID3AdamW's other arguments, `budget` among them.
    Raises TypeError for an option that ID3AdamW has not; ValueError for one that contradicts `args` or is
    out of range.
    """
    for name, argument in _FROM_ARGUMENTS.items():
        if name in options:
            raise ValueError(f"{name}: expected TrainingArguments' {argument} to say it, got {options[name]}")
    if options.get("max_grad_norm") is not None and args.max_grad_norm > 0:
        both = f"got {args.max_grad_norm} beside the optimizer's {options['max_grad_norm']}"
        raise ValueError(f"max_grad_norm: expected TrainingArguments(max_grad_norm=0), {both}: both clip")
    if args.optim not in _DEFAULT_OPTIMIZERS:
        raise ValueError(
            f"optim: expected TrainingArguments' default beside ID3AdamW, got {args.optim.value}"
        )
    options |= {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2)}
    options |= {"eps": args.adam_epsilon, "weight_decay": args.weight_decay}
    ID3AdamW([("checked", torch.nn.Parameter(torch.zeros(1)))], **options)  # refuses now what it would later

    def build(model: torch.nn.Module, **kwargs: Any) -> ID3AdamW:
        return ID3AdamW(groups(model, fresh), **kwargs)

    return lambda: build, options


class ID3Callback(TrainerCallback, ExportableState):
    """Tells the optimizer how many steps the Trainer will take, adds its numbers to the Trainer's logs, and
    saves the delta in every checkpoint.

    The number of steps is the Trainer's own (epochs, accumulation, the last partial batch), taken when
    training begins; an optimizer that already has a `total_steps` keeps it. A run resumed with another
    number of steps is refused (ValueError), since its budget was being spent over the first.

    Logged: `run.numbers_to_log`, in the Trainer's history; what `report_to` names gets them too after
    `report_first(trainer)`, and a warning says so where that is missing.

    save_deltas: write `delta.safetensors` into each checkpoint folder, once per run or node as the Trainer
    saves; not in a hyper-parameter search. delta_options: `save_delta`'s own, such as `originals=True`.
    """

    def __init__(self, save_deltas: bool = True, **delta_options: Any) -> None:
        self.save_deltas, self.delta_options = save_deltas, delta_options
        self.total_steps_from_run = False
        self.reports_first = False  # see `report_first`

    def state(self) -> dict:
        """What the Trainer keeps in its checkpoints."""
        arguments = {"save_deltas": self.save_deltas, **self.delta_options}
        return {"args": arguments, "attributes": {"total_steps_from_run": self.total_steps_from_run}}

    def on_init_end(self, args, state, control, **kwargs):
        self.total_steps_from_run = False  # no other Trainer's, if it had this callback before

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        if args.report_to and not self.reports_first and state.is_world_process_zero:
            warnings.warn(
                f"ID3Callback: its numbers do not reach {args.report_to} without report_first(trainer)",
                stacklevel=2,
            )
        # A checkpoint written without this callback has no state of it, and the Trainer needs one to save.
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

    The Trainer puts what `report_to` names before the callbacks that it is given, and a callback can not
    reach the others: reporters would send a log before ID3's numbers are in it.
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
    """Host seconds of every step: the whole of it (without loading the batch), and the optimizer's share.

    On a GPU the host runs ahead: the sum over a run is right, a single step is not.
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
