"""Means, standard deviations and paired differences of scores, with an exact Wilcoxon test."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from statistics import fmean, stdev
from typing import NamedTuple


class Spread(NamedTuple):
    """mean and sd (n - 1 in the denominator; None for fewer than two) of n scores."""

    mean: float
    sd: float | None
    n: int


def spread(scores: Sequence[float]) -> Spread | None:
    """None for no scores."""
    if not scores:
        return None
    return Spread(fmean(scores), stdev(scores) if len(scores) > 1 else None, len(scores))


class Paired(NamedTuple):
    """Differences of scores that share a key, such as a seed. p: of `wilcoxon`; wins: differences above 0."""

    mean: float
    sd: float | None
    p: float | None
    wins: int
    losses: int
    ties: int

    @property
    def standard_error(self) -> float | None:
        """Of the mean difference; None for fewer than two pairs."""
        return None if self.sd is None else self.sd / (self.wins + self.losses + self.ties) ** 0.5


def paired(scores: Mapping[Hashable, float], reference: Mapping[Hashable, float]) -> Paired | None:
    """The differences scores - reference over the keys that both have; None where they share none."""
    differences = [scores[key] - reference[key] for key in scores if key in reference]
    if not differences:
        return None
    mean, sd, n = spread(differences)
    wins, losses = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    return Paired(mean, sd, wilcoxon(differences), wins, losses, n - wins - losses)


def wilcoxon(differences: Sequence[float]) -> float | None:
    """Two-sided p of the signed-rank test, exact for ties too; None where all differences are 0.

    Differences of 0 are left out, as Wilcoxon did. Equal sizes share their mean rank. Under the hypothesis
    each of the 2^n choices of signs is equally likely; the sums of their positive ranks are counted.
    """
    differences = [float(f"{d:.9g}") for d in differences]  # 0.71 - 0.70 and 0.81 - 0.80 are one size
    sizes = sorted(abs(d) for d in differences if d)
    if not sizes:
        return None
    # Doubled, the mean rank of sizes at the places i + 1 to j is the whole number i + j + 1.
    doubled = {size: 2 * sizes.index(size) + sizes.count(size) + 1 for size in sizes}
    ranks = [doubled[size] for size in sizes]
    counts = {0: 1}  # sum of the positive ranks: how many choices of signs have it
    for rank in ranks:
        more = dict(counts)
        for total, ways in counts.items():
            more[total + rank] = more.get(total + rank, 0) + ways
        counts = more
    seen = sum(doubled[abs(d)] for d in differences if d > 0)
    smaller = min(seen, sum(ranks) - seen)
    tail = sum(ways for total, ways in counts.items() if total <= smaller)
    return min(1.0, 2 * tail / 2 ** len(ranks))
