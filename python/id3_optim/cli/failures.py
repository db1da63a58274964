"""The exit status of a command, and the one line on stderr that says why it failed."""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import pickle
import re
import sys

import torch

from ..ranks import launched

UNEXPECTED, FAILED, INTERRUPTED, CLOSED = 1, 2, 130, 141  # of a shell: 128 and the number of the signal

# Of arguments, files, the disk and the memory; a ValueError may be one of this package or of a library.
_DAMAGED = (pickle.UnpicklingError, EOFError)
_EXPECTED = (ValueError, OSError, ImportError, csv.Error, MemoryError, torch.OutOfMemoryError, *_DAMAGED)
_OF_THE_SYSTEM = re.compile(r"\(os error \d+\)")  # how libraries in Rust report a full disk, for one
_NO_MEMORY = re.compile(r"DefaultCPUAllocator: (?:can't|not enough)")
# What gloo and this package say where another process has ended; NCCL's errors have a class.
_NO_ANSWER = re.compile(r"gloo/transport|expected an answer of every rank")
_SHOWN = 60  # characters of a value in a message
_LONGEST = 500  # characters of a message; those of libraries can list every model that there is

# The package's errors name arguments of Python: here they are options.
_OPTIONS = {
    "allow_nonfinite=True": "--allow-nonfinite",
    "apply(cast=True)": "--cast",
    "originals=True": "--originals",
    "whole='first' or 'drop'": "--whole first or drop",
    "strict=False": "strict=False in Python",
}


def run(arguments: argparse.Namespace) -> int:
    """Runs `arguments.run(arguments)`; returns the exit status.

    0 after success, 2 after an error of arguments, files, disk or memory, 130 after Ctrl-C, 141 where the
    reader of stdout has gone, 1 after an unexpected error. All but 0 and 141 put one line on stderr.
    arguments.debug: raise instead.
    """
    try:
        arguments.run(arguments)
        sys.stdout.flush()
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if arguments.debug:
            raise
        _drop_unwritten()
        return _report(error)


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that the memory is used up: on the CPU torch raises a RuntimeError then."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or bool(_NO_MEMORY.search(str(error)))


def lacks_peer(error: BaseException) -> bool:
    """Whether an error says that another process did not answer."""
    kinds = getattr(torch.distributed, "DistError", ())
    return isinstance(error, kinds) or bool(_NO_ANSWER.search(str(error)))


def _report(error: BaseException) -> int:
    if isinstance(error, BrokenPipeError):
        return CLOSED
    if isinstance(error, KeyboardInterrupt):
        print(f"id3-optim: interrupted{f'; {error}' if str(error) else ''}", file=sys.stderr)
        return INTERRUPTED
    line, (rank, processes) = first_line(error), launched()
    prefix = "id3-optim: error" if processes == 1 else f"id3-optim: error on rank {rank}"
    if lacks_peer(error):
        print(f"{prefix}: expected an answer of every rank, got {line}; look for the rank that failed first",
              file=sys.stderr)  # fmt: skip
        return FAILED
    if lacks_memory(error) or isinstance(error, _EXPECTED) or _OF_THE_SYSTEM.search(str(error)):
        print(f"{prefix}: {line}", file=sys.stderr)
        return FAILED
    kind = type(error).__name__
    print(f"{prefix}: unexpected {kind}: {line}; --debug shows where", file=sys.stderr)
    return UNEXPECTED


def shortened(value: object) -> str:
    """The value as Python writes it, its beginning alone where it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def first_line(error: BaseException) -> str:
    """The message of an error, its first line alone, with options in place of Python's arguments."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if isinstance(error, _DAMAGED):  # torch's own words advise to run the code in such a file
        line = f"expected a file of tensors, got a damaged one ({type(error).__name__})"
    for argument, option in _OPTIONS.items():
        line = line.replace(argument, option)
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"


def _drop_unwritten() -> None:
    """Drops what stdout cannot take, which Python would try to write again when it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):  # a stdout that is no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
