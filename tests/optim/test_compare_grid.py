"""Which runs a comparison has: methods and rates as typed, halving with equal effort, keys of runs."""

import argparse
import itertools
from dataclasses import replace

import pytest

from id3_optim.cli.compare.grid import Plan, Trial, all_runs, all_steps, key, missing, possible, settings_of
from id3_optim.cli.compare.halving import choose, rungs
from id3_optim.cli.compare.methods import Method, read_method, read_rates
from id3_optim.cli.compare.summary import exported, notes, rows, table
from id3_optim.cli.settings import Settings


def plan_of(*methods, **changes):
    settings = Settings(model="m", train="t.csv", eval="e.csv", output="", steps=40)
    rates = (1e-3, 2e-3, 4e-3, 8e-3)
    plan = Plan(settings, methods, (0.01, 100), rates, (3, 4), 16, 0.1, "accuracy", methods[0].name, 1, {})
    return replace(plan, **changes)


def report(score):
    metrics = {} if score is None else {"eval_accuracy": score, "eval_loss": 1.0}
    return {"metrics": metrics, "history": []}


# --- what is typed -------------------------------------------------------------------------------------


def test_rates_double():
    assert read_rates("1e-4:1.6e-3") == (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3)
    assert read_rates("3e-3") == (3e-3,)


