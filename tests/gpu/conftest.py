"""Where these tests run: on the CPU what means something there, and on a GPU by each of its backends."""

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from id3_kernels import available_backends
from id3_optim import D3, ID3AdamW


class Place:
    """A device and the backend that works on it. Waits, graphs and memory mean nothing on the CPU."""

    def __init__(self, device: str, backend: str | None):
        self.device, self.backend = torch.device(device), backend
        self.on_gpu = self.device.type == "cuda"
        self.name = backend or ("reference" if available_backends()["cpu"] else "cpu")

    def optimizer(self, params: list[Tensor] | list[dict], **options) -> ID3AdamW:
        options = {"lr": 1e-2, "budget": 0.05, "total_steps": 20, "heuristic": D3(1.0, 1.0)} | options
        return ID3AdamW(params, backend=self.backend, **options)

    def tensors(self, shapes, seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Heavy-tailed numbers, the same at every place."""
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randn(shape, generator=generator) ** 3 for shape in shapes]
        return [x.to(self.device, dtype) for x in drawn]

    def params(self, shapes, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
        return [torch.nn.Parameter(x) for x in self.tensors(shapes, 0, dtype)]

    def gradients(self, shapes, steps: int, dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
        """The gradients of so many steps, each in memory of its own."""
        return [self.tensors(shapes, 1 + step, dtype) for step in range(steps)]

    @contextlib.contextmanager
    def no_waits(self) -> Iterator[None]:
        """An error where the host waits for the GPU."""
        if not self.on_gpu:
            yield
            return
        torch.cuda.synchronize()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def captured(self, step: Callable[[], object], warm_up: int) -> Callable[[], object]:
        """Takes `warm_up` steps, then a function that takes one more: on a GPU the replay of a graph."""
        if not self.on_gpu:
            for _ in range(warm_up):
                step()
            return step
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(warm_up):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay


def _needs_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: torch.cuda.is_available() is False")


def _place(name: str) -> Place:
    if name == "cpu":
        return Place("cpu", None)
    _needs_gpu()
    reason = available_backends()[name]
    if reason:
        pytest.skip(reason)
    return Place("cuda", name)


@pytest.fixture(params=["cpu", "cuda", "triton"])
def place(request) -> Place:
    return _place(request.param)


@pytest.fixture(params=["cuda", "triton"])
def gpu(request) -> Place:
    """For what means something on a GPU alone."""
    return _place(request.param)


@pytest.fixture
def oracle() -> Place:
    """The readable specification, on the CPU."""
    return Place("cpu", "reference")


@pytest.fixture
def same():
    """Asserts that two optimizers hold the same entries and their parameters the same bits."""

    def check(got: ID3AdamW, expected: ID3AdamW) -> None:
        assert (got.n_active, got.steps_done) == (expected.n_active, expected.steps_done)
        for one, other in zip(got.touched(), expected.touched(), strict=True):
            assert torch.equal(one.indices.cpu(), other.indices.cpu())
        for group, twin in zip(got.param_groups, expected.param_groups, strict=True):
            for p, q in zip(group["params"], twin["params"], strict=True):
                assert torch.equal(p.detach().cpu(), q.detach().cpu())

    return check


@pytest.fixture
def run():
    """Takes a step with each list of gradients, whose tensors become the `.grad`s themselves."""

    def steps(optimizer: ID3AdamW, gradients: list[list[Tensor | None]]) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for grads in gradients:
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            optimizer.step()

    return steps
