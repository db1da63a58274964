"""sparse_backward: layers whose backward pass computes weight gradients where the optimizer needs them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from .. import pieces
from ..distributed.part import is_split
from ..heuristics import D3, Heuristic
from ..param_groups import selectable
from ..ranks import world_size
from ..step.release import Release
from ..wrappers import check_holds, unwrapped, unwrapped_model
from .layers import norm_class, sparse_class
from .weight import Readers, Weight


class Way(NamedTuple):
    """How the gradient of one parameter reaches the optimizer. way: "sparse", "released", or "frozen" where
    it requires none."""

    name: str
    entries: int
    way: str
    reason: str


class SparseBackward:
    """What `sparse_backward` has changed: ways, one `Way` per parameter that is selected from."""

    def __init__(self, ways: list[Way], changed: list[tuple[nn.Module, Weight]]):
        self.ways, self._changed = ways, changed

    def report(self) -> str:
        """Which parameters go which way and why: a line for each, and the sums."""
        width = max((len(way.name) for way in self.ways), default=0)
        lines = [f"{w.name:{width}}  {w.entries:>13,}  {w.way:8}  {w.reason}".rstrip() for w in self.ways]
        total = sum(way.entries for way in self.ways if way.way != "frozen")
        sparse = sum(way.entries for way in self.ways if way.way == "sparse")
        return "\n".join([*lines, f"sparse: {sparse:,} of {total:,} entries"])

    def remove(self) -> None:
        """Makes the layers plain again. Gradients are released as before, whole for one tensor at a time;
        `optimizer.remove_hooks()` ends that too."""
        for layer, weight in self._changed:
            if getattr(layer, "sparse_weight", None) is weight:
                _make_plain(layer)
        self._changed = []


def sparse_backward(model: nn.Module, optimizer: Any, select_from: str | None = None) -> SparseBackward:
    """Changes the layers of `model` so that a backward pass makes no whole gradient of their weights.

    Between two selections (`select_every`) the gradient is computed at active entries alone; in a step that
    selects, in blocks of rows that are looked at and dropped. This holds for weights of `nn.Linear`,
    transformers' `Conv1D`, `nn.Embedding` and transformers' scaled ones that `optimizer` selects from. All
    other parameters go the way of released gradients (`release_gradients=True`, which this implies). So do,
    in steps that select, weights that are used more than once in a pass: tied ones, and those of a layer that
    is called twice. In such a step RMSNorms of transformers compute their normalised input again rather than
    keep it for the backward pass. `report()` of the result lists each parameter's way.

    Call it before the first step, or after a state was loaded. model: as it is trained, in any dtype that
    ID3AdamW takes, under autocast too. select_from: see `ID3AdamW`, whose own it is if
    None.
    Called again for the same optimizer, or when the one before is gone, it begins anew.
    Raises ValueError for a model that another optimizer has changed, an embedding with `sparse=True` or
    `max_norm`, a DTensor, another `select_from` than the optimizer's, and what released gradients refuse
    (several processes without a `process_group`, "repeat", `capturable`).
    """
    _check_plain(model)
    optimizer, model = unwrapped(optimizer), unwrapped_model(model)
    _check_owners(model, optimizer)
    found = list(_ways(model, optimizer))
    release = optimizer.release_gradients(select_from)
    for layer in filter(_is_changed, model.modules()):
        _make_plain(layer)
    changed, readers = [], Readers()
    for _, layers in found:
        weight = Weight(layers[0].weight, release, readers) if layers else None
        for layer in layers:
            layer.sparse_weight = weight
            layer.__class__ = _subclass_of(type(layer))
            changed.append((layer, weight))
    return SparseBackward([way for way, _ in found], changed)


def _check_plain(model: nn.Module) -> None:
    """Raises ValueError for a wrapper that waits for gradients of all weights."""
    if isinstance(model, nn.parallel.DistributedDataParallel) and world_size() > 1:
        raise ValueError(
            "model: expected one without DistributedDataParallel, got one: sparse_backward makes no "
            "gradients for it to average; give the plain model, and ID3AdamW a process_group; Trainers have "
            "SparseDataParallel for it, Lightning SparseDataParallelStrategy (docs/trainers.md)"
        )


def begun(sparse: bool, model: nn.Module, optimizer: Any) -> SparseBackward | None:
    """What a trainer does that begins: gradients are released again where the optimizer releases them, with
    sparse also by `sparse_backward`. What another run that did not end has left on the model is undone."""
    for layer in filter(_is_changed, unwrapped_model(model).modules()):
        if (owner := _owner(layer)) is None or not owner.belongs_to(optimizer):
            _make_plain(layer)
            if owner is not None:
                owner.remove_hooks()
    if optimizer.releases:
        optimizer.release_gradients()
    return sparse_backward(model, optimizer) if sparse else None


def _is_changed(layer: nn.Module) -> bool:
    return hasattr(layer, "sparse_weight") or _plain_class(layer) is not type(layer)


def _owner(layer: nn.Module) -> Release | None:
    """The hooks of the optimizer that has changed the layer, where it lives."""
    weight = getattr(layer, "sparse_weight", None)
    return None if weight is None else weight.release


def _make_plain(layer: nn.Module) -> None:
    layer.__class__ = _plain_class(layer)
    vars(layer).pop("sparse_weight", None)


def _plain_class(layer: nn.Module) -> type[nn.Module]:
    """The class that was replaced; the layer's own where a parametrization has put another one over it."""
    plain = getattr(type(layer), "plain", None)
    return plain if plain is not None and type(layer) is _subclass_of(plain) else type(layer)


