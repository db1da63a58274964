"""The two halves of a step alone, through the kernels that the optimizer calls."""

from dataclasses import replace

import torch

from benchmarks.cases import Case, reads, slow_rounds, start_methods
from benchmarks.measure import Timed
from benchmarks.ours import EPS, LEARNING_RATE, Ours
from benchmarks.shapes import Inputs
from id3_kernels import Entries
from id3_kernels.table import kernels_for

KERNELS = kernels_for(torch.device("cpu"), None)


class Update:
    """The sparse AdamW on `entries`, from zero moments; weights change in place, gradients do not."""

    def __init__(
        self, weights: list[torch.Tensor], grads: list[torch.Tensor], entries: Entries, kernels=KERNELS
    ):
        self._weights, self._grads, self._entries, self._kernels = weights, grads, entries, kernels
        device = weights[0].device
        self._moments = [torch.zeros(len(entries.indices), device=device) for _ in range(2)]
        self._step = torch.ones(len(weights), dtype=torch.int64, device=device)
        low = weights[0].dtype != torch.float32
        self._master = kernels.gather(weights, *entries).float() if low else None

    def run(self) -> None:
        state = (*self._moments, self._master, None, self._step)
        hyperparameters = (LEARNING_RATE, 0.9, 0.999, 1e-8, 0.0, False)
        scalars = (None, None, None, None)
        self._kernels.adamw_(self._weights, self._grads, *self._entries, *state, *hyperparameters, *scalars)


def wanted(k: int, device: torch.device | str = "cpu") -> tuple[torch.Tensor, int]:
    """k as the kernels take it: the count on the device, and the capacity of the result."""
    return torch.full((1,), k, dtype=torch.int64, device=device), k


def active_entries(ours: Ours) -> Entries:
    return Entries.from_lists([touched.indices for touched in ours.optimizer.touched()])


def timed_selections(case: Case, inputs: Inputs) -> dict[str, Timed]:
    """Selection alone with the active entries excluded; no method changes the inputs of the next."""
    methods = start_methods(case, inputs)
    ours = methods["id3"]
    weights, entries, k = [p.detach() for p in ours.params], active_entries(ours), case.counts()[3]
    arguments = (weights, inputs.grads, *entries, *wanted(k), EPS, case.exp)
    timed = {"id3": Timed(lambda: KERNELS.select_topk(*arguments))}
    dense = methods["dense"]
    dense.prepare()
    timed["dense"] = Timed(dense.select)
    if "dense_plain" in case.rivals:
        timed["dense_plain"] = Timed(dense.select_plain, None, slow_rounds(case))
    if "toolkit" in methods:
        methods["toolkit"].prepare()
        timed["toolkit"] = Timed(methods["toolkit"].select, None, slow_rounds(case))
    return timed | reads(ours, inputs)


def timed_updates(case: Case, inputs: Inputs) -> dict[str, Timed]:
    """The update alone; for the rivals with a mask it includes zeroing the gradient outside."""
    rivals = tuple(rival for rival in case.rivals if rival != "dense_plain")
    methods = start_methods(replace(case, rivals=rivals), inputs)
    ours = methods["id3"]
    update = Update([p.detach() for p in ours.params], inputs.grads, active_entries(ours))
    timed = {"id3": Timed(update.run)}
    timed["dense"] = Timed(methods["dense"].update, methods["dense"].prepare)
    timed["adamw"] = Timed(methods["adamw"].step)
    if "toolkit" in methods:
        toolkit = methods["toolkit"]
        timed["toolkit"] = Timed(toolkit.update, toolkit.prepare, slow_rounds(case))
    return timed | reads(ours, inputs)
