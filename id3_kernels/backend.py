"""Which backend can run here, and which one a call takes.

A backend is a module-like object whose functions are the op table of `ops.py`. Without a wish, calls go
through torch's dispatcher: C++ for CPU tensors and CUDA for GPU tensors where these extensions are built,
Triton for GPU tensors where it is installed, and `reference` everywhere else.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import torch

from . import extension

NAMES = ("reference", "cpu", "triton", "cuda")

_wish: str | None = os.environ.get("ID3_BACKEND") or None


def native() -> ModuleType | None:
    """The C++ extension, or None where it was not built or does not load."""
    return extension.load("_C")[0]


def available_backends() -> dict[str, str | None]:
    """Backend name -> None where it can run here, else one line that says why not and what would help."""
    return {name: _why_not(name) for name in NAMES}


def _why_not(name: str) -> str | None:
    if name == "cpu" and native() is None:
        return (
            f"{extension.load('_C')[1]}: install with a C++ compiler and `pip install --no-build-isolation`"
        )
    if name == "cuda":
        if extension.load("_cuda")[0] is None:
            return (
                f"{extension.load('_cuda')[1]}: install with torch for CUDA, its toolkit and "
                "`pip install --no-build-isolation`, or use triton"
            )
        return None if torch.cuda.is_available() else "torch sees no NVIDIA GPU"
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed: pip install 'triton>=3.4'"
        from . import triton

        return triton.why_unavailable()
    return None


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, every public function of id3_kernels runs on backend `name`.

    Optimizers keep the backend that they were built with. Raises ValueError for an unknown name and for a
    backend that can not run here.
    """
    global _wish
    require(name)
    before, _wish = _wish, name
    try:
        yield
    finally:
        _wish = before


def wish() -> str | None:
    """The backend asked for by `use_backend` or ID3_BACKEND, or None."""
    return _wish


def require(name: str) -> None:
    """Raises ValueError unless backend `name` exists and can run here."""
    if name not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")
    reason = _why_not(name)
    if reason:
        raise ValueError(f"backend: {name!r} can not run here: {reason}")


def kernels_for(device: torch.device, name: str | None) -> ModuleType | SimpleNamespace:
    """The op table as backend `name` (None: whatever torch's dispatcher takes) runs it on `device`.

    Raises ValueError where it can not.
    """
    if name is None:
        return _dispatched()
    require(name)
    if name == "cpu" and device.type not in ("cpu", "meta"):
        raise ValueError(f"backend: 'cpu' runs on CPU tensors, got tensors on {device}")
    if name == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "backend: 'triton' runs on GPU tensors (on CPU tensors only with TRITON_INTERPRET=1)"
        )
    if name == "cuda" and device.type != "cuda":
        raise ValueError(f"backend: 'cuda' runs on GPU tensors, got tensors on {device}")
    return _dispatched() if name == "cpu" else _module(name)


@functools.cache
def for_gpu() -> ModuleType:
    """The backend that calls on GPU tensors take: the CUDA kernels where they are built, else Triton."""
    return _module("cuda" if _why_not("cuda") is None else "triton")


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"id3_kernels.{name}")


def candidate_room(device: torch.device, name: str | None, k: int) -> tuple[int, int]:
    """(candidates, numbers of `state`) that `collect_` wants room for, to hold the best k of all tensors."""
    module = (
        for_gpu()
        if name is None and device.type == "cuda"
        else _module("reference" if name in (None, "cpu") else name)
    )
    return module.candidate_room(k) if hasattr(module, "candidate_room") else (k, 0)


def _dispatched() -> SimpleNamespace:
    from .ops import DISPATCHED

    return DISPATCHED
