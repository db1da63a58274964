"""The saved form of the state: torch's per-parameter dicts, and the checks before one is taken over.

torch's own loader casts state to the parameter's dtype (int32 1234567 becomes 1236992 as bfloat16), so it
sees the dense groups' state, and what hooks have added to any state.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import schedules, validation
from ..distributed.part import as_split
from ..method import DEFAULTS, Method
from ..param_groups import members, trainable_entries
from . import flat
from .active_set import ActiveSet
from .layout import Layout
from .parameter_state import (
    OWN,
    by_hooks,
    check_shape,
    checked,
    differs,
    saved_states,
    without_entries,
)

# torch.distributed.checkpoint takes an empty `optimizer.state` for one that has never stepped, and steps it
# with zero gradients to make state: that would use up a step of the budget.
MARKER = "id3"
MARKED = {"note": "state_dict() holds the state of the active entries"}

# The budget is checked apart: it may be given as another number of the same meaning.
_MUST_AGREE = ("total_steps", *(field.name for field in fields(Method) if field.name != "budget_given"))


class Restored(NamedTuple):
    """A saved state that fits the optimizer: what it is to take over."""

    for_torch: dict[str, Any]  # without the state that is ID3AdamW's own
    sparse: dict[int, dict[str, Any]]  # by position; empty where the saved run had not begun
    steps_done: int
    total_steps: int | None
    n_entries: int | None
    budget: int | float
    growth: list[tuple[int, int]]  # (step, entries): what `grow_budget` has added


# --- save ------------------------------------------------------------------------------------------


def sparse_state(active: ActiveSet) -> dict[Tensor, dict[str, Any]]:
    """Every parameter's own state: copies, so that later steps leave what was saved alone."""
    return {
        shard.owners[j]: state
        for i, shard in enumerate(active.shards)
        for j, state in zip(shard.firsts(), saved_states(active, i), strict=True)
    }


@contextmanager
def lent(state: MutableMapping[Any, Any], sparse: dict[Tensor, dict[str, Any]]) -> Iterator[None]:
    """Puts the parameters' own state into the optimizer's `state` for as long as torch packs it.

    What a hook or a user has put there, before or meanwhile, stays there and is saved beside it. Raises
    ValueError for what has a name that is ID3AdamW's own.
    """
    for p in sparse:
        for name in OWN & set(state.get(p, {})):
            raise ValueError(f"state: expected another name for what is added to a parameter's, got {name!r}")
    state.update({p: {**state.get(p, {}), **own} for p, own in sparse.items()})
    try:
        yield
    finally:
        for p in sparse:
            added = by_hooks(state.pop(p))
            if added:
                state[p] = added


def pack(
    torch_state: dict[str, Any], settings: dict[str, Any], groups: list[dict[str, Any]], layout: Layout
) -> None:
    """Takes the marker out of torch's state dict, and puts the settings into its first param group; or, where
    parameters are split over ranks, brings all into the form of `flat`."""
    torch_state["state"].pop(MARKER, None)
    if not flat.is_flat(groups, layout):
        torch_state["param_groups"][0]["id3"] = settings
        return
    budget = settings["budget"]
    if settings["n_entries"] is None:  # the size that the arrays will have
        budget = schedules.resolve_budget(settings["budget_given"], trainable_entries(groups))
    flat.close(torch_state, settings, groups, layout, budget)


# --- load ------------------------------------------------------------------------------------------


def check(
    state: dict[str, Any],
    settings: dict[str, Any],
    groups: list[dict],
    layout: Layout,
    strict: bool,
    cast: bool,
) -> Restored:
    """Checks a whole saved state against an optimizer of these settings, param groups and layout.

    As for torch's optimizers, parameters may be keyed by anything (torch.distributed.checkpoint uses names):
    their order in the param groups is what counts. Mutates nothing. Raises ValueError for what does not fit.
    """
    state = flat.opened(state, groups)
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
    growth = saved.get("budget_growth", []) if budget == saved["budget"] else []
    _check_dense_states(groups, state["state"])
    sparse = _sparse_states(groups, state["state"], layout, strict, cast) if begun else {}
    for_torch = {
        **state,
        "state": {i: by_hooks(s) if i in sparse else s for i, s in state["state"].items()},
        "param_groups": [{k: v for k, v in g.items() if k != "id3"} for g in state["param_groups"]],
    }
    growth = [(step, entries) for step, entries in growth]
    return Restored(
        for_torch, sparse, saved["step"], saved["total_steps"], saved["n_entries"], budget, growth
    )


