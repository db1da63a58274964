"""The receiver of a weight stream: a model that follows a run, update by update."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from .coordinates import part_views
from .file import Change, DeltaError
from .fingerprint import fingerprints
from .patches import find_in
from .rows import Kind, Memory, Rows, kinds_of
from .update import WeightUpdate


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
        self._kinds = kinds_of(self._weights)
        remedy = "make a receiver of the first model, and send it next(full=True)"
        self._memory = Memory(dict(model.named_parameters()), "receiver", remedy)
        self._originals = [Rows.empty(kind.tensors) for kind in self._kinds]

    @torch.no_grad()
    def apply_patch(self, update: WeightUpdate) -> None:
        """Brings the model from the update's base step to its target step, in O(entries).

        An update from step 0 applies at every step: entries that it lacks return to the first model's values.
        Raises ResendNeeded, and changes nothing, where another update is missing before this one, or the
        weights are not those of the update's base; DeltaError for a name, shape or dtype of another model;
        ValueError where the model was moved or cast after the receiver was made.
        """
        self._memory.check()
        full = update.base_step == 0 and update.base_checksum == 0
        if not full:
            self._check_base(update)
        find_in(self._weights, update.changes)
        new = [_rows(kind, update.changes) for kind in self._kinds]
        held = [rows.held(kind.tensors) for kind, rows in zip(self._kinds, new, strict=True)]
        if full:
            pairs = zip(self._originals, held, strict=True)
            held = [first.joined(now).at(now.entries) for first, now in pairs]
        self._check_target(update, held)
        if full:
            self.reset()
        for kind, rows in zip(self._kinds, new, strict=True):
            rows.write(kind.tensors)
        self._originals = [o.joined(now) for o, now in zip(self._originals, held, strict=True)]
        self.step, self.checksum = update.target_step, update.target_checksum

    @torch.no_grad()
    def reset(self) -> None:
        """Puts the first model's values back bit for bit: step 0. Raises ValueError as `apply_patch`."""
        self._memory.check()
        for kind, rows in zip(self._kinds, self._originals, strict=True):
            rows.write(kind.tensors)
        self._originals = [Rows.empty(kind.tensors) for kind in self._kinds]
        self.step, self.checksum = 0, 0

    def _check_target(self, update: WeightUpdate, held: list[Rows]) -> None:
        """held: the base's values at the update's entries."""
        rows = {}
        for kind, now in zip(self._kinds, held, strict=True):
            for name, values in zip(kind.names, now.values.split(now.counts()), strict=True):
                if values.numel():
                    change = update.changes[name]
                    rows[name] = change.indices, values.cpu(), change.values
        before, after = fingerprints(rows) if rows else (0, 0)
        target = (update.base_checksum - before + after) % 2**64
        if target != update.target_checksum:
            raise ResendNeeded(f"target_checksum: expected {update.target_checksum:016x} at step "
                               f"{update.target_step}, got {target:016x}: the update is damaged, or its "
                               "base has other weights; send next(full=True)")  # fmt: skip

    def _check_base(self, update: WeightUpdate) -> None:
        if update.base_step != self.step:
            raise ResendNeeded(f"base_step: expected {self.step}, which the weights are of, got "
                               f"{update.base_step}; send next(full=True)")  # fmt: skip
        if update.base_checksum != self.checksum:
            raise ResendNeeded(f"base_checksum: expected {self.checksum:016x} at step {self.step}, got "
                               f"{update.base_checksum:016x}, another run; send next(full=True)")  # fmt: skip


def _rows(kind: Kind, changes: Mapping[str, Change]) -> Rows:
    found = ((i, changes[name]) for i, name in enumerate(kind.names) if name in changes)
    return Rows.of(kind.tensors, {i: (change.indices, change.values) for i, change in found})
