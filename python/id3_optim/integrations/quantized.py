"""`QuantizedSparse` inside `transformers.Trainer` and TRL, by public arguments and callbacks alone.

    sparse = QuantizedSparse(model, budget=0.001, total_steps=1000)
    args = TrainingArguments(…, learning_rate=1e-3, max_grad_norm=0, max_steps=1000)
    trainer = Trainer(trainable(model, sparse), args, callbacks=[SparseCallback(max_grad_norm=1.0)], …)

The Trainer refuses a quantised model that has no adapter. It takes a module around the model, in which the
sparse values train and whose checkpoints hold them alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..delta import Delta
from ..delta.facts import setting_of_model
from ..delta.file import Change
from ..quantized import QuantizedSparse
from ..validation import check_fresh
from .huggingface import DELTA_NAME

_COUNTS = ("steps_done", "n_active")
_PLACES = ("indices", "slots", "shape")


class _Loaded(NamedTuple):
    """What `Module.load_state_dict` returns."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class _Trainable(nn.Module):
    """A quantised model with its sparse values. What it does not know, its model answers."""

    # Of what trains, that is: TRL would round it to bfloat16, and the Trainer refuse the model.
    is_quantized = is_loaded_in_4bit = is_loaded_in_8bit = False

    def __init__(self, model: nn.Module, sparse: QuantizedSparse, fresh: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.quantized, self.values = model, sparse.values
        self.sparse, self.fresh = sparse, dict(fresh)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "quantized":  # a copy that is being made has none yet
                raise
            return getattr(self.quantized, name)

    def delta(self) -> Delta:
        """The delta of the dequantised base, with the fresh parameters whole."""
        sparse = self.sparse.delta()
        whole = {name: p.detach().cpu().clone() for name, p in self.fresh.items()}
        dense = {name: Change(tuple(p.shape), p.dtype, None, p) for name, p in whole.items()}
        settings = sparse.settings | setting_of_model(self.quantized)
        return Delta(sparse.changes | dense, sparse.fingerprint, settings)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """What trains: `QuantizedSparse.state_dict` without its nesting, and the fresh parameters."""
        state = self.sparse.state_dict()
        flat = {"values": state["values"]} | {name: torch.tensor(state[name]) for name in _COUNTS}
        flat |= {
            f"run.{name}": torch.tensor(value, dtype=_wide(value)) for name, value in state["run"].items()
        }
        for layer, places in state["layers"].items():
            flat |= {f"{kind}.{layer}": places[kind] for kind in _PLACES}
        return flat | {f"fresh.{name}": p.detach().clone() for name, p in self.fresh.items()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> _Loaded:
        """Takes over what `state_dict` gave. Raises ValueError for that of another model."""
        expected = {"values", *_COUNTS, *(f"fresh.{name}" for name in self.fresh)}
        if absent := sorted(expected - state_dict.keys()):
            got = f"{len(state_dict)} tensors without"
            raise ValueError(f"state: expected {', '.join(absent)}, got {got}")
        layers: dict[str, dict[str, Tensor]] = {}
        run = {}
        for name, held in state_dict.items():
            kind, _, of = name.partition(".")
            if kind in _PLACES:
                layers.setdefault(of, {})[kind] = held
            elif kind == "run":
                run[of] = held.item()
        counts = {name: int(state_dict[name]) for name in _COUNTS}
        self.sparse.load_state_dict({"values": state_dict["values"], "layers": layers, "run": run} | counts)
        for name, p in self.fresh.items():
            p.copy_(state_dict[f"fresh.{name}"])
        return _Loaded([], [])


def _wide(value: float) -> torch.dtype:
    return torch.int64 if isinstance(value, int) else torch.float64


def trainable(model: nn.Module, sparse: QuantizedSparse, fresh: Iterable[str] = ()) -> nn.Module:
    """A module around `model` for `Trainer(model=…)`, with the attributes of the model.

    The sparse values train in it, and the parameters named in `fresh`, such as a new head, whole. Its
    state_dict holds these alone; `delta()` is theirs, of the dequantised base. Mutates the model: every other
    parameter is frozen. The class has the name and the signature of the model's, from which the Trainer
    learns the columns that the model reads.
    Raises ValueError for a fresh name that is not in the model.
    """
    named, fresh = dict(model.named_parameters()), set(fresh)
    check_fresh(named, fresh)
    for name, p in named.items():
        p.requires_grad_(name in fresh)

    def forward(self: _Trainable, *args: Any, **kwargs: Any) -> Any:
        return self.quantized(*args, **kwargs)

    kind = type(model)
    forward.__signature__ = inspect.signature(kind.forward)
    own = type(kind.__name__, (_Trainable,), {"forward": forward})
    return own(model, sparse, {name: p for name, p in named.items() if name in fresh})


class SparseCallback(TrainerCallback):
    """Lets entries join before each step of the optimizer, and saves a delta in every checkpoint.

    max_grad_norm: the largest norm of a step's gradients, those of joining entries among them, which
    TrainingArguments' clipping has not seen yet. save_deltas: write `delta.safetensors`, of the dequantised
    base, into each checkpoint folder.
    Raises ValueError, when training begins, for a model that is not `trainable`'s, clipping in
    TrainingArguments, weight decay of the sparse values, fp16, several processes or devices, and a run that
    is shorter than the steps over which the budget is spent.
    """

    def __init__(self, max_grad_norm: float | None = None, save_deltas: bool = True) -> None:
        self.max_grad_norm, self.save_deltas = max_grad_norm, save_deltas

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if not isinstance(model, _Trainable):
            raise ValueError(f"model: expected that of `trainable`, got {type(model).__name__}")
        _check_arguments(args)
        for group in optimizer.param_groups:
            if group.get("weight_decay") and any(p is model.values for p in group["params"]):
                raise ValueError(
                    f"weight_decay: expected 0, got {group['weight_decay']}, which would pull to the base"
                )
        if state.max_steps < model.sparse.total_steps:
            raise ValueError(
                f"total_steps: expected at most the run's {state.max_steps}, got {model.sparse.total_steps}, "
                "which would leave a part of the budget unspent"
            )

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        model.sparse.join()
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_([model.values, *model.fresh.values()], self.max_grad_norm)

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        if "loss" in logs:
            logs["n_active"] = model.sparse.n_active
            state.log_history[-1]["n_active"] = logs["n_active"]  # the Trainer has copied `logs` already

    def on_save(self, args, state, control, model=None, **kwargs):
        if self.save_deltas and args.should_save:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            model.delta().save(folder / DELTA_NAME)


def _check_arguments(args: Any) -> None:
    if args.max_grad_norm:
        raise ValueError(
            f"max_grad_norm: expected 0 in TrainingArguments, got {args.max_grad_norm}: entries join after "
            "that clipping; give it to SparseCallback"
        )
    if args.fp16:
        raise ValueError("fp16: expected bf16 or float32, got fp16: joining entries lack its loss scale")
    if (devices := max(args.world_size, args.n_gpu)) > 1:
        raise ValueError(f"devices: expected one process on one device, got {devices}")
