"""Processes with a limit: one process whose rows are read as they come, or several at once."""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable

from benchmarks.render import ROOT

_SILENCE = 100  # seconds without a line after which a process counts as hung


class Deadline:
    def __init__(self, seconds: float):
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        return self._end - time.monotonic()


def _environment(more: dict[str, str]) -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | more


def _start(command: list[str], output, more: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen(
        command, cwd=ROOT, env=_environment(more), stdout=output, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip


def _kill(process: subprocess.Popen) -> None:
    """The process and all processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def stream(command: list[str], seconds: float, take: Callable[[dict], object]) -> str:
    """Runs the command; `take` gets every JSON object that it prints. Returns the end of its other lines."""
    deadline, tail = Deadline(seconds), deque(maxlen=40)
    process = _start(command, subprocess.PIPE, {})
    while True:
        timer = threading.Timer(max(0.1, min(deadline.left(), _SILENCE)), _kill, [process])
        timer.start()
        line = process.stdout.readline()
        timer.cancel()
        if not line:
            break
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        take(row) if isinstance(row, dict) else tail.append(line)
    process.wait()
    cut = (
        [f"(cut off after {seconds - deadline.left():.0f} s)"]
        if process.returncode == -signal.SIGKILL
        else []
    )
    return "".join([*tail, *cut])


def together(commands: dict[str, list[str]], seconds: float, **environment: str) -> dict[str, dict]:
    """Runs all at once: per name whether it ended well and in time, its seconds and the end of its output."""
    environment = {name: value for name, value in environment.items() if value}
    deadline, found = Deadline(seconds), {}
    running: dict[str, tuple] = {}
    for name, command in commands.items():
        output = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - read after its process ended
        try:
            running[name] = (_start(command, output, environment), output)
        except OSError as error:
            found[name] = {"ok": None, "skipped": str(error)}
    for name, (process, output) in running.items():
        timed_out = False
        try:
            process.wait(max(0.1, deadline.left()))
        except subprocess.TimeoutExpired:
            timed_out = True
            _kill(process)
            process.wait()
        output.seek(0)
        text = output.read()
        output.close()
        found[name] = {
            "ok": process.returncode == 0,
            "timed_out": timed_out,
            "seconds": round(seconds - deadline.left(), 1),
            "last_line": next((line for line in reversed(text.splitlines()) if line.strip()), ""),
            "tail": text[-20_000:],
        }
    return found
