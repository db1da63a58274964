"""Reads summaries of the method's own toolkit (PyPI: selective-optimizers) without running code from them."""

from __future__ import annotations

import math
import os
import pickle
import zipfile
from typing import Any

import torch
from torch import Tensor, nn

from ..wrappers import plain_parameters
from .delta import Delta
from .file import Change, DeltaError
from .fingerprint import fingerprint


class _Summary:
    """Replaces the toolkit's dataclass: values, pointers, shapes, bn_metadata, budget_used."""


_NAME = "selective_optimizers.load_store.SelectivePeftSummary"
# Raised by torch's restricted unpickler for a class that is not allowed and for a damaged stream.
_BROKEN = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError)
_FIELDS = ("values", "pointers", "shapes", "bn_metadata", "budget_used")


def load_toolkit_summary(path: str | os.PathLike, base: nn.Module, strict: bool = True) -> Delta:
    """The delta in a file of the toolkit's `write_summary_to_disk`, for the base model it was trained from.

    The toolkit stores no names: values belong to `base.parameters()` in order, and every shape and dtype must
    agree. A tensor selected whole is stored whole. Originals and fingerprint come from `base`, which is not
    mutated. The file is read by torch's weights-only loading, with the toolkit's one class allowed as a
    container.
    strict=False drops batch-norm statistics, which are buffers: a delta holds parameters alone.
    Raises DeltaError for a file of other content or a model that does not fit, OSError if the file cannot be
    opened.
    """
    summary = _read(path)
    params = _in_order(base)
    n_values = len(summary.values)
    if n_values != len(params):
        raise DeltaError(f"base: expected the summary's {n_values} parameters, got {len(params)}")
    if summary.bn_metadata and strict:
        raise DeltaError(
            f"bn_metadata: expected none, got statistics of {len(summary.bn_metadata)} layers, which a delta "
            "cannot hold; strict=False drops them"
        )
    changes = {}
    rows = zip(params, summary.values, summary.pointers, summary.shapes, strict=True)
    for (name, param), values, pointers, shape in rows:
        if values is None or values.numel() == 0:
            continue
        changes[name] = _change(name, param, values, pointers, shape)
    sparse = {n: c for n, c in changes.items() if c.indices is not None}
    mark = fingerprint({n: (c.indices, c.originals) for n, c in sparse.items()})
    settings = {"method": "selective-optimizers", "budget_used": summary.budget_used}
    return Delta(changes, mark, settings)


def _read(path: str | os.PathLike) -> _Summary:
    with open(path, "rb") as file:  # torch.save writes a zip archive; torch.load also reads bare pickles
        if not zipfile.is_zipfile(file):
            raise DeltaError(
                f"summary: expected a file of the toolkit, got {os.fspath(path)}, which is no torch archive"
            )
    with torch.serialization.safe_globals([(_Summary, _NAME)]):
        try:
            summary = torch.load(path, map_location="cpu", weights_only=True)
        except _BROKEN as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise DeltaError(f"summary: expected a file of the toolkit, got {reason}") from error
    fields = vars(summary) if isinstance(summary, _Summary) else {}
    missing = [field for field in _FIELDS if field not in fields]
    if missing:
        raise DeltaError(f"summary: expected {', '.join(_FIELDS)}, got no {', '.join(missing)}")
    columns = [summary.values, summary.pointers, summary.shapes]
    if not all(isinstance(column, list) for column in columns) or len(set(map(len, columns))) != 1:
        sizes = [len(column) if isinstance(column, list) else type(column).__name__ for column in columns]
        raise DeltaError(f"summary: expected values, pointers and shapes as lists of one length, got {sizes}")
    kinds = (Tensor, Tensor, torch.Size)
    for column, kind in zip(columns, kinds, strict=True):
        for item in column:
            if not (item is None or (isinstance(item, kind) and _is_dense(item))):
                got = item.layout if isinstance(item, Tensor) else type(item).__name__
                raise DeltaError(f"summary: expected {kind.__name__} or None, got {got}")
    used = summary.budget_used
    if isinstance(used, Tensor) and used.numel() == 1:
        used = used.item()
    if not isinstance(used, int) or not isinstance(summary.bn_metadata, list):
        got = f"{type(used).__name__} and {type(summary.bn_metadata).__name__}"
        raise DeltaError(f"summary: expected a count as budget_used and a list as bn_metadata, got {got}")
    summary.budget_used = used
    return summary


def _is_dense(item: Any) -> bool:
    return not isinstance(item, Tensor) or (item.layout == torch.strided and item.device.type == "cpu")


def _in_order(base: nn.Module) -> list[tuple[str, Tensor]]:
    """(plain name, parameter) in the order of `base.parameters()`: a tied parameter once."""
    seen: dict[int, tuple[str, Tensor]] = {}
    for name, param in plain_parameters(base).items():
        seen.setdefault(id(param), (name, param))
    return list(seen.values())


def _change(name: str, param: Tensor, values: Any, pointers: Any, shape: Any) -> Change:
    expected = f"{param.dtype} {tuple(param.shape)}"
    if (values.dtype, shape) != (param.dtype, param.shape):
        got = f"{values.dtype} {tuple(shape or ())}"
        raise DeltaError(f"{name}: expected {expected} as in the base, got {got}")
    flat = _flat(name, param.shape, pointers, values.numel())
    order = flat.argsort()
    flat = flat[order]
    if bool((flat.diff() == 0).any()):
        repeated = int(flat[1:][flat.diff() == 0][0])
        raise DeltaError(f"{name}: expected every entry once, got index {repeated} more than once")
    if flat.numel() == param.numel():  # the toolkit's choose_all, such as a fresh head
        return Change(tuple(param.shape), param.dtype, None, values.reshape(-1)[order].reshape(param.shape))
    originals = param.detach().reshape(-1)[flat.to(param.device)].cpu()
    return Change(tuple(param.shape), param.dtype, flat.to(torch.int32), values.reshape(-1)[order], originals)


def _flat(name: str, shape: torch.Size, pointers: Any, n: int) -> Tensor:
    """Flat indices int64 [n] of coordinates [n, dimensions], each within the shape."""
    fits = isinstance(pointers, Tensor) and pointers.dtype == torch.int64
    if not fits or tuple(pointers.shape) != (n, len(shape)):
        got = f"{pointers.dtype} {tuple(pointers.shape)}" if isinstance(pointers, Tensor) else type(pointers)
        raise DeltaError(f"{name}: expected int64 pointers of shape ({n}, {len(shape)}), got {got}")
    outside = ((pointers < 0) | (pointers >= torch.tensor(shape))).any(1)
    if bool(outside.any()):
        got = pointers[outside][0].tolist()
        raise DeltaError(f"{name}: expected pointers inside {tuple(shape)}, got {got}")
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    return (pointers * torch.tensor(strides, dtype=torch.int64)).sum(1)
