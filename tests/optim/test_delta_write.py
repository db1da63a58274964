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

from id3_optim.delta import DeltaError, load_delta, save_delta
from id3_optim.delta import file as delta_file
from id3_optim.optimizer import Touched


@pytest.fixture
def path(tmp_path):
    return tmp_path / "delta.safetensors"


KILLED_FIFTY_TIMES = """
import os, random, signal, sys, time
import torch
from hand_trained import HandTrained
from id3_optim.delta import DeltaError, load_delta, save_delta
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

KILLED_BETWEEN_CALLS = """
import os, signal, sys
import torch
from id3_optim import atomic
from id3_optim.delta import Change, Delta, load_delta

torch.set_num_threads(1)  # threads do not survive a fork
path, n = sys.argv[1], 1 << 12

def delta(step):
    change = Change((n,), torch.float32, torch.arange(n, dtype=torch.int32), torch.full((n,), float(step)))
    return Delta({"weight": change}, None, {"step": step})

def trace(stop_at):
    # Counts the calls that `atomic.write` itself makes and their ends; at the given one the process dies.
    count = [0]
    def profile(frame, event, function):
        if frame.f_code is atomic.write.__code__ and event in ("c_call", "c_return"):
            count[0] += 1
            if count[0] == stop_at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.setprofile(profile)
    delta(2).save(path)
    sys.setprofile(None)
    return count[0]

moments = trace(0)
for moment in range(1, moments + 1):
    delta(1).save(path)
    child = os.fork()
    if child == 0:
        trace(moment)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, status
    found = load_delta(path)
    assert (found.changes["weight"].values == found.settings["step"]).all()
    partial = [name for name in os.listdir(os.path.dirname(path)) if name.endswith(".partial")]
    print(found.settings["step"], len(partial))
"""


def run(script, path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_a_killed_process_leaves_the_old_file_or_the_new(path):
    """Fifty processes save two deltas in turn to one path and are killed at random moments."""
    steps = run(KILLED_FIFTY_TIMES, path)
    assert len(steps) == 50 and set(steps) == {"1", "2"}
    assert len(os.listdir(path.parent)) > 1  # at least one was killed while it wrote


def test_killed_between_any_two_calls_of_the_write(path):
    """Before the file is made, after it is written, flushed, synced, renamed: each moment once, in order."""
    moments = [tuple(map(int, line.split())) for line in run(KILLED_BETWEEN_CALLS, path)]
    steps = [step for step, _ in moments]
    renamed = steps.index(2)
    assert set(steps[:renamed]) == {1} and set(steps[renamed:]) == {2}
    assert renamed >= 8 and len(steps) - renamed >= 2
    left = [count for _, count in moments]
    assert left[0] == 0 and left[renamed - 1] > 0 and left[renamed] == left[-1]


def test_what_killed_writers_left_is_removed_when_old(path):
    """Files of this target alone, an hour after them; a younger one may still be written to."""
    names = [f".{path.name}.{digit * 16}.partial" for digit in "0123"]
    others = [f".other.{'0' * 16}.partial", f".{path.name}.{'0' * 15}.partial", f"x.{path.name}.partial"]
    for name in [*names, *others]:
        (path.parent / name).write_bytes(b"begun")
    save_delta(path, *large(1))
    now = path.stat().st_mtime
    for name, age in [
        *zip(names, (3700, 3500, 90_000, -90_000), strict=True),
        *((o, 90_000) for o in others),
    ]:
        os.utime(path.parent / name, (now - age, now - age))
    save_delta(path, *large(2))
    assert sorted(os.listdir(path.parent)) == sorted([path.name, names[1], names[3], *others])
    assert load_delta(path).settings["step"] == 2


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


def test_a_directory_that_can_not_be_synced_is_no_failure(path, monkeypatch):
    """Some network file systems refuse; the file itself is safe by then."""
    model, fsync = nn.Linear(4, 1), os.fsync

    def refuse_directories(handle):
        if os.fstat(handle).st_mode & 0o040000:
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(handle)

    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(handle), refuse_directories(handle)))
    touched = Touched(model.weight, torch.arange(4, dtype=torch.int32), None)
    save_delta(path, model, HandTrained([touched], []))
    assert len(synced) == 2 and load_delta(path).changes["weight"].indices.numel() == 4


def test_names_that_no_reader_would_take_are_not_written(path, monkeypatch):
    model = nn.Linear(4, 1)
    touched = Touched(model.weight, torch.arange(4, dtype=torch.int32), None)
    monkeypatch.setattr(delta_file, "_HEADER_LIMIT_BYTES", 200)
    with pytest.raises(DeltaError, match="delta: expected names and shapes of 100 MB at most"):
        save_delta(path, model, HandTrained([touched], []))
    assert not path.exists()
