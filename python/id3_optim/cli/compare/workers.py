"""Runs the missing runs of a grid, in this process or in several, and stores each as it ends."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from ..models import quiet_transformers
from ..tasks import Task
from .grid import Plan, Trial, settings_of
from .trial import Outcome, held_out, run_trial

OnStep = Callable[[Trial], None]


class Here:
    """Runs one run at a time in this process."""

    def __init__(self, plan: Plan, task: Task, threads: int) -> None:
        self._plan, self._task, self._threads = plan, task, threads
        self._waiting: list[Trial] = []
        self.free = 1

    def begin(self, trial: Trial) -> None:
        """Accepts a run; needs `free` above 0."""
        self._waiting.append(trial)
        self.free = 0

    def finished(self, on_step: OnStep) -> tuple[Trial, Outcome]:
        """Waits until a run that has begun ends."""
        trial, self.free = self._waiting.pop(), 1
        settings = settings_of(self._plan, trial)
        task = held_out(self._task, self._plan.held_out) if trial.tuning else self._task
        return trial, run_trial(settings, task, self._threads, lambda: on_step(trial))


class Workers:
    """Runs a run in each of several processes, which end with this process at their next step.

    On a machine with GPUs each process sees one of them.
    """

    def __init__(self, plan: Plan, task: Task, threads: int, jobs: int) -> None:
        context = multiprocessing.get_context("spawn")
        gpus = _gpus()
        self._processes, self._idle, self._busy = [], [], {}
        for i in range(jobs):
            ours, theirs = context.Pipe()
            arguments = (theirs, plan, task, threads, gpus[i % len(gpus)] if gpus else None)
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._idle.append(ours)

    @property
    def free(self) -> int:
        return len(self._idle)

    def begin(self, trial: Trial) -> None:
        """Accepts a run; needs `free` above 0."""
        worker = self._idle.pop()
        with _alive(trial):
            worker.send(trial)
        self._busy[worker] = trial

    def finished(self, on_step: OnStep) -> tuple[Trial, Outcome]:
        """Waits until a run that has begun ends. Raises what it raised, OSError for a process that died."""
        while True:
            for worker in wait(list(self._busy)):
                trial = self._busy[worker]
                with _alive(trial):
                    kind, value = worker.recv()
                if kind == "step":
                    on_step(trial)
                    continue
                del self._busy[worker]
                self._idle.append(worker)
                if kind == "error":
                    raise value
                return trial, value

    def close(self) -> None:
        """Ends the processes, and with them what they are running."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()


@contextlib.contextmanager
def _alive(trial: Trial) -> Iterator[None]:
    """Within the block a closed pipe says that its process has died."""
    try:
        yield
    except (EOFError, ConnectionError):
        message = f"--jobs: the process of {trial.method} has ended; fewer need less memory"
        raise OSError(message) from None


@contextlib.contextmanager
def runner(plan: Plan, task: Task, threads: int, jobs: int) -> Iterator[Here | Workers]:
    """What runs the runs; its processes end with the block."""
    if jobs == 1:
        yield Here(plan, task, threads)
        return
    workers = Workers(plan, task, threads, jobs)
    try:
        yield workers
    finally:
        workers.close()


def _gpus() -> list[str]:
    """The names by which CUDA_VISIBLE_DEVICES chooses the GPUs that this process sees."""
    if not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


def _work(pipe: Connection, plan: Plan, task: Task, threads: int, gpu: str | None) -> None:
    """A process: takes runs from the pipe until its other end is closed."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # read at the first use of CUDA, which is later
    quiet_transformers()
    here = Here(plan, task, threads)
    with contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        while True:
            here.begin(pipe.recv())
            try:
                message: tuple[str, Any] = ("done", here.finished(lambda trial: pipe.send(("step", None)))[1])
            except (BrokenPipeError, KeyboardInterrupt):
                raise
            except Exception as error:
                message = ("error", error)
            pipe.send(message)
