"""The bytes of a sparse delta: a safetensors file, written atomically and checked whole before its use.

docs/delta-format.md describes the format. Tensors `<name>.indices` (int32, flat, ascending, unique) or,
in the compact form, `<name>.gaps` (uint8, `gaps`); `<name>.values`, optionally `<name>.originals`; or
`<name>.dense` for a parameter stored whole. One metadata entry, `id3_delta`, holds the rest as JSON:
`{"version": 1, "shapes": [[…], …], "fingerprint": …, "settings": {…}}`, the shapes being those of the
parameters in ascending order of their names, the fingerprint 16 hex digits or null.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections import Counter
from typing import Any, BinaryIO, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from .. import atomic
from . import gaps

VERSION = 1
KEY = "id3_delta"
# The limit of the safetensors library, some 250 000 parameters. It bounds the JSON of a crafted file.
_HEADER_LIMIT_BYTES = 100_000_000
STORED = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
VALUE_DTYPES = [dtype for dtype in STORED.values() if dtype.is_floating_point]
_FORMS = [{"dense"}, {"indices", "values"}, {"gaps", "values"}]  # originals may accompany values

Parts = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # part of a parameter → its dtype and shape


class DeltaError(ValueError):
    """A delta cannot be read or does not fit the model. The model is unchanged."""


class Change(NamedTuple):
    """A delta's values of one parameter, on the CPU.

    shape, dtype: the parameter's. indices: int32 [n], flat row-major, ascending and unique, or None when the
    parameter is stored whole. values: [n] in dtype, or of `shape` when whole. originals: as values, or None.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    indices: Tensor | None
    values: Tensor
    originals: Tensor | None = None


class Contents(NamedTuple):
    """A delta file's contents; fingerprint is None where the originals were not known."""

    changes: dict[str, Change]
    fingerprint: int | None
    settings: dict[str, Any]


def write(path: str | os.PathLike, contents: Contents, compact: bool = False) -> None:
    """Writes a delta file at path, atomically, as `atomic.write` does. Raises OSError."""
    atomic.write(path, _to_bytes(contents, compact), "a delta")


def _to_bytes(contents: Contents, compact: bool) -> bytes:
    tensors: dict[str, Tensor] = {}
    for name, change in contents.changes.items():
        if change.indices is None:
            parts = {"dense": change.values}
        else:
            coded = {"gaps": gaps.encode(change.indices)} if compact else {"indices": change.indices}
            parts = coded | {"values": change.values, "originals": change.originals}
        tensors |= {f"{name}.{part}": t.contiguous() for part, t in parts.items() if t is not None}
    head = {
        "version": VERSION,
        "shapes": [list(contents.changes[name].shape) for name in sorted(contents.changes)],
        "fingerprint": None if contents.fingerprint is None else f"{contents.fingerprint:016x}",
        "settings": contents.settings,
    }
    content = safetensors.torch.save(tensors, {KEY: json.dumps(head, allow_nan=False, separators=(",", ":"))})
    (header_bytes,) = struct.unpack("<Q", content[:8])
    _require(header_bytes <= _HEADER_LIMIT_BYTES, "delta", "names and shapes of 100 MB at most", header_bytes)
    return content


