"""The receiver of a weight stream: a model that follows a run, update by update."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .coordinates import part_views
from .file import DeltaError
from .fingerprint import fingerprint
from .patches import Patch, find_in, read, write
from .rows import Row, Rows, joined
from .update import WeightUpdate, checksum_after


class ResendNeeded(DeltaError):
    """The update does not continue from the receiver's weights, which stay: send `next(full=True)`."""


class WeightReceiver:
    """Follows a `WeightStream` with a copy of the model that training began with.

    `step` is the run's step that the weights are of, 0 at first. `checksum` is a number modulo 2^64 that
    identifies them: the fingerprint (`docs/delta-format.md`) of the entries that differ from the first model,
    less that of the first model at these entries. It is 0 for the first model, and an update changes it by
    its own entries alone. The receiver keeps the first model's values of each entry that an update changed:
    4 bytes and a value per entry.

    model: its parameters are changed in place, on any device; updates name the weights of its checkpoint.
    """

    def __init__(self, model: nn.Module) -> None:
        self.step, self.checksum = 0, 0
        self._weights = part_views(model)
        self._originals: Rows = {}

    @torch.no_grad()
    def apply_patch(self, update: WeightUpdate) -> None:
        """Brings the model from the update's base step to its target step, in O(entries).

        An update from step 0 applies at every step: entries that it lacks return to the first model's values.
        Raises ResendNeeded, and changes nothing, where another update is missing before this one, or the
        weights are not those of the update's base; DeltaError for a name, shape or dtype of another model.
        """
        full = update.base_step == 0 and update.base_checksum == 0
        if not full:
            self._check_base(update)
        patches = find_in(self._weights, update.changes)
        held = self._first_values(patches) if full else _rows(patches, read(list(patches.values())))
        target = checksum_after(update.base_checksum, fingerprint(held), update.changes)
        if target != update.target_checksum:
            raise ResendNeeded(f"target_checksum: expected {update.target_checksum:016x} at step "
                               f"{update.target_step}, got {target:016x}: the update is damaged, or its "
                               "base has other weights; send next(full=True)")  # fmt: skip
        if full:
            self.reset()
        write(list(patches.values()))
        self._originals = joined(self._originals, held)
        self.step, self.checksum = update.target_step, update.target_checksum

    @torch.no_grad()
    def reset(self) -> None:
        """Puts the first model's values back bit for bit: step 0."""
        write([Patch(self._weights[name], *row) for name, row in self._originals.items()])
        self._originals, self.step, self.checksum = {}, 0, 0

    def _check_base(self, update: WeightUpdate) -> None:
        if update.base_step != self.step:
            raise ResendNeeded(f"base_step: expected {self.step}, which the weights are of, got "
                               f"{update.base_step}; send next(full=True)")  # fmt: skip
        if update.base_checksum != self.checksum:
            raise ResendNeeded(f"base_checksum: expected {self.checksum:016x} at step {self.step}, got "
                               f"{update.base_checksum:016x}, another run; send next(full=True)")  # fmt: skip

    def _first_values(self, patches: dict[str, Patch]) -> Rows:
        """The first model's values at the entries of the patches."""
        now = _rows(patches, read(list(patches.values())))
        known = joined(self._originals, now)
        return {name: Row(row.indices, _at(known[name], row.indices)) for name, row in now.items()}


def _rows(patches: dict[str, Patch], held: list[Patch]) -> Rows:
    pairs = zip(patches.items(), held, strict=True)
    return {name: Row(patch.indices.to(now.values.device), now.values) for (name, patch), now in pairs}


def _at(row: Row, indices: Tensor) -> Tensor:
    """The row's values at some of its indices."""
    return row.values[torch.searchsorted(row.indices, indices)]
