"""What a rank sends and holds: computed from the sizes of a run, checked in tests against counted bytes."""

from __future__ import annotations

from dataclasses import dataclass

from .choice import DIGIT_BITS, GATHERED

# A node of 8 H200 on NVLink, with a network card of 400 Gb/s for each GPU; a message's latency.
NODE, NVLINK_BYTES, NETWORK_BYTES, LATENCY_S = 8, 450e9, 50e9, 20e-6


@dataclass(frozen=True)
class Run:
    """A bfloat16 model of `entries` under FSDP2 over `ranks`, of which `budget` are trained in `steps` steps.

    tensors: the number of its parameters. The mask is taken as evenly spread over the ranks.
    """

    entries: int
    budget: int
    steps: int
    ranks: int
    tensors: int = 300

    @property
    def increment(self) -> int:
        """The entries that join in one step of the uniform schedule."""
        return -(-self.budget // self.steps)

    @property
    def _gathers(self) -> bool:
        return self.increment * self.ranks <= GATHERED

    @property
    def choice_messages(self) -> int:
        """Collective operations in one choice of entries."""
        if self.ranks == 1:
            return 0
        if self._gathers:
            return 1
        return -(-32 // DIGIT_BITS) + -(-(32 + self.tensors.bit_length()) // DIGIT_BITS)

    @property
    def choice_bytes(self) -> int:
        """What a rank sends for a choice, by rings: 12 bytes per candidate and rank, or histograms."""
        if self._gathers:
            return 12 * self.increment * (self.ranks - 1)
        return self.choice_messages * (8 << DIGIT_BITS) * 2 * (self.ranks - 1) // self.ranks

    @property
    def choice_seconds(self) -> float:
        """Predicted, not measured: latency per message and the bytes over the slowest link."""
        link = NVLINK_BYTES if self.ranks <= NODE else NETWORK_BYTES
        return self.choice_messages * LATENCY_S + self.choice_bytes / link

    @property
    def model_bytes(self) -> int:
        """What FSDP2 itself sends in a step: parameters gathered twice, gradients reduced once."""
        return 3 * 2 * self.entries * (self.ranks - 1) // self.ranks

    @property
    def state_bytes(self) -> int:
        """What the optimizer holds on a rank: indices, moments, master copies and originals."""
        return 18 * self.budget // self.ranks

    @property
    def weight_bytes(self) -> int:
        """The rank's part of the parameters and of their gradients."""
        return 2 * 2 * self.entries // self.ranks


@dataclass(frozen=True)
class Replicated:
    """The same model and budget in data parallelism by `process_group`, which selects in every K-th step.

    Bytes are what a replica sends by rings. Left out: lists of candidates, and a byte for each tensor.
    """

    entries: int
    budget: int
    ranks: int
    every: int = 16

    @property
    def wrapper_bytes(self) -> int:
        """What DistributedDataParallel sends in each step: bfloat16 gradients, twice."""
        return self._ring(2 * 2 * self.entries)

    @property
    def compact_bytes(self) -> int:
        """Between selections: float32 gradients of active entries, twice."""
        return self._ring(2 * 4 * self.budget)

    @property
    def selecting_bytes(self) -> int:
        """In a step that selects: bfloat16 blocks of each weight gradient, once, and active entries."""
        return self._ring(2 * self.entries) + self.compact_bytes

    @property
    def mean_bytes(self) -> int:
        """The mean over the K steps of a window."""
        return (self.selecting_bytes + (self.every - 1) * self.compact_bytes) // self.every

    def _ring(self, n: int) -> int:
        return n * (self.ranks - 1) // self.ranks


def replicas_table(sizes: tuple[float, ...] = (1e9, 7e9, 70e9), share: float = 0.001) -> list[str]:
    """Lines of a Markdown table for 8 ranks, with the whole budget active."""
    head = "| model | wrapper | between selections | step that selects | mean, K = 16 | mean, K = 64 |"
    lines = [head, "|---|---|---|---|---|---|"]
    for size in sizes:
        run, rare = (Replicated(int(size), int(size * share), 8, every) for every in (16, 64))
        sent = run.wrapper_bytes, run.compact_bytes, run.selecting_bytes, run.mean_bytes, rare.mean_bytes
        lines.append(f"| {size / 1e9:.0f}B | {' | '.join(map(_size, sent))} |")
    return lines


def table(sizes: tuple[float, ...] = (1e9, 7e9, 70e9), share: float = 0.001, steps: int = 1000) -> list[str]:
    """Lines of a Markdown table from 1 to 1024 ranks; `share` of the entries are trained in `steps` steps."""
    head = "| model | ranks | choice, sent per step | predicted | FSDP2's own, per step | state per rank |"
    lines = [head, "|---|---|---|---|---|---|"]
    for size in sizes:
        for ranks in (1, 2, 8, 64, 1024):
            run = Run(int(size), int(size * share), steps, ranks)
            sent, own, state = (_size(n) for n in (run.choice_bytes, run.model_bytes, run.state_bytes))
            took = f"{1e3 * run.choice_seconds:.2f} ms"
            lines.append(f"| {size / 1e9:.0f}B | {ranks} | {sent} | {took} | {own} | {state} |")
    return lines


def _size(n: int) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000 or unit == "GB":
            return f"{n:.0f} {unit}" if n >= 100 or unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
