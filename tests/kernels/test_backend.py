import ast
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import id3_kernels
from id3_kernels import available_backends, extension, table
from id3_kernels.backend import NAMES, requested
from id3_kernels.table import kernels_for

PACKAGE = Path(id3_kernels.__file__).parent


def python(code: str, *arguments: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_available_backends_names_all_and_says_why_not():
    backends = id3_kernels.available_backends()
    assert tuple(backends) == NAMES == ("reference", "cpu", "triton", "cuda")
    assert backends["reference"] is None
    assert all(reason is None or (len(reason) > 20 and "\n" not in reason) for reason in backends.values())


def test_use_backend_holds_within_the_block_only(backend):
    before = requested()
    with id3_kernels.use_backend(backend.name):
        assert requested() == backend.name
        with id3_kernels.use_backend("reference"):
            assert requested() == "reference"
        assert requested() == backend.name
    assert requested() == before


def test_use_backend_is_undone_by_an_exception():
    before = requested()
    with pytest.raises(KeyError), id3_kernels.use_backend("reference"):
        raise KeyError
    assert requested() == before


def test_use_backend_decides_who_computes(monkeypatch):
    from id3_kernels import reference

    calls = []
    monkeypatch.setattr(reference, "d3_score", lambda *args: calls.append(args) or torch.zeros(2))
    ones = torch.ones(2)
    with id3_kernels.use_backend("reference"):
        id3_kernels.d3_score(ones, ones, eps=1.0, exp=1.0)
    assert len(calls) == 1


def test_unknown_backend():
    expected = "backend: expected one of reference, cpu, triton, cuda, got 'gpu'"
    with pytest.raises(ValueError, match=expected), id3_kernels.use_backend("gpu"):
        pass


def test_unavailable_backend_says_why():
    reason = id3_kernels.available_backends()["cuda"]
    with pytest.raises(ValueError, match="backend: expected one that can run here, got 'cuda'") as error:
        kernels_for(torch.device("cpu"), "cuda")
    assert reason in str(error.value)


def test_backend_on_the_wrong_device(backend):
    if backend.name == "cpu":
        with pytest.raises(
            ValueError, match="backend: expected one for tensors on cuda, got 'cpu', which needs CPU tensors"
        ):
            kernels_for(torch.device("cuda"), "cpu")
    elif backend.name == "triton":
        code = (
            "import torch, id3_kernels\n"
            "from id3_kernels.table import kernels_for\n"
            "try: kernels_for(torch.device('cpu'), 'triton')\n"
            "except ValueError as e: print(e)"
        )
        message = python(code, TRITON_INTERPRET="0")
        assert message.startswith("backend: expected one ")
        assert "'triton'" in message
        assert "TRITON_INTERPRET=1" in message or "GPU" in message
    else:
        assert kernels_for(torch.device("cuda"), "reference").__name__ == "id3_kernels.reference"


@pytest.fixture
def gpus(monkeypatch):
    """Sets which GPUs torch sees, by their compute capabilities, and that the CUDA extension is built."""

    def see(*capabilities, images="sm_80,sm_90,sm_100,compute_100"):
        loaded = extension.load
        built = SimpleNamespace(images=images), ""
        monkeypatch.setattr(extension, "load", lambda name: built if name == "_cuda" else loaded(name))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device}")

    table.for_gpu.cache_clear()
    yield see
    table.for_gpu.cache_clear()


@pytest.mark.parametrize(
    ("capability", "images", "runs"),
    [
        ((7, 5), "sm_80,sm_90,sm_100,compute_100", False),  # T4, RTX 20
        ((8, 0), "sm_80,sm_90,sm_100,compute_100", True),
        ((8, 9), "sm_80,sm_90,sm_100,compute_100", True),  # code of the same major version
        ((12, 0), "sm_80,sm_90,sm_100,compute_100", True),  # by the PTX
        ((9, 0), "sm_80", False),  # no PTX
        ((8, 0), "sm_86,compute_86", False),
        ((9, 0), "sm_80,compute_80", True),
        ((9, 0), "sm_90a", True),
        ((10, 0), "sm_90a,compute_90a", False),
        ((10, 3), "sm_100", True),
    ],
)
def test_cuda_runs_where_the_extension_has_code_for_every_gpu(gpus, capability, images, runs):
    gpus((8, 0) if images.startswith("sm_80") else capability, capability, images=images)
    reason = available_backends()["cuda"]
    assert (reason is None) == runs
    if not runs:
        major, minor = capability
        assert f"compute capability {major}.{minor}, the CUDA extension holds sm_" in reason
        assert f"use triton, or install with TORCH_CUDA_ARCH_LIST={major}.{minor}" in reason


def test_a_gpu_without_compiled_code_takes_triton(gpus):
    gpus((7, 5))
    assert table.for_gpu().__name__ == "id3_kernels.triton"
    with pytest.raises(ValueError, match=r"got 'cuda': cuda:0 \(GPU 0\) has compute capability 7\.5, "):
        kernels_for(torch.device("cuda"), "cuda")
    gpus((9, 0))
    table.for_gpu.cache_clear()
    assert table.for_gpu().__name__ == "id3_kernels.cuda"


