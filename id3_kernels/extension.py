"""Loads the native extensions `_C` (C++) and `_cuda`, unless they are built for another torch.

PyTorch's C++ interface changes between minor releases, and an extension built for another one can crash where
it does not fail to load. So the release that the extension is built for is read from its file first.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import mmap
import re
import warnings
from pathlib import Path
from types import ModuleType

import torch

_KINDS = {"_C": "C++", "_cuda": "CUDA"}
_INSTEAD = {"_C": "CPU tensors take the pure-Python backend", "_cuda": "GPU tensors take the Triton backend"}
_MARK = b"id3_kernels built for torch "  # csrc/built_for.h writes it


@functools.cache
def load(name: str) -> tuple[ModuleType | None, str]:
    """(the extension `name`, "") or (None, the reason). Loading an extension registers its kernels.

    An extension that is built and cannot be loaded is reported once by a RuntimeWarning of one line.
    """
    kind = _KINDS[name]
    spec = importlib.util.find_spec(f"id3_kernels.{name}")
    if spec is None or spec.origin is None:
        return None, f"the {kind} extension is not built"
    release = built_for(Path(spec.origin))
    if release is not None and _minor(release) != _minor(torch.__version__):
        reason = f"the {kind} extension is built for torch {release}, this is torch {torch.__version__}"
    else:
        try:
            return importlib.import_module(f"id3_kernels.{name}"), ""
        except (ImportError, OSError) as error:
            first_line = next(iter(str(error).splitlines()), type(error).__name__)
            reason = f"the {kind} extension does not load ({first_line})"
    warnings.warn(f"id3_kernels: {reason}: {_INSTEAD[name]}", RuntimeWarning, stacklevel=2)
    return None, reason


def built_for(path: Path) -> str | None:
    """The release of torch that the extension at `path` is built for ("2.13.0"), None if it names none."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = data.find(_MARK)
        if start < 0:
            return None
        return data[start + len(_MARK) : start + len(_MARK) + 64].split(b"\0", 1)[0].decode()


def _minor(release: str) -> tuple[str, ...]:
    """("2", "13") of "2.13.0+cpu": the part of a version that releases with one C++ interface share."""
    return tuple(re.findall(r"\d+", release)[:2])
