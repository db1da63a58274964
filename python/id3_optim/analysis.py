"""Where the budget went: allocation by layer and role, tensor sparsity, sparsity entropy (paper, section 6).

Each function reads `optimizer.touched()`, the entries that training may have changed, in O(|Λ| + M), or the
entries of a delta. Parameters that are trained or stored whole do not count.
"""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .delta.split import read_split
from .distributed.part import is_split

# The first pattern that a parameter's name matches gives its role. Covered are the names of BERT, RoBERTa,
# DeBERTa, DistilBERT, ModernBERT, GPT-2, Llama and models derived from it.
_ROLE_PATTERNS = (
    ("LayerNorm", r"layer_?norm|\bln_|norm\b"),
    ("pooler", r"\bpooler\b"),
    ("head", r"^classifier|^score\b|\blm_head\b|^cls\b|\bqa_outputs\b|\blm_predictions\b"),
    ("embeddings", r"embed|\bwte\b|\bwpe\b"),
    ("query, key, value", r"\bc_attn\b|\bquery_key_value\b|\bw?qkv\b|\bin_proj\b"),
    ("query", r"\b(pos_)?(query|q_proj|query_proj|q_lin)\b"),
    ("key", r"\b(pos_)?(key|k_proj|key_proj|k_lin)\b"),
    ("value", r"\b(value|v_proj|value_proj|v_lin)\b"),
    (
        "attention output",
        r"\battention\.(output|dense)\b|\b(self_)?attn\.(c_proj|o_proj|out_proj|wo)\b|\bout_lin\b",
    ),
    (
        "FFN1",
        r"\bintermediate\b|\bc_fc\b|\b(gate|up|gate_up)_proj\b|\bfc1\b|\blin1\b|\bdense_h_to_4h\b|\bmlp\.wi\b",
    ),
    (
        "FFN2",
        r"\boutput\.dense\b|\bmlp\.c_proj\b|\bdown_proj\b|\bfc2\b|\blin2\b|\bdense_4h_to_h\b|\bmlp\.wo\b",
    ),
)
ROLES = (
    *("key", "query", "value", "query, key, value", "attention output", "FFN1", "FFN2"),
    *("LayerNorm", "embeddings", "pooler", "head", "other"),
)
_LAYER = re.compile(r"\b(?:layers?|h|blocks?)\.(\d+)\.")
# `experts.3.` is one expert; `experts.up_proj` has all, `experts.up_proj[8:16]` some of them, by dimension 0.
_EXPERTS = re.compile(r"(?:^|\.)experts(?:\.(?P<one>\d+)\.|(?=$|[.\[])[^\[]*(?:\[(?P<first>\d+):\d+\])?$)")


class Place(NamedTuple):
    """Where a parameter stands in a transformer."""

    layer: int | None  # None: in no layer (embeddings, pooler, head)
    role: str  # one of ROLES


def locate(name: str) -> Place:
    """The layer and role of a parameter by its name."""
    number = _LAYER.search(name)
    role = next(
        (role for role, pattern in _ROLE_PATTERNS if re.search(pattern, name, re.IGNORECASE)), "other"
    )
    return Place(int(number[1]) if number else None, role)


class Allocation(NamedTuple):
    """Counts of figure 7. active, entries: int64[roles, layers]; layers may begin with None: in no layer."""

    roles: list[str]
    layers: list[int | None]
    active: Tensor
    entries: Tensor

    def share(self) -> Tensor:
        """float32[roles, layers]: each cell's part of all active entries; zeros if there are none."""
        return self.active / max(int(self.active.sum()), 1)


def allocation(model: torch.nn.Module, optimizer) -> Allocation:
    """Active entries by role and layer (paper, figure 7); parameters that `model` lacks count as "other"."""
    names = {id(p): name for name, p in model.named_parameters()}
    touched = optimizer.touched()
    return allocate((names.get(id(param), ""), len(rows), param.numel()) for param, rows, _ in touched)


def delta_allocation(delta) -> Allocation:
    """A delta's entries by role and layer; `entries` counts the parameters that the delta has entries of."""
    changes = delta.changes.items()
    return allocate((n, len(c.indices), math.prod(c.shape)) for n, c in changes if c.indices is not None)