def test_the_build_tells_the_extension_what_it_holds():
    code = "import setuptools; setuptools.setup = lambda **_: None\nimport setup; print(*setup.device_code())"
    held = python(code, TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX", PYTHONPATH=str(PACKAGE.parent), ID3_CUDA="0")
    assert held.splitlines()[-1] == "sm_90 sm_80 compute_90"


@pytest.mark.parametrize("name", ["reference", ""])
def test_environment_variable(name):
    assert python(
        "from id3_kernels.backend import requested; print(requested())", ID3_BACKEND=name
    ).strip() == str(name or None)


def test_environment_variable_is_checked_at_the_first_call():
    code = (
        "import torch, id3_kernels\n"
        "t = torch.ones(2)\n"
        "try: id3_kernels.d3_score(t, t, eps=1.0, exp=1.0)\n"
        "except ValueError as e: print(e)"
    )
    assert "expected one of reference, cpu, triton, cuda, got 'fast'" in python(code, ID3_BACKEND="fast")


def test_importing_stays_light():
    """No optimizer, and Triton (slow to import) only when it is called."""
    loaded = python("import sys, id3_kernels; print('id3_optim' in sys.modules, 'triton' in sys.modules)")
    assert loaded.split() == ["False", "False"]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_kernels_never_import_the_optimizer(path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            imported.add(node.module.split(".")[0])
    assert "id3_optim" not in imported


THREADS = """
import os, torch, id3_kernels
torch.set_num_threads(2)
p, g = (torch.ones(8_000_000).uniform_() for _ in range(2))
def seconds():
    tick = os.sysconf("SC_CLK_TCK")
    stats = {t: open(f"/proc/self/task/{t}/stat").read() for t in os.listdir("/proc/self/task")}
    fields = {t: stat.rsplit(")", 1)[1].split() for t, stat in stats.items()}
    return {t: (int(f[11]) + int(f[12])) / tick for t, f in fields.items()}
def gained(before):
    return sorted((t - before.get(i, 0) for i, t in seconds().items()), reverse=True)
before = seconds()
while sum(gained(before)) < 1.0:
    for _ in range(5):
        id3_kernels.select_topk([p], [g], None, 10, eps=1.0, exp=2.0)
print(gained(before)[1])
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs Linux's CPU time per thread")
def test_the_extension_really_uses_two_threads(cpu):
    """Compiled without -fopenmp, at::parallel_for is silently a serial loop, and one thread does it all."""
    second_busiest = float(python(THREADS, ID3_BACKEND="cpu"))
    assert second_busiest > 0.3  # of a second of CPU time in all


MEMORY = """
import mmap, sys, torch
from id3_kernels.table import kernels_for
table = kernels_for(torch.device("cpu"), "cpu")
def status(name):
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return 1024 * int(lines[name].split()[0])
def step(params, grads, n_active, k):
    each = n_active // len(params)
    row = torch.arange(each, dtype=torch.int32) * (params[0].numel() // each)
    index = torch.cat([row] * len(params) + [torch.zeros(k, dtype=torch.int32)])
    offsets, steps = torch.arange(len(params) + 1) * each, torch.ones(len(params), dtype=torch.int64)
    m, v = (torch.zeros(n_active + k).fill_(0.1) for _ in range(2))
    ballast = mmap.mmap(-1, status("VmPeak") - status("VmSize") + mmap.PAGESIZE)  # so that now is the peak
    before = status("VmPeak")
    new = table.select_topk(params, grads, offsets, index[:n_active], torch.tensor([k]), k, 1.0, 2.0)
    table.join_([index, m, v], offsets, new[0], new[1], [None, None])
    numbers = (1e-3, 0.9, 0.999, 1e-8, 0.0)
    table.adamw_(params, grads, offsets, index, m, v, None, None, steps, *numbers, False, *[None] * 4)
    return status("VmPeak") - before
def tensors(size):
    return [torch.empty(size).normal_() for _ in range(4)]
step(tensors(1 << 16), tensors(1 << 16), 64, 8)  # starts the threads
print(step(tensors(1 << 24), tensors(1 << 24), int(sys.argv[1]), 1000))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's account of memory")
@pytest.mark.parametrize("n_active", [20_000, 2_000_000])
def test_memory_a_step_allocates(cpu, n_active):
    """At most N/64 + 8·M + 32·|Λ| bytes + O(k), of 67M entries; an N-bit mask would take 8 MiB.

    One heap for all threads, and each large block in pages of its own, so that the peak is exact up to the
    heap's growth in steps: 512 KiB for that.
    """
    n_entries, n_tensors, k = 4 << 24, 4, 1000
    bar = n_entries // 64 + 8 * n_tensors + 32 * n_active + 64 * k
    allocator = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    assert 0 < int(python(MEMORY, str(n_active), **allocator)) <= bar + 2**19
