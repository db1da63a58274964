"""Interleaved timing: every method runs once a round, so that the machine's noise reaches all alike."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import quantiles

import torch

# Twice the last-level cache of most machines: no method finds there what the method before it left.
_FLUSH_BYTES = 128 << 20


@dataclass
class Timed:
    """One method of a case: `run` is timed; `prepare`, untimed, restores the state that `run` starts from.

    per_run: how often `run` does the measured thing; `seconds` are those of one. touch: runs,
    untimed, behind the flush, and leaves in the caches what `run` is to find there.
    """

    run: Callable[[], object]
    prepare: Callable[[], object] | None = None
    max_rounds: int | None = None
    per_run: int = 1
    touch: Callable[[], object] | None = None
    seconds: list[float] = field(default_factory=list)


class Flush:
    """Calling it writes more bytes than the caches hold."""

    def __init__(self):
        self._bytes = torch.empty(_FLUSH_BYTES, dtype=torch.uint8)

    def __call__(self) -> None:
        self._bytes.fill_(1)


class Interleaved:
    """Runs the methods of one case in turns. The caller times the subject: `ready()`, then its `run`."""

    def __init__(self, methods: dict[str, Timed], subject: str):
        self.methods = methods
        self.subject = methods[subject]
        self._flush = Flush()

    def _prepare(self, method: Timed) -> None:
        if method.prepare is not None:
            method.prepare()
        self._flush()
        if method.touch is not None:
            method.touch()

    def ready(self) -> None:
        """Time every method but the subject once, then prepare the subject."""
        for method in self.methods.values():
            enough = method.max_rounds is not None and len(method.seconds) >= method.max_rounds
            if method is self.subject or enough:
                continue
            self._prepare(method)
            begin = time.perf_counter()
            method.run()
            method.seconds.append((time.perf_counter() - begin) / method.per_run)
        self._prepare(self.subject)

    def warm_up(self) -> None:
        """One untimed turn of everything quick: compiles, page faults, lazily made state."""
        for method in self.methods.values():
            if method.max_rounds is None:
                self._prepare(method)
                method.run()


def summary(seconds: list[float]) -> dict[str, float]:
    """p20, median and p80 in milliseconds, and the number of rounds."""
    cuts = quantiles(seconds, n=10, method="inclusive") if len(seconds) > 1 else seconds * 9
    p20, median, p80 = (round(cuts[i] * 1e3, 4) for i in (1, 4, 7))
    return {"p20_ms": p20, "median_ms": median, "p80_ms": p80, "rounds": len(seconds)}