def delta_experts(delta) -> dict[int | None, dict[int, int]]:
    """A delta's entries by layer and expert, of weights whose name has `experts`; {} without such weights.

    An expert has weights of its own (`experts.3.up_proj`), or is a slice of one weight's first dimension.
    """
    found: dict[int | None, dict[int, int]] = {}
    for name, change in delta.changes.items():
        known = _EXPERTS.search(name)
        if change.indices is None or known is None or not change.shape:
            continue
        if known["one"] is not None:
            counts = torch.tensor([change.indices.numel()])
        else:
            each = change.indices.long() // math.prod(change.shape[1:])
            counts = torch.bincount(each, minlength=change.shape[0])
        experts = found.setdefault(locate(name).layer, {})
        for expert, count in enumerate(counts.tolist(), int(known["one"] or known["first"] or 0)):
            experts[expert] = experts.get(expert, 0) + count
    order = sorted(found, key=lambda layer: -1 if layer is None else layer)
    return {layer: dict(sorted(found[layer].items())) for layer in order}


def allocate(counts: Iterable[tuple[str, int, int]]) -> Allocation:
    """Sums (parameter name, active entries, all entries) by role and layer."""
    counted = [(locate(name), n_active, n_entries) for name, n_active, n_entries in counts]
    layers = sorted(
        {place.layer for place, _, _ in counted}, key=lambda layer: -1 if layer is None else layer
    )
    roles = [role for role in ROLES if any(place.role == role for place, _, _ in counted)]
    active = torch.zeros(len(roles), len(layers), dtype=torch.int64)
    entries = torch.zeros_like(active)
    for place, n_active, n_entries in counted:
        cell = roles.index(place.role), layers.index(place.layer)
        active[cell] += n_active
        entries[cell] += n_entries
    return Allocation(roles, layers, active, entries)


def allocation_table(allocated: Allocation) -> list[str]:
    """Lines of text: layers as rows, roles as columns, with totals; a cell without parameters is empty."""
    by_layer = zip(allocated.active.T.tolist(), allocated.entries.T.tolist(), strict=True)
    cells = [[f"{n:,}" if size else "" for n, size in zip(*row, strict=True)] for row in by_layer]
    names = ["–" if layer is None else str(layer) for layer in allocated.layers]
    of_layers = [f"{total:,}" for total in allocated.active.sum(0).tolist()]
    of_roles = [f"{total:,}" for total in allocated.active.sum(1).tolist()]
    rows = [["layer", *allocated.roles, "all"]]
    rows += [[name, *row, total] for name, row, total in zip(names, cells, of_layers, strict=True)]
    rows += [["all", *of_roles, f"{int(allocated.active.sum()):,}"]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def tensor_sparsity(optimizer) -> float:
    """The share of tensor parameters without one active entry (paper, figure 8)."""
    counts = [len(indices) for _, indices, _ in optimizer.touched()]
    return counts.count(0) / max(len(counts), 1)


def sparsity_entropy(optimizer) -> float:
    """The entropy, in nats, of p_j = |P_j ∩ Λ| / |P_j| normalised over the tensors (paper, figure 9); 0 for
    an empty Λ.

    Its largest value, all tensors being equally dense, is ln M.
    """
    densities = [len(indices) / param.numel() for param, indices, _ in optimizer.touched() if len(indices)]
    whole = math.fsum(densities)
    return -math.fsum(p / whole * math.log(p / whole) for p in densities) + 0.0


def count_changed(optimizer) -> int | None:
    """How many entries differ from the pre-trained values, in O(|Λ|); None without `keep_originals`."""
    changed = 0
    for param, indices, originals in optimizer.touched():
        if len(indices) and originals is None:
            return None
        if len(indices):
            changed += int((entries_of(param, indices) != originals).sum())
    return changed


def entries_of(param: Tensor, indices: Tensor) -> Tensor:
    """param.reshape(-1)[indices] that copies no parameter, whatever its strides. indices: int32[n], flat.

    Where ranks hold parts of the parameter, every rank has to call this.
    """
    if is_split(param):
        return read_split([(param, indices)])[0]
    param, indices = param.detach(), indices.long()
    if param.is_contiguous():
        return param.view(-1)[indices]
    return param[torch.unravel_index(indices, param.shape)]
