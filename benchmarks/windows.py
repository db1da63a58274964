"""The optimizer's time over whole windows of `select_every=K`, against that of selecting in each step."""

import torch

from benchmarks.cases import Case
from benchmarks.measure import Timed
from benchmarks.ours import Ours
from benchmarks.shapes import Inputs

WINDOWS = (1, 4, 16)
_STEPS = max(WINDOWS)  # of a timed run, whose first one selects


def timed_windows(case: Case, inputs: Inputs) -> dict[str, Timed]:
    """`every_K`: milliseconds of a step, the mean over 16 steps, of which 16 / K select."""
    _, _, start, k = case.counts()
    ours = {every: Ours(inputs, start, k, case.exp, select_every=every) for every in WINDOWS}

    def steps(one: Ours) -> None:
        for _ in range(_STEPS):
            one.step()

    for one in ours.values():
        steps(one)
    _check({every: one.active() for every, one in ours.items()})
    return {
        f"every_{every}": Timed(lambda one=one: steps(one), per_run=_STEPS) for every, one in ours.items()
    }


def _check(active: dict[int, torch.Tensor]) -> None:
    """All have spent the same budget; the gradient being the same, they chose nearly the same entries."""
    for every, entries in active.items():
        assert len(entries) == len(active[1]), f"every {every}: another number of entries"
        assert torch.isin(entries, active[1]).float().mean() > 0.99, f"every {every}: other entries"
