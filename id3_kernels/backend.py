"""What can run here: the names of the backends, why one cannot run, and which one is requested.

A backend implements the ops of `table.py`. `reference` is plain torch and runs everywhere; `cpu` is the C++
extension, `cuda` the CUDA extension, and `triton` compiles its kernels at their first call.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Iterator
from types import ModuleType

import torch

from . import extension

NAMES = ("reference", "cpu", "triton", "cuda")

_requested: str | None = os.environ.get("ID3_BACKEND") or None


def native() -> ModuleType | None:
    """The C++ extension, or None where it was not built or does not load."""
    return extension.load("_C")[0]


def available_backends() -> dict[str, str | None]:
    """Backend name -> None where the backend can run here, else one line with the reason and a remedy."""
    return {name: why_not(name) for name in NAMES}


def why_not(name: str) -> str | None:
    """The reason why backend `name` cannot run here, with a remedy; None where it can run."""
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
        return why_no_code(extension.load("_cuda")[0].images)
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed: pip install 'triton>=3.4'"
        return importlib.import_module(f"id3_kernels.{name}").why_unavailable()
    return None


def why_no_code(images: str) -> str | None:
    """The reason why compiled code cannot run on every GPU that torch sees; None where it can.

    images: what the extension holds, in nvcc's words, as "sm_80,sm_90,compute_90".
    """
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    for device in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(device)
        if not any(_runs_on(image, major, minor) for image in images.split(",")):
            return (
                f"cuda:{device} ({torch.cuda.get_device_name(device)}) has compute capability "
                f"{major}.{minor}, the CUDA extension holds {images.replace(',', ', ')}: use triton, or "
                f"install with TORCH_CUDA_ARCH_LIST={major}.{minor}"
            )
    return None


def _runs_on(image: str, major: int, minor: int) -> bool:
    """Machine code (sm_80) runs on its major version from its minor one on, PTX (compute_80) on all newer.

    With the suffix "a" (sm_90a) both run on exactly that capability.
    """
    kind, code = image.split("_")
    digits = code.rstrip("af")
    of_image, capability = (int(digits[:-1]), int(digits[-1])), (major, minor)
    if code.endswith("a"):
        return capability == of_image
    return capability >= of_image and (kind == "compute" or major == of_image[0])


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, every public function of id3_kernels runs on backend `name`.

    An optimizer keeps the backend with which it was built. Raises ValueError for an unknown name and for a
    backend that cannot run here.
    """
    global _requested
    require(name)
    before, _requested = _requested, name
    try:
        yield
    finally:
        _requested = before


def requested() -> str | None:
    """The backend requested by `use_backend` or ID3_BACKEND, or None."""
    return _requested


def require(name: str) -> None:
    """Raises ValueError unless backend `name` exists and can run here."""
    if name not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")
    reason = why_not(name)
    if reason:
        raise ValueError(f"backend: expected one that can run here, got {name!r}: {reason}")
