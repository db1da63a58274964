"""state_dict and back: flat state cut into torch's per-parameter shape, and checked before it is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from . import schedules

if TYPE_CHECKING:
    from .optimizer import ID3AdamW

_MUST_AGREE = (
    "total_steps",
    "strategy",
    "heuristic",
    "schedule",
    "bias_correction",
    "max_grad_norm",
    "keep_originals",
)


# torch.distributed.checkpoint takes an empty `optimizer.state` for one that has never stepped, and steps it
# with zero gradients to make state: that would use up a step of the budget.
MARKER = "id3"


def state_dict(optimizer: ID3AdamW, torch_state_dict: Callable[[], dict]) -> dict[str, Any]:
    """torch's own state_dict, with the sparse state lent to `optimizer.state` while torch packs it."""
    sparse = {p: shard.cut(j) for shard in optimizer._shards for j, p in enumerate(shard.params)}
    optimizer.state.update(sparse)
    try:
        packed = torch_state_dict()
    finally:
        for p in sparse:
            del optimizer.state[p]
    packed["state"].pop(MARKER, None)
    packed["param_groups"][0]["id3"] = optimizer.settings()
    return packed


def load_state_dict(
    optimizer: ID3AdamW, state: dict[str, Any], strict: bool, torch_load_state_dict: Callable[[dict], None]
) -> None:
    """Checks the whole state, then takes it.

    torch's own loader casts state to the parameter's dtype (int32 1234567 becomes 1236992 as bfloat16), so
    it sees the dense groups' state alone. As for torch's optimizers, parameters may be keyed by anything
    (torch.distributed.checkpoint uses names): their order in the param groups is what counts.
    """
    saved = state["param_groups"][0].get("id3")
    if saved is None:
        raise ValueError(
            "state_dict: expected a state saved by ID3AdamW (param_groups[0]['id3']), found none"
        )
    _check_groups(optimizer, state)
    state = _by_position(state)
    if strict:
        _check_settings(optimizer, saved)
    begun = saved["n_entries"] is not None
    # N and the budget were fixed at the saved run's first step, whatever is frozen now.
    budget = optimizer.budget_given
    if begun:
        budget = saved["budget"] if strict else schedules.resolve_budget(budget, saved["n_entries"])
    _check_dense_states(optimizer, state)
    sparse = _sparse_states(optimizer, state) if begun else {}
    dense = {i: s for i, s in state["state"].items() if i not in sparse}
    groups = [{k: v for k, v in g.items() if k != "id3"} for g in state["param_groups"]]
    torch_load_state_dict({**state, "state": dense, "param_groups": groups})
    for p, dense_state in optimizer.state.items():
        dense_state["step"] = dense_state["step"].to(p.device, torch.float32)
    optimizer.state[MARKER] = {}
    optimizer._progress.begin_at(saved["step"])
    if optimizer.total_steps is None:
        optimizer.total_steps = saved["total_steps"]
    optimizer._shards = []
    optimizer.n_entries, optimizer.budget = saved["n_entries"], budget
    if begun:
        optimizer._begin()
        for shard in optimizer._shards:
            shard.load([sparse[position] for position in shard.positions], optimizer.steps_done)


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
        raise ValueError(f"state: expected parameters of the param groups, found {stray[0]!r}")
    return {**state, "state": {positions[k]: s for k, s in state["state"].items()}, "param_groups": groups}


def _check_settings(optimizer: ID3AdamW, saved: dict[str, Any]) -> None:
    own = optimizer.settings()
    for key in _MUST_AGREE:
        unset = key == "total_steps" and None in (own[key], saved[key])
        if own[key] != saved[key] and not unset:
            raise ValueError(f"{key}: the optimizer has {own[key]}, the saved state has {saved[key]}")
    if not _same_budget(own["budget_given"], saved):
        raise ValueError(
            f"budget: the optimizer has {own['budget_given']}, the saved state has {saved['budget']}"
        )


