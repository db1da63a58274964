"""The saved form for split parameters: tensors of a fixed size, which torch.distributed.checkpoint can fill.

Its loader reads into the tensors of a state dict that exists, so that a new optimizer has to have the same
ones as one that has run. All active entries lie in arrays of the budget's length, by place in the whole
tensors, beside the first parameter that trains: torch loads no state of a frozen one. Every rank saves and
loads all of them and keeps its own. Any other ranks can go on from there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor

from id3_kernels.checks import FLOATS

from ..distributed.part import any_split, local
from ..param_groups import Member, members
from ..pieces import index_bits, index_dtype_of
from .layout import Layout

KEY = "id3"
HEADER_BYTES = 4096  # for the settings as JSON


def mark(state: MutableMapping[Any, Any], groups: list[dict[str, Any]]) -> None:
    """Makes the keys of a split run's state, by which flattened states are read, and dense moments.

    Drops the keys of parameters that a trainer has replaced. Mutates state.
    """
    if not any_split(groups):
        return
    known = {p for group in groups for p in group["params"]}
    for key in [key for key in state if isinstance(key, Tensor) and key not in known]:
        del state[key]
    for _, _, p in members(groups, dense=False):
        state[p].setdefault(KEY, {})
    for _, _, p in members(groups, dense=True):
        if "exp_avg" not in state[p]:
            moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            state[p] |= {"step": torch.zeros((), dtype=torch.float32, device=local(p).device), **moments}


def is_flat(groups: list[dict[str, Any]], layout: Layout) -> bool:
    """Whether the state takes this form. With "repeat" it has no size that is known in advance; dense groups
    alone have torch's own form."""
    sparse = any(True for _ in members(groups, dense=False))
    return sparse and not layout.repeat and any_split(groups)


def close(
    state: dict[str, Any], settings: dict[str, Any], groups: list[dict[str, Any]], layout: Layout, budget: int
) -> None:
    """Brings the parameters' own state, over all ranks and by number, and the settings into this form."""
    rows, by_dtype, states = list(members(groups, dense=False)), {}, state["state"]
    bits = index_bits(row.param.numel() for row in rows)
    for row in rows:
        by_dtype.setdefault(row.param.dtype, []).append(row)
    columns = {
        _name(dtype): dict(_columns(held, states, layout, budget, bits)) for dtype, held in by_dtype.items()
    }
    for position, _, p in rows:
        own = states.get(position, {})
        shape = torch.tensor(list(p.shape), dtype=torch.int64, device=p.device)
        step = torch.as_tensor(own.get("step", 0), device=p.device).to(torch.int64)
        dtype = torch.tensor(FLOATS.index(p.dtype), device=p.device)
        names = {"indices", "step", "shape", *layout.columns(p.dtype)}
        more = {name: value for name, value in own.items() if name not in names}
        states[position] = more | {KEY: {"step": step, "shape": shape, "dtype": dtype}}
    home = next((row for row in rows if row.param.requires_grad), rows[0])
    states[home.position][KEY] |= {"settings": _header(settings, home.param.device), **columns}


def _columns(
    rows: list[Member], states: dict[int, dict], layout: Layout, budget: int, bits: int
) -> Iterator[tuple[str, Tensor]]:
    """The arrays of one dtype's parameters: `place`, padded by -1, then those beside the indices, by 0."""
    first = rows[0].param
    size = min(budget, sum(row.param.numel() for row in rows))
    held = [(position, states[position]) for position, _, _ in rows if "indices" in states.get(position, {})]
    place = [(position << bits) | own["indices"].long() for position, own in held]
    yield "place", _padded(place, size, torch.int64, first.device, -1)
    for name, dtype in layout.columns(first.dtype).items():
        if name != "indices":
            yield name, _padded([own[name] for _, own in held], size, dtype, first.device, 0)


def _padded(parts: list[Tensor], size: int, dtype: torch.dtype, device: torch.device, value: int) -> Tensor:
    out, at = torch.full((size,), value, dtype=dtype, device=device), 0
    for part in parts:
        out[at : at + part.numel()] = part
        at += part.numel()
    return out


def _header(settings: dict[str, Any], device: torch.device) -> Tensor:
    text = json.dumps(settings).encode()
    size = -(-len(text) // HEADER_BYTES) * HEADER_BYTES
    return torch.tensor(list(text.ljust(size)), dtype=torch.uint8, device=device)


def opened(state: dict[str, Any], groups: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """The same state by parameters, with the settings in `param_groups[0]["id3"]`; another state as it is.

    groups: of the optimizer that loads it. Its frozen parameters without active entries need no state.
    """
    keys = [key for group in state["param_groups"] for key in group["params"]]
    own = {key: found for key in keys if (found := _own(state["state"].get(key)))}
    home = next((found for found in own.values() if "settings" in found), None)
    if home is None:
        return state
    settings, states = json.loads(bytes(home["settings"].tolist())), dict(state["state"])
    for key in own:
        states[key] = {name: x for name, x in states[key].items() if name != KEY}
    if settings["n_entries"] is not None:
        shapes = {key: found["shape"].tolist() for key, found in own.items()}
        frozen = {i: p for i, p in _frozen(groups or []) if i < len(keys) and keys[i] not in own}
        bits = index_bits([*map(math.prod, shapes.values()), *(p.numel() for p in frozen.values())])
        columns = {name: _by_position(x, len(keys), bits) for name, x in home.items() if isinstance(x, dict)}
        for position, key in enumerate(keys):
            if key in own:
                row = columns[_name(FLOATS[int(own[key]["dtype"])])][position]
                row["indices"] = row["indices"].to(index_dtype_of(shapes[key]))
                states[key] |= row | {"step": own[key]["step"], "shape": shapes[key]}
        for position, p in frozen.items():
            rows = columns.get(_name(p.dtype))
            if rows is not None and rows[position]["indices"].numel() == 0:
                none = {"indices": rows[position]["indices"].to(index_dtype_of(p.shape))}
                none |= {"step": torch.zeros((), dtype=torch.int64), "shape": list(p.shape)}
                states[keys[position]] = states.get(keys[position], {}) | rows[position] | none
    groups = [dict(group) for group in state["param_groups"]]
    groups[0][KEY] = settings
    states = {key: s for key, s in states.items() if s or key not in own}
    return {**state, "state": states, "param_groups": groups}


def _frozen(groups: list[dict[str, Any]]) -> Iterator[tuple[int, Tensor]]:
    """(position, parameter) of those that torch's functions load no state of, dense ones aside."""
    for row in members(groups, dense=False):
        if not row.param.requires_grad:
            yield row.position, row.param


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _own(state: Any) -> dict[str, Any] | None:
    found = state.get(KEY) if isinstance(state, dict) else None
    return found if isinstance(found, dict) and "shape" in found else None


def _by_position(columns: dict[str, Tensor], n_tensors: int, bits: int) -> list[dict[str, Tensor]]:
    """For each position `indices`, int64, and the columns beside them."""
    place = columns["place"]
    place = place[place >= 0]
    edges = torch.searchsorted(place, torch.arange(n_tensors + 1, device=place.device) << bits)
    sizes = edges.diff().tolist()
    named = {"indices": place & ((1 << bits) - 1)}
    named |= {name: column[: place.numel()] for name, column in columns.items() if name != "place"}
    parts = [column.split(sizes) for column in named.values()]
    return [dict(zip(named, row, strict=True)) for row in zip(*parts, strict=True)]