def _subclass_of(plain: type[nn.Module]) -> type[nn.Module] | None:
    return sparse_class(plain) or norm_class(plain)


def ended(handle: SparseBackward | None, optimizer: Any) -> None:
    """What a trainer does that is done: other optimizers find whole gradients."""
    if handle is not None:
        handle.remove()
    if optimizer is not None and optimizer.releases:
        optimizer.remove_hooks()


class _Holder(NamedTuple):
    """A layer that holds a parameter under `name`, and the layer's path in the model."""

    path: str
    name: str
    layer: nn.Module


def _check_owners(model: nn.Module, optimizer: Any) -> None:
    """Raises ValueError for a model that another optimizer has changed and still trains."""
    for path, layer in model.named_modules():
        owner = _owner(layer)
        if owner is not None and not owner.belongs_to(optimizer):
            raise ValueError(
                f"model: expected one without sparse_backward, got {path} with another optimizer's: call "
                "remove() of what sparse_backward returned, or delete that optimizer; of two optimizers for "
                "parts of a model each takes the module that is its part"
            )


def _ways(model: nn.Module, optimizer: Any) -> Iterator[tuple[Way, list[nn.Module]]]:
    """For each parameter that is selected from: its way, and the layers to change."""
    holders: dict[int, list[_Holder]] = {}
    for path, layer in model.named_modules():
        for name, param in layer.named_parameters(recurse=False):
            holders.setdefault(id(param), []).append(_Holder(path, name, layer))
    check_holds(holders, selectable(optimizer.param_groups))
    for param in selectable(optimizer.param_groups):
        held = holders[id(param)]
        name = f"{held[0].path}.{held[0].name}".lstrip(".")
        if is_split(param):
            raise ValueError(
                f"{name}: expected a whole parameter with sparse_backward, got a DTensor; use "
                "release_gradients=True, which FSDP2 goes with"
            )
        why_not = next((why for holder in held if (why := _obstacle(holder))), None)
        if why_not and len(held) > 1:
            why_not += f" and shared by {_paths(held)}"
        frozen = "" if param.requires_grad else "frozen"
        if why_not:
            norms = [holder.layer for holder in held if _is_norm(holder)]
            n = 0 if is_lazy(param) else param.numel()
            yield Way(name, n, frozen or "released", why_not), norms
        else:
            whole = _whole(held, optimizer.heuristic)
            yield Way(name, param.numel(), frozen or "sparse", whole), [holder.layer for holder in held]


def _is_norm(holder: _Holder) -> bool:
    """Whether the layer is one of `norm_class` and has the forward pass of its class."""
    return norm_class(_plain_class(holder.layer)) is not None and "forward" not in vars(holder.layer)


def _obstacle(holder: _Holder) -> str | None:
    """Why the gradient of a parameter cannot be made in parts; None where it can."""
    path, name, layer = holder
    kind = _plain_class(layer)
    if sparse_class(kind) is None:
        return f"of a {kind.__name__}"
    if name != "weight":
        return f"the {name} of a {kind.__name__}"
    if "forward" in vars(layer):
        return f"of a {kind.__name__} with a forward of its own"
    if layer.weight.numel() == 0:
        return "without entries"
    if getattr(layer, "scale_grad_by_freq", False):
        return "of an Embedding with scale_grad_by_freq"
    if isinstance(layer, nn.Embedding) and (layer.sparse or layer.max_norm is not None):
        option = "sparse=True" if layer.sparse else f"max_norm={layer.max_norm}"
        raise ValueError(f"{path}: expected an embedding without {option.split('=')[0]}, got {option}")
    if layer.weight.numel() > pieces.LARGEST:
        return "of more entries than int32 counts"
    return None


def _paths(held: list[_Holder]) -> str:
    return " and ".join(holder.path for holder in held)


def _whole(held: list[_Holder], heuristic: Heuristic) -> str:
    """Why the gradient is made whole in steps that select; empty where it is not."""
    whole = "whole in steps that select: "
    if len(held) > 1:
        return whole + "shared by " + _paths(held)
    return "" if isinstance(heuristic, D3) else whole + "its heuristic scores whole tensors"
