"""Writing a delta: killed processes, full disks, links."""

import errno
import os
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hand_trained import HandTrained
from torch import nn

from id3_optim.delta import load_delta, save_delta
from id3_optim.optimizer import Touched


@pytest.fixture
def path(tmp_path):
    return tmp_path / "delta.safetensors"


KILLED_FIFTY_TIMES = """
import os, random, signal, sys, time
import torch
from hand_trained import HandTrained
from id3_optim.delta import load_delta, save_delta
from id3_optim.optimizer import Touched

torch.set_num_threads(1)  # threads do not survive a fork
path, rng, n = sys.argv[1], random.Random(0), 1 << 17
model = torch.nn.Linear(n, 1, bias=False)
touched = Touched(model.weight, torch.arange(n, dtype=torch.int32), None)

def save(step):
    model.weight.data.fill_(step)
    save_delta(path, model, HandTrained([touched], [], step))

began = time.perf_counter()
save(1)
longest = 3 * (time.perf_counter() - began)
for _ in range(50):
    child = os.fork()
    if child == 0:
        for _ in range(200):  # far beyond the kill, but never for ever
            save(2)
            save(1)
        os._exit(0)
    time.sleep(rng.random() * longest)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    delta = load_delta(path)
    assert (delta.changes["weight"].values == delta.settings["step"]).all()
    print(delta.settings["step"])
"""


def test_a_killed_process_leaves_the_old_file_or_the_new(path):
    """Fifty processes save two deltas in turn to one path and are killed at random moments."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", KILLED_FIFTY_TIMES, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 0, result.stderr
    steps = result.stdout.split()
    assert len(steps) == 50 and set(steps) == {"1", "2"}
    assert len(os.listdir(path.parent)) > 1  # at least one was killed while it wrote


def large(step):
    model = nn.Linear(1000, 10, bias=False)
    model.weight.data.fill_(step)
    return model, HandTrained(
        [Touched(model.weight, torch.arange(10_000, dtype=torch.int32), None)], [], step
    )


def test_a_file_size_limit_keeps_the_old_file(path):
    save_delta(path, *large(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match=r"File too large: a delta of 8.... bytes was not") as caught:
            save_delta(path, *large(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename == str(path)
    assert load_delta(path).settings["step"] == 1
    assert os.listdir(path.parent) == [path.name]


def test_a_full_disk_says_so(path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    save_delta(path, *large(1))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: a delta of 8.... bytes was not written"):
        save_delta(path, *large(2))
    assert load_delta(path).settings["step"] == 1
    assert os.listdir(path.parent) == [path.name]


def test_where_nothing_can_be_written(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a delta of 8.... bytes was not written"):
        save_delta(tmp_path / "no" / "delta", *large(1))
    with pytest.raises(OSError, match=r"path: expected a file name, got .* not a regular file"):
        save_delta(tmp_path, *large(1))


def test_an_optimizer_inside_a_wrapper_is_found(path):
    model, optimizer = large(3)
    save_delta(path, model, SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer)))
    assert load_delta(path).settings["step"] == 3


def test_a_link_is_followed(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save_delta(tmp_path / "link", *large(1))
    assert (tmp_path / "link").is_symlink() and load_delta(tmp_path / "real").settings["step"] == 1
