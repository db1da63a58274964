"""The CUDA kernels compile for each architecture, the streaming kernel to the code it should be."""

import collections
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
ARCHITECTURES = ["sm_80", "sm_90", "sm_100"]
STREAMING = {"selection": "18tile_maxima_kernel", "collect": "13stream_kernel"}
GENERAL = "ExponentE7E"  # a power in float64: the streaming kernels spill a register or two
REGISTER_CEILING = 64  # 65536 registers then hold four blocks of 256 threads


def nvcc() -> str | None:
    """The compiler of the wheel nvidia-cuda-nvcc, or of an installed toolkit."""
    spec = importlib.util.find_spec("nvidia.cu13") if importlib.util.find_spec("nvidia") else None
    roots = [
        *(spec.submodule_search_locations if spec else []),
        os.environ.get("CUDA_HOME", "/usr/local/cuda"),
    ]
    found = (shutil.which("nvcc", path=str(Path(root) / "bin")) for root in roots)
    return next(filter(None, found), None)


pytestmark = pytest.mark.skipif(nvcc() is None, reason="needs nvcc (pip install nvidia-cuda-nvcc)")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def compiled(request, tmp_path_factory):
    """Source name -> (cubin, what ptxas says), for one architecture."""
    folder, out = tmp_path_factory.mktemp(request.param), {}
    flags = [
        f"-arch={request.param}",
        "-cubin",
        "-O3",
        "-std=c++20",
        "-fmad=false",
        f"-I{CSRC}",
        "-Xptxas=-v",
    ]
    for source in sorted((CSRC / "cuda").glob("*.cu")):
        cubin = folder / f"{source.stem}.cubin"
        ran = subprocess.run(
            [nvcc(), *flags, source, "-o", cubin], capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stderr
        assert "warning" not in ran.stderr, ran.stderr
        out[source.stem] = cubin, ran.stderr
    return out


def resources(told: str) -> dict[str, tuple[int, int]]:
    """Kernel -> (registers, bytes spilled), of what `-Xptxas=-v` prints."""
    pattern = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers"
    )
    rows = re.findall(pattern, told, re.DOTALL)
    return {name: (int(registers), int(stores) + int(loads)) for name, stores, loads, registers in rows}


def disassembled(cubin: Path) -> dict[str, collections.Counter]:
    """Kernel -> its instructions, counted."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([cuobjdump, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"Function : (\w+)", text)[1:]
    mnemonic = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)")
    return {
        name: collections.Counter(mnemonic.findall(code))
        for name, code in zip(parts[::2], parts[1::2], strict=True)
    }


def test_every_kernel_fits_the_registers_without_spilling(compiled):
    seen = 0
    for _, told in compiled.values():
        for name, (registers, spilled) in resources(told).items():
            if GENERAL in name:
                continue
            seen += 1
            assert spilled == 0, name
            assert registers <= REGISTER_CEILING, (name, registers)
    assert seen > 40


@pytest.mark.parametrize("source", STREAMING)
def test_the_streaming_kernel_reads_16_bytes_at_a_time(compiled, source):
    cubin, _ = compiled[source]
    kernels = {
        name: code
        for name, code in disassembled(cubin).items()
        if STREAMING[source] in name and GENERAL not in name
    }
    assert len(kernels) == 7
    for name, code in kernels.items():
        wide = sum(n for op, n in code.items() if op.startswith("LDG") and "128" in op)
        # float32, bfloat16 and float16 each read eight times 16 bytes ahead; exponent 0 only gradients.
        assert wide >= (12 if "ExponentE0E" in name else 24), (name, code)
        assert not any(op.startswith(("LDL", "STL")) for op in code), name
