"""The streaming kernels compiled ahead of time, on a machine without a GPU: by nvcc, and by Triton."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu.machine_code import Loop, kernels, streaming_loops
from benchmarks.render import ROOT

CSRC = ROOT / "csrc"
EXPONENTS = ("0", "½", "1", "2", "-½", "-1", "-2", "general")  # in the order of `Exponent` of score.h
KERNELS = {"selection": "tile_maxima_kernel", "collect": "stream_kernel"}
TRITON_KINDS = {"0": "g", "½": "g/√d", "1": "g/d", "2": "g/dd"}
DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
POINTERS = {
    "*i64": "params grads tiles offsets wanted", "*i32": "owners lengths maxima", "*u8": "active",
    "*fp64": "exponent", "fp32": "eps widest", "i32": "low",
}  # fmt: skip


class Stream(NamedTuple):
    """One dtype of one streaming kernel. registers, spills (bytes) and code_bytes are the whole kernel's."""

    kernel: str
    exp: str
    dtype: str
    registers: int
    spills: int
    code_bytes: int
    loop: Loop

    @property
    def entry_bytes(self) -> int:
        if self.dtype == "mixed":
            return 6
        return (1 if self.exp == "0" else 2) * (4 if self.dtype == "float32" else 2)

    def per_entry(self, count: int) -> float:
        """Of instructions of one round: how many each entry takes."""
        return count / (self.loop.lane_bytes / self.entry_bytes)


def nvcc() -> str | None:
    """The compiler of the wheel nvidia-cuda-nvcc, or of an installed toolkit."""
    spec = importlib.util.find_spec("nvidia.cu13") if importlib.util.find_spec("nvidia") else None
    roots = [
        *(spec.submodule_search_locations if spec else []),
        os.environ.get("CUDA_HOME", "/usr/local/cuda"),
    ]
    found = (shutil.which("nvcc", path=str(Path(root) / "bin")) for root in roots)
    return next(filter(None, found), None)


def compile_cuda(source: Path, architecture: str, folder: Path) -> tuple[Path, str]:
    """(cubin, what ptxas says of registers and spills), with the flags of setup.py."""
    cubin = folder / f"{source.stem}.{architecture}.cubin"
    flags = [f"-arch={architecture}", "-cubin", "-O3", "-std=c++20", "-fmad=false", f"-I{CSRC}", "-Xptxas=-v"]
    command = [nvcc(), *flags, source, "-o", cubin]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"nvcc: expected {source.name} to compile, got {ran.stderr}")
    return cubin, ran.stderr


def resources(told: str) -> dict[str, tuple[int, int]]:
    """Kernel -> (registers, bytes spilled), of what `-Xptxas=-v` prints."""
    pattern = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers"
    )
    rows = re.findall(pattern, told, re.DOTALL)
    return {name: (int(registers), int(stores) + int(loads)) for name, stores, loads, registers in rows}


def cuda_streams(source: str, cubin: Path, told: str) -> list[Stream]:
    """The streaming kernel of `source`, a key of KERNELS, for every exponent and dtype."""
    used, found = resources(told), []
    for name, code in kernels(cubin).items():
        exponent = re.search(r"ExponentE(\d)", name)
        if not exponent or not re.search(rf"\d{KERNELS[source]}I", name):
            continue
        exp = EXPONENTS[int(exponent[1])]
        rows = [(exp, loop.dtype, *used[name], 16 * len(code), loop) for loop in streaming_loops(code)]
        found += [Stream(f"CUDA {source}", *row) for row in rows]
    return found


def triton_stream(exp: str, dtype: str, architecture: str, folder: Path) -> Stream:
    """Triton's streaming kernel with active entries."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from id3_kernels.triton import selection

    kernel, kind = selection.tile_maxima_kernel, TRITON_KINDS[exp]
    constants = {"CHUNK": 4096, "ROWS": selection.ROWS, "KIND": kind, "FULL": True, "EXCLUDE": True}
    constants |= {"PARAM": DTYPES[dtype], "GRAD": DTYPES[dtype], "QUICK": kind in selection.QUICK_KINDS}
    types = {name: type_ for type_, names in POINTERS.items() for name in names.split()}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): x for name, x in constants.items()}, {})
    options = {"num_warps": 1, "enable_fp_fusion": False}
    target = GPUTarget("cuda", int(architecture[3:]), 32)
    cubin = folder / f"triton.{architecture}.{exp}.{dtype}.cubin"
    cubin.write_bytes(triton.compile(source, target=target, options=options).asm["cubin"])
    (code,) = kernels(cubin).values()
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    told = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    spills = sum(i.op.startswith(("LDL", "STL")) for i in code) * 4
    # The second loop, if there is one, scores tiles again.
    first = max(streaming_loops(code), key=lambda loop: loop.issued)
    registers = int(re.search(r"REG:(\d+)", told)[1])
    return Stream("Triton", exp, dtype, registers, spills, 16 * len(code), first)
