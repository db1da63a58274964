"""Schedules and the rules of the budget, against the paper's formulas and by their properties."""

import copy
import functools
import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from short import short

from id3_optim import schedules
from id3_optim.schedules import (
    cosine,
    exponential,
    front_loaded,
    one_shot,
    resolve_budget,
    tabulate,
    uniform,
)

EVERY = [
    uniform,
    cosine,
    exponential(3.0),
    exponential(-2.0),
    exponential(700.0),
    front_loaded(0.2),
    one_shot,
]
steps = st.integers(1, 300)
budgets = st.integers(0, 10**12)


def custom(step, total_steps, budget):
    return [5, 2, 9, -1][step]


@pytest.mark.parametrize("schedule", EVERY, ids=short)
@given(total_steps=steps, budget=budgets)
def test_targets_never_fall_and_end_at_the_budget(schedule, total_steps, budget):
    targets = tabulate(schedule, total_steps, budget)
    assert len(targets) == total_steps
    assert all(type(c) is int and 0 <= c <= budget for c in targets)
    assert targets == sorted(targets)
    assert targets[-1] == budget


@given(total_steps=steps, budget=budgets)
def test_uniform_is_exact_and_even(total_steps, budget):
    targets = tabulate(uniform, total_steps, budget)
    for step, target in enumerate(targets):
        assert target * total_steps <= budget * (step + 1) < (target + 1) * total_steps
    gains = np.diff([0, *targets])
    assert gains.max() - gains.min() <= 1


@pytest.mark.parametrize("budget", [0, 1, 3, 5])
def test_budgets_below_the_number_of_steps(budget):
    targets = tabulate(uniform, 10, budget)
    assert targets[-1] == budget and len(set(targets) | {0}) == budget + 1


@given(total_steps=steps, budget=budgets, share=st.sampled_from([0.05, 0.1, 0.2, 0.3, 0.7, 1.0]))
def test_front_loaded_is_uniform_over_its_share(total_steps, budget, share):
    spending = max(1, -(-round(100 * share) * total_steps // 100))  # ceil, in whole hundredths
    expected = tabulate(uniform, spending, budget) + [budget] * (total_steps - spending)
    assert tabulate(front_loaded(share), total_steps, budget) == expected


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, math.nan])
def test_front_loaded_refuses(share):
    with pytest.raises(ValueError, match=r"share: expected a number in \(0, 1\]"):
        front_loaded(share)


@pytest.mark.parametrize("schedule", EVERY, ids=short)
def test_one_step_takes_all(schedule):
    assert tabulate(schedule, 1, 17) == [17]


def test_formulas():
    budget, total = 100_000, 8
    x = [(t + 1) / total for t in range(total)]
    by_formula = [budget * (1 - math.cos(math.pi * v)) / 2 for v in x]
    assert tabulate(cosine, total, budget) == [math.floor(c) for c in by_formula]
    by_formula = [budget * (1 - math.exp(-3 * v)) / (1 - math.exp(-3)) for v in x]
    assert tabulate(exponential(3), total, budget) == pytest.approx(by_formula, abs=1.0)
    assert tabulate(one_shot, total, budget) == [budget] * total
    assert tabulate(uniform, 10, 25) == [2, 5, 7, 10, 12, 15, 17, 20, 22, 25]


def test_a_function_of_ones_own_is_clamped():
    assert tabulate(custom, 4, 8) == [5, 5, 8, 8]
    assert tabulate(lambda t, T, B: np.int64(t), 4, 8) == [0, 1, 2, 8]


@pytest.mark.parametrize("answer", [2.0, None, True, float("nan")])
def test_a_schedule_must_give_integers(answer):
    with pytest.raises(TypeError, match=r"schedule .*<lambda>: expected an int at step 0, got"):
        tabulate(lambda t, T, B: answer, 4, 8)


@pytest.mark.parametrize(
    ("total_steps", "error"), [(0, ValueError), (-3, ValueError), (2.0, TypeError), (True, TypeError)]
)
def test_total_steps_is_a_positive_int(total_steps, error):
    with pytest.raises(error, match="total_steps: expected"):
        tabulate(uniform, total_steps, 8)


