"""ID3AdamW: the drop-in for `torch.optim.AdamW`; `unmasking.py` holds the algorithm behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from . import compatibility, running, validation
from .heuristics import D3, Heuristic
from .method import Method, Prune
from .param_groups import OPTIONS, selectable
from .schedules import Schedule, uniform
from .state import checkpoint, flat
from .state.active_set import ActiveSet, Touched
from .state.memory import memory_report
from .state.progress import Wanted
from .step.release import Release
from .step.scaling import Scaling
from .unmasking import Unmasking


class ID3AdamW(torch.optim.Optimizer):
    """AdamW on a growing set of entries: ID3, "Step-by-Step Unmasking" (arXiv 2408.14470, algorithm 1).

    At each step the best entries by `heuristic` that are not active yet join the active set, and AdamW
    (decoupled weight decay included) runs on active entries alone. All other entries keep their bits. State
    is kept for the budget only, 16 to 26 bytes per entry; "repeat" also remembers every entry that was ever
    active.

    params: as for torch.optim.AdamW: parameters, named parameters or groups with their own lr,
        weight_decay, betas, eps, maximize. A group with `dense=True` (a fresh head) is trained whole by
        torch's AdamW and counts in neither the budget nor N.
    budget: the most entries that may ever be active: an int counts, a float in (0, 1] is a share of N.
    total_steps: T, the steps over which the budget is spent; may come later by `set_total_steps`.
    heuristic: D3(eps, exp), Magnitude(), Fisher(scores), Random(seed), Bias() or f(param, grad) -> scores.
    strategy: "increment" (ID3), "static" (the whole budget at the first step), "repeat" (a fresh top B at
        every selecting step; entries that leave lose their state and keep their value).
    schedule: f(step, total_steps, budget) -> entries active after that step; ignored unless increment.
    select_every: K: entries join in steps 0, K, 2K, … alone, as many as the schedule gives to K steps; the
        steps between do not read N entries. 1 is the paper's. With "repeat" they choose anew.
    bias_correction: "tensor": by the steps in which the tensor had a gradient, as in torch and the paper;
        "entry": by the steps since the entry joined.
    max_grad_norm: clip by the norm over everything that this step updates: the active entries, the new
        ones included, and dense groups. (`clip_grad_norm_` outside clips by the dense gradients' norm.)
    keep_originals: remember each active entry's first value, so that a saved delta can be checked and undone.
    entry_warmup: W: an entry's learning rate rises linearly over its first W updates, to the group's.
    tensor_cap: the largest part of the budget that one tensor gets.
    prune: `Prune(every, share)`: entries that have moved least give their place to new ones.
    backend: "cpu", "cuda", "triton" or "reference"; None: the best for each parameter's device.
    release_gradients: hooks take what a step needs of each gradient during the backward pass and set `.grad`
        to None, tensor by tensor; the entries chosen and their values keep their bits.
    select_from: which micro-batch's scores choose with released gradients: "last", or "max" over all.
    capturable: after a step outside of it, a CUDA graph may capture `step()` and replay it with new gradients
        in the same tensors; an lr tensor may change too. `steps_done` and `n_active` then synchronise. Needs
        one device for all parameters, neither "repeat" nor `release_gradients`. A load voids earlier graphs.
    process_group: data parallelism without DistributedDataParallel. Replicas choose by the mean of their
        gradients, and between selections send those of active entries alone (page "Many GPUs").

    On a GPU `step()` does not synchronise with the device, but for the cases in the page "On a GPU".
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
        select_every: int = 1,
        bias_correction: str = "tensor",
        max_grad_norm: float | None = None,
        keep_originals: bool = True,
        maximize: bool = False,
        backend: str | None = None,
        release_gradients: bool = False,
        select_from: str = "last",
        capturable: bool = False,
        entry_warmup: int = 0,
        tensor_cap: float | None = None,
        prune: Prune | None = None,
        process_group: torch.distributed.ProcessGroup | None = None,
        **not_applicable: Any,
    ):
        validation.refuse_not_applicable(not_applicable)
        chosen = strategy, heuristic, schedule, bias_correction, max_grad_norm, keep_originals
        method = Method(budget, *chosen, select_every, entry_warmup, tensor_cap, prune)
        compatibility.check_options(method, release_gradients, select_from, capturable)
        layout = method.layout(validation.usable_backend(backend), release_gradients, capturable)
        self._unmasking = Unmasking(method, layout)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(validation.check_iterable(params), defaults | {"maximize": maximize, "dense": False})
        self.state[checkpoint.MARKER] = dict(checkpoint.MARKED)
        if total_steps is not None:
            self.set_total_steps(total_steps)
        self._unmasking.take_gradients(self._begin_pass, process_group, select_from, self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. After the first step the new tensors extend N; a budget already fixed stays.

        Warns where that budget is spent: the new tensors get no entries then. See `grow_budget`.
        """
        super().add_param_group(param_group)
        try:
            self._unmasking.add_group(self.param_groups)
        except Exception:
            self.param_groups.pop()
            raise
        flat.mark(self.state, self.param_groups)

    def grow_budget(self) -> None:
        """Lets a budget given as a share follow N: for layers added or unfrozen after the first step.

        Counts N anew (it never falls) and makes the budget its share of that N. The schedule spends what was
        added over the steps that are left of `total_steps`, or in the next selection where none is. All
        entries compete, those of older tensors too. Does nothing before the first step, which counts N
        itself. Saved states remember it. Raises ValueError for a budget given as a number of entries.
        """
        self._unmasking.grow_budget(self.param_groups)

    def set_total_steps(self, total_steps: int) -> None:
        """Sets T, the steps over which the budget is spent. Raises ValueError to change it after step 0."""
        self._unmasking.set_total_steps(total_steps)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step; returns the closure's loss.

        Mutates active entries of the parameters, the state, and the active set. Does nothing if a
        GradScaler found an overflow. Raises ValueError where total_steps is not set or a gradient does not
        fit its parameter, before anything changes.
        """
        loss, run = None, self._unmasking
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if run.release is not None and getattr(self, "found_inf", None) is not None:  # of a GradScaler
            run.release.check_scaler()
        scaling = Scaling.of(self, run.method.max_grad_norm, run.active.layout.capturable)
        if not scaling.stopped:
            run.step(self.param_groups, self.state, scaling)
        if run.release is not None:
            run.release.clear()
        return loss

    # --- released gradients --------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; forgets what hooks have taken too (which `model.zero_grad()` cannot)."""
        super().zero_grad(set_to_none)
        if self._unmasking.release is not None:
            self._unmasking.release.clear()

    def release_gradients(self, select_from: str | None = None) -> Release:
        """As the argument of that name, before the first step or after a load; returns the hooks."""
        return self._unmasking.release_gradients(self._begin_pass, select_from, self.param_groups)

    def remove_hooks(self) -> None:
        """Takes the hooks of `release_gradients` off; gradients stay whole then, until a step takes them."""
        if self._unmasking.release is not None:
            self._unmasking.release.remove_hooks()

    def scaled_tensors(self) -> list[Tensor]:
        """What hooks keep that a GradScaler has to check and unscale in place, or else `step()` raises."""
        release = self._unmasking.release
        return [] if release is None else release.scaled_tensors(self._unmasking.active)

    def share_overflow(self, found: dict[torch.device, Tensor]) -> None:
        """Makes an overflow that a GradScaler has found on one rank known to all. Mutates `found`."""
        self._unmasking.share_overflow(list(found.values()))

    no_sync = property(attrgetter("_unmasking.no_sync"), doc="For all micro-batches of a step but the last.")

    def _begin_pass(self) -> tuple[ActiveSet, Wanted | None]:
        return self._unmasking.begin_pass(self.param_groups)

    # --- what the run is, and how far it is ----------------------------------------------------------

    method = property(attrgetter("_unmasking.method"), doc="What defines the run: a frozen `Method`.")
    budget_given = property(attrgetter("_unmasking.method.budget_given"), doc="The budget as it was given.")
    heuristic = property(attrgetter("_unmasking.method.heuristic"))
    strategy = property(attrgetter("_unmasking.method.strategy"))
    schedule = property(attrgetter("_unmasking.method.schedule"))
    bias_correction = property(attrgetter("_unmasking.method.bias_correction"))
    budget = property(attrgetter("_unmasking.budget"), doc="B, a number of entries from the first step on.")
    total_steps = property(attrgetter("_unmasking.total_steps"), doc="T, or None before it is set.")
    n_entries = property(attrgetter("_unmasking.n_entries"), doc="N, or None before the first step.")
    steps_done = property(attrgetter("_unmasking.progress.steps_done"), doc="t, without overflowed steps.")
    n_active = property(attrgetter("_unmasking.active.n_active"), doc="|Λ|: how many entries are active.")
    active_set = property(attrgetter("_unmasking.active"), doc="The `ActiveSet`, which a step may replace.")
    replicas = property(attrgetter("_unmasking.replicas"), doc="Of `process_group`; None without one.")
    releases = property(attrgetter("_unmasking.releases"), doc="Whether the backward pass takes gradients.")
    select_from = property(attrgetter("_unmasking.select_from"), doc="None where `step()` takes gradients.")
    last_selection = property(attrgetter("_unmasking.last_selection"), doc="The newest `Selection`, or None.")
    phase_seconds = property(attrgetter("_unmasking.phase_seconds"), doc="Host seconds of select and update.")

    @property
    def max_grad_norm(self) -> float | None:
        """What `step()` clips by; may be set between steps."""
        return self._unmasking.method.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, norm: float | None) -> None:
        self._unmasking.method = replace(self._unmasking.method, max_grad_norm=norm)

    def touched(self) -> Iterator[Touched]:
        """For every non-dense parameter, in order: the entries that training may have changed."""
        return self._unmasking.touched(self.param_groups)

    def changed_since(self, step: int) -> Iterator[Touched]:
        """For every parameter updated after the first `step` steps (`steps_done`): which entries may differ.

        A superset of the changed bits: the active entries of each tensor that had a gradient since (with
        "repeat" all that were ever active), then dense groups whole. After a state is loaded, all count as
        updated by its last step. Raises ValueError for a step that is not done yet, and with `prune`.
        """
        return self._unmasking.changed_since(step, self.param_groups, self.state)

    def settings(self) -> dict[str, Any]:
        """What a resumed run must share, as plain values: method, numbers, heuristic and schedule by name."""
        return self._unmasking.settings()

    def memory_report(self) -> dict[str, int]:
        """Allocated bytes by kind, `total` last. `select_tiles` (one score maximum per 256 entries) and
        `select_mask` (a bit per entry, of the Triton backend) live only while a step selects."""
        release = self._unmasking.release
        kept = () if release is None else release.tensors()
        return memory_report(self._unmasking.active, self.state.values(), *kept)

    # --- state ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """torch's shape, settings in `param_groups[0]["id3"]`; `torch.load(weights_only=True)` reads it.

        Hooks see the whole state: pre-hooks in `self.state`, post-hooks in the dict. What they add for a
        parameter is saved too. Raises ValueError where it has the name of something of ID3AdamW's.
        """

        def pack(_: Any, state: dict[str, Any]) -> None:
            checkpoint.pack(state, self.settings(), self.param_groups, self._unmasking.active.layout)
            running.save(self.heuristic, self.param_groups, state)

        flat.mark(self.state, self.param_groups)
        sparse = checkpoint.sparse_state(self._unmasking.active)
        with self.register_state_dict_post_hook(pack, prepend=True), checkpoint.lent(self.state, sparse):
            return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True, cast: bool = False) -> None:
        """Continues bit for bit where the saved run stood, on the same backend.

        Raises ValueError with both values where the state does not fit (shapes, names, T, B, heuristic,
        schedule, strategy), before anything changes; `strict=False` lets settings differ, and parameters
        without a state begin without active entries. cast: converts the state of parameters of another
        dtype; a low-precision parameter's master copy then starts from the parameter.

        As in torch, pre-hooks may change or replace what is loaded, and the checks see their result;
        post-hooks run when all is loaded. What a param group of the state lacks is as at construction.
        """
        found = []

        def check(_: Any, state: dict[str, Any]) -> dict[str, Any]:
            layout = self._unmasking.active.layout
            found.append(checkpoint.check(state, self.settings(), self.param_groups, layout, strict, cast))
            return found[0].for_torch

        def restore(_: Any) -> None:
            checkpoint.settle_dense(self.state, self.param_groups)
            self._unmasking.restore(found[0], self.param_groups)
            running.load(self.heuristic, self.param_groups)

        with (
            self.register_load_state_dict_pre_hook(check),  # behind the user's
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ):
            super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_unmasking": self._unmasking}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # an older state may lack what came later
            for name in OPTIONS:
                group.setdefault(name, self.defaults[name])
        # torch's own load_state_dict calls this too, without an `_unmasking`: then nothing is copied.
        if "_unmasking" in state and self._unmasking.release is not None:
            self._unmasking.release.rebind(self._begin_pass, selectable(self.param_groups))
