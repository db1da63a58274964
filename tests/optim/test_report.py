"""The number that a GPU sends to the host, with a stand-in for its event."""

import copy

import torch

from id3_optim import ID3AdamW
from id3_optim.state import progress


class Event:
    """Arrived from the second question on."""

    def __init__(self):
        self.questions = 0

    def record(self, stream):
        assert stream == "the current one"

    def query(self):
        self.questions += 1
        return self.questions > 1


def test_nobody_waits_for_it(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory, **options: empty(*args, **options))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the current one")
    report = progress.Report()
    assert report.newest(5, wait=False) == 5
    report.send(torch.tensor([7]))
    report.send(torch.tensor([8]))  # one is on its way, so that the memory it is written to is not touched
    assert [report.newest(5, wait=False) for _ in range(3)] == [5, 7, 5]
    report.send(torch.tensor([9]))
    assert [report.newest(7, wait=False) for _ in range(2)] == [7, 9]


def test_a_copy_has_its_own():
    optimizer = ID3AdamW([torch.nn.Parameter(torch.ones(4))], budget=1, total_steps=1)
    twin = copy.deepcopy(optimizer)
    assert twin._unmasking.progress._report is not optimizer._unmasking.progress._report


def test_memory_report_of_a_backend_for_gpus(monkeypatch):
    monkeypatch.setattr("id3_kernels.backend.require", lambda name: None)
    optimizer = ID3AdamW([torch.nn.Parameter(torch.ones(4))], budget=1, backend="cuda")
    assert optimizer.memory_report()["total"] == 0
