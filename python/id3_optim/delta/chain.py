"""The sender of a weight stream: updates from the last acknowledged step of a run to the present one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..wrappers import check_holds, check_trained, plain_names, unwrapped
from .coordinates import Part, checkpoint_parts
from .file import Change
from .fingerprint import bits, fingerprint
from .patches import Patch, check_param, read
from .rows import Row, Rows, joined
from .update import WeightUpdate, checksum_after
from .values import check_finite


class WeightStream:
    """The changes of a run, step by step, for copies of the model on inference servers.

    The stream remembers the values that the last acknowledged update left at the entries that the optimizer
    trains: 4 bytes and a value per entry, no copy of the model. Before the first acknowledgement these are
    the values that training began with. Bits that training did not change are not sent.

    model, optimizer: the model and the ID3AdamW that trains it, or a wrapper that holds one. Names, shapes
    and indices of updates are those of the model's checkpoint (`save_pretrained` of transformers, which keeps
    the experts of a layer apart); in other models, those of its parameters. Dense groups are copied here.

    Raises ValueError for an optimizer with keep_originals=False and for a parameter that the model lacks;
    TypeError for another optimizer. A stream made after a dense group's first step needs its saved state.
    """

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self.optimizer, names = unwrapped(optimizer), plain_names(model)
        check_trained(names, self.optimizer)
        if not self.optimizer.method.keep_originals:
            raise ValueError("optimizer: expected keep_originals=True, got keep_originals=False")
        groups = self.optimizer.param_groups
        check_holds(names, (p for group in groups for p in group["params"] if p.requires_grad))
        self._params = {names[id(p)]: p for g in groups for p in g["params"] if id(p) in names}
        for name, param in self._params.items():
            check_param(name, param)
        self._names, self._parts = names, checkpoint_parts(model)
        dense = [p for group in groups if group.get("dense") for p in group["params"]]
        self._dense: Rows = {names[id(p)]: _whole(p) for p in dense}
        self._dense_known = self.optimizer.steps_done == 0 or not dense
        self._known: Rows = {}
        self.step, self.checksum = 0, 0  # of the last acknowledged update
        self._pending: tuple[WeightUpdate, Rows] | None = None

    @torch.no_grad()
    def next(self, full: bool = False, allow_nonfinite: bool = False) -> WeightUpdate:
        """The update from the last acknowledged step to the present one.

        full: from the model that training began with, for a receiver that has lost its place or starts anew.
        The stream does not move on: `acknowledge` the update when a receiver has applied it. Synchronises
        with a GPU. Raises DeltaError for values that are NaN or infinite, without allow_nonfinite; ValueError
        for a parameter that the checkpoint keeps in a form that is no view of it.
        """
        step, checksum, original = self.step, self.checksum, self._originals()
        base = original if full else joined(self._known, original)
        if full:
            step, checksum = 0, 0
        patches = [Patch(self._params[name], row.indices, row.values) for name, row in base.items()]
        held = {name: patch.values for name, patch in zip(base, read(patches), strict=True)}
        before, after = _changed(base, held)
        before, after = self._in_checkpoint(before), self._in_checkpoint(after)
        changes = {n: Change(part.shape, row.values.dtype, *row) for n, (part, row) in after.items()}
        if not allow_nonfinite:
            check_finite(changes)
        mark = fingerprint({name: row for name, (_, row) in before.items()})
        target = checksum_after(checksum, mark, changes)
        unchanged = sum(values.numel() for values in held.values())
        unchanged -= sum(change.values.numel() for change in changes.values())
        done = self.optimizer.steps_done
        update = WeightUpdate(step, done, checksum, target, changes, mark, unchanged)
        self._pending = update, {name: Row(row.indices.clone(), held[name]) for name, row in base.items()}
        return update

    def acknowledge(self, update: WeightUpdate) -> None:
        """Continues from the newest update of `next`, which a receiver has applied.

        Raises ValueError for another update: the receiver then needs `next(full=True)`.
        """
        newest = None if self._pending is None else self._pending[0]
        if update is not newest:
            expected = "none" if newest is None else f"the one to step {newest.target_step}"
            raise ValueError(f"update: expected the newest of next(), {expected}, got the one to step "
                             f"{update.target_step}; send next(full=True)")  # fmt: skip
        self.step, self.checksum, self._known = update.target_step, update.target_checksum, self._pending[1]
        self._pending = None

    def state_dict(self) -> dict[str, Any]:
        """The acknowledged step and values: save them with the optimizer's state, to continue the chain."""
        rows = {"known": self._known, "dense": self._dense}
        kept = {
            key: {n: {"indices": r.indices.clone(), "values": r.values.clone()} for n, r in row.items()}
            for key, row in rows.items()
        }
        return {"step": self.step, "checksum": f"{self.checksum:016x}", **kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues the chain of a saved stream, in a run that resumed from the same checkpoint.

        Raises ValueError, before anything changes, for a parameter that the optimizer does not train, or
        another dtype or size.
        """
        rows = {key: {n: self._loaded(n, row) for n, row in state[key].items()} for key in ("known", "dense")}
        if rows["dense"].keys() != self._dense.keys():
            raise ValueError(f"dense: expected the parameters of the dense groups, {sorted(self._dense)}, "
                             f"got {sorted(rows['dense'])}")  # fmt: skip
        self.step, self.checksum = int(state["step"]), int(state["checksum"], 16)
        self._known, self._dense, self._dense_known, self._pending = rows["known"], rows["dense"], True, None

    def _loaded(self, name: str, row: Mapping[str, Tensor]) -> Row:
        param = self._params.get(name)
        if param is None:
            raise ValueError(f"{name}: expected a parameter that the optimizer trains, got none of this name")
        indices, values = row["indices"], row["values"]
        inside = indices.numel() == 0 or (indices[0] >= 0 and indices[-1] < param.numel())
        ascending = indices.dtype == torch.int32 and bool((indices.diff() > 0).all())
        if not (inside and ascending) or values.dtype != param.dtype or values.shape != indices.shape:
            expected = f"ascending int32 below {param.numel()} with as many {param.dtype} values"
            raise ValueError(f"{name}: expected {expected}, got {values.dtype} {tuple(values.shape)}")
        return Row(indices.to(param.device, copy=True), values.to(param.device, copy=True))

    def _originals(self) -> Rows:
        """The entries that the optimizer trains, with the values that training began with."""
        if not self._dense_known:
            raise ValueError("optimizer: expected its first step after the stream was made, for the values of "
                             "dense groups, got a run that has begun; load its")  # fmt: skip
        rows = {
            self._names[id(touched.param)]: Row(touched.indices, touched.originals)
            for touched in self.optimizer.touched()
            if touched.indices.numel()
        }
        return rows | self._dense

    def _in_checkpoint(self, rows: Mapping[str, Row]) -> dict[str, tuple[Part, Row]]:
        """The rows by the checkpoint's names, on the CPU."""
        found = {}
        for name, row in rows.items():
            parts = self._parts[name]
            if not parts:
                raise ValueError(f"{name}: expected a parameter whose checkpoint holds views of it, got a "
                                 "conversion that copies; freeze it, or send the whole model")  # fmt: skip
            for part in parts:
                selected, flat = part.locate(row.indices)
                if flat.numel():
                    found[part.name] = part, Row(flat.cpu(), row.values[selected].cpu())
        return found


def _whole(param: Tensor) -> Row:
    indices = torch.arange(param.numel(), dtype=torch.int32, device=param.device)
    return Row(indices, param.detach().reshape(-1).clone())


def _changed(base: Mapping[str, Row], held: Mapping[str, Tensor]) -> tuple[Rows, Rows]:
    """The entries whose bits differ: with the base's values, and with those held now."""
    before, after = {}, {}
    for name, row in base.items():
        at = (bits(row.values) != bits(held[name])).nonzero().squeeze(1)
        if at.numel():
            indices = row.indices[at]
            before[name], after[name] = Row(indices, row.values[at]), Row(indices, held[name][at])
    return before, after
