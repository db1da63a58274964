"""The saved form of the state: torch's per-parameter dicts, and the checks before one is taken over.

torch's own loader casts state to the parameter's dtype (int32 1234567 becomes 1236992 as bfloat16), so it
sees the dense groups' state alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from id3_kernels import Entries

from .. import schedules
from ..method import Method
from ..param_groups import Member, members
from .active_set import ActiveSet
from .layout import Layout
from .repeat import EverActive
from .shard import Shard

# torch.distributed.checkpoint takes an empty `optimizer.state` for one that has never stepped, and steps it
# with zero gradients to make state: that would use up a step of the budget.
MARKER = "id3"

# The budget is checked apart: it may be given as another number of the same meaning.
_MUST_AGREE = ("total_steps", *(field.name for field in fields(Method) if field.name != "budget_given"))


class Restored(NamedTuple):
    """A saved state that fits the optimizer: what it is to take over."""

    for_torch: dict[str, Any]  # with the dense groups' state alone
    sparse: dict[int, dict[str, Any]]  # by position; empty where the saved run had not begun
    steps_done: int
    total_steps: int | None
    n_entries: int | None
    budget: int | float


# --- save ------------------------------------------------------------------------------------------


def sparse_state(active: ActiveSet) -> dict[Tensor, dict[str, Any]]:
    """Every parameter's own state: copies, so that later steps leave what was saved alone."""
    return {
        p: _own_state(active, i, j, columns)
        for i, shard in enumerate(active.shards)
        for j, (p, columns) in enumerate(zip(shard.params, _columns(active, shard), strict=True))
    }


def _columns(active: ActiveSet, shard: Shard) -> Iterator[dict[str, Tensor]]:
    """For each tensor of a shard its part of every saved array."""
    names = tuple(active.layout.columns(shard.dtype))
    for parts in zip(*(shard.parts(name) for name in names), strict=True):
        yield dict(zip(names, parts, strict=True))


def _own_state(active: ActiveSet, i: int, j: int, columns: dict[str, Tensor]) -> dict[str, Any]:
    shard = active.shards[i]
    state = {name: column.clone() for name, column in active.ranks.whole(columns).items()}
    state |= {"step": shard.steps[j].clone(), "shape": list(shard.params[j].shape)}
    if active.layout.repeat:
        indices, originals = active.ever[i].of(j)
        ever = {"indices": indices} | ({} if originals is None else {"originals": originals})
        state |= {f"ever_{name}": column.clone() for name, column in active.ranks.whole(ever).items()}
    return state


