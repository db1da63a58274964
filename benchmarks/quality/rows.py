"""The results of the grids as they are committed, and the row of a method in them."""

from __future__ import annotations

import json
from pathlib import Path

Reports = dict[tuple[str, str], dict]


def read(folder: Path) -> Reports:
    """(part, task): the report of each grid that has one."""
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return {(report["part"], report["task"]): report for report in reports}


def chosen_by_loss(report: dict) -> list[str]:
    """The methods whose tuning runs of one length, two or more, all have one score: the loss chose among
    their rates.

    On a task with classes of different size these runs predict the more frequent class alone.
    """
    rungs: dict[tuple, dict[int, list[float]]] = {}
    for run in (run for run in report["runs"] if run["tuning"] and run.get("metrics")):
        score = run["metrics"][f"eval_{report['metric']}"]
        rungs.setdefault((run["method"], run["budget"]), {}).setdefault(run["steps"], []).append(score)
    every = ((cell[0], scores) for cell, by_steps in rungs.items() for scores in by_steps.values())
    tied = [method for method, scores in every if len(scores) > 1 and len(set(scores)) == 1]
    return list(dict.fromkeys(tied))


def row_of(reports: Reports, part: str, task: str, method: str, budget: float | None) -> dict | None:
    """The row of a method; of one without a budget its only row. None where no run has ended."""
    rows = reports.get((part, task), {}).get("rows", [])
    found = [row for row in rows if row["method"] == method and row["budget"] in (None, budget)]
    return found[0] if found and (found[0]["scores"] or found[0]["diverged"]) else None
