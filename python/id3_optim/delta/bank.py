"""Many deltas of one model in memory, one at a time on the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..wrappers import plain_names, plain_parameters
from .delta import Delta
from .patches import Patch, find, read, write
from .rows import Memory, Rows, kinds_of
from .values import check_finite

Request, Answer = TypeVar("Request"), TypeVar("Answer")


class _Held(NamedTuple):
    """A delta on the model's devices: for each kind its sparse values; whole parameters as patches."""

    sparse: list[
        tuple[int, Rows, Tensor]
    ]  # (kind, the delta's values, the base's values at the same entries)
    whole: list[tuple[Patch, Patch]]  # (the delta's, the base's)


class DeltaBank:
    """Deltas of one base model by name, ready to be put on it.

    Beside each delta the bank holds the base's values at its entries, so that a switch reads no file, checks
    nothing and costs the entries of the delta that leaves and of the one that comes. Between two deltas the
    model is the base, bit for bit. Nothing else may write to the entries meanwhile.

    model: the base; its parameters are changed in place, on any device. One request at a time may use it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.active = model, None
        params = {name: plain_parameters(model)[name] for name in plain_names(model).values()}
        self._kinds = kinds_of(params)
        self._memory = Memory(params, "bank", "make a bank of the base anew, and add the deltas")
        self._held: dict[str, _Held] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def __len__(self) -> int:
        return len(self._held)

    @torch.no_grad()
    def add(
        self,
        name: str,
        delta: Delta,
        strict: bool = True,
        cast: bool = False,
        allow_nonfinite: bool = False,
    ) -> None:
        """Takes a delta under a name, with the checks of `Delta.apply`, whose arguments these are.

        The delta in use stays in use. Raises ValueError for a name that is taken, DeltaError as
        `Delta.apply` does.
        """
        if name in self._held:
            raise ValueError(f"name: expected one that is free, got {name!r}; remove that delta first")
        with self.using(None):
            delta = delta.cast(self.model, strict) if cast else delta
            if not allow_nonfinite:
                check_finite(delta.changes)
            placed = find(self.model, delta.changes, strict)
            previous = read(list(placed.values()))
            if strict:
                delta.check_base(list(placed), previous)
            self._held[name] = self._hold(placed, previous)

    def remove(self, name: str) -> None:
        """Forgets a delta, and takes it off the model where it is in use. Raises KeyError as `use`."""
        self._check(name)
        if self.active == name:
            self.use(None)
        del self._held[name]

    @torch.no_grad()
    def use(self, name: str | None) -> None:
        """Puts a delta on the model and takes off the one in use; None: the base.

        Raises KeyError for a name that the bank does not hold, ValueError where the model was moved or cast
        after the bank was made.
        """
        if name is not None:
            self._check(name)
        self._memory.check()
        if name == self.active:
            return
        if self.active is not None:
            self._write(self._held[self.active], base=True)
        self.active = None
        if name is not None:
            self._write(self._held[name], base=False)
        self.active = name

    @contextmanager
    def using(self, name: str | None) -> Iterator[nn.Module]:
        """`with bank.using(name):` has that delta on the model for the block, then again the one before."""
        before = self.active
        self.use(name)
        try:
            yield self.model
        finally:
            self.use(before)

    def serve(
        self,
        requests: Sequence[tuple[str | None, Request]],
        run: Callable[[list[Request]], Sequence[Answer]],
    ) -> list[Answer]:
        """Answers a mixed batch with one call of `run` for each delta, and one switch between two calls.

        requests: (name of a delta or None, request). run: the requests of one delta, which is on the model,
        → as many answers. Returns the answers in the order of the requests. The delta in use comes first,
        and the last one stays in use. Raises KeyError for a name that the bank does not hold, before the
        first call, and ValueError for another number of answers.
        """
        groups: dict[str | None, list[int]] = {}
        for i, (name, _) in enumerate(requests):
            groups.setdefault(name, []).append(i)
        for name in groups:
            if name is not None:
                self._check(name)
        answers: list[Any] = [None] * len(requests)
        for name in sorted(groups, key=lambda name: name != self.active):
            self.use(name)
            members = groups[name]
            given = run([requests[i][1] for i in members])
            if len(given) != len(members):
                raise ValueError(f"run: expected {len(members)} answers for {name!r}, got {len(given)}")
            for i, answer in zip(members, given, strict=True):
                answers[i] = answer
        return answers

    def _check(self, name: str) -> None:
        if name not in self._held:
            raise KeyError(f"name: expected one of {sorted(self._held)}, got {name!r}")

    def _hold(self, placed: dict[str, Patch], previous: list[Patch]) -> _Held:
        pairs = list(zip(placed.values(), previous, strict=True))
        by_memory = {_memory(new.param): (new, old) for new, old in pairs if new.indices is not None}
        known = {_memory(tensor) for _, tensors in self._kinds for tensor in tensors}
        if unknown := [name for name, new in placed.items() if _memory(new.param) not in known]:
            raise ValueError(
                f"{unknown[0]}: expected whole parameters in the bank's deltas, got a part of one; "
                "Delta.apply takes it"
            )
        sparse = []
        for _, tensors in self._kinds:
            found = {i: by_memory[_memory(t)] for i, t in enumerate(tensors) if _memory(t) in by_memory}
            if found:
                new = Rows.of(tensors, {i: (p.indices, p.values) for i, (p, _) in found.items()})
                old = Rows.of(tensors, {i: (p.indices, q.values) for i, (p, q) in found.items()})
                sparse.append((tensors, new, old._replace(entries=new.entries)))
        whole = [(new, old) for new, old in pairs if new.indices is None]
        copies = [new._replace(values=new.values.to(new.param.device, copy=True)) for new, _ in whole]
        return _Held(sparse, list(zip(copies, (old for _, old in whole), strict=True)))

    def _write(self, held: _Held, base: bool) -> None:
        for tensors, new, old in held.sparse:
            (old if base else new).write(tensors)
        write([pair[1 if base else 0] for pair in held.whole])


def _memory(tensor: Tensor) -> tuple[int, int]:
    """Equal for a parameter and what is found of it by its name: where it begins and how far it reaches."""
    return tensor.data_ptr(), tensor.numel()
