"""The parts of a trainer's callback that no trainer changes: the number of steps, and the numbers to log."""

from __future__ import annotations

from ..analysis import count_changed, sparsity_entropy, tensor_sparsity
from ..optimizer import ID3AdamW


def take_total_steps(optimizer: ID3AdamW, steps: int, from_run: bool) -> bool:
    """Sets the optimizer's `total_steps` to the run's `steps` where none are set.

    Returns True where `total_steps` comes from the run, False where it was set by hand. Call this function
    after a checkpoint has been loaded, before the first step.
    from_run: the return value at the start of the run that is resumed or restarted; False for a new run.
    Raises ValueError if the resumed run spends its budget over a different number of steps.
    """
    if optimizer.steps_done == 0:
        if optimizer.total_steps is not None and not from_run:
            return False
        optimizer.set_total_steps(steps)
        return True
    if from_run and optimizer.total_steps != steps:
        begun = f"{optimizer.total_steps}, over which the resumed run spends its budget"
        raise ValueError(f"max_steps: expected {begun}, got {steps}")
    return from_run


def numbers_to_log(optimizer: ID3AdamW) -> dict[str, float]:
    """Numbers about the active set, in O(|Λ|).

    `n_active` (|Λ|), `n_changed` (entries that differ from the pre-trained model; only where originals are
    kept), `tensor_sparsity` and `sparsity_entropy` (see `id3_optim.analysis`). Of the newest selection's
    scores, if it found any: the smallest as `threshold`, and the 10th, 50th and 90th percentile (nearest
    rank) as `score_q10`, `score_q50`, `score_q90`.
    """
    numbers = {
        "n_active": optimizer.n_active,
        "tensor_sparsity": tensor_sparsity(optimizer),
        "sparsity_entropy": sparsity_entropy(optimizer),
    }
    changed, newest = count_changed(optimizer), optimizer.last_selection
    if changed is not None:
        numbers["n_changed"] = changed
    if newest is not None and newest.count:
        ranked = newest.scores.sort().values
        at = [round(share * (newest.count - 1)) for share in (0.0, 0.1, 0.5, 0.9)]
        names = ("threshold", "score_q10", "score_q50", "score_q90")
        numbers |= zip(names, ranked[at].tolist(), strict=True)
    return numbers
