"""One side of `benchmarks.against`: requests and replies as lines of JSON on stdin and stdout."""

import gc
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from benchmarks.cases import DTYPES, Case, start_methods, step_cases
from benchmarks.deltas import Swap, timed_delta
from benchmarks.measure import Flush, Timed
from benchmarks.shapes import MODELS, make_inputs


def _steps(size: str) -> dict[str, Case]:
    """The step cases of a size by name: "tiny", "quick" or "full"."""
    if size == "tiny":
        plain = Case("tiny", budget=0.05)
        cases = [plain, replace(plain, dtype="bfloat16"), replace(plain, exp=0.7)]
    else:
        cases = step_cases(size == "quick")
    return {f"step {case}": replace(case, rivals=()) for case in cases}


def _deltas(size: str) -> dict[str, tuple[str, str]]:
    """Apply and revert by name: the model and the dtype."""
    model = {"tiny": "tiny", "quick": "MiniLM-L6", "full": list(MODELS)[-1]}[size]
    return {f"delta {model}-{dtype}": (model, dtype) for dtype in DTYPES}


SIZES = ("tiny", "quick", "full")
STEPS = {name: case for size in SIZES for name, case in _steps(size).items()}
DELTAS = {name: case for size in SIZES for name, case in _deltas(size).items()}


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """A hash of all bits."""
    total = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        total.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return total.hexdigest()


class Side:
    """The methods of one case at a time. Each public method answers the request of its name."""

    def __init__(self):
        self._flush, self._timed = Flush(), {}
        self._tensors: Callable[[], Iterable[torch.Tensor]] = list

    def cases(self, size: str) -> list[str]:
        return [*_steps(size), *_deltas(size)]

    def prepare(self, name: str) -> list[str]:
        """Build the case, past its gate, run every method once; returns the methods' names."""
        self._timed, self._tensors = {}, list
        gc.collect()
        if name in STEPS:
            self._start_step(STEPS[name])
        else:
            self._start_delta(*DELTAS[name])
        for method in self._timed:
            self.time(method)
        return list(self._timed)

    def _start_step(self, case: Case) -> None:
        ours = start_methods(case, make_inputs(case.model, DTYPES[case.dtype]))["id3"]
        self._timed = {"id3": Timed(ours.step)}
        self._tensors = lambda: [*ours.params, ours.active()]

    def _start_delta(self, model: str, dtype: str) -> None:
        swap = Swap(make_inputs(model, DTYPES[dtype]))
        self._timed, _ = timed_delta(swap)
        self._tensors = swap.model.parameters

    def time(self, method: str) -> float:
        """Seconds of one run, after its preparation and with flushed caches."""
        timed = self._timed[method]
        if timed.prepare is not None:
            timed.prepare()
        self._flush()
        begin = time.perf_counter()
        timed.run()
        return time.perf_counter() - begin

    def digest(self) -> str:
        """Of the weights, and of a step's active entries: equal where both sides compute the same bits."""
        return digest(self._tensors())


def main() -> None:
    """Answer requests `[name, argument …]` until stdin ends."""
    gc.disable()
    side = Side()
    requests = {"cases": side.cases, "prepare": side.prepare, "time": side.time, "digest": side.digest}
    for line in sys.stdin:
        name, *words = json.loads(line)
        print(json.dumps(requests[name](*words)), flush=True)
