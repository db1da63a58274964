"""Which arguments, param groups and parameters ID3AdamW refuses, before anything changes."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from id3_kernels import backend, checks

from . import schedules
from .distributed.part import check_part, is_split, local
from .heuristics import Bias, Heuristic
from .method import Method
from .param_groups import members, trainable_entries
from .pieces import index_dtype, pieces_of, rows_of
from .ranks import check_whole

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
    *("entry_warmup", "tensor_cap", "prune"),
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


def warn_one_selection(method: Method, total_steps: int) -> None:
    """Warns where a run selects once although its schedule spreads the budget over the steps."""
    spreads = method.strategy == "increment" and method.schedule is not schedules.one_shot
    if spreads and method.select_every >= total_steps > 1:
        warnings.warn(
            f"select_every: expected less than total_steps, {total_steps}, got {method.select_every}: the "
            "first step selects the whole budget, and no later one selects",
            stacklevel=4,
        )


def warn_spent(budget: int, method: Method, group: dict[str, Any]) -> None:
    """Warns where a new param group comes too late for a budget that is spent."""
    if budget == 0 or not trainable_entries([group]):
        return
    by_share = "grow_budget() extends it, " if isinstance(method.budget_given, float) else ""
    warnings.warn(
        f"add_param_group: the budget of {budget} entries is spent, so that no entry of the new group will "
        f"be trained; {by_share}dense=True trains the group whole",
        stacklevel=4,
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
            ranges = pieces_of(name, local(p).shape)
            if group["dense"] and index_dtype(p) == torch.int64:  # a delta file would hold it whole
                raise ValueError(
                    f"{name}: expected at most 2^31 - 1 entries with dense=True, got {p.numel()}"
                )
            checks.plain(name, rows_of(local(p), ranges and ranges[0]))
            check_memory(name, local(p))


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


def check_fresh(named: Mapping[str, torch.Tensor], fresh: Iterable[str]) -> None:
    """Raises ValueError for a name in `fresh`, the parameters to train whole, that no parameter has."""
    if unknown := sorted(set(fresh) - named.keys()):
        raise ValueError(f"fresh: expected names of the model's parameters, got {unknown[0]!r}")
