"""Builds the native half of id3_kernels: C++ where torch and a compiler are found, else pure Python.

Metadata lives in pyproject.toml. torch must be importable while building, so install with
`pip install --no-build-isolation` (`make setup` does).
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def why_no_extension() -> str | None:
    """The reason why the C++ kernels can not be built here, or None."""
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch is not importable in the build environment (use --no-build-isolation)"
    compiler = os.environ.get("CXX", "c++" if sys.platform == "darwin" else "g++")
    return None if shutil.which(compiler.split()[0]) else f"no C++ compiler ({compiler})"


def native_extension() -> dict:
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class BuildOrGoWithout(BuildExtension):
        """A failed compile leaves a pure-Python install: torch's RuntimeError would end the installation."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except RuntimeError as error:
                print(f"id3-optim: installing pure Python: {str(error).splitlines()[0]}", file=sys.stderr)
                self.extensions = []

        def get_outputs(self) -> list[str]:
            return [path for path in super().get_outputs() if Path(path).exists()]

    # -ffp-contract=off: a fused multiply-add rounds once where the specification rounds twice, and
    # which loops get one would depend on the instruction set; without it all machines give the same bits.
    # -fopenmp: at::parallel_for is a serial loop in an extension compiled without it.
    # The math flags change no result: they let loops with a square root or a select become vector code.
    flags = [
        "-O3",
        "-g0",
        "-std=c++20",
        "-fvisibility=hidden",
        "-ffp-contract=off",
        "-fno-math-errno",
        "-fno-trapping-math",
    ]
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    extension = CppExtension(
        "id3_kernels._C",
        sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cpp")),
        include_dirs=[str(ROOT / "csrc")],
        depends=sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.h")),
        extra_compile_args=flags + openmp,
        extra_link_args=openmp,
    )
    extension.optional = True  # setuptools then does not miss the file
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildOrGoWithout}}


reason = why_no_extension()
if reason:
    print(f"id3-optim: installing pure Python (reference and Triton backends): {reason}")
setup(**({} if reason else native_extension()))
