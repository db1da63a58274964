"""The method of a run: what a resumed run must share."""

from __future__ import annotations

import math
import numbers
from dataclasses import asdict, dataclass, fields
from typing import Any

from . import heuristics, schedules
from .heuristics import Bias, Heuristic, Random
from .schedules import Schedule
from .state.layout import Layout

STRATEGIES = ("increment", "static", "repeat")
BIAS_CORRECTIONS = ("tensor", "entry")


@dataclass(frozen=True)
class Prune:
    """Entries that have moved least give their place to new ones, as in RigL (Evci et al., 2020).

    every: the step 0 is the first; in the steps every, 2·every, … entries leave, and as many join by the
        heuristic. None leaves later than `every` steps before the end, since new entries need steps.
    share: which part of the active entries leaves at a time. Those of smallest |θ − θ₀| do, of the entries
        that have been active for at least `every` updates; ties by tensor and index.

    An entry that leaves gets its first value θ₀ back, bit for bit, and loses its moments. So never more than
    the budget differs from the base, and a delta holds the active entries alone. It may join again.
    Raises TypeError or ValueError unless every ≥ 1 and 0 < share < 1.
    """

    every: int
    share: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "every", whole_number("prune: every", self.every, 1))
        object.__setattr__(self, "share", share_of("prune: share", self.share))

    def due(self, step: int, total_steps: int) -> bool:
        """Whether entries leave in this step, the first being 0."""
        return step > 0 and step % self.every == 0 and step + self.every <= total_steps


@dataclass(frozen=True)
class Method:
    """What defines a run, apart from its length and the number of entries; see `ID3AdamW` for each field.

    Its plain form (`describe`) goes into state dicts and delta files; a state dict is refused by an optimizer
    whose plain form differs. Raises TypeError for what is no heuristic or no schedule, and TypeError or
    ValueError for other fields with a default.
    """

    budget_given: int | float
    strategy: str
    heuristic: Heuristic
    schedule: Schedule
    bias_correction: str
    max_grad_norm: float | None
    keep_originals: bool
    select_every: int = 1
    entry_warmup: int = 0
    tensor_cap: float | None = None
    prune: Prune | None = None

    def __post_init__(self) -> None:
        _check_strategy(self.strategy, self.bias_correction, self.heuristic)
        plain = {
            "budget_given": _plain_budget(self.budget_given),
            "max_grad_norm": _plain_norm(self.max_grad_norm),
            "select_every": whole_number("select_every", self.select_every, 1),
            "entry_warmup": whole_number("entry_warmup", self.entry_warmup, 0),
            "tensor_cap": None if self.tensor_cap is None else share_of("tensor_cap", self.tensor_cap),
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        if self.prune is not None and not isinstance(self.prune, Prune):
            raise TypeError(f"prune: expected Prune(every, share) or None, got {self.prune!r}")
        self.describe()

    def describe(self) -> dict[str, Any]:
        """Plain values by field: the heuristic and the schedule by name and numbers.

        Fields with a default are left out at their default: files of versions without them have the same
        bytes.
        """
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        plain = {name: value for name, value in plain.items() if DEFAULTS.get(name, ...) != value}
        described = {
            "heuristic": heuristics.describe(self.heuristic),
            "schedule": schedules.describe(self.schedule),
        }
        return plain | described | ({} if self.prune is None else {"prune": asdict(self.prune)})

    def effective_schedule(self) -> Schedule:
        """The schedule that the strategy follows: its own for "increment", else the whole budget at once."""
        return self.schedule if self.strategy == "increment" else schedules.one_shot

    def layout(self, backend: str | None, release_gradients: bool, capturable: bool) -> Layout:
        """Which arrays a run of this method keeps."""
        by_age = self.bias_correction == "entry"
        age = by_age or self.entry_warmup > 0 or self.prune is not None
        kept = self.keep_originals, age, self.strategy == "repeat"
        return Layout(*kept, backend, release_gradients, capturable, by_age)


DEFAULTS = {field.name: field.default for field in fields(Method) if hasattr(Method, field.name)}


def _check_strategy(strategy: str, bias_correction: str, heuristic: Heuristic) -> None:
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if bias_correction not in BIAS_CORRECTIONS:
        raise ValueError(
            f"bias_correction: expected one of {', '.join(BIAS_CORRECTIONS)}, got {bias_correction!r}"
        )
    if strategy == "repeat" and isinstance(heuristic, Random | Bias):
        kind = type(heuristic).__name__
        raise ValueError(
            f"strategy: expected 'static' with {kind}, whose scores are the same at every step, got 'repeat'"
        )


def _plain_budget(budget: int | float) -> int | float:
    """The budget as a plain number, numpy's too: it goes into states and delta files, as JSON."""
    schedules.check_budget(budget)
    return int(budget) if isinstance(budget, numbers.Integral) else float(budget)


def _plain_norm(max_grad_norm: float | None) -> float | None:
    """Likewise."""
    if max_grad_norm is not None and not 0 < max_grad_norm < math.inf:
        raise ValueError(f"max_grad_norm: expected a finite number above 0, or None, got {max_grad_norm}")
    return None if max_grad_norm is None else float(max_grad_norm)


def whole_number(name: str, value: int, least: int) -> int:
    """The value as an int. Raises ValueError unless it is a whole number of at least `least`."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < least:
        raise ValueError(f"{name}: expected an int of at least {least}, got {value!r}")
    return int(value)


def share_of(name: str, value: float) -> float:
    """The value as a float. Raises ValueError unless it is a number above 0 and below 1."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not 0.0 < value < 1.0:
        raise ValueError(f"{name}: expected a number above 0 and below 1, got {value!r}")
    return float(value)
