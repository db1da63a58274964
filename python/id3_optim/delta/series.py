"""Deltas saved at chosen budgets along one increment run (paper, figures 5 and 6)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..distributed.part import any_split
from ..distributed.writer import writes
from ..param_groups import trainable_entries
from ..schedules import resolve_budget
from ..wrappers import check_holds, plain_names, unwrapped
from .delta import save_delta


class DeltaSeries:
    """Saves `delta-<entries>.safetensors` in a directory each time the active set reaches one of the budgets.

    Each file is a whole delta of the base model with that many entries. The series uses the optimizer's step
    hooks, so it works in every trainer; of several processes the first alone writes. A step that passes
    several budgets writes one file. A resumed run continues the series of the saved one.

    budgets: entries (int) or shares of N (float), each at most the optimizer's own budget.
    originals, compact, allow_nonfinite: as for `save_delta`.
    Raises ValueError for a budget out of range, a strategy other than "increment" (which reaches its whole
    budget at the first step), or a model that lacks a parameter that the optimizer trains.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        model: nn.Module,
        optimizer: Any,
        budgets: Sequence[int | float],
        originals: bool = False,
        compact: bool = False,
        allow_nonfinite: bool = False,
    ) -> None:
        self.directory, self.model, self.optimizer = Path(directory), model, unwrapped(optimizer)
        self.options = {"originals": originals, "compact": compact, "allow_nonfinite": allow_nonfinite}
        if self.optimizer.strategy != "increment":
            raise ValueError(f"optimizer: expected the strategy increment, got {self.optimizer.strategy}")
        check_model(model, self.optimizer)
        self.budgets = _resolved(budgets, self.optimizer)
        self.paths: list[Path] = []  # written by this process
        self.directory.mkdir(parents=True, exist_ok=True)
        self._n_active_before = 0
        self._hooks = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
        ]

    def remove(self) -> None:
        """Stops saving: removes the hooks from the optimizer."""
        for hook in self._hooks:
            hook.remove()

    def _before_step(self, optimizer: Any, args: tuple, kwargs: dict) -> None:
        self._n_active_before = optimizer.n_active

    def _after_step(self, optimizer: Any, args: tuple, kwargs: dict) -> None:
        n_active = optimizer.n_active
        reached = any(self._n_active_before < budget <= n_active for budget in self.budgets)
        if not reached or not (any_split(optimizer.param_groups) or writes(optimizer)):
            return
        path = self.directory / f"delta-{n_active}.safetensors"
        save_delta(path, self.model, optimizer, **self.options)
        self.paths.append(path)


def check_model(model: nn.Module, optimizer: Any) -> None:
    """Raises ValueError if the model lacks a parameter that the optimizer trains, which has no name then."""
    params = (p for group in unwrapped(optimizer).param_groups for p in group["params"])
    check_holds(plain_names(model), (p for p in params if p.requires_grad))


def _resolved(budgets: Sequence[int | float], optimizer: Any) -> list[int]:
    n_entries = optimizer.n_entries or trainable_entries(optimizer.param_groups)
    most = resolve_budget(optimizer.budget_given, n_entries)
    resolved = [resolve_budget(budget, n_entries) for budget in budgets]
    for given, budget in zip(budgets, resolved, strict=True):
        if not 0 < budget <= most:
            raise ValueError(f"budgets: expected 1 to {most} entries (the optimizer's budget), got {given}")
    return resolved
