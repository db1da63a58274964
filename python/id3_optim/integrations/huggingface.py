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

from ..backward.handle import SparseBackward, begun, ended
from ..delta import save_delta
from ..distributed.part import any_split
from ..optimizer import ID3AdamW
from ..wrappers import unwrapped
from .groups import fresh_parameters as fresh_parameters
from .groups import parameter_groups as parameter_groups
from .run import Attempt, check_clipping, check_resumed, numbers_to_log, take_total_steps

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
_LOST = (
    "the checkpoint lacks optimizer.pt or scheduler.pt (save_only_model=True leaves them out): resume from a "
    "whole one, or pass ID3Callback(save_deltas=False, fresh_optimizer=True)"
)
_DEFAULT_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")


def id3_optimizer(
    args: TrainingArguments,
    fresh: Iterable[str] = (),
    groups: Callable[..., list[dict]] = parameter_groups,
    head_options: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Callable, dict[str, Any]]:
    """The pair for the Trainer's `optimizer_cls_and_kwargs`.

    The Trainer builds the optimizer when training begins, from the model of that moment: the result of
    `model_init`, or a model with SFTTrainer's adapter. Learning rate, betas, eps and weight decay (of active
    entries, biases and norms too) come from `args`, and `total_steps` from the run, by ID3Callback.

    fresh: names of parameters to train whole. head_options: settings of these alone, such as `lr`. groups:
    (model, fresh, **head_options) → param groups; `adapter_groups` for PEFT. options: ID3AdamW's further
    arguments, `budget` among them.
    Raises TypeError for an option that ID3AdamW does not have, ValueError for an option that contradicts
    `args` or is out of range.
    """
    _refuse_deepspeed(args)
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
        return ID3AdamW(groups(model, fresh, **head_options or {}), **kwargs)

    return lambda: build, options


def _refuse_deepspeed(args: TrainingArguments) -> None:
    """Raises ValueError: DeepSpeed puts other parameters, flat parts of all, into the optimizer."""
    if getattr(args, "deepspeed_plugin", None) is not None:
        raise ValueError(
            "deepspeed: does not apply to ID3AdamW: DeepSpeed gives it flat parts of the parameters; use "
            "DistributedDataParallel"
        )


