"""ID3AdamW inside `transformers.Trainer`, by public arguments and callbacks alone.

    optimizer = ID3AdamW(parameter_groups(model, fresh), lr=1e-3, budget=0.005)
    trainer = Trainer(model, args, optimizers=(optimizer, None), callbacks=[ID3Callback()], …)

Give TrainingArguments `max_grad_norm=0` and the optimizer its own `max_grad_norm` instead: the Trainer clips
by the norm of all N gradients, so that how far an active entry moves would depend on entries that never
train.
"""

import time
from collections.abc import Iterable

import torch
from transformers import TrainerCallback

from ..analysis import count_changed, sparsity_entropy, tensor_sparsity


def unwrapped(optimizer):
    """The optimizer inside Accelerate's wrapper."""
    while not hasattr(optimizer, "touched") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def fresh_parameters(model: torch.nn.Module, loading_info: dict) -> set[str]:
    """Names of the parameters that `from_pretrained(…, output_loading_info=True)` found in no checkpoint
    file.

    These start from random numbers, so there is no pre-trained value to stay near: train them densely.
    """
    mismatched = {
        entry[0] if isinstance(entry, tuple) else entry for entry in loading_info["mismatched_keys"]
    }
    missing = set(loading_info["missing_keys"]) | mismatched
    return {name for name, _ in model.named_parameters() if name in missing}


def parameter_groups(model: torch.nn.Module, fresh: Iterable[str] = (), **dense_options) -> list[dict]:
    """Param groups for ID3AdamW: what was pre-trained competes for the budget, `fresh` is a `dense=True`
    group.

    dense_options: settings of the dense group alone, such as `lr`. Frozen parameters are left out.
    """
    fresh = set(fresh)
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [(name, p) for name, p in trainable if name not in fresh]}]
    dense = [(name, p) for name, p in trainable if name in fresh]
    if dense:
        groups.append({"params": dense, "dense": True, **dense_options})
    return groups


class ID3Callback(TrainerCallback):
    """Tells the optimizer how many steps the Trainer will take, and adds its numbers to the Trainer's logs.

    The number of steps is the Trainer's own (epochs, accumulation, the last partial batch), taken when
    training begins; an optimizer that already has a `total_steps` keeps it. Logged: `n_active` (|Λ|),
    `n_changed` (entries that differ from the pre-trained model), `threshold` (the smallest score of the
    newest selection), `tensor_sparsity` and `sparsity_entropy` (see `id3_optim.analysis`).
    """

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        optimizer = unwrapped(optimizer)
        if optimizer.total_steps is None:
            optimizer.set_total_steps(state.max_steps)

    def on_log(self, args, state, control, logs=None, optimizer=None, **kwargs):
        optimizer = unwrapped(optimizer)
        if "loss" not in logs or not hasattr(optimizer, "touched"):
            return
        numbers = {
            "n_active": optimizer.n_active,
            "n_changed": count_changed(optimizer),
            "tensor_sparsity": tensor_sparsity(optimizer),
            "sparsity_entropy": sparsity_entropy(optimizer),
        }
        newest = optimizer.last_selection
        if newest is not None and newest.threshold is not None:
            numbers["threshold"] = float(newest.threshold)
        logs.update(numbers)
        # The Trainer has already copied `logs` into its history.
        state.log_history[-1].update(numbers)


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
