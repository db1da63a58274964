"""A mask that is known before training: the entries of a delta, or those that another run has trained."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .delta import Delta
from .delta.coordinates import in_parameters
from .heuristics import Fisher
from .wrappers import plain_name, plain_names, plain_parameters, unwrapped

Mask = Delta | Mapping[str, Tensor]


def mask_of(entries: Mask, model: nn.Module) -> Fisher:
    """A heuristic that scores `entries` 1 and all other entries 0.

    With `strategy="static"` and a budget of as many entries, the first step makes exactly these active. With
    a larger budget every step searches for more, and finds none.
    entries: a delta, of which the parameters that it holds whole do not count; or flat indices int [n] by the
    parameter's name in the plain model, as `trained_entries` returns them. model: the one to train; the
    optimizer needs its named parameters. Keeps O(entries) and makes the scores of one tensor at a time.
    Raises ValueError for a name that the model lacks and indices beyond its parameter.
    """
    entries, params = indices_of(entries), plain_parameters(model)
    if not entries.keys() <= params.keys():
        entries = in_parameters(model, entries)
    for name, indices in entries.items():
        if name not in params:
            raise ValueError(f"entries: expected names of the model's parameters, got {name!r}")
        numel = params[name].numel()
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < numel:
            raise ValueError(f"entries: expected indices below {numel} for {name}, got {int(indices.max())}")
    return Fisher(_Ones({name: p.shape for name, p in params.items()}, entries))


def indices_of(entries: Mask) -> dict[str, Tensor]:
    """Flat indices by the parameter's name; a delta's, but for the parameters that it holds whole."""
    if not isinstance(entries, Delta):
        return dict(entries)
    changes = entries.changes.items()
    return {name: change.indices for name, change in changes if change.indices is not None}


def trained_entries(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """The entries that an ID3AdamW has trained in `model`, by name: flat indices [n] on the CPU, int32, or
    int64 for a parameter of 2^31 entries or more."""
    names = plain_names(model)
    return {names[id(t.param)]: t.indices.cpu().clone() for t in unwrapped(optimizer).touched()}


class _Ones(Mapping[str, Tensor]):
    """Scores by name: float32 of a parameter's shape, 1 at its entries and 0 elsewhere, made when read."""

    def __init__(self, shapes: dict[str, torch.Size], entries: dict[str, Tensor]):
        self._shapes, self._entries = shapes, entries

    def __getitem__(self, name: str) -> Tensor:
        plain = plain_name(name)
        scores = torch.zeros(self._shapes[plain], dtype=torch.float32, device="cpu")
        if plain in self._entries:
            scores.view(-1)[self._entries[plain].long()] = 1.0
        return scores

    def __contains__(self, name: object) -> bool:
        return plain_name(str(name)) in self._shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def describe(self) -> dict[str, Any]:
        """How many entries, and a checksum of their names and indices."""
        digest = hashlib.blake2b(digest_size=8)
        for name, indices in sorted(self._entries.items()):
            digest.update(name.encode() + indices.long().numpy().tobytes())
        entries = sum(indices.numel() for indices in self._entries.values())
        return {"entries": entries, "checksum": digest.hexdigest()}