class ID3Callback(TrainerCallback, ExportableState):
    """Sets the optimizer's `total_steps`, logs its numbers, and saves a delta in every checkpoint.

    The number of steps is the Trainer's own (epochs, accumulation, the last partial batch), read when
    training begins. An optimizer that already has a `total_steps` keeps it. A run resumed with fewer
    steps is refused (ValueError), since its budget is spent over the first number; with more it trains on
    with the entries that are active then, and warns. With a static mask any number is taken.

    The Trainer's history gets `run.numbers_to_log`. The reporters of `report_to` get these numbers after
    `report_first(trainer)`; without that call a warning is given.

    save_deltas: write `delta.safetensors` into each checkpoint folder, once per run or node as the Trainer
    saves, and beside the model that `push_to_hub` uploads; not in a hyper-parameter search. delta_options:
    arguments for `save_delta`, such as `originals=True`.
    fresh_optimizer: resume from a checkpoint that has no optimizer state (`save_only_model=True`), which is
    refused otherwise. The whole budget is spent over the steps that are left. The optimizer's originals are
    the checkpoint's weights then, so that a delta would fit this checkpoint and not the base: needs
    save_deltas=False; `id3_optim.diff(base, model)` makes the delta that fits the base.

    sparse_backward: change the model by `id3_optim.sparse_backward` while it is trained.

    With `auto_find_batch_size` a run whose memory runs out, after some steps too, begins again from the
    weights and with the whole budget of its beginning.
    """

    def __init__(
        self,
        save_deltas: bool = True,
        fresh_optimizer: bool = False,
        sparse_backward: bool = False,
        **delta_options: Any,
    ) -> None:
        if fresh_optimizer and save_deltas:
            raise ValueError(
                "fresh_optimizer: needs save_deltas=False: the deltas would not fit the base; "
                "id3_optim.diff(base, model) makes one that does"
            )
        self.save_deltas, self.delta_options = save_deltas, delta_options
        self.fresh_optimizer, self.sparse_backward = fresh_optimizer, sparse_backward
        self._sparse: SparseBackward | None = None
        self.total_steps_from_run = False
        self.begun_at = 0  # the Trainer's step at which the optimizer had none
        self.steps_done = 0  # the optimizer's, when the state was last saved
        self.reports_first = False  # see `report_first`
        self._optimizer: ID3AdamW | None = None
        self._attempt: Attempt | None = None  # None between runs

    def state(self) -> dict:
        """The callback's state in the Trainer's checkpoints."""
        if self._optimizer is not None:
            self.steps_done = self._optimizer.steps_done
        names = ("save_deltas", "fresh_optimizer", "sparse_backward")
        own = {name: getattr(self, name) for name in names}
        names = ("total_steps_from_run", "begun_at", "steps_done")
        return {
            "args": own | self.delta_options,
            "attributes": {name: getattr(self, name) for name in names},
        }

    def on_init_end(self, args, state, control, **kwargs):
        self.total_steps_from_run, self._optimizer, self._attempt = False, None, None  # of an earlier Trainer

    def on_train_begin(
        self, args, state, control, model=None, optimizer=None, train_dataloader=None, **kwargs
    ):
        _refuse_deepspeed(args)
        if args.report_to and not self.reports_first and state.is_world_process_zero:
            warnings.warn(
                f"ID3Callback: its numbers do not reach {args.report_to} without report_first(trainer)",
                stacklevel=2,
            )
        self._optimizer = unwrapped(optimizer)
        if args.auto_find_batch_size:
            own = getattr(train_dataloader, "batch_size", None)  # of a loader that Accelerate has not made
            self._try(getattr(train_dataloader, "total_batch_size", own) or 0)
        # A checkpoint written without this callback lacks its state, which the Trainer needs to save.
        absent = {"attributes": {"total_steps_from_run": self.total_steps_from_run}}
        saved = state.stateful_callbacks.get(type(self).__name__, absent)["attributes"]
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        recorded = saved.get("steps_done")  # older checkpoints have neither this nor `begun_at`
        self.begun_at = self._resumed_at(state.global_step, recorded, saved.get("begun_at", 0))
        steps, from_run = state.max_steps - self.begun_at, saved["total_steps_from_run"]
        if steps > 0:
            self.total_steps_from_run = take_total_steps(self._optimizer, steps, from_run)
        self._sparse = begun(self.sparse_backward, model, self._optimizer)
        try:
            check_clipping(self._optimizer, "max_grad_norm in TrainingArguments", args.max_grad_norm)
        except ValueError:
            self.remove()  # another run's optimizer would find no gradients
            raise

    def _try(self, batch_size: int) -> None:
        """A smaller batch than that of a run that has not ended is a retry; else `train` was called anew."""
        if self._attempt is not None and batch_size < self._attempt.batch_size:
            self._attempt.retry(self._optimizer, batch_size)
        else:
            self._attempt = Attempt(self._optimizer, batch_size)

    def _resumed_at(self, global_step: int, recorded: int | None, begun_at: int) -> int:
        """The Trainer's step at which the optimizer began. Refuses an optimizer without the run's state."""
        if global_step == 0:
            return 0
        if self.fresh_optimizer and self._optimizer.steps_done == 0 and recorded != 0:
            return global_step
        check_resumed(self._optimizer, global_step, recorded, _LOST)
        return begun_at

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self._attempt is not None:
            self._attempt.stepped = True

    def on_train_end(self, args, state, control, **kwargs):
        self._attempt = None
        self.remove()

    def remove(self) -> None:
        """Gives the model back, whose gradients other optimizers find then. Training does it when it ends; do
        it where it was interrupted."""
        ended(self._sparse, self._optimizer)

    def on_log(self, args, state, control, logs=None, optimizer=None, **kwargs):
        if "loss" not in logs:
            return
        numbers = numbers_to_log(unwrapped(optimizer))
        logs.update(numbers)
        # The Trainer has already copied `logs` into its history.
        state.log_history[-1].update(numbers)

    def on_save(self, args, state, control, model=None, optimizer=None, **kwargs):
        together = optimizer is not None and any_split(optimizer.param_groups)  # every rank has its entries
        if self.save_deltas and (args.should_save or together) and not state.is_hyper_param_search:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            save_delta(folder / DELTA_NAME, model, optimizer, **self.delta_options)

    def on_push_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if optimizer is None or not self.save_deltas or state.is_hyper_param_search:
            return
        split = any_split(optimizer.param_groups)
        # Where a checkpoint is uploaded one process is here, and a delta of split parameters needs all.
        if (split and control.should_save) or not (split or state.is_world_process_zero):
            return
        folders = [Path(args.output_dir)]  # what the Trainer uploads next
        if not split:  # and with some strategies the checkpoint
            folders += folders[0].glob(f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        folders[0].mkdir(parents=True, exist_ok=True)
        for folder in folders:
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
