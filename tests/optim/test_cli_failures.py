"""Exit statuses of `id3-optim`, and the one line on stderr."""

import argparse
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from id3_optim import Delta
from id3_optim.cli import failures, main
from id3_optim.delta import Change


def fail(error, debug=False):
    def run(arguments):
        raise error

    return failures.run(argparse.Namespace(run=run, debug=debug))


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("a: expected b, got c\nand more"), 2, "error: a: expected b, got c"),
        (OSError(28, "No space left on device", "x"), 2, "error: [Errno 28] No space left on device: 'x'"),
        (ValueError("x" * 2000), 2, f"error: {'x' * 500}…"),
        (ValueError(""), 2, "error: ValueError"),
        (MemoryError(), 2, "error: MemoryError"),
        (torch.OutOfMemoryError("no memory left"), 2, "error: no memory left"),
        (Exception("full (os error 28)"), 2, "error: full (os error 28)"),
        (EOFError("Ran out"), 2, "error: expected a file of tensors, got a damaged one (EOFError)"),
        (KeyError("x"), 1, "error: unexpected KeyError: 'x'; --debug shows where"),
        (RuntimeError("shape"), 1, "error: unexpected RuntimeError: shape; --debug shows where"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyboardInterrupt("--resume goes on"), 130, "interrupted; --resume goes on"),
        (ValueError("w; allow_nonfinite=True takes them"), 2, "error: w; --allow-nonfinite takes them"),
        (ValueError("w; apply(cast=True) rounds"), 2, "error: w; --cast rounds"),
    ],
)
def test_status_and_line(capsys, error, status, line):
    assert fail(error) == status
    assert capsys.readouterr() == ("", f"id3-optim: {line}\n")


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), RuntimeError("x")])
def test_debug_raises(error):
    with pytest.raises(type(error)):
        fail(error, debug=True)


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    printed = capsys.readouterr().out
    assert stopped.value.code == 0 and printed.startswith("id3-optim ") and printed.count("\n") == 1


@pytest.fixture
def large(tmp_path):
    """A delta whose summary as JSON is longer than the buffers of stdout and of a pipe."""
    changes = {f"layer.{i}.weight": Change((1,), torch.float32, None, torch.zeros(1)) for i in range(2000)}
    Delta(changes, None, {}).save(tmp_path / "delta")
    return tmp_path / "delta"


def start(*words, **options):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": ""}
    command = [sys.executable, "-m", "id3_optim.cli", *map(str, words)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, **options)


def test_a_reader_that_has_gone_is_no_error(large):
    process = start("inspect", large, "--json", stdout=subprocess.PIPE)
    process.stdout.read(1)
    process.stdout.close()
    assert (process.stderr.read(), process.wait(60)) == ("", 141)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("words", ["inspect", "env"])  # fails while it prints, and when it ends
def test_a_full_stdout_is_one_line(large, words):
    with open("/dev/full", "w") as full:
        process = start(words, *([large] if words == "inspect" else []), stdout=full)
        errors = process.stderr.read()
    assert (errors, process.wait(60)) == ("id3-optim: error: [Errno 28] No space left on device\n", 2)


def test_ctrl_c_is_a_signal(capsys, monkeypatch):
    def interrupted(path):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)

    monkeypatch.setattr("id3_optim.cli.delta.read_delta", interrupted)
    assert main(["inspect", __file__]) == 130
    assert capsys.readouterr() == ("", "id3-optim: interrupted\n")
