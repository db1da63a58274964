"""The parts of a trainer's callback that no trainer changes: the number of steps, whether a resumed optimizer
fits its run, the way back to a run's beginning, and the numbers to log."""

from __future__ import annotations

import warnings

import torch

from ..analysis import count_changed, sparsity_entropy, tensor_sparsity
from ..delta.patches import Patch, write
from ..optimizer import ID3AdamW
from ..param_groups import members
from ..ranks import world_size


def take_total_steps(optimizer: ID3AdamW, steps: int, from_run: bool) -> bool:
    """Sets the optimizer's `total_steps` to the run's `steps` where none are set.

    Returns True where `total_steps` comes from the run, False where it was set by hand. Call this function
    after a checkpoint has been loaded, before the first step.
    from_run: the return value at the start of the run that is resumed or restarted; False for a new run.
    A resumed run keeps the number over which it spends its budget: a larger one is a longer run, with a
    warning. Raises ValueError for a smaller one, which would leave a part of the budget unspent.
    """
    if optimizer.steps_done == 0:
        if optimizer.total_steps is not None and not from_run:
            return False
        optimizer.set_total_steps(steps)
        return True
    if from_run and optimizer.strategy != "static" and optimizer.total_steps != steps:
        _keep_total_steps(optimizer.total_steps, steps)
    return from_run


def _keep_total_steps(spent_over: int, steps: int) -> None:
    """A resumed run spends its budget as it began to: a longer one trains what is active then."""
    begun = f"{spent_over}, over which the resumed run spends its budget"
    if steps < spent_over:
        raise ValueError(
            f"max_steps: expected at least {begun}, got {steps} (num_train_epochs gives another number with "
            f"other rows or processes); set max_steps={spent_over}"
        )
    warnings.warn(
        f"max_steps: {steps}, more than the {begun}: no entry joins in the steps after it", stacklevel=4
    )


def check_resumed(optimizer: ID3AdamW, steps_behind: int, recorded: int | None, remedy: str) -> None:
    """Refuses an optimizer that has not taken the steps of the run that it resumes.

    It would spend its budget anew, on weights that are no longer the base's: its deltas would fit no base.

    steps_behind: the steps that the trainer counts, those that overflowed too. recorded: the optimizer's
    `steps_done` when the checkpoint was written; None where the checkpoint does not say: then any number
    above 0 is taken. remedy: what the caller can do.
    Raises ValueError with both numbers and the remedy.
    """
    done = optimizer.steps_done
    expected = (done or steps_behind) if recorded is None else recorded
    if done != expected:
        raise ValueError(
            f"resume: expected an optimizer with {expected} steps done, as the run had at this checkpoint, "
            f"got {done}; {remedy}"
        )


def check_averages(optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError unless the optimizer averages the gradients of all processes (`process_group`).

    Any other one would train each process alone where no wrapper averages them.
    """
    if not isinstance(optimizer, ID3AdamW) or optimizer.replicas is None:
        got = "none" if isinstance(optimizer, ID3AdamW) else type(optimizer).__name__
        raise ValueError(f"optimizer: expected ID3AdamW with a process_group, got {got}")
    if optimizer.replicas.size != world_size():
        raise ValueError(
            f"process_group: expected all {world_size()} processes, got {optimizer.replicas.size} of them"
        )


def check_clipping(optimizer: ID3AdamW, argument: str, norm: float | None) -> None:
    """Raises ValueError where a trainer would clip what gradients released in the backward pass leave to it:
    those of dense groups alone, by a norm of their own. argument: the trainer's; norm: its value."""
    if optimizer.releases and norm and norm > 0:
        raise ValueError(
            f"{argument}: expected 0 or none with released gradients or sparse backward, got {norm}, which "
            "would clip a new head alone; give max_grad_norm to ID3AdamW"
        )


class Beginning:
    """The state of a run before its first step, to which the optimizer and its parameters can go back.

    Holds copies of the dense groups' parameters. Of all other parameters the optimizer remembers the values.
    """

    def __init__(self, optimizer: ID3AdamW) -> None:
        self._state = optimizer.state_dict()
        dense = members(optimizer.param_groups, dense=True)
        self._dense = [Patch(p, None, p.detach().clone()) for _, _, p in dense]

    def restore(self, optimizer: ID3AdamW) -> None:
        """Undoes all steps since, bit for bit: mutates the parameters and the optimizer, but not its `lr`.

        Raises ValueError where the optimizer does not keep originals.
        """
        if not optimizer.method.keep_originals:
            raise ValueError(
                "auto_find_batch_size: needs keep_originals=True to undo the steps of a larger batch"
            )
        write([Patch(p, at, values) for p, at, values in optimizer.touched() if at.numel()] + self._dense)
        groups = zip(self._state["param_groups"], optimizer.param_groups, strict=True)
        groups = [{**before, "lr": now["lr"]} for before, now in groups]
        optimizer.load_state_dict({**self._state, "param_groups": groups})


class Attempt:
    """A run with `auto_find_batch_size`, and the way back where memory runs out after it has stepped.

    The Trainer leaves weights and optimizer as they are, and begins again with a smaller batch.
    batch_size: of all processes together.
    """

    def __init__(self, optimizer: ID3AdamW, batch_size: int) -> None:
        self.batch_size, self.stepped = batch_size, False
        self._steps_before = optimizer.steps_done
        self._beginning = Beginning(optimizer) if self._steps_before == 0 else None

    def retry(self, optimizer: ID3AdamW, batch_size: int) -> None:
        """Undoes the steps of the larger batch. Raises ValueError where this is not possible."""
        if self.stepped and self._beginning is None:
            raise ValueError(
                f"auto_find_batch_size: expected memory for batches of {self.batch_size} in a run that began "
                f"with {self._steps_before} steps done, got too little after another step, which cannot be "
                "undone; resume in a new Trainer with auto_find_batch_size=False and a smaller batch"
            )
        if self.stepped:
            self._beginning.restore(optimizer)
        self.batch_size, self.stepped = batch_size, False


def numbers_to_log(optimizer: ID3AdamW) -> dict[str, float]:
    """Numbers about the active set, in O(|Λ|).

    `n_active` (|Λ|), `n_changed` (entries that differ from the pre-trained model; only where originals are
    kept), `tensor_sparsity` and `sparsity_entropy` (see `id3_optim.analysis`). Of the newest selection's
    scores, if it found any: the smallest as `threshold`, and the 10th, 50th and 90th percentile (nearest
    rank) as `score_q10`, `score_q50`, `score_q90`; not where other ranks hold some of them.
    """
    numbers = {
        "n_active": optimizer.n_active,
        "tensor_sparsity": tensor_sparsity(optimizer),
        "sparsity_entropy": sparsity_entropy(optimizer),
    }
    changed, newest = count_changed(optimizer), optimizer.last_selection
    if changed is not None:
        numbers["n_changed"] = changed
    if newest is not None and 0 < newest.count == newest.scores.numel():
        ranked = newest.scores.sort().values
        at = [round(share * (ranked.numel() - 1)) for share in (0.0, 0.1, 0.5, 0.9)]
        names = ("threshold", "score_q10", "score_q50", "score_q90")
        numbers |= zip(names, ranked[at].tolist(), strict=True)
    return numbers