def read(path: str | os.PathLike) -> Contents:
    """Reads and checks a whole delta file: structure, names, dtypes, shapes, index range, order, uniqueness.

    Reads both forms. Allocates a small multiple of the file's size, runs no code from it, and maps no memory:
    a file that another process truncates meanwhile raises an error instead of a crash. Raises DeltaError, or
    OSError if the file cannot be opened.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        raw_header = _header_bytes(file, size)
        stored = _json(raw_header.decode("utf-8", "replace"), "the header")
        head = _head(stored)
        layout = _layout(stored, size - 8 - len(raw_header))
        for name, parts in layout.items():
            _check_form(name, parts)
        shapes = dict(zip(sorted(layout), _shapes(head, len(layout)), strict=True))
        for name, parts in layout.items():
            _check_parts(name, parts, shapes[name])
        body = file.read(size)
    try:
        tensors = safetensors.torch.load(struct.pack("<Q", len(raw_header)) + raw_header + body)
    except SafetensorError as error:
        raise DeltaError(f"delta file: expected a safetensors file, got {error}") from error
    changes = {name: _change(name, layout[name], shape, tensors) for name, shape in shapes.items()}
    fingerprint = head["fingerprint"]
    return Contents(changes, None if fingerprint is None else int(fingerprint, 16), head["settings"])


def is_delta(path: str | os.PathLike) -> bool:
    """Whether a file has the header of a delta, or is empty. Raises OSError if it cannot be opened."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            return size == 0 or bool(_head(_json(_header_bytes(file, size).decode("utf-8", "replace"), "")))
        except DeltaError:
            return False


def hex_digits(what: str, value: Any) -> int:
    """The 64-bit number of 16 lower-case hex digits. Raises DeltaError, which begins with `what`."""
    fits = isinstance(value, str) and re.fullmatch("[0-9a-f]{16}", value)
    _require(bool(fits), what, "16 hex digits", value)
    return int(value, 16)


def _require(condition: bool, what: str, expected: str, got: object) -> None:
    if not condition:
        text = str(got)
        raise DeltaError(f"{what}: expected {expected}, got {text if len(text) <= 80 else text[:80] + '…'}")


def _header_bytes(file: BinaryIO, size: int) -> bytes:
    _require(size >= 8, "delta file", "at least 8 bytes", size)
    begin = file.read(8).ljust(8, b"\0")
    (length,) = struct.unpack("<Q", begin)
    _require(
        length <= _HEADER_LIMIT_BYTES, "delta file", "a safetensors file", f"one that begins with {begin}"
    )
    expected = f"a safetensors header of at most {size - 8} bytes (a truncated file?)"
    _require(length <= size - 8, "delta file", expected, length)
    raw = file.read(length)
    _require(len(raw) == length, "delta file", f"a header of {length} bytes", len(raw))
    return raw


