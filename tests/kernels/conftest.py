"""The `backend` fixture: each test that takes it runs on every backend."""

import importlib.util
import shutil

import emulated
import pytest
import torch
from hypothesis import settings

import id3_kernels
from id3_kernels import backend as backends
from id3_kernels import table
from id3_kernels.backend import available_backends


class Backend:
    """The public functions of id3_kernels (as attributes) and the op table, run by one backend."""

    def __init__(self, name: str):
        self.name = name
        for_gpu = name in ("triton", "cuda")
        self.device = torch.device("cuda" if for_gpu and torch.cuda.is_available() else "cpu")
        self.has_float64 = not for_gpu
        self.is_slow = for_gpu and self.device.type == "cpu"  # interpreted or emulated

    @property
    def table(self):
        """The unchecked ops, as an optimizer calls them."""
        return table.kernels_for(self.device, self.name)

    def count(self, k: int) -> torch.Tensor:
        """k as the unchecked ops take it."""
        return torch.tensor([k], device=self.device)

    def candidate_room(self, k: int) -> tuple[int, int]:
        """What `collect_` wants room for: (candidates, numbers of its state)."""
        return table.candidate_room(self.device, self.name, k)

    def __getattr__(self, function: str):
        def call(*args, **kwargs):
            with id3_kernels.use_backend(self.name):
                return getattr(id3_kernels, function)(*args, **kwargs)

        return call

    def here(self, value):
        """A tensor, None, Entries or list of them, on this backend's device."""
        if isinstance(value, torch.Tensor):
            return value.to(self.device)
        if isinstance(value, id3_kernels.Entries):
            return id3_kernels.Entries(*map(self.here, value))
        return [self.here(v) for v in value] if isinstance(value, list | tuple) else value

    def examples(self, count: int, interpreted: int) -> settings:
        """Hypothesis settings: so many examples, or so many where a GPU is stood in for."""
        return settings(max_examples=interpreted if self.is_slow else count)


def _unavailable(name: str) -> None:
    """Skips where the backend can not be had on this machine; fails where it could be but does not work."""
    if name == "reference":
        return
    reason = available_backends()[name]
    could_be_had = {
        "cpu": shutil.which("c++") or shutil.which("g++"),
        "triton": importlib.util.find_spec("triton"),
        "cuda": importlib.util.find_spec("id3_kernels._cuda"),
    }
    if reason and could_be_had[name]:
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


@pytest.fixture(params=["reference", "cpu", "triton", "cuda"])
def backend(request) -> Backend:
    if request.param == "cuda" and not torch.cuda.is_available():
        request.getfixturevalue("emulated_cuda")
    else:
        _unavailable(request.param)
    return Backend(request.param)


@pytest.fixture
def emulated_cuda(monkeypatch):
    """The backend `cuda` on CPU tensors: its Python as it is, its kernels run by the host."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    from id3_kernels import cuda

    def with_cuda(device, name):
        return cuda if name == "cuda" else kernels_for(device, name)

    why_not, kernels_for = backends.why_not, table.kernels_for
    monkeypatch.setattr(cuda, "_ops", emulated)
    monkeypatch.setattr(backends, "why_not", lambda name: None if name == "cuda" else why_not(name))
    monkeypatch.setattr(table, "kernels_for", with_cuda)


@pytest.fixture
def cpu() -> Backend:
    """The C++ backend, for what only it promises."""
    _unavailable("cpu")
    return Backend("cpu")


@pytest.fixture(autouse=True, scope="module")
def poisoned_memory():
    """torch.empty gives NaN and the largest integer, so that a result never written is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # on a GPU not every op of torch has such a form
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def threads():
    """Sets how many threads torch uses, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def simd_levels(cpu):
    """A generator over the instruction sets of this machine, each in use while it is yielded."""
    native = importlib.import_module("id3_kernels._C")
    before = native.build_info()["simd_level"]

    def levels():
        for name in native.build_info()["simd_levels"]:
            native.set_simd_level(name)
            yield name

    yield levels
    native.set_simd_level(before)
