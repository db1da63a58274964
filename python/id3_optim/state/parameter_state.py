"""One parameter's state in a checkpoint: cut out of the active set, checked, converted, and put back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from id3_kernels import Entries

from ..distributed.part import is_split
from ..param_groups import Member
from ..pieces import index_dtype, inside
from .active_set import ActiveSet
from .layout import Layout
from .repeat import EverActive
from .shard import Shard
from .whole import own_part

# What a parameter's state may hold that is ID3AdamW's; all else is the user's own, from hooks.
_COLUMNS = Layout(originals=True, age=True, repeat=False, backend=None).columns(torch.float16)
OWN = {"step", "shape", "ever_indices", "ever_originals", *_COLUMNS}

_REMEDY = "; cast=True converts the state of a parameter of another dtype"


def saved_states(active: ActiveSet, i: int) -> Iterator[dict[str, Any]]:
    """The state of each parameter of shard i, in the order of its tensors, over all ranks: copies."""
    shard = active.shards[i]
    names = [name for name in active.layout.columns(shard.dtype) if name != "indices"]
    ever = active.ever_columns(i) if active.layout.repeat else [{} for _ in shard.owners]
    every = list(zip(active.columns(i, names), ever, strict=True))
    for j in shard.firsts():
        columns, more = (
            _joined(shard, j, found) for found in zip(*(every[n] for n in shard.pieces(j)), strict=True)
        )
        state = {"step": shard.steps[j].clone(), "shape": list(shard.owners[j].shape)}
        yield columns | state | {f"ever_{name}": column for name, column in more.items()}


def _joined(shard: Shard, j: int, found: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The columns of the parameter whose first tensor is j, from those of its pieces: copies."""
    state = {name: torch.cat([columns[name] for columns in found]) for name in found[0]}
    if "indices" in state:
        state["indices"] = shard.joined(j, [columns["indices"] for columns in found]).clone()
    return state


def by_hooks(state: dict[str, Any]) -> dict[str, Any]:
    """What a parameter's state holds beside ID3AdamW's own."""
    return {name: value for name, value in state.items() if name not in OWN}


def without_entries(p: Tensor, layout: Layout) -> dict[str, Any]:
    """The state of a parameter that has no active entry and had no gradient yet."""
    dtypes = layout.columns(p.dtype) | {"indices": index_dtype(p)}
    if layout.repeat:
        dtypes["ever_indices"] = index_dtype(p)
        dtypes |= {"ever_originals": p.dtype} if layout.originals else {}
    empty = {name: torch.empty(0, dtype=dtype) for name, dtype in dtypes.items()}
    return empty | {"step": 0, "shape": list(p.shape)}


def differs(what: str, own: Any, saved: Any) -> ValueError:
    return ValueError(f"{what}: expected {own} as in the optimizer, got {saved} in the saved state")


def check_shape(where: str, saved: list[int], p: Tensor) -> None:
    """Raises ValueError where a state of another shape was saved, or where p has no shape yet."""
    if torch.nn.parameter.is_lazy(p):
        raise ValueError(
            f"{where}: expected a parameter with a shape, got {type(p).__name__}; run a forward pass first"
        )
    if saved != list(p.shape):
        raise differs(f"{where}: shape", list(p.shape), saved)


def checked(member: Member, state: dict[str, Any], layout: Layout, cast: bool) -> dict[str, Any]:
    """The saved state of a parameter, or its conversion where `cast` allows one. Raises ValueError if it does
    not fit the parameter and the layout."""
    where, p = f"state[{member.position}]", member.param
    for name in ("shape", "step", "indices"):
        if name not in state:
            raise ValueError(f"{where}: {name}: expected it in the saved state, got none")
    check_shape(where, list(state["shape"]), p)
    columns = layout.columns(p.dtype) | {"indices": index_dtype(p)}
    for name in ("indices", "ever_indices"):
        _check_indices(f"{where}: {name}", state.get(name, state["indices"]), p)
    if cast:
        state = _converted(state, columns, p)
    _check_columns(where, state, columns, p.dtype)
    return state


def _check_columns(
    where: str, state: dict[str, Any], columns: dict[str, torch.dtype], own: torch.dtype
) -> None:
    expected = [(name, dtype, state["indices"].numel()) for name, dtype in columns.items()]
    if "ever_originals" in state:
        expected.append(("ever_originals", own, state["ever_indices"].numel()))
    for name, dtype, n in expected:
        if name not in state:
            remedy = _REMEDY if name == "master" else ""
            raise ValueError(f"{where}: {name}: expected it in the saved state, got none{remedy}")
        column = state[name]
        if column.shape != (n,) or column.dtype != dtype:
            got = f"{column.dtype} {tuple(column.shape)}"
            remedy = _REMEDY if column.shape == (n,) else ""
            raise ValueError(f"{where}: {name}: expected {dtype} of shape ({n},), got {got}{remedy}")
    if "master" in state and "master" not in columns:
        raise ValueError(f"{where}: master: expected none beside {own}, got one{_REMEDY}")


def _converted(state: dict[str, Any], columns: dict[str, torch.dtype], p: Tensor) -> dict[str, Any]:
    """The state of a parameter of another dtype as one of p's. A master copy that it lacks is p's value."""
    cast = {name: state[name].to(dtype) for name, dtype in columns.items() if name in state}
    if "master" in columns and "master" not in state:
        if is_split(p):
            raise ValueError(
                "cast: does not apply to a DTensor whose state has no master: load it in one process, save it"
            )
        at = state["indices"].to(p.device, torch.int64)
        cast["master"] = p.detach().reshape(-1)[at].to(columns["master"])
    if "ever_originals" in state:
        cast["ever_originals"] = state["ever_originals"].to(p.dtype)
    return {name: value for name, value in state.items() if name != "master"} | cast


def _check_indices(where: str, rows: Tensor, p: Tensor) -> None:
    inside = rows.numel() == 0 or (rows[0] >= 0 and rows[-1] < p.numel())
    if rows.dtype != index_dtype(p) or not inside or not bool((rows.diff() > 0).all()):
        expected = str(index_dtype(p)).removeprefix("torch.")
        raise ValueError(f"{where}: expected ascending {expected} below {p.numel()}, got something else")


def fill(active: ActiveSet, sparse: dict[int, dict[str, Any]], steps_done: int) -> None:
    """Puts checked per-parameter states by position into an active set that holds no entries yet."""
    for i, shard in enumerate(active.shards):
        states = [_own(shard, j, sparse[position]) for j, position in enumerate(shard.positions)]
        _fill_shard(shard, states, steps_done)
        if active.layout.repeat:
            _fill_ever(active.ever[i], states, shard.device)

    if active.count is not None:
        active.count.fill_(sum(state["indices"].numel() for state in sparse.values()))


def _own(shard: Shard, j: int, state: dict[str, Any]) -> dict[str, Any]:
    """The state of tensor j at the entries that this rank holds, by their indices in its part."""
    rows = shard.ranges[j]
    if shard.blocks is None and rows is None:
        return state
    found = dict(state)
    for prefix, names in (("", _COLUMNS), ("ever_", ("indices", "originals"))):
        if f"{prefix}indices" in state:
            held = [f"{prefix}{name}" for name in names if f"{prefix}{name}" in state]
            if rows is None:
                indices, at = own_part(shard, j, state[f"{prefix}indices"])
            else:
                at, indices = inside(rows, shard.shapes[j], state[f"{prefix}indices"])
            found |= {name: state[name].to(shard.device)[at] for name in held}
            found[f"{prefix}indices"] = indices
    return found


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
