"""One step of a weight stream: what changed between two steps of a run, and the forms that servers take."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import file
from .delta import Delta, load_delta
from .file import Change, DeltaError

KEY = "stream"  # in a delta file's settings
_NUMBERS = ("base_step", "target_step", "unchanged")
_CHECKSUMS = ("base_checksum", "target_checksum")


class SparseWeightPatch(NamedTuple):
    """The fields of vLLM's `SparseWeightPatch`: one weight in the coordinates of the checkpoint.

    indices: int32 [n], flat row-major, ascending. values: [n] of the weight's dtype, absolute. Both are
    contiguous, on the CPU. full_shape: the weight's shape in the checkpoint.
    """

    name: str
    indices: Tensor
    values: Tensor
    full_shape: tuple[int, ...]


class DeltaParam(NamedTuple):
    """The fields of verl's `DeltaParam`: a weight's part of a flush, in bytes of positions and in values."""

    name: str
    dtype: str
    shape: list[int]
    pos_start: int
    pos_end: int
    pos_width: int
    val_start: int
    val_end: int


class DeltaFlush(NamedTuple):
    """The fields of verl's `DeltaFlush`: all changed weights of one dtype in two tensors, on the CPU.

    positions_cpu: uint8, little-endian int32 flat indices. checksum: verl's, of both tensors.
    """

    encoding: str
    params: list[DeltaParam]
    positions_cpu: Tensor
    values_gpu: Tensor
    checksum: int

    def named_tensors(self) -> list[tuple[str, Tensor]]:
        """What verl's loader for SGLang takes: `__delta_spec__`, `__positions__` and `__values__`."""
        spec = {"encoding": self.encoding, "params": [p._asdict() for p in self.params]}
        text = json.dumps(spec | {"checksum": self.checksum}).encode()
        names = ("__delta_spec__", "__positions__", "__values__")
        spec_bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return list(zip(names, (spec_bytes, self.positions_cpu, self.values_gpu), strict=True))


@dataclass(frozen=True, eq=False)
class WeightUpdate:
    """The entries whose bits differ between two steps of a run, in the coordinates of the checkpoint.

    Made by `WeightStream.next` or `load_update`, applied by `WeightReceiver.apply_patch`. base_step,
    target_step: before and after, 0 being the model that training began with. base_checksum,
    target_checksum: of the weights at these steps (`WeightReceiver`). changes: the weight's name → Change,
    with absolute values. fingerprint: of the base's values at these entries. unchanged: how many entries the
    optimizer trains whose stored bits are those of the base, and which are left out.
    """

    base_step: int
    target_step: int
    base_checksum: int
    target_checksum: int
    changes: dict[str, Change]
    fingerprint: int
    unchanged: int

    @property
    def entries(self) -> int:
        """How many entries the update holds."""
        return sum(change.values.numel() for change in self.changes.values())

    def save(self, path: str | os.PathLike, compact: bool = True) -> None:
        """Writes a delta file atomically, its place in the chain under `stream` in the settings.

        `load_delta` reads the file too. compact: indices as gaps, about 4 bytes per bfloat16 entry in all.
        Raises OSError if writing fails (`atomic.write`).
        """
        numbers = {name: getattr(self, name) for name in _NUMBERS}
        numbers |= {name: f"{getattr(self, name):016x}" for name in _CHECKSUMS}
        Delta(self.changes, self.fingerprint, {KEY: numbers}).save(path, compact, allow_nonfinite=True)

    def vllm(self) -> list[SparseWeightPatch]:
        """The update for vLLM's `sparse_nccl` weight transfer, which takes the patches of one list together.

        vLLM reserves NaN for unchanged entries. Raises DeltaError for a value that is NaN.
        """
        for name, change in self.changes.items():
            if change.values.isnan().any():
                raise DeltaError(f"{name}: expected no NaN, which vLLM takes as unchanged, got one")
        return [SparseWeightPatch(n, c.indices, c.values, c.shape) for n, c in self.changes.items()]

    def verl(self) -> list[DeltaFlush]:
        """The update for verl's `delta_sharded` weight transfer: one flush for each dtype."""
        kinds: dict[torch.dtype, dict[str, Change]] = {}
        for name, change in self.changes.items():
            kinds.setdefault(change.dtype, {})[name] = change
        return [_flush(dtype, changes) for dtype, changes in kinds.items()]


def load_update(path: str | os.PathLike) -> WeightUpdate:
    """Reads and checks a file of `WeightUpdate.save`. Raises DeltaError, or OSError where it is missing."""
    delta = load_delta(path)
    numbers = _numbers(delta.settings.get(KEY))
    if delta.fingerprint is None or any(c.indices is None for c in delta.changes.values()):
        raise DeltaError(f"{KEY}: expected sparse entries with a fingerprint, got a delta of another kind")
    return WeightUpdate(**numbers, changes=delta.changes, fingerprint=delta.fingerprint)


def _numbers(stored: Any) -> dict[str, int]:
    if not isinstance(stored, Mapping):
        raise DeltaError(f"{KEY}: expected the place in a chain in the settings, got {stored!r:.80}; "
                         "load_delta reads a delta that is no update")  # fmt: skip
    found = {name: stored.get(name) for name in _NUMBERS}
    for name, value in found.items():
        if type(value) is not int or not 0 <= value < 2**63:
            raise DeltaError(f"{name}: expected an integer from 0, got {value!r:.80}")
    for name in _CHECKSUMS:
        found[name] = file.hex_digits(name, stored.get(name))
    return found


def _flush(dtype: torch.dtype, changes: Mapping[str, Change]) -> DeltaFlush:
    params, begin = [], 0
    for name, change in changes.items():
        end = begin + change.values.numel()
        kind, shape = str(dtype).removeprefix("torch."), list(change.shape)
        params.append(DeltaParam(name, kind, shape, 4 * begin, 4 * end, 4, begin, end))
        begin = end
    positions = torch.cat([change.indices for change in changes.values()]).view(torch.uint8)
    values = torch.cat([change.values for change in changes.values()])
    return DeltaFlush("indices", params, positions, values, _verl_checksum(positions, values))


def _verl_checksum(positions: Tensor, values: Tensor) -> int:
    """verl's `checksum`: xor of the words of both tensors."""
    hashes = [int(torch.hash_tensor(t).item()) if t.numel() else 0 for t in (positions, values)]
    return hashes[0] ^ (hashes[1] << 1)
