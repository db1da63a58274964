"""`id3-optim train --fsdp`: FSDP2 (`fully_shard`) splits the model over the processes of the launcher.

What is written has the form of one process: whole weights, and the optimizer's state by place in whole
tensors. So a checkpoint of split parameters loads into whole ones, and the other way round.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ..distributed.part import as_split, full
from ..integrations.data_parallel import leave_plain
from ..ranks import world_size
from .watched_trainer import WatchedTrainer


def shard(model: nn.Module, device: torch.device) -> None:
    """Splits the parameters over all processes, layer by layer, and moves each part to the device.

    The model may lie on the CPU, so that no device has to hold it whole. Afterwards it takes over state dicts
    of whole tensors. Mutates model; call this before its optimizer is built.
    Raises ValueError for a module whose own parameters have two dtypes, which FSDP2 cannot hold together.
    """
    mesh = init_device_mesh(device.type, (world_size(),))
    for module in [*_of_other_dtypes(model), *_layers(model)]:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.register_load_state_dict_pre_hook(_split_weights)


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The modules of the outermost lists: what a transformer calls one after the other."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else _layers(child)


def _of_other_dtypes(model: nn.Module) -> Iterator[nn.Module]:
    """The modules, such as a new head in float32, whose parameters differ in dtype from the model's first."""
    usual = next(model.parameters()).dtype
    for name, module in model.named_modules():
        dtypes = {p.dtype for p in module.parameters(recurse=False)}
        if len(dtypes) > 1:
            got = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            raise ValueError(f"--bf16: expected one dtype in {name} with --fsdp, got {got}; leave --bf16 out")
        if dtypes - {usual}:
            yield module


def _split_weights(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, param in model.named_parameters(remove_duplicate=False):
        if prefix + name in state:
            state[prefix + name] = as_split(state[prefix + name], param)


def split_moments(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A pre-hook of `load_state_dict` for torch's optimizers: whole tensors are split as parameters are."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    found = {
        i: {name: as_split(x, params[i]) if _alike(x, params[i]) else x for name, x in own.items()}
        for i, own in state["state"].items()
    }
    return {**state, "state": found}


def _alike(value: Any, param: torch.Tensor) -> bool:
    return torch.is_tensor(value) and value.shape == param.shape


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's state dict of whole tensors on the CPU for the first process, {} for the other ones.

    Tied parameters are one tensor. Every process has to call this where parameters are split.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state, first = get_model_state_dict(model, options=options), {}
    for name, param in model.named_parameters(remove_duplicate=False):
        if name in state:
            state[name] = state[first.setdefault(id(param), name)]
    return state


def whole_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state dict with whole tensors. Every process has to call this."""
    state = optimizer.state_dict()
    found = {
        key: {name: full(x) if torch.is_tensor(x) else x for name, x in own.items()}
        for key, own in state["state"].items()
    }
    return {**state, "state": found}


class ShardedTrainer(WatchedTrainer):
    """A Trainer for a model that `shard` has split; every process takes part where it saves."""

    def create_accelerator_and_postprocess(self) -> None:
        """The Trainer's own."""
        super().create_accelerator_and_postprocess()
        leave_plain(self.accelerator, device_placement=False)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Each part is on its device, and hooks on parameters do not survive a move."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the whole weights."""
        weights = whole_weights(self.model)
        if self.args.should_save:
            self.model.save_pretrained(output_dir or self.args.output_dir, state_dict=weights)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        state = whole_state(self.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")
