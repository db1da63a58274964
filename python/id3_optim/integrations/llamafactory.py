"""ID3AdamW inside LLaMA-Factory's version 1 trainers, under the name `id3`.

    import id3_optim.integrations.llamafactory  # registers the name
    from llamafactory.v1.trainers.sft_trainer import run_sft

    run_sft()  # reads the YAML file that the command line names

In the YAML file:

    optim_config: {name: id3, lr: 1.0e-3, budget: 0.005, total_steps: 1000, max_grad_norm: 1.0}
    max_grad_norm: 1.0e+9  # ID3AdamW clips by the norm of what it updates
"""

from typing import Any

import torch

try:
    from llamafactory.v1.plugins.trainer_plugins.optimizers.optimizer import OptimizerPlugin
except ModuleNotFoundError:  # until release 0.9.5
    from llamafactory.v1.plugins.trainer_plugins.optimizer import OptimizerPlugin

from ..optimizer import ID3AdamW
from .groups import parameter_groups

_NEEDED = ("budget", "total_steps")


def create_id3_optimizer(model: torch.nn.Module, optim_config: dict[str, Any]) -> ID3AdamW:
    """ID3AdamW over the trainable parameters of the model, an adapter's alone where only these are trainable.

    optim_config: `name`, and arguments of ID3AdamW, among them `budget` and `total_steps`: the trainer gives
    plugins no number of steps. `fresh`: names of parameters to train whole.
    Raises ValueError or TypeError for options that are missing, unknown or out of range.
    """
    options = {name: value for name, value in optim_config.items() if name not in ("name", "fresh")}
    for name in _NEEDED:
        if name not in options:
            raise ValueError(f"optim_config: expected {name} in it, got {sorted(optim_config)}")
    return ID3AdamW(parameter_groups(model, optim_config.get("fresh", ())), **options)


OptimizerPlugin("id3").register()(create_id3_optimizer)
