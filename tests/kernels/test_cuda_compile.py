"""The CUDA kernels compile for each architecture, the streaming kernel to the code it should be."""

import collections
from pathlib import Path

import pytest

from benchmarks.gpu.compiled import CSRC, compile_cuda, cuda_streams, nvcc, resources
from benchmarks.gpu.machine_code import kernels
from benchmarks.gpu.predicted import GPUS, issue_load

ARCHITECTURES = ["sm_80", "sm_90", "sm_100"]
STREAMING = {"selection": "18tile_maxima_kernel", "collect": "13stream_kernel"}
GENERAL = "ExponentE7E"  # a power in float64: the kernel that collects candidates spills registers
REGISTER_CEILING = 64  # 65536 registers then hold four blocks of 256 threads
# Instructions per entry on the fast path, active entries present, of sm_90; by exponent and dtype.
CEILINGS = {
    ("0", "bfloat16"): 9, ("½", "bfloat16"): 22, ("1", "bfloat16"): 19, ("2", "bfloat16"): 20,
    ("-½", "bfloat16"): 17.5, ("-1", "bfloat16"): 12, ("-2", "bfloat16"): 13,
    ("1", "mixed"): 17, ("2", "mixed"): 18,
    ("1", "float32"): 17, ("2", "float32"): 18, ("1", "float16"): 19, ("2", "float16"): 20,
}  # fmt: skip


pytestmark = pytest.mark.skipif(nvcc() is None, reason="needs nvcc (pip install nvidia-cuda-nvcc)")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def compiled(request, tmp_path_factory):
    """Source name -> (cubin, what ptxas says), for one architecture."""
    folder, out = tmp_path_factory.mktemp(request.param), {}
    for source in sorted((CSRC / "cuda").glob("*.cu")):
        cubin, told = compile_cuda(source, request.param, folder)
        assert "warning" not in told, told
        out[source.stem] = cubin, told
    return out


def instructions(cubin: Path) -> dict[str, collections.Counter]:
    """Kernel -> its instructions, counted."""
    return {name: collections.Counter(i.op for i in code) for name, code in kernels(cubin).items()}


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
        for name, code in instructions(cubin).items()
        if STREAMING[source] in name and GENERAL not in name
    }
    assert len(kernels) == 7
    for name, code in kernels.items():
        wide = sum(n for op, n in code.items() if op.startswith("LDG") and "128" in op)
        # float32, bfloat16 and float16 each read eight times 16 bytes ahead; exponent 0 only gradients.
        assert wide >= (12 if "ExponentE0E" in name else 24), (name, code)
        assert not any(op.startswith(("LDL", "STL")) for op in code), name


def test_a_streamed_entry_takes_few_instructions(compiled, request):
    """On the fast path, of which every exponent and dtype is found in the machine code."""
    streams = {stream[1:3]: stream for stream in cuda_streams("selection", *compiled["selection"])}
    assert len(streams) >= 7 * 3
    architecture = request.node.callspec.params["compiled"]
    for key, ceiling in CEILINGS.items():
        counted = streams[key].per_entry(streams[key].loop.issued)
        assert 4 < counted <= ceiling * (1.1 if architecture != "sm_90" else 1), (key, counted)
    if architecture == "sm_90":
        for exp in ("1", "2"):
            assert issue_load(streams[exp, "bfloat16"], GPUS["H200"]) <= 0.75
