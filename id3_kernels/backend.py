"""Which backend can run here, and which one a call takes.

A backend is a module-like object whose functions are the op table of `ops.py`. Without a wish, calls go
through torch's dispatcher: C++ for CPU tensors where the extension is built, Triton for GPU tensors where
it is installed, and `reference` everywhere else.
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

NAMES = ("reference", "cpu", "triton", "cuda")

_wish: str | None = os.environ.get("ID3_BACKEND") or None


@functools.cache
def _load_native() -> tuple[ModuleType | None, str]:
    """(the C++ extension, "") or (None, why there is none)."""
    if importlib.util.find_spec("id3_kernels._C") is None:
        return None, "the C++ extension is not built"
    try:
        return importlib.import_module("id3_kernels._C"), ""
    except (ImportError, OSError) as error:  # built for another torch, as a rule
        return None, f"the C++ extension does not load ({str(error).splitlines()[0]})"


def native() -> ModuleType | None:
    """The C++ extension, or None where it was not built or does not load."""
    return _load_native()[0]


def available_backends() -> dict[str, str | None]:
    """Backend name -> None where it can run here, else one line that says why not and what would help."""
    return {name: _why_not(name) for name in NAMES}


def _why_not(name: str) -> str | None:
    if name == "cpu" and native() is None:
        return f"{_load_native()[1]}: install with a C++ compiler and `pip install --no-build-isolation`"
    if name == "cuda":
        return "the CUDA C++ kernels do not exist yet: use triton on a GPU"
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
    if name == "reference":
        from . import reference

        return reference
    if name == "triton":
        from . import triton

        return triton
    return _dispatched()


def _dispatched() -> SimpleNamespace:
    from .ops import DISPATCHED

    return DISPATCHED
