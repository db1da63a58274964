"""Heat maps of a comparison: where the budget went, which entries runs share, and the effect of ε and exp."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import plotly.graph_objects as go

from ..settings import Settings
from .grid import Cell, Plan, Results, Trial, cells
from .looks import figure, name_of
from .summary import final_reports, rows

ActiveOf = Callable[[Trial], np.ndarray | None]
_MOST = 40  # runs in the map of shared entries: more cannot be read


def allocation(plan: Plan, results: Results) -> go.Figure:
    """Per cent of the active entries by role and layer, the mean over seeds; a menu chooses the cell."""
    drawn = figure("layer (–: in no layer)", "")
    shares = {cell: _shares(plan, results, cell) for cell in cells(plan)}
    shares = {cell: share for cell, share in shares.items() if share is not None}
    for i, (cell, (roles, layers, share)) in enumerate(shares.items()):
        drawn.add_heatmap(
            z=share, x=layers, y=roles, visible=i == 0, colorscale="Blues", zmin=0, texttemplate="%{z:.1f}",
            name=name_of(plan, cell), hovertemplate="layer %{x}, %{y}<br>%{z:.2f} %<extra></extra>",
            showscale=False, hoverongaps=False,
        )  # fmt: skip
    buttons = [
        {
            "label": name_of(plan, cell),
            "method": "restyle",
            "args": [{"visible": [other == cell for other in shares]}],
        }
        for cell in shares
    ]
    menu = {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"}
    drawn.update_layout(updatemenus=[menu] if buttons else [], margin={"t": 60})
    drawn.update_xaxes(type="category")
    drawn.update_yaxes(autorange="reversed", type="category")
    return drawn


def _shares(plan: Plan, results: Results, cell: Cell) -> tuple[list, list, list] | None:
    """Roles, layers and per cent [roles][layers], None where the model has no entries of the kind."""
    reports = final_reports(plan, results, cell).values()
    counted = [r["allocation"] for r in reports if sum(map(sum, r.get("allocation", {}).get("active", [])))]
    if not counted:
        return None
    entries = np.array(counted[0]["entries"])
    mean = np.mean([np.array(c["active"]) / np.sum(c["active"]) for c in counted], axis=0)
    layers = ["–" if layer is None else str(layer) for layer in counted[0]["layers"]]
    share = [
        [100 * float(m) if n else None for m, n in zip(*pair, strict=True)]
        for pair in zip(mean, entries, strict=True)
    ]
    return counted[0]["roles"], layers, share


def overlap(plan: Plan, results: Results, active_of: ActiveOf) -> go.Figure:
    """The share of the smaller run's entries that two runs both trained, for the largest budget's runs."""
    largest = max(plan.budgets, key=lambda budget: (isinstance(budget, int), budget))
    chosen = [cell for cell in cells(plan) if cell.budget == largest]
    trials = [trial for cell in chosen for trial in final_reports(plan, results, cell)]
    found = ((trial, active_of(trial)) for trial in trials)
    recorded = ((trial, active) for trial, active in found if active is not None and len(active))
    sets = dict(itertools.islice(recorded, _MOST))
    labels = [f"{trial.method}, seed {trial.seed}" for trial in sets]
    z = [[100 * shared(a, b) for b in sets.values()] for a in sets.values()]
    drawn = figure("", "")
    drawn.add_heatmap(
        z=z, x=labels, y=labels, zmin=0, zmax=100, colorscale="Blues", showscale=False,
        hovertemplate="%{x}<br>%{y}<br>%{z:.1f} % shared<extra></extra>",
        texttemplate="%{z:.0f}" if len(sets) <= 12 else None,
    )  # fmt: skip
    drawn.update_xaxes(type="category")
    drawn.update_yaxes(autorange="reversed", type="category")
    return drawn


def shared(a: np.ndarray, b: np.ndarray) -> float:
    """The part of the smaller set that the larger one has too. a, b: sorted, without repeats."""
    return len(np.intersect1d(a, b, assume_unique=True)) / max(1, min(len(a), len(b)))


def eps_and_exp(plan: Plan, results: Results) -> go.Figure:
    """The mean score by D3's ε and exponent, of the methods that differ in these alone."""
    drawn = figure("exp", "ε")
    scored = [(row, _d3(plan, row.cell.method)) for row in rows(plan, results) if row.spread]
    largest = max(plan.budgets, key=lambda budget: (isinstance(budget, int), budget))
    means = {at: row.spread.mean for row, at in scored if at is not None and row.cell.budget == largest}
    exps, epss = sorted({exp for _, exp in means}), sorted({eps for eps, _ in means})
    if len(means) > 1:
        drawn.add_heatmap(
            z=[[means.get((eps, exp)) for exp in exps] for eps in epss], x=exps, y=epss,
            texttemplate="%{z:.4f}", colorscale="Blues", showscale=False,
            hovertemplate=f"ε = %{{y}}, exp = %{{x}}<br>{plan.metric} %{{z:.4f}}<extra></extra>",
        )  # fmt: skip
    drawn.update_xaxes(type="category")
    drawn.update_yaxes(type="category")
    return drawn


def _d3(plan: Plan, name: str) -> tuple[float, float] | None:
    """(ε, exp) of a method that is ID3 with another ε or exponent; None for all other methods."""
    changes: dict[str, Any] = dict(plan.method(name).changes)
    at = tuple(changes.pop(setting, getattr(Settings, setting)) for setting in ("eps", "exp"))
    return None if changes or name.partition(":")[0] != "id3" else at
