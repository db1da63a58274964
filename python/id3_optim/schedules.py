"""Schedules say how many entries may be active after each step; this module also checks the budget.

A schedule is any `f(step, total_steps, budget) -> int`: the number of entries that may be active after step
`step` (0, 1, … total_steps − 1). It must depend on its arguments alone, because a resumed run tabulates it
anew.
"""

import inspect
import math
import numbers
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Schedule = Callable[[int, int, int], int]


def uniform(step: int, total_steps: int, budget: int) -> int:
    """floor(B·(t+1)/T) in integer arithmetic: the paper's u_t = B/T for every B and T."""
    return budget * (step + 1) // total_steps


def cosine(step: int, total_steps: int, budget: int) -> int:
    """floor(B·(1 − cos πx)/2) with x = (t+1)/T: slow at both ends, fastest in the middle."""
    return math.floor(budget * (1.0 - math.cos(math.pi * (step + 1) / total_steps)) / 2.0)


def one_shot(step: int, total_steps: int, budget: int) -> int:
    """The whole budget at step 0."""
    return budget


@dataclass(frozen=True)
class Exponential:
    """floor(B·(1 − e^(−ax))/(1 − e^(−a))) with x = (t+1)/T: early for a > 0, late for a < 0.

    Raises ValueError unless 0 < |a| ≤ 700 (a = 0 is `uniform`; beyond 700 the exponential overflows).
    """

    a: float

    def __post_init__(self) -> None:
        if not 0.0 < abs(self.a) <= 700.0:
            raise ValueError(f"a: expected a number with 0 < |a| <= 700 (a = 0 is `uniform`), got {self.a!r}")
        object.__setattr__(self, "a", float(self.a))

    def __call__(self, step: int, total_steps: int, budget: int) -> int:
        return math.floor(budget * math.expm1(-self.a * (step + 1) / total_steps) / math.expm1(-self.a))


@dataclass(frozen=True)
class FrontLoaded:
    """`uniform` over the first `share` of the steps, ceil(share·T) of them, and nothing after.

    Raises ValueError unless 0 < share ≤ 1 (1 is `uniform`).
    """

    share: float

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise ValueError(f"share: expected a number in (0, 1] (1 is `uniform`), got {self.share!r}")
        object.__setattr__(self, "share", float(self.share))

    def __call__(self, step: int, total_steps: int, budget: int) -> int:
        # A share such as 0.1 lies above its decimal value: the small term keeps 0.1 of 10 steps at 1.
        spending = max(1, math.ceil(self.share * total_steps - 1e-6))
        return budget * min(step + 1, spending) // spending


@dataclass(frozen=True)
class After:
    """Nothing over the first `share` of the steps, ceil(share·T) of them, then the whole budget at once.

    Dense groups, such as a new head, train from the first step on, so that the one choice sees a head that
    has learnt. With `select_every` the choice is made in the first selecting step from then on, or in the
    last one of the run. Raises ValueError unless 0 < share < 1 (0 is `one_shot`).
    """

    share: float

    def __post_init__(self) -> None:
        if not 0.0 < self.share < 1.0:
            raise ValueError(f"share: expected a number in (0, 1) (0 is `one_shot`), got {self.share!r}")
        object.__setattr__(self, "share", float(self.share))

    def __call__(self, step: int, total_steps: int, budget: int) -> int:
        return budget if step >= self.wait(total_steps) else 0

    def wait(self, total_steps: int) -> int:
        """The first step with entries."""
        return math.ceil(self.share * total_steps - 1e-6)


exponential, front_loaded, after = Exponential, FrontLoaded, After

_BY_NAME = {"uniform": uniform, "cosine": cosine, "one_shot": one_shot}
_WITH_NUMBER = {"exponential": Exponential, "front_loaded": FrontLoaded, "after": After}


def tabulate(schedule: Schedule, total_steps: int, budget: int, select_every: int = 1) -> list[int]:
    """The targets c(0) … c(T−1): non-decreasing, within 0 … budget, the last one equal to budget.

    select_every: see `in_windows`.
    Raises ValueError for total_steps < 1 and TypeError for a schedule that returns anything but an integer.
    """
    check_total_steps(total_steps)
    targets, reached = [], 0
    for step in range(total_steps):
        target = schedule(step, total_steps, budget)
        if isinstance(target, bool) or not isinstance(target, numbers.Integral):
            name = describe(schedule)["name"]
            raise TypeError(f"schedule {name}: expected an int at step {step}, got {target!r}")
        reached = min(max(reached, operator.index(target)), budget)
        targets.append(reached)
    targets[-1] = budget
    return in_windows(targets, schedule, select_every)