def _by_position(state: dict[str, Any]) -> dict[str, Any]:
    """The same state with the parameters numbered through all groups."""
    keys = [key for group in state["param_groups"] for key in group["params"]]
    positions = {key: i for i, key in enumerate(keys)}
    groups, first = [], 0
    for group in state["param_groups"]:
        groups.append({**group, "params": list(range(first, first + len(group["params"])))})
        first += len(group["params"])
    for key, value in state["state"].items():  # hooks may add what belongs to no parameter
        if key not in positions and isinstance(value, dict) and "exp_avg" in value:
            raise ValueError(f"state: expected parameters of the param groups, got {key!r}")
    by_position = {positions.get(key, key): value for key, value in state["state"].items()}
    return {**state, "state": by_position, "param_groups": groups}


def _check_settings(own: dict[str, Any], saved: dict[str, Any]) -> None:
    own, saved = ({**DEFAULTS, **settings} for settings in (own, saved))  # defaults are left out
    for key in _MUST_AGREE:
        unset = key == "total_steps" and None in (own[key], saved[key])
        if own[key] != saved[key] and not unset:
            raise differs(key, own[key], saved[key])
    if not _same_budget(own["budget_given"], saved):
        raise differs("budget", own["budget_given"], saved["budget"])


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
        raise differs("param_groups", f"{len(own)} groups", f"{len(saved)} groups")
    for i, (ours, theirs) in enumerate(zip(own, saved, strict=True)):
        if len(ours["params"]) != len(theirs["params"]):
            count = [f"{len(group['params'])} parameters" for group in (ours, theirs)]
            raise differs(f"param_groups[{i}]", *count)
        if ours["dense"] != theirs.get("dense", False):
            raise differs(f"param_groups[{i}]: dense", ours["dense"], theirs.get("dense", False))
        validation.check_options_of_group(theirs, f"param_groups[{i}]")
        for name, other in zip(ours.get("param_names", []), theirs.get("param_names", []), strict=False):
            if name != other:
                raise differs(f"param_groups[{i}]", repr(name), repr(other))


def _sparse_states(
    groups: list[dict], state: dict[int, dict], layout: Layout, strict: bool, cast: bool
) -> dict[int, dict[str, Any]]:
    """The per-parameter dicts of all non-dense parameters by position, each checked."""
    found = {}
    for member in members(groups, dense=False):
        saved = state.get(member.position, {})
        if not OWN & saved.keys():
            if strict:
                raise ValueError(
                    f"state[{member.position}]: expected the state of this parameter, got none; with "
                    "strict=False it has no active entries"
                )
            saved = {**saved, **without_entries(member.param, layout)}
        found[member.position] = checked(member, saved, layout, cast)
    return found


def _check_dense_states(groups: list[dict], state: dict[int, dict]) -> None:
    for position, _, p in members(groups, dense=True):
        saved = state.get(position, {})  # none before the parameter's first gradient
        for name in ("exp_avg", "exp_avg_sq"):
            if name in saved:
                check_shape(f"state[{position}]: {name}", list(saved[name].shape), p)


def settle_dense(state: MutableMapping[Any, Any], groups: list[dict[str, Any]]) -> None:
    """After torch's load: the marker, steps for torch's fused AdamW, and moments split as parameters are."""
    state[MARKER] = dict(MARKED)
    for _, _, p in members(groups, dense=True):
        own = state.get(p, {})
        if "step" in own:
            own["step"] = torch.as_tensor(own["step"]).to(p.device, torch.float32)
        own |= {name: as_split(own[name], p) for name in ("exp_avg", "exp_avg_sq") if name in own}
    flat.mark(state, groups)