@pytest.mark.parametrize("text", ["", "x", "0", "-1e-3", "1e-3:1e-4", "1e-4:", "nan", "1e-4:inf", "1:2:3"])
def test_rates_that_are_none(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected a learning rate above 0"):
        read_rates(text)


def test_a_method_has_settings_of_train():
    method = read_method("id3:eps=0.5,select-every=16,sparse_backward=true,schedule=cosine,lr=1e-3:4e-3")
    changes = {"eps": 0.5, "select_every": 16, "sparse_backward": True, "schedule": "cosine"}
    assert dict(method.changes) == changes and method.rates == (1e-3, 2e-3, 4e-3)
    assert method.name == "id3:eps=0.5,select-every=16,sparse_backward=true,schedule=cosine"
    assert dict(read_method("fish").changes) == {"method": "fish"}
    left_out = {"leave_out": ("embed", "pooler"), "method": "id3"}
    assert dict(read_method("id3:leave_out=embed+pooler").changes) == left_out
    for name, more in (("full", {"budget": None}), ("static-d3", {}), ("repeat-d3", {})):
        expected = {"leave_out": ("embed",), "method": name, **more}  # which the settings take
        assert dict(read_method(f"{name}:leave_out=embed").changes) == expected
    changes = {"prune": 100, "reuse_mask": True, "tensor_cap": 0.1}
    assert dict(read_method("id3:tensor_cap=0.1,prune=100,reuse_mask=true").changes) == changes
    assert not read_method("full").has_budget and read_method("random").has_budget


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no-such", "expected one of .*, got 'no-such'"),
        ("id3:no_such=1", "expected settings of train"),
        ("id3:train=x.csv", "expected settings of train"),
        ("id3:eps=big", "expected eps as float, got 'big'"),
        ("id3:eps=true", "expected eps as float, got 'true'"),
        ("id3:select_every=1.5", "expected select_every as int"),
        ("id3:bf16=1", "expected bf16 as bool"),
        ("id3:eps", "expected eps as float, got ''"),
    ],
)
def test_a_method_that_is_none(text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        read_method(text)


# --- halving -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(1, 20))
def test_rungs_halve_the_rates_and_double_the_steps(n):
    found = rungs(n, 800)
    counts = [rung.kept for rung in found] + [1]
    assert counts[0] == n and all(b == (a + 1) // 2 for a, b in itertools.pairwise(counts))
    assert [rung.steps for rung in found] == [800 // 2 ** (len(found) - 1 - i) for i in range(len(found))]


def tuned(rates, scores):
    """The chosen rate, and every run that it took, where a rate's score is that of a dict."""
    ran, chosen = {}, None

    def value(rate, steps):
        return ran.get((rate, steps))

    while chosen is None:
        chosen, wanted = choose(rates, 16, value)
        ran |= {(rate, steps): (scores[rate],) for rate, steps in wanted}
    return chosen, ran


@pytest.mark.parametrize("best", [0, 1, 3, 6])
def test_the_best_rate_is_chosen(best):
    rates = read_rates("1e-3:6.4e-2")
    chosen, ran = tuned(rates, {rate: -abs(i - best) for i, rate in enumerate(rates)})
    assert chosen == rates[best] and len(ran) == 7 + 4 + 2
    assert {rate for rate, steps in ran if steps == 16} <= set(rates[max(0, best - 1) : best + 2])


def test_of_equal_rates_the_smallest_is_chosen():
    assert tuned([4.0, 1.0, 2.0], dict.fromkeys((1.0, 2.0, 4.0), 0))[0] == 1.0


# --- the grid ------------------------------------------------------------------------------------------


def finish(plan, scores):
    """All runs of a grid, in the order in which they are missing. scores: (method, rate) -> score."""
    results = {}
    while waiting := list(missing(plan, results)):
        results |= {t: report(scores(t.method, t.lr)) for t in waiting}
    return results


def test_every_method_gets_the_same_effort():
    plan = plan_of(Method("id3"), Method("random", (("heuristic", "random"),)), budgets=(0.01,))
    results = finish(plan, lambda method, rate: -abs(rate - (1e-3 if method == "id3" else 8e-3)))
    effort = {m.name: sum(t.steps for t in results if t.method == m.name) for m in plan.methods}
    assert effort["id3"] == effort["random"] == 4 * 8 + 2 * 16 + 2 * 40
    assert sum(effort.values()) == all_steps(plan) and len(results) == all_runs(plan)
    assert {t.lr for t in results if not t.tuning and t.method == "random"} == {8e-3}
    assert set(results) <= set(possible(plan))


def test_tuning_uses_the_first_seed_alone():
    results = finish(plan_of(Method("id3")), lambda method, rate: rate)
    assert {t.seed for t in results if t.tuning} == {3}
    assert {t.seed for t in results if not t.tuning} == {3, 4}


def test_a_method_without_a_budget_runs_once():
    plan = plan_of(Method("id3"), read_method("full"))
    results = finish(plan, lambda method, rate: rate)
    assert {t.budget for t in results if t.method == "full"} == {None}
    assert {t.budget for t in results if t.method == "id3"} == {0.01, 100}


def test_rates_that_diverge_lose():
    results = finish(plan_of(Method("id3")), lambda method, rate: None if rate > 2e-3 else rate)
    assert {t.lr for t in results if not t.tuning} == {2e-3}


def test_a_loss_is_made_small():
    plan = plan_of(Method("id3"), metric="loss")
    results = {}
    while waiting := list(missing(plan, results)):
        results |= {t: {"metrics": {"eval_loss": abs(t.lr - 4e-3)}, "history": []} for t in waiting}
    assert {t.lr for t in results if not t.tuning} == {4e-3}


def test_a_win_is_a_smaller_loss_and_a_better_score():
    for metric, wins in (("accuracy", (2, 0)), ("loss", (0, 2))):
        plan = plan_of(Method("id3"), read_method("full"), metric=metric, budgets=(0.01,))
        results = finish(plan, lambda method, rate: 0.9 if method == "full" else 0.8)
        for found in results.values():
            found["metrics"]["eval_loss"] = found["metrics"]["eval_accuracy"]
        difference = rows(plan, with_numbers(results))[1].difference
        assert (difference.wins, difference.losses) == wins and difference.mean == pytest.approx(0.1)


def test_what_is_left_of_runs_that_diverged_is_not_compared():
    plan = plan_of(Method("id3"), read_method("full"), budgets=(0.01,), seeds=(3, 4, 5))
    results = finish(plan, lambda method, rate: 0.9 if method == "full" else 0.8)
    broken = next(t for t in results if t.method == "full" and not t.tuning and t.seed == 5)
    results[broken] = {"metrics": {}, "diverged": "loss", "history": []}
    mine, other = rows(plan, with_numbers(results))
    assert (other.diverged, other.spread, other.difference) == (1, None, None) and len(other.scores) == 2
    assert mine.spread.n == 3
    mine, other = rows(replace(plan, against="full"), with_numbers(results))
    assert mine.spread.n == 3 and mine.difference is None
    assert any(note.startswith("diverged") for note in notes(plan, with_numbers(results)))


def test_runs_of_other_versions_are_said():
    plan = plan_of(Method("id3"), budgets=(0.01,))
    results = with_numbers(finish(plan, lambda method, rate: 0.9))
    assert not any(note.startswith("versions") for note in notes(plan, results))
    for i, found in enumerate(results.values()):
        found["versions"] = f"torch 2.{i % 2}"
    (said,) = (note for note in notes(plan, results) if note.startswith("versions"))
    assert "torch 2.0; torch 2.1" in said


@pytest.mark.parametrize(
    ("metric", "before", "also", "lost"), [("loss", 2.0, 2.5, 0.5), ("accuracy", 0.9, 0.7, 0.2)]
)
def test_what_is_forgotten_is_in_the_table(metric, before, also, lost):
    plan = plan_of(Method("id3"), read_method("full"), metric=metric, budgets=(0.01,))
    results = with_numbers(finish(plan, lambda method, rate: 0.9))
    assert not {"also", "forgotten"} & {*table(plan, results)[0]}
    for trial, found in results.items():
        if trial.method == "id3" and not trial.tuning:
            found["metrics"][f"also_{metric}"] = also
    assert table(plan, results)[0][-1] == "also", "a fresh head has nothing to forget"
    for found in results.values():
        if f"also_{metric}" in found["metrics"]:
            found["metrics"][f"before_{metric}"] = before
    header, mine, other = table(plan, results)
    assert header[-2:] == ["also", "forgotten"]
    assert mine[-2:] == [f"{also:.4f}", f"+{lost:.4f}"] and other[-2:] == ["", ""]
    row, _ = exported(plan, results)["rows"]
    assert (row["also"], row["forgotten"]) == (also, pytest.approx(lost))
    assert any(note.startswith(f"also: {metric}") for note in notes(plan, results))


def with_numbers(results):
    numbers = {"trained": 100, "step_ms": {"total": 1.0}, "optimizer_bytes": 8}
    return {trial: numbers | found for trial, found in results.items()}


def test_one_rate_needs_no_tuning():
    plan = plan_of(read_method("id3:lr=5e-3"), budgets=(0.01,))
    assert list(missing(plan, {})) == [Trial("id3", 0.01, 5e-3, seed, 40, False) for seed in (3, 4)]


def test_a_run_is_the_same_in_every_grid_that_has_it():
    small, large = plan_of(Method("id3")), plan_of(Method("id3"), read_method("full"), seeds=(3, 4, 5))
    trial = Trial("id3", 0.01, 1e-3, 3, 40, False)
    assert key(small, trial) == key(large, trial)
    renamed = plan_of(Method("id3", ()), budgets=(0.5,), settings=replace(small.settings, train="other.csv"))
    assert key(small, trial) == key(renamed, trial)


def test_grids_of_other_lengths_share_their_tuning_runs():
    short = plan_of(Method("id3"))
    long = replace(short, settings=replace(short.settings, steps=80, eval_every=8, log_every=2))
    trial = Trial("id3", 0.01, 1e-3, 3, 20, True)
    assert key(short, trial) == key(long, trial)
    assert key(short, trial._replace(tuning=False)) != key(long, trial._replace(tuning=False))


@pytest.mark.parametrize(
    ("changes", "trial"),
    [
        ({}, {"lr": 2e-3}),
        ({}, {"seed": 4}),
        ({}, {"steps": 41}),
        ({}, {"budget": 100}),
        ({}, {"tuning": True}),
        ({"facts": {"eval_labels": "other"}}, {}),
        ({"methods": (Method("id3", (("eps", 0.5),)),)}, {}),
        ({"settings": Settings("m", "t.csv", "e.csv", "", steps=40, batch_size=8)}, {}),
    ],
)
def test_what_changes_a_result_makes_another_run(changes, trial):
    plan, first = plan_of(Method("id3")), Trial("id3", 0.01, 1e-3, 3, 40, False)
    assert key(plan, first) != key(replace(plan, **changes), first._replace(**trial))


def test_the_settings_of_a_run():
    plan = plan_of(read_method("id3:eps=0.5"))
    settings = settings_of(plan, Trial("id3:eps=0.5", 100, 2e-3, 4, 16, True))
    assert (settings.eps, settings.budget, settings.lr, settings.seed, settings.steps) == (
        0.5,
        100,
        2e-3,
        4,
        16,
    )
