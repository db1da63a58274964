"""Successive halving over learning rates: the worse half leaves, the steps of a run double.

Every method gets as many learning rates and the same rungs, so the same number of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Rung(NamedTuple):
    """How many learning rates are tried, and the steps of each run."""

    kept: int
    steps: int


def rungs(n_rates: int, steps: int) -> list[Rung]:
    """The rungs for n_rates learning rates; the last one compares two over `steps`. One rate has none."""
    kept = []
    while n_rates > 1:
        kept.append(n_rates)
        n_rates = (n_rates + 1) // 2
    return [Rung(n, max(1, steps >> (len(kept) - 1 - i))) for i, n in enumerate(kept)]


def choose(
    rates: Sequence[float], steps: int, value: Callable[[float, int], tuple | None]
) -> tuple[float | None, list[tuple[float, int]]]:
    """The chosen learning rate, or None and the runs (rate, steps) that the present rung still needs.

    value: (rate, steps) -> what orders the runs, the larger the better; None: not run yet. Of equal ones the
    smaller rate is taken.
    """
    remaining = sorted(rates)
    for i, rung in enumerate(plan := rungs(len(remaining), steps)):
        values = {rate: value(rate, rung.steps) for rate in remaining}
        if missing := [rate for rate in remaining if values[rate] is None]:
            return None, [(rate, rung.steps) for rate in missing]
        n_next = plan[i + 1].kept if i + 1 < len(plan) else 1
        remaining = sorted(sorted(remaining, key=values.get, reverse=True)[:n_next])
    return remaining[0], []
