"""The runs of a comparison: which there are, which are still missing, and what identifies each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

from ..settings import Settings
from .halving import choose, rungs
from .methods import IN_FACTS, Method

# Smaller is better; of all other metrics larger.
_LOSSES = ("loss", "token_loss", "perplexity")


@dataclass(frozen=True)
class Plan:
    """settings: what all runs share. tune_steps: of the last rung; held_out: the share of the training rows
    that tuning measures on and does not train on. metric: what orders runs. against: the name of the method
    that all methods are compared with. threads: of torch, in each run. facts: hashes of rows and weights, and
    the kind of device.
    """

    settings: Settings
    methods: tuple[Method, ...]
    budgets: tuple[int | float, ...]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    tune_steps: int
    held_out: float
    metric: str
    against: str
    threads: int
    facts: Mapping[str, Any]

    def rates_of(self, method: Method) -> tuple[float, ...]:
        return method.rates or self.rates

    def method(self, name: str) -> Method:
        return next(method for method in self.methods if method.name == name)


class Cell(NamedTuple):
    """A method at a budget (None: the method has none), whose learning rate is tuned."""

    method: str
    budget: int | float | None


class Trial(NamedTuple):
    """One run. tuning: on a part of the training rows, measured on the part kept aside."""

    method: str
    budget: int | float | None
    lr: float
    seed: int
    steps: int
    tuning: bool

    @property
    def cell(self) -> Cell:
        return Cell(self.method, self.budget)


def cells(plan: Plan) -> list[Cell]:
    """Method after method; one without a budget once."""
    return [
        Cell(method.name, budget)
        for method in plan.methods
        for budget in (plan.budgets if method.has_budget else (None,))
    ]


def settings_of(plan: Plan, trial: Trial) -> Settings:
    """The settings of `id3-optim train` for a run."""
    changes = dict(plan.method(trial.method).changes)
    changes["budget"] = trial.budget if trial.budget is not None else plan.settings.budget
    changes |= {"lr": trial.lr, "seed": trial.seed, "steps": trial.steps}
    if trial.tuning:  # only its end counts, so that grids whose runs are longer or shorter share it
        changes |= {"eval_every": None, "log_every": Settings.log_every}
    return replace(plan.settings, **changes)


def key(plan: Plan, trial: Trial) -> str:
    """A hash of all that changes a run's result: a run is found again by it, whatever grid it is part of."""
    settings = asdict(settings_of(plan, trial))
    settings = {
        field.name: settings[field.name]
        for field in fields(Settings)  # those at their default are left out: a later version may have more
        if field.name not in IN_FACTS and settings[field.name] != field.default
    }
    settings["budget"] = trial.budget
    whole = {"settings": settings, "held_out": plan.held_out if trial.tuning else 0.0, "facts": plan.facts}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


Results = Mapping[Trial, Mapping[str, Any]]


def score(plan: Plan, report: Mapping[str, Any]) -> float | None:
    """The run's metric; None for a run that diverged."""
    return report["metrics"].get(f"eval_{plan.metric}")


def is_loss(metric: str) -> bool:
    return metric in _LOSSES


def _order(plan: Plan, report: Mapping[str, Any] | None) -> tuple[float, float] | None:
    """What orders runs of one rung: the metric, then the loss. None for a run that has not ended."""
    if report is None:
        return None
    value = score(plan, report)
    if value is None:
        return (float("-inf"), float("-inf"))
    loss = report["metrics"].get("eval_loss", 0.0)
    return (-value if is_loss(plan.metric) else value, -loss)


def chosen_rate(plan: Plan, cell: Cell, results: Results) -> tuple[float | None, list[Trial]]:
    """The learning rate that tuning chose, or None and the tuning runs that are missing now."""

    def trial(rate: float, steps: int) -> Trial:
        return Trial(*cell, rate, plan.seeds[0], steps, True)

    rates = plan.rates_of(plan.method(cell.method))
    rate, missing = choose(
        rates, plan.tune_steps, lambda rate, steps: _order(plan, results.get(trial(rate, steps)))
    )
    return rate, [trial(*run) for run in missing]


def finals(plan: Plan, cell: Cell, rate: float) -> list[Trial]:
    """A run for each seed, on all training rows."""
    return [Trial(*cell, rate, seed, plan.settings.steps, False) for seed in plan.seeds]


def missing(plan: Plan, results: Results) -> Iterator[Trial]:
    """The runs that can begin now: of each cell the present rung, or the final runs."""
    for cell in cells(plan):
        rate, tuning = chosen_rate(plan, cell, results)
        trials = tuning if rate is None else finals(plan, cell, rate)
        yield from (trial for trial in trials if trial not in results)


def all_steps(plan: Plan) -> int:
    """The steps of all runs."""
    n_rates = [len(plan.rates_of(plan.method(cell.method))) for cell in cells(plan)]
    tuning = sum(rung.kept * rung.steps for n in n_rates for rung in rungs(n, plan.tune_steps))
    return tuning + len(n_rates) * len(plan.seeds) * plan.settings.steps


def all_runs(plan: Plan) -> int:
    n_rates = [len(plan.rates_of(plan.method(cell.method))) for cell in cells(plan)]
    tuning = sum(rung.kept for n in n_rates for rung in rungs(n, plan.tune_steps))
    return tuning + len(n_rates) * len(plan.seeds)


def possible(plan: Plan) -> Iterator[Trial]:
    """Every run that the grid may need, whatever tuning chooses."""
    for cell in cells(plan):
        rates = plan.rates_of(plan.method(cell.method))
        for rung in rungs(len(rates), plan.tune_steps):
            yield from (Trial(*cell, rate, plan.seeds[0], rung.steps, True) for rate in rates)
        for rate in rates:
            yield from finals(plan, cell, rate)


def relevant(plan: Plan, results: Results) -> Collection[Trial]:
    """The runs of the grid that have ended and that the present choices of learning rates use."""
    used: set[Trial] = set()
    for cell in cells(plan):
        rate, _ = chosen_rate(plan, cell, results)
        used |= {trial for trial in results if trial.cell == cell and trial.tuning}
        used |= set(finals(plan, cell, rate) if rate is not None else ()) & results.keys()
    return used