def _json(text: str, what: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            (name, count), *_ = Counter(name for name, _ in pairs).most_common(1)
            _require(False, what, "every name once", f"{name!r} {count} times")
        return made

    def refuse(constant: str) -> None:
        raise DeltaError(f"{what}: expected finite numbers, got {constant}")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except DeltaError:
        raise
    except (ValueError, RecursionError) as error:
        raise DeltaError(f"{what}: expected JSON, got {error}") from error


def _head(stored: Any) -> dict[str, Any]:
    """The delta's metadata, its fields checked for their kinds."""
    metadata = stored.get("__metadata__") if isinstance(stored, dict) else None
    text = metadata.get(KEY) if isinstance(metadata, dict) else None
    _require(isinstance(text, str), "delta file", f"the metadata entry {KEY!r}", "none")
    head = _json(text, KEY)
    _require(isinstance(head, dict), KEY, "an object", head)
    version = head.get("version")
    _require(type(version) is int and version == VERSION, "version", str(VERSION), version)
    settings, fingerprint = head.get("settings"), head.get("fingerprint", "")
    _require(isinstance(settings, dict), "settings", "an object", settings)
    is_hex = isinstance(fingerprint, str) and re.fullmatch("[0-9a-f]{16}", fingerprint)
    _require(fingerprint is None or bool(is_hex), "fingerprint", "16 hex digits or null", fingerprint)
    return head


def _shapes(head: dict[str, Any], count: int) -> list[tuple[int, ...]]:
    shapes = head.get("shapes")
    _require(isinstance(shapes, list), "shapes", "a list", shapes)
    _require(len(shapes) == count, "shapes", f"one for each of the {count} parameters", len(shapes))
    for shape in shapes:
        _require(_is_shape(shape), "shapes", "fewer than 2^31 entries", shape)
    return [tuple(shape) for shape in shapes]


def _is_shape(shape: Any) -> bool:
    if not isinstance(shape, list) or len(shape) > 64:
        return False
    return all(type(d) is int and 0 <= d < 2**31 for d in shape) and math.prod(shape) < 2**31


def _layout(stored: dict[str, Any], body_bytes: int) -> dict[str, Parts]:
    """The parts of every parameter, by its name; together they must fill the body exactly."""
    layout, total = {}, 0
    for key, entry in stored.items():
        if key == "__metadata__":
            continue
        _require(isinstance(entry, dict), key, "dtype, shape and data_offsets", entry)
        dtype, shape = entry.get("dtype"), entry.get("shape")
        _require(isinstance(dtype, str) and dtype in STORED, f"{key}: dtype", " or ".join(STORED), dtype)
        _require(_is_shape(shape), f"{key}: shape", "fewer than 2^31 entries", shape)
        name, _, part = key.rpartition(".")
        layout.setdefault(name, {})[part] = (STORED[dtype], tuple(shape))
        total += math.prod(shape) * STORED[dtype].itemsize
    _require(total == body_bytes, "delta file", f"{total} bytes of tensors (a truncated file?)", body_bytes)
    return layout


def _check_form(name: str, parts: Parts) -> None:
    """Raises DeltaError unless the parameter has exactly the parts of one form."""
    fits = set(parts) in _FORMS or set(parts) - {"originals"} in _FORMS[1:]
    expected = "indices or gaps, values and perhaps originals, or dense"
    _require(fits, name or "delta file", expected, " and ".join(parts))


def _check_parts(name: str, parts: Parts, shape: tuple[int, ...]) -> None:
    """Raises DeltaError for a part of a parameter with another dtype or shape than its form has."""
    dtype, kept = parts.get("values", parts.get("dense"))
    key = f"{name}.{'dense' if 'dense' in parts else 'values'}"
    _require(dtype in VALUE_DTYPES, key, "floating-point numbers", dtype)
    expected = {"dense": (dtype, shape), "values": (dtype, (math.prod(kept),))}
    expected["originals"] = expected["values"]
    expected["indices"] = (torch.int32, expected["values"][1])
    for part, (found, size) in parts.items():
        if part == "gaps":
            least, most = math.prod(kept), gaps.LONGEST_BYTES * math.prod(kept)
            fits = found == torch.uint8 and len(size) == 1 and least <= size[0] <= most
            _require(fits, f"{name}.gaps", f"torch.uint8 of {least} to {most} bytes", (found, size))
        else:
            wanted = f"{expected[part][0]} of shape {expected[part][1]}"
            _require((found, size) == expected[part], f"{name}.{part}", wanted, (found, size))


def _change(name: str, parts: Parts, shape: tuple[int, ...], tensors: dict[str, Tensor]) -> Change:
    if "dense" in parts:
        return Change(shape, tensors[f"{name}.dense"].dtype, None, tensors[f"{name}.dense"])
    values, originals = tensors[f"{name}.values"], tensors.get(f"{name}.originals")
    if "gaps" in parts:
        try:
            indices = gaps.decode(tensors[f"{name}.gaps"], values.numel())
        except ValueError as error:
            raise DeltaError(f"{name}.{error}") from error  # "gaps: …"
    else:
        indices = tensors[f"{name}.indices"]
        falls = (indices[1:] <= indices[:-1]).nonzero()[:1].flatten().tolist()
        got = [indices[at : at + 2].tolist() for at in falls]
        _require(not falls, f"{name}.indices", "ascending, unique indices", got)
    if indices.numel():
        low, high, entries = indices[0].item(), indices[-1].item(), math.prod(shape)
        part = "gaps" if "gaps" in parts else "indices"
        _require(low >= 0 and high < entries, f"{name}.{part}", f"0 to {entries - 1}", f"{low} to {high}")
    return Change(shape, values.dtype, indices, values, originals)
