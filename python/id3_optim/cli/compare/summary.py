"""The table of a comparison: each method at each budget, with paired differences to one method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from statistics import fmean
from typing import Any

from ..settings import Settings
from .grid import Cell, Plan, Results, Trial, cells, chosen_rate, finals, is_loss, key, score
from .statistics import Paired, Spread, paired, spread


@dataclass(frozen=True)
class Row:
    """A cell of the grid. rate: chosen; at_edge: it is the first or the last of several that were tried.

    scores: by seed, of the final runs that have ended with a finite loss; diverged: how many did not.
    difference: of the scores to those of the plan's `against` at the same budget; a win is a better score,
    which of a loss is the smaller one. Both it and `spread` are None where a run diverged: the runs that are
    left are no fair sample. also: the mean score on --also-eval; forgotten: by how much it is worse than
    that of the model before training, None where that is not known. Both are None where a run diverged.
    """

    cell: Cell
    rate: float | None
    at_edge: bool
    scores: Mapping[int, float]
    diverged: int
    spread: Spread | None
    difference: Paired | None
    entries: float | None
    step_ms: float | None
    optimizer_bytes: float | None
    also: float | None
    forgotten: float | None


def final_reports(plan: Plan, results: Results, cell: Cell) -> dict[Trial, Mapping[str, Any]]:
    """The reports of the cell's final runs that have ended."""
    rate, _ = chosen_rate(plan, cell, results)
    trials = finals(plan, cell, rate) if rate is not None else []
    return {trial: results[trial] for trial in trials if trial in results}


def rows(plan: Plan, results: Results) -> list[Row]:
    """A row for each cell, in the order of methods and budgets."""
    reports = {cell: final_reports(plan, results, cell) for cell in cells(plan)}
    scores = {
        cell: {t.seed: s for t, report in ended.items() if (s := score(plan, report)) is not None}
        for cell, ended in reports.items()
    }
    fair = {cell: found for cell, found in scores.items() if len(found) == len(reports[cell])}
    return [_row(plan, results, cell, reports[cell], scores[cell], fair) for cell in cells(plan)]


def _row(plan, results, cell: Cell, reports, scores, fair) -> Row:
    """fair: the scores of all cells without a run that diverged."""
    rate, _ = chosen_rate(plan, cell, results)
    rates = plan.rates_of(plan.method(cell.method))
    ended = [report for report in reports.values() if "diverged" not in report]
    return Row(
        cell,
        rate,
        len(rates) > 1 and rate in (min(rates), max(rates)),
        scores,
        len(reports) - len(scores),
        spread(list(scores.values())) if cell in fair else None,
        _difference(plan, fair.get(cell), _reference(plan, cell, fair)),
        fmean(r["trained"] for r in ended) if ended else None,
        fmean(r["step_ms"]["total"] for r in ended) if ended else None,
        fmean(r["optimizer_bytes"] for r in ended) if ended else None,
        _mean(r["metrics"].get(f"also_{plan.metric}") for r in ended) if cell in fair else None,
        _mean(forgotten(plan.metric, r["metrics"]) for r in ended) if cell in fair else None,
    )


def forgotten(metric: str, measured: Mapping[str, float]) -> float | None:
    """By how much a run's score on --also-eval is worse than before it; None where one is not known."""
    after, before = measured.get(f"also_{metric}"), measured.get(f"before_{metric}")
    if after is None or before is None:
        return None
    return after - before if is_loss(metric) else before - after


def _mean(values: Iterable[float | None]) -> float | None:
    """None where there is none, or where one of them is None."""
    found = list(values)
    return fmean(found) if found and None not in found else None


def _reference(plan: Plan, cell: Cell, fair) -> Mapping[int, float] | None:
    """The scores that a cell is compared with: those of `against` at its budget, or of its only budget."""
    if cell.method == plan.against:
        return None
    alike = [other for other in cells(plan) if other.method == plan.against]
    same = Cell(plan.against, cell.budget)
    if same not in alike:
        same = alike[0] if len(alike) == 1 else None
    return fair.get(same)


def _difference(plan: Plan, scores, reference) -> Paired | None:
    """Of the scores of two cells; None where one of them has none that may be compared."""
    found = paired(scores, reference) if scores is not None and reference is not None else None
    if found is None or not is_loss(plan.metric):
        return found
    return found._replace(wins=found.losses, losses=found.wins)


def shown_budget(budget: int | float | None) -> str:
    """`0.17 %` of a share, `320,000` entries, `–` where there is none."""
    if budget is None:
        return "–"
    return f"{100 * budget:.3g} %" if isinstance(budget, float) else f"{budget:,}"


def table(plan: Plan, results: Results) -> list[list[str]]:
    """Cells of text: a header, then a row for each method and budget."""
    header = ["method", "budget", "lr", "entries", plan.metric, "sd", "runs", f"− {plan.against}", "p"]
    lines = [[*header, "won/lost/tied", "step, ms", "also", "forgotten"]]
    lines += [_cells(plan, row) for row in rows(plan, results)]
    kept = [i for i, name in enumerate(lines[0]) if name not in _OPTIONAL or any(x[i] for x in lines[1:])]
    return [[line[i] for i in kept] for line in lines]


_OPTIONAL = ("also", "forgotten")  # columns of --also-eval


