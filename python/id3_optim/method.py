"""The method of a run: what a resumed run must share."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from . import heuristics, schedules
from .heuristics import Heuristic
from .schedules import Schedule


@dataclass(frozen=True)
class Method:
    """What defines a run, apart from its length and the number of entries; see `ID3AdamW` for each field.

    Its plain form (`describe`) goes into state dicts and delta files; a state dict is refused by an optimizer
    whose plain form differs. Raises TypeError for what is no heuristic or no schedule.
    """

    budget_given: int | float
    strategy: str
    heuristic: Heuristic
    schedule: Schedule
    bias_correction: str
    max_grad_norm: float | None
    keep_originals: bool
    select_every: int

    def __post_init__(self) -> None:
        self.describe()

    def describe(self) -> dict[str, Any]:
        """Plain values by field: the heuristic and the schedule by name and numbers.

        Without `select_every` where that is 1, as before there was such a field: files keep their bytes.
        """
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.select_every == 1:
            del plain["select_every"]
        described = {
            "heuristic": heuristics.describe(self.heuristic),
            "schedule": schedules.describe(self.schedule),
        }
        return plain | described

    def effective_schedule(self) -> Schedule:
        """The schedule that the strategy follows: its own for "increment", else the whole budget at once."""
        return self.schedule if self.strategy == "increment" else schedules.one_shot
