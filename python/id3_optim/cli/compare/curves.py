"""Figures of scores and of training: against budgets, entries, steps and learning rates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import Any

import plotly.graph_objects as go

from .grid import Cell, Plan, Results, Trial, cells, score
from .looks import colour, dash, figure, name_of
from .summary import final_reports, rows

History = Mapping[str, Any]


def score_against_budget(plan: Plan, results: Results) -> go.Figure:
    """A line for each method, a level for one without a budget."""
    drawn = figure("entries trained", plan.metric, logarithmic=True)
    every = [row for row in rows(plan, results) if row.spread]
    counts = [row.entries for row in every if row.cell.budget is not None]
    for method in plan.methods:
        ended = [row for row in every if row.cell.method == method.name]
        points = [(row.entries, row.spread.mean, row.spread.sd or 0.0) for row in ended]
        if points and not method.has_budget:
            points = [(x, *points[0][1:]) for x in (min(counts), max(counts))] if counts else points
        if points:
            x, y, sd = zip(*sorted(points), strict=True)
            bars = {"type": "data", "array": sd, "thickness": 1.2}
            drawn.add_scatter(
                x=x, y=y, error_y=bars, mode="lines+markers" if method.has_budget else "lines",
                name=method.name, meta=method.name, line=_line(plan, method.name, None),
                hovertemplate=f"{method.name}<br>%{{x:,.0f}} entries: %{{y:.4f}}<extra></extra>",
            )  # fmt: skip
    return drawn


def score_against_entries(plan: Plan, results: Results) -> go.Figure:
    """Along the runs: the score of each measurement against the entries that were active then."""
    drawn = figure("active entries", plan.metric, logarithmic=True)
    for cell in cells(plan):
        points = [_measured(plan, report) for report in final_reports(plan, results, cell).values()]
        _add(drawn, plan, cell, mean_curve(points), "%{x:,} entries: %{y:.4f}")
    return drawn


def _measured(plan: Plan, report: History) -> dict[int, float]:
    """Active entries: the score measured with them, along one run."""
    active = {log["step"]: log["n_active"] for log in report["history"] if "n_active" in log}
    metric = f"eval_{plan.metric}"
    measured = {log["step"]: log[metric] for log in report["history"] if metric in log}
    trained = report.get("trained") or 0
    if not active:  # an optimizer without a schedule
        active = {0: trained}
    elif (end := report.get("steps")) in measured:  # where nothing may be logged
        active[end] = trained
    counts = {step: max((n for at, n in active.items() if at <= step), default=0) for step in measured}
    return {n: measured[step] for step, n in counts.items() if n}


def along_training(plan: Plan, results: Results, name: str, title: str, logarithmic=False) -> go.Figure:
    """A number of the runs' logs against the step, the mean over seeds; a curve for each cell."""
    drawn = figure("step", title)
    if logarithmic:
        drawn.update_yaxes(type="log")
    for cell in cells(plan):
        logs = [report["history"] for report in final_reports(plan, results, cell).values()]
        curves = [
            {log["step"]: log[name] for log in history if _is_number(log.get(name))} for history in logs
        ]
        _add(drawn, plan, cell, mean_curve(curves), "step %{x}: %{y:.4g}")
    return drawn


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def mean_curve(curves: list[dict[int, float]]) -> dict[int, float]:
    """The mean over runs at the places that all of them have."""
    shared = set.intersection(*map(set, curves)) if curves else set()
    return {x: fmean(curve[x] for curve in curves) for x in sorted(shared)}


def _add(drawn: go.Figure, plan: Plan, cell: Cell, curve: dict[int, float], hover: str) -> None:
    if curve:
        drawn.add_scatter(
            x=list(curve), y=list(curve.values()), mode="lines+markers" if len(curve) < 12 else "lines",
            name=name_of(plan, cell), meta=cell.method, line=_line(plan, cell.method, cell.budget),
            hovertemplate=f"{name_of(plan, cell)}<br>{hover}<extra></extra>",
        )  # fmt: skip


