"""The sender of a weight stream: updates from the last acknowledged step of a run to the present one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from id3_kernels import Entries

from .. import pieces
from ..distributed.part import is_split
from ..wrappers import check_holds, check_trained, plain_names, unwrapped
from .coordinates import checkpoint_parts, located
from .file import Change
from .fingerprint import fingerprints
from .patches import check_param
from .rows import Kind, Memory, Rows, kinds_of
from .update import WeightUpdate
from .values import check_finite


class WeightStream:
    """The changes of a run, step by step, for copies of the model on inference servers.

    The stream remembers the values that the last acknowledged update left at the entries that the optimizer
    trains: 4 bytes and a value per entry, no copy of the model. Before the first acknowledgement these are
    the values that training began with. Bits that training did not change are not sent.

    model, optimizer: the model and the ID3AdamW that trains it, or a wrapper that holds one. Names, shapes
    and indices of updates are those of the model's checkpoint (`save_pretrained` of transformers, which keeps
    the experts of a layer apart); in other models, those of its parameters. Dense groups are copied here.

    Raises ValueError for an optimizer with keep_originals=False, a parameter that the model lacks, and a
    DTensor; TypeError for another optimizer. A stream made after a dense group's first step needs its saved
    state. Where the model is moved or cast, or the optimizer gets a param group, `next` raises ValueError:
    make a stream anew, and load the state of this one.
    """

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self.optimizer, names = unwrapped(optimizer), plain_names(model)
        check_trained(names, self.optimizer)
        if not self.optimizer.method.keep_originals:
            raise ValueError("optimizer: expected keep_originals=True, got keep_originals=False")
        groups = self.optimizer.param_groups
        check_holds(names, (p for group in groups for p in group["params"] if p.requires_grad))
        params = {names[id(p)]: p for group in groups for p in group["params"] if id(p) in names}
        for name, param in params.items():
            _check_whole(name, param)
        self._names, self._parts, self._kinds = names, checkpoint_parts(model), kinds_of(params)
        self._memory = Memory(params, "stream", "make a stream anew, and load the state of this one")
        whole = ((n, p) for n in params for p in self._parts[n] if p.is_all_of(params[n]))
        self._whole = dict(whole)  # parameter name → the weight that is the whole parameter
        dense = [p for group in groups if group.get("dense") for p in group["params"]]
        self._dense = {names[id(p)]: p.detach().reshape(-1).clone() for p in dense}
        self._dense_known = self.optimizer.steps_done == 0 or not dense
        self._known = [Rows.empty(kind.tensors) for kind in self._kinds]
        self.step, self.checksum = 0, 0  # of the last acknowledged update
        self._pending: tuple[WeightUpdate, list[Rows]] | None = None

    @torch.no_grad()
    def next(self, full: bool = False, allow_nonfinite: bool = False) -> WeightUpdate:
        """The update from the last acknowledged step to the present one.

        full: from the model that training began with, for a receiver that has lost its place or starts anew.
        The stream does not move on: `acknowledge` the update when a receiver has applied it. Synchronises
        with a GPU. Raises DeltaError for values that are NaN or infinite, without allow_nonfinite; ValueError
        for a parameter that the checkpoint keeps in a form that is no view of it.
        """
        self._memory.check()
        step, checksum = (0, 0) if full else (self.step, self.checksum)
        pieces, held, finite = {}, [], True
        for kind, known, original in zip(self._kinds, self._known, self._originals(), strict=True):
            base = original if full else known.joined(original)
            now = base.held(kind.tensors)
            held.append(now)
            changed = base.changed(now.values)
            finite = finite and bool(changed[2].isfinite().all())
            pieces |= self._in_checkpoint(kind.names, *changed)
        changes = {name: Change(p.shape, p.after.dtype, p.indices, p.after) for name, p in pieces.items()}
        if not (finite or allow_nonfinite):
            check_finite(changes)
        rows = {name: (p.indices, p.before, p.after) for name, p in pieces.items()}
        before, after = fingerprints(rows) if rows else (0, 0)
        unchanged = sum(rows.values.numel() for rows in held) - sum(p.after.numel() for p in pieces.values())
        target = (checksum - before + after) % 2**64
        done = self.optimizer.steps_done
        update = WeightUpdate(step, done, checksum, target, changes, before, unchanged)
        self._pending = update, [rows.clone() for rows in held]
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
        known = [self._by_name(*pair) for pair in zip(self._kinds, self._known, strict=True)]
        dense = {name: values.clone() for name, values in self._dense.items()}
        rows = {name: row for kind in known for name, row in kind.items()}
        return {"step": self.step, "checksum": f"{self.checksum:016x}", "known": rows, "dense": dense}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues the chain of a saved stream, in a run that resumed from the same checkpoint.

        Raises ValueError, before anything changes, for a parameter that the optimizer does not train, or
        another dtype or size.
        """
        for name, row in state["known"].items():
            self._check_saved(name, row["indices"], row["values"])
        dense = {name: (v.numel(), v.dtype) for name, v in state["dense"].items()}
        own = {name: (v.numel(), v.dtype) for name, v in self._dense.items()}
        if dense != own:
            raise ValueError(f"dense: expected the dense groups' {own}, got {dense}")
        saved, known = state["known"], []
        for names, tensors in self._kinds:
            found = {i: saved[name] for i, name in enumerate(names) if name in saved}
            rows = {i: (row["indices"], row["values"]) for i, row in found.items()}
            known.append(Rows.of(tensors, rows).clone())
        self.step, self.checksum, self._known = int(state["step"]), int(state["checksum"], 16), known
        self._dense = {name: v.to(self._dense[name].device, copy=True) for name, v in state["dense"].items()}
        self._dense_known, self._pending = True, None

    def _check_saved(self, name: str, indices: Tensor, values: Tensor) -> None:
        found = [t for kind in self._kinds for n, t in zip(*kind, strict=True) if n == name]
        if not found:
            raise ValueError(f"{name}: expected a parameter that the optimizer trains, got another name")
        (param,) = found
        inside = indices.numel() == 0 or (indices[0] >= 0 and indices[-1] < param.numel())
        ascending = indices.dtype == torch.int32 and bool((indices.diff() > 0).all())
        if not (inside and ascending) or values.dtype != param.dtype or values.shape != indices.shape:
            expected = f"ascending int32 below {param.numel()} with as many {param.dtype} values"
            raise ValueError(f"{name}: expected {expected}, got {values.dtype} {tuple(values.shape)}")

    @staticmethod
    def _by_name(kind: Kind, rows: Rows) -> dict[str, dict[str, Tensor]]:
        parts = zip(kind.names, rows.entries.lists(), rows.values.split(rows.counts()), strict=True)
        return {n: {"indices": i.clone(), "values": v.clone()} for n, i, v in parts if i.numel()}

    def _originals(self) -> Iterator[Rows]:
        """The entries that the optimizer trains, with the values that training began with, for each kind."""
        if not self._dense_known:
            raise ValueError("stream: expected its making before the first step of a dense group, got it "
                             "later, without the values before training; load its state")  # fmt: skip
        rows = {
            self._names[id(touched.param)]: (touched.indices, touched.originals)
            for touched in self.optimizer.touched()
            if touched.indices.numel()
        }
        self._check_groups(rows)
        for name, values in self._dense.items():
            rows[name] = torch.arange(values.numel(), dtype=torch.int32, device=values.device), values
        for names, tensors in self._kinds:
            yield Rows.of(tensors, {i: rows[name] for i, name in enumerate(names) if name in rows})

    def _check_groups(self, rows: Iterable[str]) -> None:
        """Raises ValueError for a trained parameter that the optimizer did not have at first."""
        groups = (group for group in self.optimizer.param_groups if group.get("dense"))
        dense = {self._names[id(p)] for group in groups for p in group["params"]}
        known = {name for kind in self._kinds for name in kind.names}
        for name in [*(dense - self._dense.keys()), *(name for name in rows if name not in known)]:
            raise ValueError(
                f"{name}: expected a parameter that the optimizer had when the stream was made, got one of "
                "a later param group; make a stream anew, and load the state of this one"
            )

    def _in_checkpoint(
        self, names: list[str], entries: Entries, before: Tensor, after: Tensor
    ) -> dict[str, _Piece]:
        """The changed entries by the checkpoint's names, on the CPU."""
        entries, before, after = Entries(*(t.cpu() for t in entries)), before.cpu(), after.cpu()
        found, counts = {}, entries.offsets.diff().tolist()
        columns = (column.split(counts) for column in (entries.indices, before, after))
        for name, indices, old, new in zip(names, *columns, strict=True):
            if indices.numel() == 0:
                continue
            if (part := self._whole.get(name)) is not None:
                found[part.name] = _Piece(part.shape, indices, old, new)
                continue
            if not self._parts[name]:
                raise ValueError(f"{name}: expected a parameter whose checkpoint holds views of it, got a "
                                 "conversion that copies; freeze it, or send the whole model")  # fmt: skip
            for part, selected, flat in located(self._parts[name], indices):
                found[part.name] = _Piece(part.shape, flat, old[selected], new[selected])
        return found


def _check_whole(name: str, param: Tensor) -> None:
    if is_split(param):
        raise ValueError(f"{name}: expected a whole parameter, got a DTensor; use weight_patches")
    if param.numel() > pieces.LARGEST:
        raise ValueError(
            f"{name}: expected at most {pieces.LARGEST} entries, got {param.numel()}; use weight_patches"
        )
    check_param(name, param)


class _Piece(NamedTuple):
    """Changed entries of one weight of the checkpoint, with the values before and after."""

    shape: tuple[int, ...]
    indices: Tensor
    before: Tensor
    after: Tensor
