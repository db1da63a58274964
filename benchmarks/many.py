"""`python -m benchmarks many`: steps and states of very many small tensors, beside torch's fused AdamW."""

import argparse
import statistics
import time

import torch

from benchmarks.gate import check_selection
from benchmarks.measure import Interleaved, Timed
from benchmarks.ours import Ours
from benchmarks.render import Bar, bar_rows, bars_table, number, table
from benchmarks.rivals import DenseAdamW
from benchmarks.shapes import Inputs

SIZES = (10_000, 50_000)
ENTRIES = 16  # of each tensor
LIMIT = 3.0  # of the first step over AdamW's
EXP = 1.0
WHATS = ("first step", "later step", "state_dict", "load_state_dict")


def many_inputs(n_tensors: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    weights, grads = (torch.randn(n_tensors, ENTRIES, generator=generator).unbind() for _ in range(2))
    return Inputs(f"{n_tensors:,} tensors", list(weights), list(grads))


def ours(inputs: Inputs) -> Ours:
    """A twentieth of the entries joins at the first step, as many again over the later ones."""
    return Ours(inputs, inputs.n_entries // 20, max(1, inputs.n_entries // 20_000), EXP)


class Side:
    """One optimizer `new` before its first step, one `old` after two steps, and the saved state of `old`."""

    def __init__(self, build, inputs: Inputs):
        self._build, self._inputs = build, inputs
        self.renew()
        self.old = self.new
        self.old.step()
        self.first = self.old.active() if hasattr(self.old, "active") else None
        self.old.step()
        self._saved = self.old.optimizer.state_dict()

    def renew(self) -> None:
        self.new = self._build(self._inputs)

    def load(self) -> None:
        self.new.optimizer.load_state_dict(self._saved)

    def timed(self, load_rounds: int | None = None) -> list[Timed]:
        """In the order of `WHATS`."""
        return [
            Timed(lambda: self.new.step(), self.renew),
            Timed(self.old.step),
            Timed(self.old.optimizer.state_dict),
            Timed(self.load, self.renew, max_rounds=load_rounds),
        ]


def check(side: Side, inputs: Inputs) -> None:
    """AssertionError where our first step did not choose what a sort does, or a loaded state lost entries."""
    check_selection(inputs, side.first.new_empty(0), side.first, EXP)
    side.renew()
    side.load()
    assert torch.equal(side.new.active(), side.old.active()), "load_state_dict lost entries"


def measure(n_tensors: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Median milliseconds of each of `WHATS`: ours and AdamW's, in interleaved rounds."""
    inputs = many_inputs(n_tensors)
    side = Side(ours, inputs)
    check(side, inputs)
    rival = Side(DenseAdamW, inputs).timed(load_rounds=1)  # torch's is quadratic in the number of tensors
    methods = dict(enumerate(side.timed() + rival))
    turns = Interleaved(methods, 0)
    turns.warm_up()
    for _ in range(rounds):
        turns.ready()
        begin = time.perf_counter()
        turns.subject.run()
        turns.subject.seconds.append(time.perf_counter() - begin)
    medians = [statistics.median(method.seconds) * 1e3 for method in methods.values()]
    return dict(zip(WHATS, zip(medians[: len(WHATS)], medians[len(WHATS) :], strict=True), strict=True))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks many", description=__doc__)
    parser.add_argument("--tensors", type=int, nargs="+", default=SIZES, help=f"of {ENTRIES} entries each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    lines, bars = [], []
    for n in options.tensors:
        medians = measure(n, options.rounds)
        for what, (own, adamw) in medians.items():
            lines.append([f"{n:,} tensors, {what}", f"{own:.1f}", f"{adamw:.1f}", number(own / adamw)])
        own, adamw = medians["first step"]
        bars.append(Bar(f"first step / AdamW(fused=True)'s, {n:,} tensors", LIMIT, own / adamw))
    print(table(["median", "ID3AdamW, ms", "AdamW(fused=True), ms", "ratio"], lines))
    print(bars_table(bar_rows(bars)))
