"""ID3AdamW inside torchtitan. Tried on whole parameters alone: one GPU, or DistributedDataParallel.

    group = ParamGroupConfig(pattern=".*", optimizer_name="ID3AdamW", optimizer_kwargs={"lr": 1e-3})
    config.optimizer = ID3OptimizersContainer.Config(
        param_groups=[group],
        optimizer_factory_kwargs_by_name={"ID3AdamW": {"budget": 0.005, "total_steps": 1000}},
    )

A group of `optimizer_kwargs={"dense": True, …}` is trained whole.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torchtitan.components.optimizer import OptimizersContainer

from ..optimizer import ID3AdamW

_KEY = "id3_optim.state"


def _id3_adamw(groups: list[dict[str, Any]], **options: Any) -> ID3AdamW:
    """ID3AdamW without torchtitan's choice among torch's implementations, which it puts into each group."""
    choice = ("fused", "foreach")
    return ID3AdamW([{k: v for k, v in group.items() if k not in choice} for group in groups], **options)


class ID3OptimizersContainer(OptimizersContainer):
    """torchtitan's container with one more name for optimizers, `ID3AdamW`.

    A checkpoint has its state as one entry: the sparse state has other sizes at each step, and torchtitan's
    form holds tensors of sizes that are known before they are loaded.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """torchtitan's own fields; ID3AdamW's arguments go into `optimizer_factory_kwargs_by_name`."""

    def __init__(self, config: Config, *, model_parts: list[torch.nn.Module]) -> None:
        if len(model_parts) != 1:
            raise ValueError(
                f"model_parts: expected one, since the budget is shared over the whole model, got "
                f"{len(model_parts)}; train without pipeline parallelism"
            )
        super().__init__(config, model_parts=model_parts)

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., torch.optim.Optimizer]:
        return _id3_adamw if name == "ID3AdamW" else OptimizersContainer._resolve_optimizer_factory(name)

    def state_dict(self) -> dict[str, Any]:
        """The states of all optimizers, as one entry of bytes."""
        written = io.BytesIO()
        torch.save([optimizer.state_dict() for optimizer in self.optimizers], written)
        return {_KEY: written.getvalue()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError for a checkpoint of another container, or of another number of optimizers."""
        if _KEY not in state_dict:
            raise ValueError(
                f"optimizer: expected a checkpoint of ID3OptimizersContainer ({_KEY}), got one without it"
            )
        states = torch.load(io.BytesIO(state_dict[_KEY]), weights_only=True)
        if len(states) != len(self.optimizers):
            raise ValueError(
                f"optimizer: expected states of {len(self.optimizers)} optimizers, got {len(states)}"
            )
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)
