"""What ID3AdamW refuses, before anything changes."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Iterable
from typing import Any

import torch

from id3_kernels import backend, checks

from . import schedules
from .distributed.part import check_part, is_split, local
from .heuristics import Bias, Heuristic, Random
from .method import Method
from .param_groups import members
from .ranks import check_builder, check_whole, world_size
from .state.layout import Layout

STRATEGIES = ("increment", "static", "repeat")
SELECT_FROM = ("last", "max")
BIAS_CORRECTIONS = ("tensor", "entry")
_NOT_APPLICABLE = {
    "amsgrad": "a maximum over moments that start at different steps has no meaning",
    "foreach": "one call already updates all tensors",
    "fused": "the sparse step is always fused",
    "differentiable": "the step is not recorded by autograd",
}

# What ID3AdamW takes once, and torch would leave unread in a param group.
OPTIONS_OF_A_RUN = (
    *("budget", "total_steps", "heuristic", "strategy", "schedule", "select_every", "bias_correction"),
    *("max_grad_norm", "keep_originals", "backend", "release_gradients", "select_from", "capturable"),
    "process_group",
)


def refuse_not_applicable(not_applicable: dict[str, Any], where: str = "") -> None:
    for name, value in not_applicable.items():
        if name not in _NOT_APPLICABLE:
            raise TypeError(f"{where}{name}: expected an argument of ID3AdamW, got {name}={value!r}")
        if value:
            raise ValueError(f"{where}{name}: does not apply to ID3AdamW: {_NOT_APPLICABLE[name]}")


def check_iterable(params: Iterable) -> Iterable:
    """The parameters of an optimizer. Refuses a module, which torch says only that it is not iterable."""
    if isinstance(params, torch.nn.Module):
        raise TypeError(
            f"params: expected parameters or param groups, got a {type(params).__name__}; pass "
            "model.named_parameters()"
        )
    return params


def check_method(strategy: str, bias_correction: str, heuristic: Heuristic, select_every: int) -> None:
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if bias_correction not in BIAS_CORRECTIONS:
        raise ValueError(
            f"bias_correction: expected one of {', '.join(BIAS_CORRECTIONS)}, got {bias_correction!r}"
        )
    whole = isinstance(select_every, numbers.Integral) and not isinstance(select_every, bool)
    if not whole or select_every < 1:
        raise ValueError(f"select_every: expected an int of at least 1, got {select_every!r}")
    if strategy == "repeat" and isinstance(heuristic, Random | Bias):
        kind = type(heuristic).__name__
        raise ValueError(
            f"strategy: expected 'static' with {kind}, whose scores are the same at every step, got 'repeat'"
        )


def warn_one_selection(method: Method, total_steps: int) -> None:
    """Warns where a run selects once although its schedule spreads the budget over the steps."""
    spreads = method.strategy == "increment" and method.schedule is not schedules.one_shot
    if spreads and method.select_every >= total_steps > 1:
        warnings.warn(
            f"select_every: expected less than total_steps, {total_steps}, got {method.select_every}: the "
            "first step selects the whole budget, and no later one selects",
            stacklevel=4,
        )


def check_options(strategy: str, release_gradients: bool, select_from: str, capturable: bool) -> None:
    """Refuses ZeroRedundancyOptimizer, and released gradients and capturable steps where they cannot work."""
    check_builder()
    _check_release(release_gradients, select_from, strategy)
    _check_capturable(capturable, strategy, release_gradients)


def _check_release(release_gradients: bool, select_from: str, strategy: str) -> None:
    if select_from not in SELECT_FROM:
        raise ValueError(f"select_from: expected one of {', '.join(SELECT_FROM)}, got {select_from!r}")
    if not release_gradients:
        if select_from != "last":
            raise ValueError(f"select_from: {select_from!r} needs release_gradients=True")
        return
    if strategy == "repeat":
        raise ValueError(
            "release_gradients: does not apply to strategy 'repeat': entries that come back would need "
            "gradients that are gone"
        )


def _check_capturable(capturable: bool, strategy: str, release_gradients: bool) -> None:
    if capturable and strategy == "repeat":
        raise ValueError(
            "capturable: does not apply to strategy 'repeat': the host has to know how many entries stay"
        )
    if capturable and release_gradients:
        raise ValueError("capturable: does not apply to release_gradients: no graph replays its hooks")


def check_devices(layout: Layout, tensors: Iterable[torch.Tensor], dense: bool = False) -> None:
    """Refuses, where the step is to be captured, tensors that no graph can hold. dense: torch trains them."""
    if not layout.capturable:
        return
    tensors = list(tensors)
    if any(map(is_split, tensors)):
        raise ValueError(
            "capturable: does not apply to DTensor parameters: the host has to know how many entries each "
            "rank gets"
        )
    devices = sorted({str(t.device) for t in tensors})
    if len(devices) > 1:
        raise ValueError(f"capturable: expected all parameters on one device, got {', '.join(devices)}")
    on_gpu = any(t.device.type != "cpu" for t in tensors)
    if on_gpu and layout.backend == "reference":
        raise ValueError("capturable: expected a backend with GPU kernels, got 'reference'")
    if on_gpu and not dense and any(t.dtype == torch.float64 for t in tensors):
        raise ValueError(
            "capturable: expected float32, bfloat16 or float16 parameters, got float64, which GPUs leave to "
            "the reference kernels"
        )


def check_capture(capturable: bool, begun: bool) -> None:
    """To be called under a CUDA graph capture: raises RuntimeError for one that could not be replayed."""
    if not capturable:
        raise RuntimeError("step: expected capturable=True under CUDA graph capture, got False")
    if not begun:
        raise RuntimeError(
            "step: expected a step before the CUDA graph capture (it makes the state), got none"
        )


def check_reduced(params: Iterable[torch.Tensor]) -> None:
    """Refuses hooks on gradients that are not yet those of all processes: a DTensor's are."""
    if world_size() > 1 and not all(map(is_split, params)):
        raise ValueError(
            "release_gradients: expected one process, or parameters of FSDP2, got "
            f"{world_size()} processes: a hook sees the gradients of its own process alone; give ID3AdamW a "
            "process_group and the plain model, without DistributedDataParallel, or use fully_shard"
        )