def _same_budget(given: int | float, saved: dict[str, Any]) -> bool:
    """Given alike, or the same number of entries of the saved N. (1 is an entry, 1.0 is all of them.)"""
    alike = type(given) is type(saved["budget_given"]) and given == saved["budget_given"]
    if alike or saved["n_entries"] is None:
        return alike
    try:
        return schedules.resolve_budget(given, saved["n_entries"]) == saved["budget"]
    except ValueError:  # more than N, or a share of nothing
        return False


def _check_groups(optimizer: ID3AdamW, state: dict[str, Any]) -> None:
    own, saved = optimizer.param_groups, state["param_groups"]
    if len(own) != len(saved):
        raise ValueError(f"param_groups: the optimizer has {len(own)}, the saved state has {len(saved)}")
    for i, (ours, theirs) in enumerate(zip(own, saved, strict=True)):
        if len(ours["params"]) != len(theirs["params"]):
            raise ValueError(
                f"param_groups[{i}]: the optimizer has {len(ours['params'])} parameters, "
                f"the saved state has {len(theirs['params'])}"
            )
        if ours["dense"] != theirs["dense"]:
            have = f"the optimizer has {ours['dense']}, the saved state has {theirs['dense']}"
            raise ValueError(f"param_groups[{i}]: dense: {have}")
        for name, other in zip(ours.get("param_names", []), theirs.get("param_names", []), strict=False):
            if name != other:
                raise ValueError(
                    f"param_groups[{i}]: the optimizer has {name!r} where the saved state has {other!r}"
                )


def _numbered(optimizer: ID3AdamW, dense: bool) -> list[tuple[int, torch.Tensor]]:
    """(position, parameter) of the dense groups, or of all others; positions count through both."""
    rows = [(group["dense"], p) for group in optimizer.param_groups for p in group["params"]]
    return [(position, p) for position, (is_dense, p) in enumerate(rows) if is_dense == dense]


def _sparse_states(optimizer: ID3AdamW, state: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The per-parameter dicts of all non-dense parameters by position, each checked."""
    found = {}
    for position, p in _numbered(optimizer, dense=False):
        if position not in state["state"]:
            raise ValueError(f"state[{position}]: expected the state of parameter {position}, found none")
        found[position] = _checked(f"state[{position}]", state["state"][position], p, optimizer)
    return found


def _check_dense_states(optimizer: ID3AdamW, state: dict[str, Any]) -> None:
    for position, p in _numbered(optimizer, dense=True):
        saved = state["state"].get(position, {})  # none before the parameter's first gradient
        for name in ("exp_avg", "exp_avg_sq") if saved else ():
            _check_shape(f"state[{position}]: {name}", list(saved[name].shape), p)


def _check_shape(where: str, saved: list[int], p: torch.Tensor) -> None:
    if saved != list(p.shape):
        raise ValueError(f"{where}: the parameter has shape {list(p.shape)}, the saved state has {saved}")


def _checked(where: str, state: dict[str, Any], p: torch.Tensor, optimizer: ID3AdamW) -> dict[str, Any]:
    columns = optimizer._layout.columns(p.dtype)
    for name in ("shape", "step", *columns):
        if name not in state:
            raise ValueError(f"{where}: {name}: expected it in the saved state, found none")
    _check_shape(where, list(state["shape"]), p)
    n = state["indices"].numel()
    for name, dtype in columns.items():
        column = state[name]
        if column.shape != (n,) or column.dtype != dtype:
            got = f"{column.dtype} {tuple(column.shape)}"
            raise ValueError(f"{where}: {name}: expected {dtype} of shape ({n},), got {got}")
    for name in ("indices", "ever_indices"):
        rows = state.get(name, state["indices"])
        rising = rows.numel() == 0 or (
            rows[0] >= 0 and rows[-1] < p.numel() and bool((rows.diff() > 0).all())
        )
        if rows.dtype != torch.int32 or not rising:
            raise ValueError(
                f"{where}: {name}: expected ascending int32 below {p.numel()}, got something else"
            )
    return state
