"""Streams wait for one another where hooks run on several. No GPU is here: the streams are stand-ins."""

import pytest
import torch
from fake_gpu import fake_gpu
from torch._subclasses.fake_tensor import FakeTensor

from id3_kernels import reference, table
from id3_optim import ID3AdamW
from id3_optim.state import progress
from id3_optim.step.passes import Passes
from id3_optim.step.streams import Streams

GPUS = torch.device("cuda:0"), torch.device("cuda:1")


class Waits:
    """Which stream is current on each GPU, what waited for what, and whose memory is read from elsewhere."""

    def __init__(self):
        self.current = {gpu: f"default of {gpu}" for gpu in GPUS}
        self.log, self.read = [], []

    def stream(self, device):
        log = self.log

        class Stream(str):
            def wait_stream(self, other):
                log.append((str(self), str(other)))

        return Stream(self.current[torch.device(device)])


@pytest.fixture
def waits(monkeypatch):
    waits = Waits()
    monkeypatch.setattr(torch.cuda, "current_stream", waits.stream)
    return waits


class Memory:
    def __init__(self, waits):
        self.record_stream = lambda stream: waits.read.append(str(stream))


def test_a_stream_waits_for_the_last_one_of_its_gpu(waits):
    streams, memory = Streams(), Memory(waits)
    for name in ("a", "a", "b", "b", "a"):
        waits.current[GPUS[0]] = name
        streams.follow(GPUS[0], [memory])
        streams.follow(GPUS[1], [memory])
    assert waits.log == [("b", "a"), ("a", "b")]
    assert waits.read == ["b", "a"]


def test_the_cpu_has_no_streams(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: pytest.fail("read a stream"))
    Streams().follow(torch.device("cpu"), [])


class NoReport:
    def send(self, number):
        pass

    def newest(self, before, wait):
        return before


@pytest.fixture
def two_gpus(monkeypatch):
    """An optimizer with released gradients of a parameter on each GPU."""
    waits, in_pass = Waits(), []

    def enter(passes, key, begin, within=0):
        """A pass begins with the first hook after each step; autograd, which knows of it, has no GPU here."""
        if not in_pass:
            begin(False)
        in_pass.append(key)
        return False

    def record_stream(tensor, stream):
        waits.read.append((str(tensor.device), str(stream)))

    monkeypatch.setattr(Passes, "enter", enter)
    monkeypatch.setattr(Passes, "end", lambda passes: in_pass.clear())
    monkeypatch.setattr(Passes, "unfinished", False)
    monkeypatch.setattr(progress, "Report", NoReport)
    monkeypatch.setattr(table, "for_gpu", lambda: reference)
    with fake_gpu(monkeypatch):
        monkeypatch.setattr(torch.cuda, "current_stream", waits.stream)
        monkeypatch.setattr(FakeTensor, "record_stream", record_stream, raising=False)
        params = [torch.nn.Parameter(torch.empty(40, 10, device=gpu)) for gpu in GPUS]
        yield ID3AdamW(params, budget=40, total_steps=9, release_gradients=True), params, waits


def test_hooks_on_other_streams_than_the_step(two_gpus):
    """The first hook of a pass, on cuda:1, prepares cuda:0 too, on the default stream of its thread."""
    optimizer, params, waits = two_gpus
    for _ in range(2):
        waits.log.clear()
        waits.read.clear()
        for gpu, p in ((GPUS[1], params[1]), (GPUS[0], params[0])):
            waits.current = {other: f"default of {other}" for other in GPUS} | {gpu: f"side of {gpu}"}
            p.grad = torch.empty_like(p)
            optimizer._unmasking.release.take(p)
        waits.current = {gpu: f"main of {gpu}" for gpu in GPUS}
        optimizer.step()
    zero, one = (str(gpu) for gpu in GPUS)
    assert waits.log == [
        (f"default of {zero}", f"main of {zero}"),  # the first hook, on cuda:1
        (f"side of {one}", f"main of {one}"),
        (f"side of {zero}", f"default of {zero}"),  # the hook on cuda:0
        (f"main of {zero}", f"side of {zero}"),  # the step
        (f"main of {one}", f"side of {one}"),
    ]
    assert {(zero, f"side of {zero}"), (zero, f"main of {zero}"), (one, f"main of {one}")} <= set(waits.read)