def in_windows(targets: list[int], schedule: Schedule, select_every: int) -> list[int]:
    """All steps of a window mK … mK+K−1 have the target of the window's last step, so that its first step
    selects what the window is due and the whole budget is spent. A schedule `After` waits: only windows that
    begin late enough, or the last one, have a target. select_every: K."""
    n, found = len(targets), []
    wait = schedule.wait(n) if isinstance(schedule, After) else 0
    for step in range(n):
        first = step - step % select_every
        waits = first < wait and first + select_every < n
        found.append(0 if waits else targets[min(first + select_every, n) - 1])
    return found


def grown(targets: list[int], schedule: Schedule, growth: Sequence[tuple[int, int]]) -> list[int]:
    """The targets of a budget that has grown: each (step, entries) is spent by the schedule over the steps
    that were left then, or at once where none were."""
    targets = list(targets)
    for step, entries in growth:
        targets += [targets[-1]] * (step + 1 - len(targets))
        added = tabulate(schedule, len(targets) - step, entries)
        targets[step:] = [target + more for target, more in zip(targets[step:], added, strict=True)]
    return targets


def check_total_steps(total_steps: int) -> None:
    """Raises TypeError or ValueError unless total_steps is an int of at least 1."""
    if isinstance(total_steps, bool) or not isinstance(total_steps, numbers.Integral):
        raise TypeError(f"total_steps: expected an int, got {total_steps!r}")
    if total_steps < 1:
        raise ValueError(f"total_steps: expected at least 1, got {total_steps}")


def describe(schedule: Schedule) -> dict:
    """The schedule's name and numbers as plain values: equal dicts mean equal schedules on resume."""
    if isinstance(schedule, Exponential):
        return {"name": "exponential", "a": schedule.a}
    if isinstance(schedule, FrontLoaded):
        return {"name": "front_loaded", "share": schedule.share}
    if isinstance(schedule, After):
        return {"name": "after", "share": schedule.share}
    _check_arguments(schedule)
    for name, known in _BY_NAME.items():
        if schedule is known:
            return {"name": name}
    return {"name": f"{schedule.__module__}.{getattr(schedule, '__qualname__', type(schedule).__qualname__)}"}


def _check_arguments(schedule: Schedule) -> None:
    """Raises TypeError for what cannot be called as a schedule, such as `front_loaded` without its share."""
    if not callable(schedule):
        raise TypeError(f"schedule: expected f(step, total_steps, budget) -> int, got {schedule!r}")
    try:
        signature = inspect.signature(schedule)
    except ValueError:  # of a builtin
        return
    try:
        signature.bind(0, 1, 1)
    except TypeError:
        name = getattr(schedule, "__qualname__", type(schedule).__qualname__)
        raise TypeError(
            f"schedule: expected f(step, total_steps, budget) -> int, got {name}"
            f"({', '.join(signature.parameters)}); pass the schedule that it returns"
        ) from None


def from_name(text: str) -> Schedule:
    """The schedule of a name, as on the command line.

    text: `uniform`, `cosine`, `one_shot`, `exponential:3` for a = 3, `front_loaded:0.2` or `after:0.2` for a
    share of 0.2; a hyphen is as good as an underscore.
    Raises ValueError for any other text.
    """
    name, colon, number = text.partition(":")
    name = name.replace("-", "_")
    if name in _BY_NAME and not colon:
        return _BY_NAME[name]
    if name in _WITH_NUMBER and colon:
        try:
            value = float(number)
        except ValueError:
            raise ValueError(f"schedule: expected a number after '{name}:', got {number!r}") from None
        return _WITH_NUMBER[name](value)
    known = ", ".join([*_BY_NAME, "exponential:<a>", "front_loaded:<share>", "after:<share>"])
    raise ValueError(f"schedule: expected one of {known}, got {text!r}")


def resolve_budget(budget: int | float, n_entries: int) -> int:
    """The budget as a number of entries: an int counts entries, a float in (0, 1] is a share of n_entries.

    A share gives floor(share·N + 1e-6), so 1 (one entry) and 1.0 (all) differ. The int 0 is allowed.
    Raises TypeError for anything but an int or a float, ValueError for a value out of range.
    """
    check_budget(budget)
    if isinstance(budget, numbers.Integral):
        if budget > n_entries:
            raise ValueError(f"budget: expected 0 to {n_entries} entries (all that train), got {budget}")
        return operator.index(budget)
    entries = min(math.floor(float(budget) * n_entries + 1e-6), n_entries)
    if entries == 0:
        raise ValueError(f"budget: expected a share of at least one of {n_entries} entries, got {budget!r}")
    return entries


def check_budget(budget: int | float) -> None:
    """Raises TypeError or ValueError for a value that is a budget for no N."""
    expected = "an int >= 0 (entries) or a float in (0, 1] (a share)"
    if isinstance(budget, bool) or not isinstance(budget, numbers.Real):
        raise TypeError(f"budget: expected {expected}, got {budget!r}")
    if budget < 0 or (not isinstance(budget, numbers.Integral) and not 0.0 < budget <= 1.0):
        raise ValueError(f"budget: expected {expected}, got {budget!r}")
