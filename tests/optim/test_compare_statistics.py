"""The statistics of `id3-optim compare`: the exact Wilcoxon test, paired differences, means."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from id3_optim.cli.compare.statistics import paired, spread, wilcoxon


def by_enumeration(differences):
    """The definition: over all choices of signs, how often the smaller rank sum is that small."""
    sizes = [abs(d) for d in differences if d]
    if not sizes:
        return None
    ranks = [sum(o < s for o in sizes) + (sum(o == s for o in sizes) + 1) / 2 for s in sizes]

    def smaller_sum(signs):
        positive = math.fsum(rank for rank, sign in zip(ranks, signs, strict=True) if sign)
        return min(positive, math.fsum(ranks) - positive)

    seen = smaller_sum([d > 0 for d in differences if d])
    choices = list(itertools.product((False, True), repeat=len(sizes)))
    return sum(smaller_sum(signs) <= seen for signs in choices) / len(choices)


@given(st.lists(st.integers(-4, 4), max_size=9))
def test_p_is_that_of_all_choices_of_signs(differences):
    expected = by_enumeration(differences)
    assert wilcoxon(differences) == (expected if expected is None else pytest.approx(expected))


# Tables of the signed-rank distribution: all of one sign; n = 6 with the rank sum 2, n = 10 with 8.
@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([1.0, 2.0, 3.0, 4.0, 5.0], 0.0625),
        ([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0], 0.03125),
        ([1.0, -2.0, 3.0, 4.0, 5.0, 6.0], 0.09375),
        ([1, 2, 3, 4, 5, 6, 7, -8, 9, 10], 0.048828125),
        ([0.0, 0.0, 1.0], 1.0),
        ([0.0], None),
        # Rows of 872: sizes that are equal but for their last bits share a rank.
        ([(602 + d) / 872 - (602 + e) / 872 for d, e in ((4, 0), (5, 1), (0, 4), (7, 3), (9, 5))], 0.375),
        ([], None),
    ],
)
def test_p_of_known_cases(differences, p):
    assert wilcoxon(differences) == p


def test_p_of_many_differences_is_exact_and_quick():
    assert wilcoxon(range(1, 61)) == pytest.approx(2 / 2**60, rel=1e-12)


def test_pairs_are_those_of_shared_seeds():
    versus = paired({0: 0.9, 1: 0.8, 2: 0.7, 3: 0.5}, {0: 0.8, 1: 0.8, 2: 0.9, 7: 0.1})
    assert (versus.wins, versus.losses, versus.ties) == (1, 1, 1)
    assert versus.mean == pytest.approx(-0.1 / 3) and versus.p == 1.0
    assert versus.standard_error == pytest.approx(versus.sd / 3**0.5)
    assert paired({0: 0.9}, {1: 0.9}) is None


def test_spread_of_few():
    assert spread([]) is None
    assert spread([0.5]) == (0.5, None, 1) and paired({0: 1.0}, {0: 0.5}).standard_error is None
    assert spread([1.0, 3.0]).sd == pytest.approx(2**0.5)
