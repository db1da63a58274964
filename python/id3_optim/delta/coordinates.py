"""Names and indices of a checkpoint, where they differ from those of the model that is in memory.

transformers joins the experts of a layer into one parameter when it loads a model, and separates them when it
saves one. A weight of the checkpoint is then a view of a parameter: part of its entries, with strides.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import pieces
from ..distributed.part import is_split
from ..wrappers import plain_parameters, unwrapped_model
from .file import Change


class Part(NamedTuple):
    """A weight of the checkpoint as a view of a parameter.

    offset, strides: where its entries lie among those of the parameter in row-major order.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]

    def view(self, param: Tensor) -> Tensor:
        """The weight in the parameter's memory. Raises ValueError for part of one that is not contiguous."""
        if self.has_form_of(param):
            return param.detach()
        if not param.is_contiguous():
            raise ValueError(f"{self.name}: expected a contiguous parameter that holds it, got strides "
                             f"{param.stride()}; call contiguous() on it")  # fmt: skip
        return param.detach().as_strided(self.shape, self.strides, param.storage_offset() + self.offset)

    def is_all_of(self, param: Tensor) -> bool:
        """Whether the weight is the whole parameter, so that both have the same indices."""
        return math.prod(self.shape) == param.numel() and self._row_major()

    def has_form_of(self, param: Tensor) -> bool:
        """Whether the weight is the parameter under another name."""
        return tuple(param.shape) == self.shape and self.is_all_of(param)

    def locate(self, indices: Tensor) -> tuple[Tensor | slice, Tensor]:
        """Which of a parameter's ascending flat indices lie in this weight, and their flat indices in it."""
        end = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)) + 1
        bounds = torch.tensor([self.offset, end], dtype=indices.dtype, device=indices.device)
        first, last = torch.searchsorted(indices, bounds).tolist()
        if self._row_major():
            return slice(first, last), indices[first:last] - self.offset
        left, flat = indices[first:last].long() - self.offset, 0
        for axis in sorted(range(len(self.shape)), key=lambda a: -self.strides[a]):
            place = (left // self.strides[axis]).clamp_(max=self.shape[axis] - 1)
            left = left - place * self.strides[axis]
            flat = flat + place * math.prod(self.shape[axis + 1 :])
        inside = (left == 0).nonzero().squeeze(1)
        flat, order = flat[inside].sort()
        return first + inside[order], flat.to(indices.dtype)

    def places(self, indices: Tensor) -> Tensor:
        """int64: where entries of this weight lie in the parameter, from their flat indices here."""
        at = torch.unravel_index(indices.long(), self.shape)
        return self.offset + sum(i * stride for i, stride in zip(at, self.strides, strict=True))

    def _row_major(self) -> bool:
        expected = [math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape))]
        return all(n == 1 or s == e for n, s, e in zip(self.shape, self.strides, expected, strict=True))


def checkpoint_parts(model: nn.Module) -> dict[str, list[Part]]:
    """Parameter name in the plain model → the weights that a checkpoint of the model keeps it in.

    For a model of transformers these are the names and shapes of `save_pretrained`, by the conversions of
    `transformers.core_model_loading`; in other models each parameter is one weight under its own name. A
    tied parameter counts once. A parameter that a checkpoint keeps in a form that is no view has no parts.
    A weight of more than `pieces.LARGEST` entries is several parts, `name[first:end]` of its rows.
    """
    params, owner = {}, set()
    for name, param in plain_parameters(model).items():
        if id(param) not in owner:
            owner.add(id(param))
            params[name] = param
    parts, names = {name: [] for name in params}, list(params)
    begins = list(accumulate((param.numel() for param in params.values()), initial=0))
    whole = torch.empty(begins[-1], device="meta").as_subclass(_View)
    memory = whole.split([param.numel() for param in params.values()])
    own = {n: held.view(p.shape) for (n, p), held in zip(params.items(), memory, strict=True)}
    for name, tensor in _saved(unwrapped_model(model), own).items():
        if tensor.untyped_storage().nbytes() == whole.untyped_storage().nbytes():  # else a copy
            source = bisect_right(begins, tensor.storage_offset()) - 1
            offset = tensor.storage_offset() - begins[source]
            parts[names[source]] += _split(Part(name, tuple(tensor.shape), offset, tensor.stride()))
    for name, views in parts.items():
        if sum(math.prod(part.shape) for part in views) != params[name].numel():  # a copy of a part
            parts[name] = []
    return parts


