"""The results of the grids as they are committed, and the row of a method in them."""

from __future__ import annotations

import json
from pathlib import Path

Reports = dict[tuple[str, str], dict]


def read(folder: Path) -> Reports:
    """(part, task): the report of each grid that has one."""
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return {(report["part"], report["task"]): report for report in reports}


def row_of(reports: Reports, part: str, task: str, method: str, budget: float | None) -> dict | None:
    """The row of a method; of one without a budget its only row. None where no run has ended."""
    rows = reports.get((part, task), {}).get("rows", [])
    found = [row for row in rows if row["method"] == method and row["budget"] in (None, budget)]
    return found[0] if found and (found[0]["scores"] or found[0]["diverged"]) else None