def _cells(plan: Plan, row: Row) -> list[str]:
    runs = f"{len(row.scores)}/{len(plan.seeds)}"
    if row.diverged:
        runs += f", {row.diverged} diverged"
    versus = row.difference
    return [
        row.cell.method,
        shown_budget(row.cell.budget),
        "" if row.rate is None else f"{row.rate:.3g}{' (edge)' if row.at_edge else ''}",
        "" if row.entries is None else f"{row.entries:,.0f}",
        "" if row.spread is None else f"{row.spread.mean:.4f}",
        "" if row.spread is None or row.spread.sd is None else f"{row.spread.sd:.4f}",
        runs,
        "" if versus is None else f"{versus.mean:+.4f}",
        "" if versus is None or versus.p is None else f"{versus.p:.3f}",
        "" if versus is None else f"{versus.wins}/{versus.losses}/{versus.ties}",
        "" if row.step_ms is None else f"{row.step_ms:.1f}",
        "" if row.also is None else f"{row.also:.4f}",
        "" if row.forgotten is None else f"{row.forgotten:+.4f}",
    ]


def text(plan: Plan, results: Results) -> str:
    """The table in columns, with what its marks mean."""
    lines = table(plan, results)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*shown, *notes(plan, results)])


def notes(plan: Plan, results: Results) -> list[str]:
    """What the numbers are, and what to beware of."""
    found = [
        f"{plan.metric}: on --eval, mean and standard deviation over seeds; differences to {plan.against} by "
        "seed, p of a two-sided exact Wilcoxon signed-rank test"
    ]
    also = [row for row in rows(plan, results) if row.also is not None]
    if also:
        found.append(f"also: {plan.metric} on --also-eval")
    if any(row.forgotten is not None for row in also):
        found.append("forgotten: by how much that is worse than before training")
    if any(row.diverged for row in rows(plan, results)):
        found.append("diverged: the other runs of such a row are not compared, nor drawn")
    if any(row.at_edge for row in rows(plan, results)):
        found.append("(edge): the best learning rate is the first or the last that was tried; try more")
    means = {row.cell.method: row.spread.mean for row in rows(plan, results) if row.spread}
    if {"full", "head"} <= means.keys():
        room = means["full"] - means["head"]
        found.append(f"room: full fine-tuning is {room:+.4f} from the head alone")
    versions = sorted({run["versions"] for run in results.values() if "versions" in run})
    if len(versions) > 1:
        found.append(f"versions: the runs are of {len(versions)} installations: {'; '.join(versions)}")
    return found


def exported(plan: Plan, results: Results) -> dict[str, Any]:
    """The table and every run of the grid as plain values: what a report of several tasks is made from.

    `Store.restore` takes the runs into a file of results, so that another machine can go on.
    """
    lines = rows(plan, results)
    runs = [
        {"key": key(plan, trial), **trial._asdict(), **_plain_run(plan, report)}
        for trial, report in sorted(results.items(), key=lambda item: repr(item[0]))
    ]
    return {
        "metric": plan.metric,
        "against": plan.against,
        "seeds": list(plan.seeds),
        "steps": plan.settings.steps,
        "tune_steps": plan.tune_steps,
        "rates": {method.name: list(plan.rates_of(method)) for method in plan.methods},
        "settings": shared_settings(plan),
        "facts": dict(plan.facts),
        "rows": [_plain_row(line) for line in lines],
        "runs": runs,
    }


def _plain_run(plan: Plan, report: Mapping[str, Any]) -> dict[str, Any]:
    """What the table and most figures need of a run; of its log the measurements alone."""
    metric = f"eval_{plan.metric}"
    active = {log["step"]: log["n_active"] for log in report["history"] if "n_active" in log}
    measured = [
        {"step": log["step"], metric: log[metric]}
        | ({"n_active": active[log["step"]]} if log["step"] in active else {})
        for log in report["history"]
        if metric in log
    ]
    return {name: report[name] for name in _EXPORTED if name in report} | {"history": measured}


_EXPORTED = ("metrics", "trained", "optimizer_bytes", "step_ms", "diverged", "versions", "allocation")


def _plain_row(row: Row) -> dict[str, Any]:
    versus = row.difference
    return {
        "method": row.cell.method,
        "budget": row.cell.budget,
        "lr": row.rate,
        "at_edge": row.at_edge,
        "scores": {str(seed): score for seed, score in row.scores.items()},
        "diverged": row.diverged,
        "mean": row.spread and row.spread.mean,
        "sd": row.spread and row.spread.sd,
        "difference": versus and versus._asdict(),
        "entries": row.entries,
        "step_ms": row.step_ms,
        "optimizer_bytes": row.optimizer_bytes,
        **{name: value for name in _OPTIONAL if (value := getattr(row, name)) is not None},
    }


def shared_settings(plan: Plan) -> dict[str, Any]:
    """The settings that all runs share and that differ from the defaults of `id3-optim train`, less paths."""
    shared = {field.name: getattr(plan.settings, field.name) for field in fields(Settings)
              if getattr(plan.settings, field.name) != field.default}  # fmt: skip
    return {name: value for name, value in shared.items() if name not in _PATHS}


_PATHS = ("model", "train", "eval", "also_eval", "output")
