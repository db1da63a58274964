"""The pools of entries besides the model's own: LoRA and its kin by peft, and bottleneck adapters.

Every pool goes into the given model in place, which stays a model of its class: no wrapper renames anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from .extras import require

REDUCTION = 16  # of a bottleneck adapter (Pfeiffer et al., 2021): its inner width is the outer one's part
_LEAST = 4  # inner width: with one or two an adapter may be dead, all its units below 0
_SPREAD = 0.02  # of the initial weights of an adapter; zeros would leave D3 and SNIP the upper half alone


class Bottleneck(nn.Module):
    """x + up(relu(down(x))), nearly the identity at first."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.down, self.up = nn.Linear(width, inner), nn.Linear(inner, width)
        for layer in (self.down, self.up):
            nn.init.normal_(layer.weight, std=_SPREAD)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(torch.relu(self.down(x)))


def block_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of the model's numbered blocks by name: no embedding, pooler or head.

    Raises ValueError for a model without any.
    """
    from transformers.pytorch_utils import Conv1D

    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and _block(name)
    }
    if not layers:
        raise ValueError(
            f"model: expected linear layers in numbered blocks, as transformers has, got none in a "
            f"{type(model).__name__}"
        )
    return layers


def _block(name: str) -> str:
    """The part of a module's name up to its first number; empty without a number."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), -1)
    return ".".join(parts[: number + 1])


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """The numbers of inputs and outputs; transformers' Conv1D has its weight transposed."""
    rows, columns = layer.weight.shape
    return (columns, rows) if isinstance(layer, nn.Linear) else (rows, columns)


def add_bottlenecks(model: nn.Module, reduction: int = REDUCTION) -> None:
    """Puts an adapter behind the last linear layer of each numbered block, and freezes all other parameters.

    Mutates the model. Draws the adapters' weights from torch's generator.
    """
    last = {_block(name): layer for name, layer in block_layers(model).items()}
    model.requires_grad_(False)
    for layer in last.values():
        width = _sizes(layer)[1]
        layer.adapter = Bottleneck(width, max(_LEAST, width // reduction)).to(layer.weight)
        layer.register_forward_hook(_through_adapter)


def _through_adapter(layer: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    return layer.adapter(output)


def load_bottlenecks(model: nn.Module, folder: str | Path, reduction: int = REDUCTION) -> None:
    """Adds the adapters that `model.save_pretrained(folder)` has saved. Mutates the model.

    Raises ValueError where the file in `folder` lacks one.
    """
    from safetensors.torch import load_file

    add_bottlenecks(model, reduction)
    saved = load_file(Path(folder) / "model.safetensors")
    for name, param in model.named_parameters():
        if ".adapter." in name:
            if name not in saved:
                raise ValueError(f"folder: expected {name} in {folder}, got none")
            param.data.copy_(saved[name])


def largest_rank(model: nn.Module, budget: int) -> tuple[int, list[str]]:
    """The largest rank whose LoRA has at most `budget` entries, and the names of the layers that it is for.

    All linear layers of the blocks where rank 1 fits there, else query and value alone, with rank 1 at least.
    """
    layers = block_layers(model)
    rank = budget // sum(sum(_sizes(layer)) for layer in layers.values())
    if rank:
        return rank, list(layers)
    few = [name for name in layers if name.rpartition(".")[2] in ("query", "value", "q_proj", "v_proj")]
    few = few or [name for name in layers if "attn" in name or "attention" in name] or list(layers)
    return max(1, budget // sum(sum(_sizes(layers[name])) for name in few)), few


def add_lora(model: nn.Module, rank: int, layers: Iterable[str]) -> Callable[[], nn.Module]:
    """LoRA (scale 1) in these layers, in place; all other parameters are frozen. Returns what merges it."""
    require("peft", extra="peft")
    from peft import LoraConfig, LoraModel

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=_exactly(layers), fan_in_fan_out=_conv(model))
    return LoraModel(model, {"default": config}, "default").merge_and_unload


def add_shira(model: nn.Module, rank: int, layers: Iterable[str], seed: int) -> Callable[[], nn.Module]:
    """SHiRA: random entries of each layer, as many as LoRA of that rank has. As `add_lora`."""
    require("peft", extra="peft")
    from peft import ShiraConfig, ShiraModel

    config = ShiraConfig(r=rank, target_modules=_exactly(layers), random_seed=seed)
    return ShiraModel(model, {"default": config}, "default").merge_and_unload


def add_adalora(
    model: nn.Module, rank: int, layers: Iterable[str], total_steps: int
) -> tuple[Callable[[], nn.Module], Callable[[int], None]]:
    """AdaLoRA from 1.5 times the rank down to `rank` on average. As `add_lora`, and what allocates the ranks
    after a step.

    The ranks fall from 10 % to 60 % of the run. The orthogonal penalty is added to the training loss.
    """
    require("peft", extra="peft")
    from peft import AdaLoraConfig, AdaLoraModel

    config = AdaLoraConfig(
        target_r=rank,
        init_r=-(-3 * rank // 2),
        lora_alpha=rank,
        tinit=total_steps // 10,
        tfinal=2 * total_steps // 5,
        deltaT=max(1, total_steps // 100),
        total_step=total_steps,
        target_modules=_exactly(layers),
        fan_in_fan_out=_conv(model),
    )
    tuner = AdaLoraModel(model, {"default": config}, "default")
    penalised = [p for name, p in model.named_parameters() if ".lora_A." in name or ".lora_B." in name]

    def add_penalty(module: nn.Module, inputs: tuple, output):
        if module.training and getattr(output, "loss", None) is not None:
            output.loss = output.loss + config.orth_reg_weight * _orthogonality(penalised)
        return output

    model.register_forward_hook(add_penalty)
    return tuner.merge_and_unload, tuner.update_and_allocate


def _orthogonality(factors: list[Tensor]) -> Tensor:
    """AdaLoRA's penalty: the mean of ‖P Pᵀ − I‖ over all factors, P the wide form of each."""
    wide = [factor if factor.shape[0] <= factor.shape[1] else factor.T for factor in factors]
    distances = [torch.linalg.norm(p @ p.T - torch.eye(len(p), device=p.device, dtype=p.dtype)) for p in wide]
    return torch.stack(distances).mean()


def _exactly(layers: Iterable[str]) -> str:
    """peft's regular expression for these modules alone: a list would match by the end of a name."""
    import re

    return "|".join(re.escape(name) for name in layers)


def _conv(model: nn.Module) -> bool:
    return not all(isinstance(layer, nn.Linear) for layer in block_layers(model).values())