@pytest.mark.parametrize("a", [0.0, 701, float("nan"), float("inf")])
def test_exponential_refuses(a):
    with pytest.raises(ValueError, match="a: expected a number with 0 <"):
        exponential(a)


@pytest.mark.parametrize("schedule", [*EVERY, custom], ids=short)
def test_schedules_pickle_and_keep_their_description(schedule):
    for same in (pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule)):
        assert same == schedule
        assert schedules.describe(same) == schedules.describe(schedule)


def test_descriptions_tell_schedules_apart():
    described = [tuple(schedules.describe(s).items()) for s in [*EVERY, custom, functools.partial(custom)]]
    assert len(set(described)) == len(described)
    assert schedules.describe(exponential(3)) == {"name": "exponential", "a": 3.0}
    with pytest.raises(TypeError, match="schedule: expected f"):
        schedules.describe("uniform")


@pytest.mark.parametrize(
    ("text", "schedule"),
    [("uniform", uniform), ("cosine", cosine), ("one_shot", one_shot), ("one-shot", one_shot),
     ("front-loaded:0.2", front_loaded(0.2)), ("front_loaded:1", front_loaded(1.0)),
     ("exponential:3", exponential(3.0)), ("exponential:-0.5", exponential(-0.5))],
)  # fmt: skip
def test_names(text, schedule):
    assert schedules.from_name(text) == schedule


@pytest.mark.parametrize(
    "text",
    [
        "linear",
        "",
        "uniform:2",
        "exponential",
        "exponential:",
        "exponential:x",
        "exponential:0",
        "front_loaded",
        "front_loaded:0",
        "front_loaded:1.5",
    ],
)
def test_wrong_names(text):
    with pytest.raises(ValueError, match=r"(schedule|a|share): expected"):
        schedules.from_name(text)


@pytest.mark.parametrize(
    ("budget", "entries"),
    [(0, 0), (1, 1), (1000, 1000), (1.0, 1000), (0.5, 500), (0.001, 1), (0.0019, 1), (0.29, 290),
     (np.int32(7), 7), (np.float32(0.25), 250)],
)  # fmt: skip
def test_budgets(budget, entries):
    resolved = resolve_budget(budget, 1000)
    assert type(resolved) is int and resolved == entries


@given(n_entries=st.integers(1, 2**40), count=st.integers(1, 2**40))
def test_a_share_that_means_a_count_gives_it(n_entries, count):
    """count/N as a float is a share; the 1e-6 in the rule keeps rounding from losing an entry."""
    count = min(count, n_entries)
    if n_entries < 2**30:  # beyond, the product's own rounding exceeds 1e-6
        assert resolve_budget(count / n_entries, n_entries) == count


@pytest.mark.parametrize(
    ("budget", "error"),
    [(True, TypeError), ("5", TypeError), (None, TypeError), (1j, TypeError), (-1, ValueError),
     (1001, ValueError), (0.0, ValueError), (-0.5, ValueError), (1.5, ValueError), (float("nan"), ValueError),
     (0.0001, ValueError)],
)  # fmt: skip
def test_budgets_that_make_no_sense(budget, error):
    with pytest.raises(error, match="budget: expected"):
        resolve_budget(budget, 1000)


@pytest.mark.parametrize(
    ("share", "steps", "first"), [(0.1, 10, 1), (0.25, 8, 2), (0.3, 10, 3), (0.01, 5, 1)]
)
def test_after_spends_the_budget_at_once(share, steps, first):
    schedule = schedules.from_name(f"after:{share}")
    assert schedule == schedules.after(share)
    assert schedules.tabulate(schedule, steps, 7) == [0] * first + [7] * (steps - first)
    assert schedules.describe(schedule) == {"name": "after", "share": share}


def test_after_needs_a_share():
    with pytest.raises(
        ValueError, match=r"share: expected a number in \(0, 1\) \(0 is `one_shot`\), got 1.0"
    ):
        schedules.after(1.0)
