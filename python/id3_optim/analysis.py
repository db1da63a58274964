"""Allocation of the budget by layer and role, tensor sparsity, sparsity entropy (paper, section 6), plots.

Every number comes from `optimizer.touched()`, the entries that training may have changed, in O(|Λ| + M), or
from the entries of a delta. Parameters trained or stored whole do not count. Only plots import matplotlib.
"""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

# The first pattern that matches a parameter's name decides its role. The names are those of BERT, RoBERTa,
# DeBERTa, DistilBERT, ModernBERT, Llama and models built like it, GPT-2.
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


class Place(NamedTuple):
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
    """The counts of the paper's figure 7.

    active, entries: int64 [roles, layers]. layers: None first where parameters are in no layer.
    """

    roles: list[str]
    layers: list[int | None]
    active: Tensor
    entries: Tensor

    def share(self) -> Tensor:
        """float32 [roles, layers]: each cell's share of all active entries; zeros if no entry is active."""
        return self.active / max(int(self.active.sum()), 1)


def allocation(model: torch.nn.Module, optimizer) -> Allocation:
    """Active entries by role and layer (paper, figure 7). Parameters outside `model` count as "other"."""
    names = {id(p): name for name, p in model.named_parameters()}
    touched = optimizer.touched()
    return allocate((names.get(id(param), ""), len(rows), param.numel()) for param, rows, _ in touched)


def delta_allocation(delta) -> Allocation:
    """A delta's entries by role and layer; `entries` is the size of the parameters that have some."""
    changes = delta.changes.items()
    return allocate((n, len(c.indices), math.prod(c.shape)) for n, c in changes if c.indices is not None)


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
    """Lines of text: layers as rows, roles as columns, with totals; cells without a parameter are blank."""
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
    """The share of tensors without an active entry (paper, figure 8)."""
    counts = [len(indices) for _, indices, _ in optimizer.touched()]
    return counts.count(0) / max(len(counts), 1)


def sparsity_entropy(optimizer) -> float:
    """The entropy, in nats, of p_j = |P_j ∩ Λ| / |P_j|, normalised over the tensors (paper, figure 9).

    0 for an empty Λ; at most ln M, where all M tensors are equally dense.
    """
    densities = [len(indices) / param.numel() for param, indices, _ in optimizer.touched() if len(indices)]
    whole = math.fsum(densities)
    return -math.fsum(p / whole * math.log(p / whole) for p in densities) + 0.0


def count_changed(optimizer) -> int | None:
    """How many entries differ from their pre-trained values, in O(|Λ|); None without `keep_originals`."""
    changed = 0
    for param, indices, originals in optimizer.touched():
        if len(indices) and originals is None:
            return None
        if len(indices):
            changed += int((entries_of(param, indices) != originals).sum())
    return changed


def entries_of(param: Tensor, indices: Tensor) -> Tensor:
    """param.reshape(-1)[indices] without copying the parameter, for any strides. indices: int32 [n], flat."""
    param, indices = param.detach(), indices.long()
    if param.is_contiguous():
        return param.view(-1)[indices]
    return param[torch.unravel_index(indices, param.shape)]


def loss_curve(history: list[dict]) -> tuple[list[int], list[float]]:
    """Steps and training losses from a Trainer's `state.log_history`."""
    logged = [entry for entry in history if "loss" in entry]
    return [entry["step"] for entry in logged], [entry["loss"] for entry in logged]


def plot_losses(axes, curves: dict[str, tuple[list[int], list[float]]], title: str = "training loss") -> None:
    """Draws (steps, losses) by label. All but the first are dashed, so that equal curves stay visible."""
    for i, (label, (steps, losses)) in enumerate(curves.items()):
        style = {"linewidth": 2.6, "alpha": 0.75} if i == 0 else {"linewidth": 1.4, "linestyle": (0, (4, 2))}
        axes.plot(steps, losses, label=label, **style)
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend(frameon=False)