def check_group(group: dict[str, Any], i: int) -> None:
    """Checks what a param group holds: numbers, options and parameters."""
    where = f"param_groups[{i}]"
    check_options_of_group(group, where)
    _check_numbers(group, where)
    check_params(group, i)


def check_options_of_group(group: dict[str, Any], where: str) -> None:
    """Refuses what no single group can have."""
    refuse_not_applicable({name: group[name] for name in _NOT_APPLICABLE if name in group}, f"{where}: ")
    for name in OPTIONS_OF_A_RUN:
        if name in group:
            raise ValueError(
                f"{where}: {name}: expected one for all groups, an argument of ID3AdamW, got {group[name]!r}"
            )


def _check_numbers(group: dict[str, Any], where: str) -> None:
    betas = group["betas"]
    if len(betas) != 2 or isinstance(betas[0], torch.Tensor) != isinstance(betas[1], torch.Tensor):
        raise ValueError(f"{where}: betas: expected two numbers or two one-element tensors, got {betas}")
    named = {name: group[name] for name in ("lr", "eps", "weight_decay")}
    named |= {"betas[0]": betas[0], "betas[1]": betas[1]}
    for name, value in named.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Real | torch.Tensor):
            raise TypeError(f"{where}: {name}: expected a number, got {value!r}")
        if isinstance(value, torch.Tensor) and value.numel() != 1:
            raise ValueError(f"{where}: {name}: expected one element, got {tuple(value.shape)}")
    for name, in_range, expected in (
        ("lr", group["lr"] >= 0, "at least 0"),
        ("betas[0]", 0 <= betas[0] < 1, "0 to below 1"),
        ("betas[1]", 0 <= betas[1] < 1, "0 to below 1"),
        ("eps", 0 <= group["eps"] < math.inf, "a finite number of at least 0"),
        ("weight_decay", group["weight_decay"] >= 0, "at least 0"),
    ):
        if not in_range:
            raise ValueError(f"{where}: {name}: expected {expected}, got {named[name]}")