def _split(part: Part) -> list[Part]:
    """The part, or parts of its rows of at most `pieces.LARGEST` entries."""
    ranges, row = pieces.pieces_of(part.name, part.shape), part.shape[1:]
    if ranges is None:
        return [part]
    return [
        part._replace(
            name=f"{part.name}[{first}:{end}]",
            shape=(end - first, *row),
            offset=part.offset + first * part.strides[0],
        )
        for first, end in ranges
    ]


def part_views(model: nn.Module, parts: Mapping[str, list[Part]] | None = None) -> dict[str, Tensor]:
    """The weights of the model's checkpoint by name, as views of its parameters; of DTensors those alone that
    have the form of one. parts: the model's `checkpoint_parts`, where they are known."""
    params, parts = plain_parameters(model), checkpoint_parts(model) if parts is None else parts
    return {
        part.name: part.view(params[name])
        for name, views in parts.items()
        for part in views
        if not is_split(params[name]) or part.has_form_of(params[name])
    }


def parts_of_split(model: nn.Module, parts: Mapping[str, list[Part]]) -> dict[str, tuple[Part, Tensor]]:
    """The weights of the model's checkpoint that are parts of DTensors, which have no views, by name. parts:
    the model's `checkpoint_parts`."""
    params = {name: param for name, param in plain_parameters(model).items() if is_split(param)}
    return {part.name: (part, param) for name, param in params.items() for part in parts.get(name, ())}


def located(parts: list[Part], indices: Tensor) -> Iterator[tuple[Part, Tensor | slice, Tensor]]:
    """Each part that has some of a parameter's ascending flat indices, with what `Part.locate` gives."""
    for part in parts:
        held, flat = part.locate(indices)
        if flat.numel():
            yield part, held, flat


def in_parts(parts: list[Part], name: str, change: Change) -> dict[str, Change]:
    """The change of a parameter as changes of its `checkpoint_parts`, with int32 indices.

    Raises ValueError for a parameter without parts, of which a checkpoint holds a copy.
    """
    found = {}
    check_views(name, parts)
    for part, held, flat in located(parts, change.indices):
        kept = None if change.originals is None else change.originals[held]
        found[part.name] = Change(part.shape, change.dtype, flat.to(torch.int32), change.values[held], kept)
    return found


def check_views(name: str, parts: list[Part] | None) -> None:
    """Raises ValueError for a parameter without parts, which a checkpoint holds in another form; a tied one
    (None) has those of another name."""
    if parts == []:
        raise ValueError(
            f"{name}: expected a parameter whose checkpoint holds views of it, got a conversion that copies"
        )


def in_parameters(model: nn.Module, entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Flat indices by the names of parameters, from those of weights of the checkpoint; other names stay."""
    owners = {p.name: (name, p) for name, parts in checkpoint_parts(model).items() for p in parts}
    found: dict[str, list[Tensor]] = {}
    for name, indices in entries.items():
        owner, part = owners.get(name, (name, None))
        found.setdefault(owner, []).append(indices if part is None else part.places(indices))
    return {name: torch.cat(own).sort().values if len(own) > 1 else own[0] for name, own in found.items()}


class _View(Tensor):
    """A tensor without memory that stays a view where a conversion would copy it."""

    def contiguous(self, *_, **__) -> _View:
        return self


def _saved(model: nn.Module, own: dict[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors of a state dict as `save_pretrained` names and converts them."""
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        return own
    try:
        from transformers import PreTrainedModel
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers before version 5 has no conversions
        return own
    if not isinstance(model, PreTrainedModel):
        return own
    return revert_weight_conversion(model, dict(own))