def plot_allocation(axes, allocated: Allocation, title: str = "where the budget went") -> None:
    """A heat map like figure 7: layers as columns, roles as rows, each cell's share of Λ in per cent."""
    share = 100.0 * allocated.share()
    present = allocated.entries > 0
    # One role can take most of the budget. Colours follow the square root, so that small shares stay
    # readable.
    colour = (share / share.max().clamp(min=1e-9)).sqrt()
    axes.imshow(colour.where(present, torch.nan).numpy(), cmap="Blues", aspect="auto", vmin=0, vmax=1.1)
    axes.set_xticks(range(len(allocated.layers)), ["–" if n is None else str(n) for n in allocated.layers])
    axes.set_yticks(range(len(allocated.roles)), allocated.roles)
    for row, column in present.nonzero().tolist():
        value, dark = float(share[row, column]), bool(colour[row, column] > 0.6)
        text = "0" if value == 0 else "<0.1" if value < 0.05 else f"{value:.1f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    outside = " (–: in no layer)" if None in allocated.layers else ""
    axes.set(xlabel=f"layer{outside}", title=f"{title}: % of {int(allocated.active.sum()):,} entries")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def plot_spread(axes, history: list[dict]) -> None:
    """Tensor sparsity (left scale) and sparsity entropy (right scale) over the run, like figures 8 and 9."""
    logged = [entry for entry in history if "tensor_sparsity" in entry]
    steps = [entry["step"] for entry in logged]
    right = axes.twinx()
    axes.plot(steps, [entry["tensor_sparsity"] for entry in logged], color="tab:blue")
    right.plot(steps, [entry["sparsity_entropy"] for entry in logged], color="tab:orange")
    axes.set(xlabel="step", title="how the selection spread over the tensors", ylim=(0, 1))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("tensor sparsity", color="tab:blue")
    right.set_ylabel("sparsity entropy, nats", color="tab:orange")
    axes.grid(alpha=0.3)


def save_plots(path: str | Path, curves: dict[str, list[dict]], model: torch.nn.Module, optimizer) -> None:
    """Writes one PNG: the loss curves, the allocation of `optimizer`, and the spread over the run.

    curves: a Trainer's log history by label; the first is the run of `optimizer`. An optimizer that does not
    select (torch's own) gets the losses alone.
    """
    from matplotlib.figure import Figure

    selective = hasattr(optimizer, "touched")
    figure = Figure(figsize=(16 if selective else 6, 4.8), layout="constrained", dpi=110)
    panels = figure.subplots(1, 3 if selective else 1, squeeze=False)[0]
    plot_losses(panels[0], {label: loss_curve(history) for label, history in curves.items()})
    if selective:
        plot_allocation(panels[1], allocation(model, optimizer))
        plot_spread(panels[2], next(iter(curves.values())))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def save_allocation(path: str | Path, allocated: Allocation, title: str) -> None:
    """Writes one PNG: the heat map by role and layer, totals per layer above it, per role beside it."""
    from matplotlib.figure import Figure

    columns, rows = max(len(allocated.layers), 1), max(len(allocated.roles), 1)
    figure = Figure(figsize=(4.5 + 0.5 * columns, 2.5 + 0.4 * rows), layout="constrained", dpi=130)
    ratios = {"width_ratios": [columns, 3.5], "height_ratios": [2.5, rows]}
    (above, corner), (middle, beside) = figure.subplots(2, 2, sharex="col", sharey="row", gridspec_kw=ratios)
    corner.remove()
    plot_allocation(middle, allocated, "")
    middle.set_title("")
    share = 100.0 * allocated.share()
    layers = above.bar(range(len(allocated.layers)), share.sum(0).numpy(), color="tab:blue", width=0.7)
    roles = beside.barh(range(len(allocated.roles)), share.sum(1).numpy(), color="tab:blue", height=0.7)
    for axes, bars, side in ((above, layers, "bottom"), (beside, roles, "left")):
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
        axes.spines[:].set_visible(False)
        axes.spines[side].set_visible(True)
        axes.tick_params(length=0, labelleft=False, labelbottom=False)
    above.margins(y=0.2)
    beside.margins(x=0.25)
    figure.suptitle(f"{title}: % of {int(allocated.active.sum()):,} changed entries", fontsize=11)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