def check_params(group: dict[str, Any], i: int) -> None:
    """Refuses what is no whole plain tensor: of a new group, and before the first step of all groups, since
    trainers replace parameters in between."""
    for j, p in enumerate(group["params"]):
        name = group["param_names"][j] if "param_names" in group else f"param_groups[{i}]['params'][{j}]"
        check_whole(name, p)
        if torch.nn.parameter.is_lazy(p):  # has a dtype; no shape before its module's first forward pass
            checks.plain(name, torch.empty(0, dtype=p.dtype, device=p.device))
        else:
            if is_split(p):
                check_part(name, p)
            check_countable_entries(name, local(p))
            checks.plain(name, local(p))
            check_memory(name, local(p))


def check_countable_entries(name: str, p: torch.Tensor) -> None:
    """Refuses a parameter whose entries int32 does not count."""
    if p.numel() >= 2**31:
        raise ValueError(f"{name}: expected fewer than 2^31 entries, got {p.numel()}; "
                         "leave it out of the param groups")  # fmt: skip


def check_memory(name: str, p: torch.Tensor) -> None:
    """Refuses strides by which entries may share memory, such as those of `expand`: an update of one of them
    would be an update of all."""
    if p.is_contiguous():
        return
    reach = 0  # of the dimensions of smaller strides
    for stride, size in sorted((st, n) for st, n in zip(p.stride(), p.shape, strict=True) if n > 1):
        if stride <= reach:
            raise ValueError(
                f"{name}: expected strides that give each entry its own memory, got {tuple(p.stride())} for "
                f"shape {tuple(p.shape)}; use contiguous()"
            )
        reach += stride * (size - 1)


def check_countable(groups: list[dict[str, Any]], names: list[str] | None) -> None:
    """Refuses parameters of lazy modules that have no shape yet, so that N cannot be counted."""
    for position, _, p in members(groups, dense=False):
        if torch.nn.parameter.is_lazy(p):
            raise ValueError(
                f"{_name(names, position)}: expected a parameter with a shape, got {type(p).__name__}; run a "
                "forward pass first"
            )


def check_nothing_to_train(groups: list[dict[str, Any]], names: list[str] | None) -> None:
    """For N = 0: refuses gradients of parameters that require none, which a step would leave unread."""
    for position, _, p in members(groups, dense=False):
        if p.grad is not None:
            raise ValueError(
                f"{_name(names, position)}: expected requires_grad=True with a gradient (N counts no other "
                "parameter), got False"
            )


def _name(names: list[str] | None, position: int) -> str:
    return names[position] if names else f"parameter {position}"


def check_names(heuristic: Heuristic, group: dict[str, Any]) -> None:
    if isinstance(heuristic, Bias) and "param_names" not in group:
        raise ValueError(
            "params: expected model.named_parameters() for the heuristic Bias, got parameters without names"
        )


def usable_backend(name: str | None) -> str | None:
    """The backend of that name, or the one requested by `use_backend` or ID3_BACKEND; None for the best.

    Raises ValueError where it cannot run here.
    """
    name = name or backend.requested()
    if name is not None:
        backend.require(name)
    return name


def plain_budget(budget: int | float) -> int | float:
    """The budget as a plain number, numpy's too: it goes into states and delta files, as JSON."""
    schedules.check_budget(budget)
    return int(budget) if isinstance(budget, numbers.Integral) else float(budget)


def plain_norm(max_grad_norm: float | None) -> float | None:
    """Likewise."""
    if max_grad_norm is not None and not 0 < max_grad_norm < math.inf:
        raise ValueError(f"max_grad_norm: expected a finite number above 0, or None, got {max_grad_norm}")
    return None if max_grad_norm is None else float(max_grad_norm)
