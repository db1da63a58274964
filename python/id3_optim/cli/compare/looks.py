"""How the figures of a comparison look: one colour for a method, one dash for a budget."""

from __future__ import annotations

import plotly.graph_objects as go
from plotly.colors import qualitative

from .grid import Cell, Plan
from .summary import shown_budget

_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_COLOURS = (*qualitative.D3, *qualitative.Dark2, *qualitative.Set1)


def colour(plan: Plan, method: str) -> str:
    """The same in every figure."""
    place = [other.name for other in plan.methods].index(method)
    return _COLOURS[place % len(_COLOURS)]


def dash(plan: Plan, budget: int | float | None) -> str:
    """The largest budget, and a method without one, is solid."""
    ordered = sorted(plan.budgets, reverse=True)
    return "solid" if budget is None else _DASHES[ordered.index(budget) % len(_DASHES)]


def name_of(plan: Plan, cell: Cell) -> str:
    """The method, and its budget where the grid has several."""
    several = cell.budget is not None and len(plan.budgets) > 1
    return f"{cell.method}, {shown_budget(cell.budget)}" if several else cell.method


def figure(x: str, y: str, logarithmic: bool = False) -> go.Figure:
    """An empty figure with both axes named; the legend is below, so that a phone has room for the plot."""
    drawn = go.Figure()
    drawn.update_layout(
        template="plotly_white", height=440, margin={"l": 10, "r": 10, "t": 20, "b": 10},
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
        hovermode="closest", font={"family": "system-ui, sans-serif"},
    )  # fmt: skip
    drawn.update_xaxes(title=x, automargin=True, type="log" if logarithmic else None)
    drawn.update_yaxes(title=y, automargin=True)
    return drawn
