"""A delta put on a model and taken off, once its file is read."""

import copy
import tempfile
from pathlib import Path

import torch
from torch import nn

from benchmarks.measure import Timed
from benchmarks.shapes import KNOWN, Inputs
from id3_optim import Delta, diff, load_delta

ENTRIES = 320_000


def model_of(inputs: Inputs) -> nn.Module:
    """Modules as deep as the names say, with copies of the weights."""
    root = nn.Module()
    for (name, _), weight in zip(KNOWN[inputs.model][0](), inputs.weights, strict=True):
        *path, last = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_parameter(last, nn.Parameter(weight.clone()))
    return root


def delta_of(model: nn.Module, seed: int = 0, entries: int = ENTRIES) -> Delta:
    """About `entries` random entries, the same share of every parameter, moved by one."""
    generator, tuned = torch.Generator().manual_seed(seed), copy.deepcopy(model)
    n_entries = sum(param.numel() for param in model.parameters())
    with torch.no_grad():
        for param in tuned.parameters():
            count = max(1, round(entries * param.numel() / n_entries))
            indices = torch.randint(param.numel(), (count,), generator=generator).unique()
            param.view(-1)[indices] += 1
    return diff(model, tuned, originals=False)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    words = torch.int32 if a.dtype == torch.float32 else torch.int16
    return a.dtype == b.dtype and torch.equal(a.view(words), b.view(words))


class Swap:
    """The model with the delta on or off; `on` and `off` do nothing where that is its state already."""

    def __init__(self, inputs: Inputs):
        self.model, self._undo = model_of(inputs), None
        with tempfile.TemporaryDirectory() as folder:
            delta_of(self.model).save(Path(folder) / "delta")
            self.delta = load_delta(Path(folder) / "delta")
        self._check(inputs)

    def on(self) -> None:
        self._undo = self._undo or self.delta.apply(self.model)

    def off(self) -> None:
        if self._undo is not None:
            self._undo.revert()
            self._undo = None

    def _check(self, inputs: Inputs) -> None:
        """On: the delta's values, and no other entry has moved. Off: every bit as before."""
        self.on()
        named = zip(self.model.named_parameters(), inputs.weights, strict=True)
        for (name, param), weight in named:
            expected, change = weight.clone(), self.delta.changes[name]
            expected.view(-1)[change.indices.long()] = change.values
            assert same_bits(param.detach(), expected), f"{name}: apply wrote something else"
        self.off()
        for param, weight in zip(self.model.parameters(), inputs.weights, strict=True):
            assert same_bits(param.detach(), weight), "revert left something else"


def timed_delta(swap: Swap) -> tuple[dict[str, Timed], int]:
    """apply and revert, each from where the other ends, and the number of entries."""
    timed = {"apply": Timed(swap.on, swap.off), "revert": Timed(swap.off, swap.on)}
    return timed, swap.delta.inspect()["entries"]
