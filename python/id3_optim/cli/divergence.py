"""A run that diverged is no success: the watch over the losses of `id3-optim train`."""

import math

import torch
import transformers

from ..distributed.part import local
from ..ranks import largest

LASTS = 3  # steps in a row without a finite loss: one alone can come from one batch


class Diverged(ValueError):
    """Training has left the finite numbers, and more steps do not bring it back."""


class FiniteLoss(transformers.TrainerCallback):
    """Raises `Diverged` after `LASTS` steps in a row whose loss is not finite, or for weights to be saved.

    `see` gets the loss of each batch: the Trainer's log has means of several steps, without the losses that
    are not finite. Put the callback before those that save.
    """

    def __init__(self) -> None:
        self.steps: list[int] = []  # the newest row of steps, counted from 1, with a loss that is not finite
        self.loss = 0.0  # of the newest such step
        self.begun = False  # the checkpoint, where there is one, is loaded: its random numbers last

    def on_step_begin(self, args, state, control, **kwargs):
        self.begun = True

    def see(self, step: int, loss: torch.Tensor) -> None:
        """Takes the loss of one batch of a step."""
        value = float(loss)
        if math.isfinite(value):
            return
        if self.steps and self.steps[-1] < step - 1:
            self.steps = []
        if step not in self.steps:
            self.steps, self.loss = [*self.steps, step], value
        if len(self.steps) == LASTS:
            raise Diverged(
                f"loss: expected finite numbers, got {self.loss} in steps {self.steps[0]} to {step}; "
                "a lower --lr may help"
            )

    def finite(self, step: int) -> bool:
        """Whether all losses of a step were finite."""
        return step not in self.steps

    def on_save(self, args, state, control, model=None, **kwargs):
        self.check(model, f"after step {state.global_step}")

    def check(self, model: torch.nn.Module, when: str) -> None:
        """Raises `Diverged`, on all processes, where a parameter of the model is not finite."""
        names, params = zip(*model.named_parameters(), strict=True)
        wrong = torch.stack([(~torch.isfinite(local(p))).any() for p in params])
        for i in largest(wrong.int()).nonzero().flatten().tolist():
            raise Diverged(
                f"{names[i]}: expected finite weights, got infinity or nan {when}; a lower --lr may help"
            )

    def check_end(self, model: torch.nn.Module, steps: int, eval_loss: float) -> None:
        """Raises `Diverged` where the run has ended and its model gives no finite loss."""
        self.check(model, f"after step {steps}, the last")
        if not math.isfinite(eval_loss):
            raise Diverged(
                f"loss: expected a finite number on --eval, got {eval_loss} after step {steps}, the last; "
                "a lower --lr may help"
            )
