"""ID3AdamW: `step()` is the paper's algorithm 1: target, select, join, update."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from id3_kernels import backend as backends

from . import changes, checkpoint, gradients, heuristics, schedules, validation
from .changes import Touched
from .heuristics import D3, Heuristic
from .memory import memory_report
from .progress import Progress, Wanted
from .release import Release
from .schedules import Schedule, uniform
from .selection import Selection, select
from .shards import Joined, adopt, join, replace, reserve
from .state import Layout, Shard, trainable_entries
from .updating import update

_OWN_STATE = (
    "budget", "budget_given", "heuristic", "strategy", "schedule", "total_steps", "bias_correction",
    "max_grad_norm", "n_entries", "last_selection", "phase_seconds", "_layout", "_shards", "_progress",
    "_release",
)  # fmt: skip


class ID3AdamW(torch.optim.Optimizer):
    """AdamW on a growing set of entries: ID3, "Step-by-Step Unmasking" (arXiv 2408.14470, algorithm 1).

    At each step the best entries by `heuristic` that are not active yet join the active set, and AdamW
    (decoupled weight decay included) runs on active entries alone. All others keep their bits. State is
    kept for active entries only: at most 24 bytes each.

    params: as for torch.optim.AdamW: parameters, named parameters or groups with their own lr,
        weight_decay, betas, eps, maximize. A group with `dense=True` (a fresh head) is trained whole by
        torch's AdamW and counts in neither the budget nor N.
    budget: the most entries that may ever be active: an int counts, a float in (0, 1] is a share of N.
    total_steps: T, the steps over which the budget is spent; may come later by `set_total_steps`.
    heuristic: D3(eps, exp), Magnitude(), Fisher(scores), Random(seed), Bias() or f(param, grad) -> scores.
    strategy: "increment" (ID3), "static" (the whole budget at the first step), "repeat" (a fresh top B at
        every step; entries that leave lose their state and keep their value).
    schedule: f(step, total_steps, budget) -> entries active after that step; ignored unless increment.
    bias_correction: "tensor": by the steps in which the tensor had a gradient, as in torch and the paper;
        "entry": by the steps since the entry joined.
    max_grad_norm: clip by the norm over everything that this step updates: the active entries, the new
        ones included, and dense groups. (`clip_grad_norm_` outside clips by the dense gradients' norm.)
    keep_originals: remember each active entry's first value, so that a saved delta can be checked and undone.
    backend: "cpu", "cuda", "triton" or "reference"; None: the best for each parameter's device.
    release_gradients: hooks take what a step needs of each gradient during the backward pass and set `.grad`
        to None, tensor by tensor; the entries chosen and their values keep their bits.
    select_from: which micro-batch's scores choose with released gradients: "last", or "max" over all.
    capturable: `step()` may be captured in a CUDA graph after a step outside of it, and replayed with new
        gradients in the same tensors: everything that changes lies on the device, a one-element tensor as lr
        too. Read with a wait: `steps_done`, `n_active`. Needs all parameters on one device and goes with
        neither "repeat" nor `release_gradients`. A state that is loaded makes earlier captures void.

    On a GPU `step()` does not wait for the device, with few exceptions (docs/gpu.md).

    Raises ValueError or TypeError for anything out of range, before anything changes.
    """

    _step_supports_amp_scaling = True  # GradScaler hands its scale and found_inf to step()

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        budget: int | float,
        total_steps: int | None = None,
        heuristic: Heuristic = D3(eps=1.0, exp=2.0),  # noqa: B008 - frozen
        strategy: str = "increment",
        schedule: Schedule = uniform,
        bias_correction: str = "tensor",
        max_grad_norm: float | None = None,
        keep_originals: bool = True,
        maximize: bool = False,
        backend: str | None = None,
        release_gradients: bool = False,
        select_from: str = "last",
        capturable: bool = False,
        **not_applicable: Any,
    ):
        validation.refuse_not_applicable(not_applicable)
        validation.check_choices(strategy, bias_correction, heuristic)
        validation.check_release(release_gradients, select_from, strategy)
        validation.check_capturable(capturable, strategy, release_gradients)
        heuristics.describe(heuristic)
        schedules.describe(schedule)
        budget, max_grad_norm = validation.plain_budget(budget), validation.plain_norm(max_grad_norm)
        backend = backend or backends.requested()
        if backend is not None:
            backends.require(backend)
        self.budget = self.budget_given = budget  # a share becomes a number of entries at the first step
        self.heuristic, self.strategy, self.schedule = heuristic, strategy, schedule
        self.total_steps: int | None = None
        self.bias_correction, self.max_grad_norm = bias_correction, max_grad_norm
        self.n_entries: int | None = None
        self.last_selection: Selection | None = None
        self.phase_seconds = {"select": 0.0, "update": 0.0}
        self._layout = Layout(
            keep_originals, bias_correction == "entry", strategy == "repeat", backend, release_gradients,
            capturable,
        )  # fmt: skip
        self._release: Release | None = None
        self._shards: list[Shard] = []
        self._progress = Progress(capturable)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"maximize": maximize, "dense": False})
        self.state[checkpoint.MARKER] = {}
        validation.check_names(heuristic, self.param_groups[0])
        if total_steps is not None:
            self.set_total_steps(total_steps)
        if release_gradients:
            self._release = Release(select_from)
            self._release.attach(self)

    # --- what stands before the first step -----------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. After the first step the new tensors extend N; a budget already fixed stays."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            validation.check_group(group, len(self.param_groups) - 1)
            validation.check_place(self._layout, [*self._shards, *group["params"]], group["dense"])
        except Exception:
            self.param_groups.pop()
            raise
        if self.n_entries is not None and not group["dense"]:
            self.n_entries += trainable_entries([group])
            adopt(self._shards, self.param_groups, len(self.param_groups) - 1, self._layout)
            reserve(self._shards, self.budget)
        if getattr(self, "_release", None) is not None:
            self._release.attach(self)

    def set_total_steps(self, total_steps: int) -> None:
        """Sets T, the steps over which the budget is spent. Raises ValueError to change it after step 0."""
        schedules.check_total_steps(total_steps)
        if total_steps == self.total_steps:  # what a captured graph reads stays where it is
            return
        if self.steps_done > 0:
            expected = f"{self.total_steps} as at the first step"
            raise ValueError(f"total_steps: expected {expected} (it can not change), got {total_steps}")
        self.total_steps = int(total_steps)
        self._progress.forget_targets()

    def _begin(self) -> None:
        """Fixes N, the budget and the shards, at the first gradient or step or when a state is loaded."""
        if self.n_entries is None:
            n_entries = trainable_entries(self.param_groups)
            self.budget = schedules.resolve_budget(self.budget_given, n_entries)
            self.n_entries = n_entries
        if not self._shards:
            shards: list[Shard] = []
            for i, group in enumerate(self.param_groups):
                if not group["dense"]:
                    adopt(shards, self.param_groups, i, self._layout)
            validation.check_place(self._layout, shards)
            reserve(shards, self.budget)
            self._shards = shards
        if not self._progress.targets and self.total_steps is not None and self._shards:
            schedule = self.schedule if self.strategy == "increment" else schedules.one_shot
            self._progress.tabulate(schedule, self.total_steps, self.budget, self._shards[0].device)

    # --- algorithm 1 ---------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step; returns the closure's loss.

        Mutates active entries of the parameters, the state, and the active set. Does nothing if a
        GradScaler found an overflow. Raises ValueError where total_steps is not set or a gradient does not
        fit its parameter, before anything changes.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if gradients.overflowed(self):
            self._forget_gradients()
            return loss
        self._ready()
        if self._release is not None:
            self._release.take_rest(self)
        grads, fine = gradients.of_step(self), gradients.without_overflow(self)
        started = time.perf_counter()
        joined = self._select_and_join(grads, fine)
        selected = time.perf_counter()
        update(self, grads, fine, joined)
        self.phase_seconds["select"] += selected - started
        self.phase_seconds["update"] += time.perf_counter() - selected
        self._forget_gradients()
        self._progress.advance(fine)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; forgets what hooks have taken too (which `model.zero_grad()` can not)."""
        super().zero_grad(set_to_none)
        self._forget_gradients()

    def remove_hooks(self) -> None:
        """Takes the hooks of `release_gradients` off; gradients stay whole then, until a step takes them."""
        if self._release is not None:
            self._release.remove_hooks()

    def _forget_gradients(self) -> None:
        if self._release is not None:
            self._release.clear()
            for shard in self._shards:
                shard.seen = [False] * len(shard.params)

    def _ready(self) -> None:
        if self.total_steps is None:
            raise ValueError(
                "total_steps: expected the number of steps of the run (set_total_steps), got None"
            )
        validation.check_capture(self._layout.capturable, bool(self._shards))
        self._begin()

    def _select_and_join(self, grads: gradients.Gradients, fine: Tensor | None) -> Joined:
        """Returns what can be undone, which is nothing with "repeat"."""
        wanted = self._wanted()
        if wanted is None:
            return []
        if fine is not None:
            wanted = wanted._replace(k=wanted.k * fine)
        if self._release is not None:
            picked, values, *newest = self._release.chosen(self._shards, wanted)
        else:
            values, fresh = [None for _ in self._shards], self.strategy == "repeat"
            picked, *newest = select(self._shards, grads, self.heuristic, wanted, self._names(), fresh)
        if self.strategy == "repeat":
            joined = replace(self._shards, picked)
        else:
            joined = join(self._shards, picked, values)
        self.last_selection = Selection(self._progress.now(), *newest)
        return joined

    def _wanted(self) -> Wanted | None:
        if not self._shards:
            return None
        if self.strategy == "repeat":
            return Wanted(torch.full((1,), self.budget, device=self._shards[0].device), self.budget)
        return self._progress.wanted(self._shards)

    # --- what others may ask -------------------------------------------------------------------------

    @property
    def steps_done(self) -> int:
        """t: how many steps were done, those that an overflow stopped left out."""
        return self._progress.steps_done

    @property
    def n_active(self) -> int:
        """|Λ|: how many entries are active now."""
        return sum(shard.n_active for shard in self._shards)

    def touched(self) -> Iterator[Touched]:
        """For every non-dense parameter, in order: the entries that training may have changed."""
        return changes.touched(self)

    def changed_since(self, step: int) -> Iterator[Touched]:
        """For every parameter updated after the first `step` steps (`steps_done`): which entries may differ.

        A superset of the changed bits: the active entries of each tensor that had a gradient since (with
        "repeat" all that were ever active), then dense groups whole. After a state is loaded, all count as
        updated by its last step. Raises ValueError for a step that is not done yet.
        """
        return changes.changed_since(self, step)

    def settings(self) -> dict[str, Any]:
        """What a resumed run must share, as plain values: method, numbers, heuristic and schedule by name."""
        return {
            "method": "id3",
            "step": self.steps_done,
            "total_steps": self.total_steps,
            "budget": self.budget,
            "budget_given": self.budget_given,
            "n_entries": self.n_entries,
            "strategy": self.strategy,
            "heuristic": heuristics.describe(self.heuristic),
            "schedule": schedules.describe(self.schedule),
            "bias_correction": self.bias_correction,
            "max_grad_norm": self.max_grad_norm,
            "keep_originals": self._layout.originals,
        }

    def memory_report(self) -> dict[str, int]:
        """Allocated bytes by kind, `total` last.

        `select_tiles` (one score maximum per 256 entries) and `select_mask` (the bit per entry that the
        Triton backend keeps to leave active entries out) live only while a step selects.
        """
        return memory_report(self._shards, self._layout, self.state.values(), self._release)

    def state_dict(self) -> dict[str, Any]:
        """torch's shape, settings in `param_groups[0]["id3"]`; `torch.load(weights_only=True)` reads it."""
        return checkpoint.state_dict(self, super().state_dict)

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> None:
        """Continues bit for bit where the saved run stood, on the same backend.

        Raises ValueError with both values where the state does not fit (shapes, names, T, B, heuristic,
        schedule, strategy), before anything changes; `strict=False` lets settings differ.
        """
        checkpoint.load_state_dict(self, state_dict, strict, super().load_state_dict)
        self._forget_gradients()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {name: getattr(self, name) for name in _OWN_STATE}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if getattr(self, "_release", None) is not None:  # a copy hooks its own parameters
            self._release.attach(self)

    def _names(self) -> list[str] | None:
        if "param_names" not in self.param_groups[0]:
            return None
        return [name for group in self.param_groups for name in group["param_names"]]

    def _name(self, position: int) -> str:
        names = self._names()
        return names[position] if names else f"parameter {position}"