def packed(torch_state: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """torch's state dict without the marker, with the settings in its first param group."""
    torch_state["state"].pop(MARKER, None)
    torch_state["param_groups"][0]["id3"] = settings
    return torch_state


# --- load ------------------------------------------------------------------------------------------


def check(
    state: dict[str, Any], settings: dict[str, Any], groups: list[dict], layout: Layout, strict: bool
) -> Restored:
    """Checks a whole saved state against an optimizer of these settings, param groups and layout.

    As for torch's optimizers, parameters may be keyed by anything (torch.distributed.checkpoint uses names):
    their order in the param groups is what counts. Mutates nothing. Raises ValueError for what does not fit.
    """
    saved = state["param_groups"][0].get("id3")
    if saved is None:
        raise ValueError(
            "state_dict: expected a state saved by ID3AdamW (param_groups[0]['id3']), got one without it"
        )
    _check_groups(groups, state["param_groups"])
    state = _by_position(state)
    if strict:
        _check_settings(settings, saved)
    begun = saved["n_entries"] is not None
    # N and the budget were fixed at the saved run's first step, whatever is frozen now.
    budget = settings["budget_given"]
    if begun:
        budget = saved["budget"] if strict else schedules.resolve_budget(budget, saved["n_entries"])
    _check_dense_states(groups, state["state"])
    sparse = _sparse_states(groups, state["state"], layout) if begun else {}
    for_torch = {
        **state,
        "state": {i: s for i, s in state["state"].items() if i not in sparse},
        "param_groups": [{k: v for k, v in g.items() if k != "id3"} for g in state["param_groups"]],
    }
    return Restored(for_torch, sparse, saved["step"], saved["total_steps"], saved["n_entries"], budget)


def _by_position(state: dict[str, Any]) -> dict[str, Any]:
    """The same state with the parameters numbered through all groups."""
    keys = [key for group in state["param_groups"] for key in group["params"]]
    positions = {key: i for i, key in enumerate(keys)}
    groups, first = [], 0
    for group in state["param_groups"]:
        groups.append({**group, "params": list(range(first, first + len(group["params"])))})
        first += len(group["params"])
    stray = [key for key in state["state"] if key not in positions]
    if stray:
        raise ValueError(f"state: expected parameters of the param groups, got {stray[0]!r}")
    return {**state, "state": {positions[k]: s for k, s in state["state"].items()}, "param_groups": groups}


def _check_settings(own: dict[str, Any], saved: dict[str, Any]) -> None:
    for key in _MUST_AGREE:
        unset = key == "total_steps" and None in (own[key], saved[key])
        if own[key] != saved[key] and not unset:
            raise _differs(key, own[key], saved[key])
    if not _same_budget(own["budget_given"], saved):
        raise _differs("budget", own["budget_given"], saved["budget"])


def _differs(what: str, own: Any, saved: Any) -> ValueError:
    return ValueError(f"{what}: expected {own} as in the optimizer, got {saved} in the saved state")


def _same_budget(given: int | float, saved: dict[str, Any]) -> bool:
    """Given alike, or the same number of entries of the saved N. (1 is an entry, 1.0 is all of them.)"""
    alike = type(given) is type(saved["budget_given"]) and given == saved["budget_given"]
    if alike or saved["n_entries"] is None:
        return alike
    try:
        return schedules.resolve_budget(given, saved["n_entries"]) == saved["budget"]
    except ValueError:  # more than N, or a share of nothing
        return False


def _check_groups(own: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
    if len(own) != len(saved):
        raise _differs("param_groups", f"{len(own)} groups", f"{len(saved)} groups")
    for i, (ours, theirs) in enumerate(zip(own, saved, strict=True)):
        if len(ours["params"]) != len(theirs["params"]):
            count = [f"{len(group['params'])} parameters" for group in (ours, theirs)]
            raise _differs(f"param_groups[{i}]", *count)
        if ours["dense"] != theirs["dense"]:
            raise _differs(f"param_groups[{i}]: dense", ours["dense"], theirs["dense"])
        for name, other in zip(ours.get("param_names", []), theirs.get("param_names", []), strict=False):
            if name != other:
                raise _differs(f"param_groups[{i}]", repr(name), repr(other))


def _sparse_states(groups: list[dict], state: dict[int, dict], layout: Layout) -> dict[int, dict[str, Any]]:
    """The per-parameter dicts of all non-dense parameters by position, each checked."""
    found = {}
    for member in members(groups, dense=False):
        if member.position not in state:
            raise ValueError(f"state[{member.position}]: expected the state of this parameter, got none")
        found[member.position] = _checked(member, state[member.position], layout)
    return found


def _check_dense_states(groups: list[dict], state: dict[int, dict]) -> None:
    for position, _, p in members(groups, dense=True):
        saved = state.get(position, {})  # none before the parameter's first gradient
        for name in ("exp_avg", "exp_avg_sq") if saved else ():
            _check_shape(f"state[{position}]: {name}", list(saved[name].shape), p)


def _check_shape(where: str, saved: list[int], p: Tensor) -> None:
    if saved != list(p.shape):
        raise _differs(f"{where}: shape", list(p.shape), saved)


def _checked(member: Member, state: dict[str, Any], layout: Layout) -> dict[str, Any]:
    where, p = f"state[{member.position}]", member.param
    columns = layout.columns(p.dtype)
    for name in ("shape", "step", *columns):
        if name not in state:
            raise ValueError(f"{where}: {name}: expected it in the saved state, got none")
    _check_shape(where, list(state["shape"]), p)
    n = state["indices"].numel()
    for name, dtype in columns.items():
        column = state[name]
        if column.shape != (n,) or column.dtype != dtype:
            got = f"{column.dtype} {tuple(column.shape)}"
            raise ValueError(f"{where}: {name}: expected {dtype} of shape ({n},), got {got}")
    for name in ("indices", "ever_indices"):
        _check_indices(f"{where}: {name}", state.get(name, state["indices"]), p.numel())
    return state


def _check_indices(where: str, rows: Tensor, numel: int) -> None:
    inside = rows.numel() == 0 or (rows[0] >= 0 and rows[-1] < numel)
    if rows.dtype != torch.int32 or not inside or not bool((rows.diff() > 0).all()):
        raise ValueError(f"{where}: expected ascending int32 below {numel}, got something else")


# --- take over -------------------------------------------------------------------------------------


def fill(active: ActiveSet, sparse: dict[int, dict[str, Any]], steps_done: int) -> None:
    """Puts checked per-parameter states by position into an active set that holds no entries yet."""
    for i, shard in enumerate(active.shards):
        states = [sparse[position] for position in shard.positions]
        _fill_shard(shard, states, steps_done)
        if active.layout.repeat:
            _fill_ever(active.ever[i], states, shard.device)


def _fill_shard(shard: Shard, states: list[dict], steps_done: int) -> None:
    bounds = _bounds([s["indices"] for s in states])
    shard.steps = torch.tensor([int(s["step"]) for s in states], dtype=torch.int64, device=shard.device)
    shard.updated_at.fill_(steps_done)  # not stored: changed_since errs on the side of too much
    shard.reserve(bounds[-1])
    shard.hold(torch.tensor(bounds, dtype=torch.int64, device=shard.device), bounds[-1], {})
    for name in shard.layout.columns(shard.dtype):
        for part, s in zip(shard.parts(name), states, strict=True):
            part.copy_(s[name])


def _fill_ever(ever: EverActive, states: list[dict], device: torch.device) -> None:
    # A state of another strategy (strict=False) has no memory of entries that left, since none has.
    rows = [s.get("ever_indices", s["indices"]).to(device) for s in states]
    ever.entries = Entries(torch.tensor(_bounds(rows), device=device), torch.cat(rows))
    if ever.originals is not None:
        before = [s["ever_originals" if "ever_originals" in s else "originals"] for s in states]
        ever.originals = torch.cat([values.to(device) for values in before])


def _bounds(rows: list[Tensor]) -> list[int]:
    return list(accumulate((row.numel() for row in rows), initial=0))