def _line(plan: Plan, method: str, budget) -> dict[str, Any]:
    return {"color": colour(plan, method), "dash": dash(plan, budget), "width": 2}


def learning_rates(plan: Plan, results: Results) -> go.Figure:
    """The score of every run that tuned, of each rung; the last rung is drawn strongest."""
    drawn = figure("learning rate", f"{plan.metric}, rows kept aside", logarithmic=True)
    for cell in cells(plan):
        for steps, points in _rungs(plan, results, cell):
            last, name = steps == plan.tune_steps, f"{name_of(plan, cell)}, {steps} steps"
            x, y = zip(*sorted(points), strict=True)
            drawn.add_scatter(
                x=x, y=y, mode="lines+markers", opacity=1.0 if last else 0.35, meta=cell.method,
                name=name, showlegend=last,
                legendgroup=name_of(plan, cell), line=_line(plan, cell.method, cell.budget),
                hovertemplate=f"{name}<br>lr %{{x:.3g}}: %{{y:.4f}}<extra></extra>",
            )  # fmt: skip
    return drawn


def _rungs(plan: Plan, results: Results, cell: Cell) -> Iterator[tuple[int, list[tuple[float, float]]]]:
    """(steps, [(learning rate, score)]) of a cell's rungs that have runs with a finite loss."""
    by_steps: dict[int, list[tuple[float, float]]] = {}
    for trial, report in results.items():
        if trial.tuning and trial.cell == cell and (value := score(plan, report)) is not None:
            by_steps.setdefault(trial.steps, []).append((trial.lr, value))
    yield from sorted(by_steps.items())


def cost(plan: Plan, results: Results) -> go.Figure:
    """Milliseconds of a step by phase, a bar for each cell."""
    drawn = figure("milliseconds of a step", "")
    ended = {cell: list(_ended(plan, results, cell)) for cell in cells(plan)}
    shown = {cell: reports for cell, reports in ended.items() if reports}
    phases = {"forward_backward": "forward, backward", "select": "select", "update": "update"}
    for phase, label in phases.items():
        drawn.add_bar(
            y=[name_of(plan, cell) for cell in shown],
            x=[fmean(r["step_ms"].get(phase, 0.0) for r in reports) for reports in shown.values()],
            name=label, orientation="h", hovertemplate="%{y}<br>%{x:.1f} ms<extra></extra>",
        )  # fmt: skip
    drawn.update_layout(barmode="stack", yaxis={"autorange": "reversed", "type": "category"})
    return drawn


def memory(plan: Plan, results: Results) -> go.Figure:
    """Megabytes of the optimizer's state, and on a GPU the peak of the run."""
    drawn = figure("MB", "")
    ended = {cell: list(_ended(plan, results, cell)) for cell in cells(plan)}
    shown = {cell: reports for cell, reports in ended.items() if reports}
    for number, label in {"optimizer_bytes": "optimizer state", "gpu_peak_bytes": "peak on the GPU"}.items():
        if any(number in report for reports in shown.values() for report in reports):
            drawn.add_bar(
                y=[name_of(plan, cell) for cell in shown],
                x=[fmean(r.get(number, 0) for r in reports) / 1e6 for reports in shown.values()],
                name=label, orientation="h", hovertemplate="%{y}<br>%{x:.2f} MB<extra></extra>",
            )  # fmt: skip
    drawn.update_layout(barmode="group", yaxis={"autorange": "reversed", "type": "category"})
    return drawn


def _ended(plan: Plan, results: Results, cell: Cell) -> Iterator[History]:
    """The reports of a cell's final runs that did not diverge."""
    reports: Mapping[Trial, History] = final_reports(plan, results, cell)
    yield from (report for report in reports.values() if "diverged" not in report)
