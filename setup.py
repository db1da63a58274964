"""Builds the native half of id3_kernels: C++ where torch and a compiler are found, CUDA with a toolkit.

What cannot be built is left out, and a line says why: the Triton and reference backends are pure Python.
Metadata lives in pyproject.toml. torch must be importable while building, so install with
`pip install --no-build-isolation` (`make setup` does). ID3_CUDA=0 leaves CUDA out.

A wheel with native code names the torch it is built for in its version: 0.1.0+torch2.13, with CUDA kernels
0.1.0+cu130torch2.13. A version without such a part is pure Python. A compile that fails leaves a wheel of
that name without the extension; `make wheel` refuses it.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.egg_info import egg_info

ROOT = Path(__file__).parent

# -ffp-contract=off: a fused multiply-add rounds once where the specification rounds twice, and
# which loops get one would depend on the instruction set; without it all machines give the same bits.
# The math flags change no result: they let loops with a square root or a select become vector code.
CXX_FLAGS = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden"]
CXX_FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
NVCC_FLAGS = ["-O3", "-std=c++20", "-fmad=false"]  # for the same reason


def why_no_cpp() -> str | None:
    """The reason why the C++ kernels cannot be built here, or None."""
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch is not importable in the build environment (use --no-build-isolation)"
    compiler = os.environ.get("CXX", "c++" if sys.platform == "darwin" else "g++")
    return None if shutil.which(compiler.split()[0]) else f"no C++ compiler ({compiler})"


def why_no_cuda() -> str | None:
    """The reason why the CUDA kernels cannot be built here, or None. It needs torch: see why_no_cpp."""
    if os.environ.get("ID3_CUDA") == "0":
        return "ID3_CUDA=0"
    import torch

    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    toolkit = toolkit_version()
    if toolkit is None:
        return "no CUDA toolkit (set CUDA_HOME to its root)"
    if toolkit[0] != int(torch.version.cuda.split(".")[0]):
        return f"torch is built for CUDA {torch.version.cuda}, the toolkit is {toolkit[0]}.{toolkit[1]}"
    return None


def toolkit_version() -> tuple[int, int] | None:
    """(major, minor) of the toolkit that torch would compile with."""
    from torch.utils.cpp_extension import CUDA_HOME

    nvcc = Path(CUDA_HOME or "") / "bin" / "nvcc"
    if CUDA_HOME is None or not nvcc.exists():
        return None
    banner = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    major, minor = re.search(r"release (\d+)\.(\d+)", banner).groups()
    return int(major), int(minor)


def sources(folder: str, *patterns: str) -> list[str]:
    found = (path for pattern in patterns for path in (ROOT / "csrc" / folder).glob(pattern))
    return sorted(str(path.relative_to(ROOT)) for path in found)


def options() -> dict:
    headers = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h"))
    return {"include_dirs": [str(ROOT / "csrc")], "depends": headers}


def cpp_extension():
    from torch.utils.cpp_extension import CppExtension

    # at::parallel_for is a serial loop in an extension compiled without OpenMP.
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    files = sources("", "*.cpp") + sources("cpu", "*.cpp")
    return CppExtension(
        "id3_kernels._C", files, **options(), extra_compile_args=CXX_FLAGS + openmp, extra_link_args=openmp
    )


def cuda_extension():
    from torch.utils.cpp_extension import CUDAExtension

    # Everything from the A100 on; what is newer than the newest here compiles the PTX when it is loaded.
    blackwell = toolkit_version() >= (12, 8)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX" if blackwell else "8.0;9.0+PTX")
    files = sources("cuda", "*.cpp", "*.cu")
    images = f"-DID3_IMAGES={','.join(device_code())}"
    flags = {"cxx": [*CXX_FLAGS, images], "nvcc": NVCC_FLAGS}
    folders = {"library_dirs": runtime_folders()}
    return CUDAExtension("id3_kernels._cuda", files, **options(), **folders, extra_compile_args=flags)


def runtime_folders() -> list[str]:
    """A folder with the CUDA runtime under its plain name, which a toolkit of Python packages lacks: it has
    libcudart.so.13 alone."""
    from torch.utils.cpp_extension import CUDA_HOME

    library = Path(CUDA_HOME) / "lib"
    numbered = sorted(library.glob("libcudart.so.*"))
    if not numbered or (library / "libcudart.so").exists():
        return []
    link = ROOT / "build" / "cudart" / "libcudart.so"
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(numbered[0])
    return [str(link.parent)]


def device_code() -> list[str]:
    """What the CUDA extension is compiled to, in nvcc's words: sm_90 is machine code, compute_90 is PTX."""
    from torch.utils.cpp_extension import _get_cuda_arch_flags

    return sorted(re.findall(r"code=((?:sm|compute)_\w+)", " ".join(_get_cuda_arch_flags())), reverse=True)


def native_extensions() -> dict:
    from torch.utils.cpp_extension import BuildExtension

    class BuildOrGoWithout(BuildExtension):
        """An extension that fails to compile is left out: torch's RuntimeError would end the installation."""

        def build_extension(self, ext) -> None:
            try:
                super().build_extension(ext)
            except RuntimeError as error:
                print(f"id3-optim: goes without {ext.name}: {str(error).splitlines()[0]}", file=sys.stderr)

        def get_outputs(self) -> list[str]:
            return [path for path in super().get_outputs() if Path(path).exists()]

    extensions = [cpp_extension()]
    reason = why_no_cuda()
    if reason is None:
        extensions.append(cuda_extension())
    else:
        print(f"id3-optim: goes without the CUDA kernels: {reason}", file=sys.stderr)
    for extension in extensions:
        extension.optional = True  # setuptools then does not miss the file
    commands = {"build_ext": BuildOrGoWithout}
    if not {"bdist_wheel", "dist_info", "editable_wheel"}.isdisjoint(sys.argv):
        commands["egg_info"] = tagged_egg_info(local_version(with_cuda=reason is None))
    return {"ext_modules": extensions, "cmdclass": commands}


def local_version(with_cuda: bool) -> str:
    """The part of a wheel's version that names the torch: "+torch2.13", or "+cu130torch2.13" with CUDA."""
    import torch

    toolkit = "cu" + torch.version.cuda.replace(".", "") if with_cuda else ""
    return f"+{toolkit}torch" + ".".join(torch.__version__.split(".")[:2])


def tagged_egg_info(tag: str) -> type[egg_info]:
    """The command that computes the version, with `tag` appended, which an sdist's setup.cfg cannot undo."""

    class TaggedEggInfo(egg_info):
        def finalize_options(self) -> None:
            self.tag_build = tag
            super().finalize_options()

    return TaggedEggInfo


reason = why_no_cpp()
if reason:
    print(f"id3-optim: installing pure Python (reference and Triton backends): {reason}")
setup(**({} if reason else native_extensions()))
