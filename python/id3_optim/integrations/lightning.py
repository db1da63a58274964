"""ID3AdamW inside Lightning's Trainer: `configure_optimizers` returns it, `ID3Callback` does the rest.

def configure_optimizers(self):
    return ID3AdamW(self.named_parameters(), lr=1e-3, budget=0.005, max_grad_norm=1.0)

Trainer(callbacks=[ID3Callback()], …)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

try:
    import lightning.pytorch as pl
except ModuleNotFoundError:
    import pytorch_lightning as pl

from ..backward.handle import SparseBackward, begun, ended
from ..delta import save_delta
from ..delta.series import check_model
from ..distributed.part import any_split
from ..optimizer import ID3AdamW
from .run import check_clipping, check_resumed, numbers_to_log, take_total_steps

_LOST = (
    "the checkpoint has no state for it: resume from a whole one, or load its weights and call fit without "
    "ckpt_path"
)


def id3_of(trainer: pl.Trainer) -> ID3AdamW:
    """The run's ID3AdamW. Raises ValueError unless the Trainer has exactly one."""
    found = [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, ID3AdamW)]
    if len(found) != 1:
        raise ValueError(f"configure_optimizers: expected one ID3AdamW, got {len(found)}")
    return found[0]


class ID3Callback(pl.Callback):
    """Sets the optimizer's `total_steps`, logs its numbers, and saves a delta beside each checkpoint.

    The number of steps is `trainer.estimated_stepping_batches` when training begins, after a checkpoint has
    been loaded, less the steps that an earlier `fit` of the same Trainer has taken. An optimizer that has a
    `total_steps` keeps it. Raises ValueError where the Trainer has neither max_epochs nor max_steps, or where
    a resumed run has fewer steps than it began with (with more it trains on with the entries that are active
    then, and warns), or an optimizer without its steps.

    Loggers get `run.numbers_to_log` every `log_every_n_steps`.

    save_deltas: write `<name>.delta.safetensors` beside each `<name>.ckpt`, and remove both together; on rank
    0, to local disks; not with WeightAveraging (ValueError). submodule: the module whose parameter names the
    delta has, "" for the whole LightningModule; every trained parameter must be in it (ValueError when
    training begins). delta_options: arguments for `save_delta`, such as `originals=True`.
    sparse_backward: change the module by `id3_optim.sparse_backward` when training begins.
    """

    def __init__(
        self,
        save_deltas: bool = True,
        submodule: str = "",
        sparse_backward: bool = False,
        **delta_options: Any,
    ) -> None:
        self.sparse_backward = sparse_backward
        self._sparse: SparseBackward | None = None
        self.save_deltas, self.submodule, self.delta_options = save_deltas, submodule, delta_options
        self.total_steps_from_run, self.begun_at = False, 0
        self._recorded: int | None = None  # steps_done in the checkpoint that was loaded
        self._optimizer: ID3AdamW | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.total_steps_from_run, self.begun_at = False, 0  # a checkpoint is loaded after this
        self._recorded = None
        if stage == "fit" and self.save_deltas:
            _refuse_averages(trainer)
            _beside(trainer, self)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        optimizer = self._optimizer = id3_of(trainer)
        if trainer.ckpt_path is not None:
            check_resumed(optimizer, trainer.global_step, self._recorded, _LOST)
        if self.save_deltas:
            check_model(self._saved_module(pl_module), optimizer)
        if optimizer.steps_done == 0:
            self.begun_at = trainer.global_step  # a second fit does not begin at 0
        steps = trainer.estimated_stepping_batches - self.begun_at
        if 0 < steps < float("inf"):
            self.total_steps_from_run = take_total_steps(optimizer, int(steps), self.total_steps_from_run)
        self._sparse = begun(self.sparse_backward, pl_module, optimizer)
        check_clipping(optimizer, "gradient_clip_val", trainer.gradient_clip_val)
        if not 0 < steps < float("inf") and optimizer.total_steps is None:
            raise ValueError(f"max_steps: expected a limit, or one in max_epochs, got {trainer.max_steps}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        ended(self._sparse, self._optimizer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException):
        ended(self._sparse, self._optimizer)  # an interrupt, too

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.log_every_n_steps and trainer.global_step % trainer.log_every_n_steps == 0:
            pl_module.log_dict({name: float(n) for name, n in numbers_to_log(id3_of(trainer)).items()})

    def state_dict(self) -> dict[str, Any]:
        done = 0 if self._optimizer is None else self._optimizer.steps_done
        own = {"total_steps_from_run": self.total_steps_from_run, "begun_at": self.begun_at}
        return own | {"steps_done": done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.total_steps_from_run = state_dict["total_steps_from_run"]
        self.begun_at = state_dict.get("begun_at", 0)  # absent in older checkpoints
        self._recorded = state_dict.get("steps_done")

    def save_beside(self, trainer: pl.Trainer, path: Path) -> None:
        """Writes the delta of the entries that training has changed so far."""
        model = self._saved_module(trainer.lightning_module)
        save_delta(path, model, id3_of(trainer), **self.delta_options)

    def _saved_module(self, module: pl.LightningModule) -> torch.nn.Module:
        modules = dict(module.named_modules(remove_duplicate=False))
        if self.submodule not in modules:
            owner = type(module).__name__
            raise ValueError(f"submodule: expected the name of a module in {owner}, got {self.submodule!r}")
        return modules[self.submodule]


def _refuse_averages(trainer: pl.Trainer) -> None:
    """Raises ValueError for a callback that puts averaged weights into the checkpoints."""
    kind = getattr(pl.callbacks, "WeightAveraging", ())  # of Lightning 2.6
    for callback in trainer.callbacks:
        if isinstance(callback, kind):
            raise ValueError(
                f"save_deltas: expected False beside {type(callback).__name__}, got True: its checkpoints "
                "hold averaged weights, and a delta other ones; id3_optim.diff(base, model) makes theirs"
            )


def _beside(trainer: pl.Trainer, callback: ID3Callback) -> None:
    """Lets the Trainer's strategy write and remove a delta with each checkpoint.

    Hooks of callbacks do not get a checkpoint's path, and a `CheckpointIO` does not see folders that all
    ranks write. Changes the strategy, once.
    """
    strategy = trainer.strategy
    save, remove = strategy.save_checkpoint, strategy.remove_checkpoint
    if getattr(save, "writes_deltas", False):
        return

    def save_checkpoint(checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        save(checkpoint, filepath, storage_options=storage_options)
        if strategy.is_global_zero or any_split(id3_of(trainer).param_groups):  # then all ranks give parts
            callback.save_beside(trainer, _delta_path(filepath))

    def remove_checkpoint(filepath: Any) -> None:
        remove(filepath)
        if strategy.is_global_zero:
            _delta_path(filepath).unlink(missing_ok=True)

    save_checkpoint.writes_deltas = True
    strategy.save_checkpoint, strategy.remove_checkpoint = save_checkpoint, remove_checkpoint


def _delta_path(path) -> Path:
    path = Path(path)
    name = path.stem if path.suffix == ".ckpt" else path.name  # "w-0.1" and "w-0.2" are two checkpoints
    return path.with_name(f"{name}.delta.safetensors")
