"""The command `id3-optim merge`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from ..delta import Delta, DeltaError
from ..delta.merge import Conflict, merge
from .delta_files import delta_path, read_delta
from .models import facts_of
from .results import check_new_file, print_summary, save_delta, written

SHOWN = 20  # parameters with overlapping entries that are listed


def run_merge(arguments: argparse.Namespace) -> None:
    """Writes the sum of several deltas, and prints where they conflict."""
    paths = [delta_path(path) for path in arguments.deltas]
    check_new_file(arguments.output, paths)
    _check_different(paths)
    deltas = [read_delta(path) for path in paths]
    try:
        merged, conflicts = merge(
            deltas, arguments.weights, arguments.whole, allow_nonfinite=arguments.allow_nonfinite
        )
    except DeltaError as error:
        message = str(error)
        for i, path in enumerate(paths):
            message = message.replace(f"deltas[{i}]", str(path))
        raise DeltaError(message) from error
    if facts := _merged_facts(deltas, paths, arguments.whole):
        merged.settings["config"] = facts
    summary = save_delta(merged, arguments) | {
        "merged": [str(path) for path in paths],
        "weights": merged.settings["weights"],
        "overlapping": sum(conflict.overlapping for conflict in conflicts.values()),
        "opposed": sum(conflict.opposed for conflict in conflicts.values()),
        "conflicts": {name: conflict._asdict() for name, conflict in conflicts.items()},
    }
    overlapping, opposed = summary["overlapping"], summary["opposed"]
    total = f"{overlapping:,} of {summary['entries']:,} entries overlap, {opposed:,} opposed"
    print_summary(arguments, summary, total, *_worst(conflicts), written(summary))


def _check_different(paths: list[Path]) -> None:
    seen: dict[str, Path] = {}
    for path in paths:
        first = seen.setdefault(os.path.realpath(path), path)
        if first is not path:
            raise ValueError(f"deltas: expected each file once, got {path} twice; to double its changes, "
                             "use --weights 2")  # fmt: skip


def _worst(conflicts: dict[str, Conflict]) -> list[str]:
    """Lines on the parameters with most overlapping entries."""
    overlapping = (name for name, conflict in conflicts.items() if conflict.overlapping)
    names = sorted(overlapping, key=lambda name: -conflicts[name].overlapping)
    lines = []
    for name in names[:SHOWN]:
        entries, overlap, opposed = conflicts[name]
        lines.append(f"  {name}: {overlap:,} of {entries:,} overlap, {opposed:,} opposed")
    if len(names) > SHOWN:
        lines.append(f"  and {len(names) - SHOWN} more parameters (--json lists all)")
    return lines


def _merged_facts(deltas: list[Delta], paths: list[Path], whole: str) -> dict[str, Any]:
    """The class and the labels of the merged delta's model; {} where the deltas give none or disagree."""
    heads = [any(change.indices is None for change in delta.changes.values()) for delta in deltas]
    if whole == "drop" and any(heads):
        return {}  # a model without the heads is of the base's class
    facts = [facts_of(delta, path.parent) for delta, path in zip(deltas, paths, strict=True)]
    if whole == "first" and any(heads):
        return facts[heads.index(True)]
    known = [one for one in facts if one]
    return known[0] if known and all(one == known[0] for one in known) else {}
