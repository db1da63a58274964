"""What the commands on deltas write: checked before the work begins, and whole or not there at all."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from .. import atomic
from ..delta import Delta
from ..delta.file import is_delta
from .failures import first_line


def save_model(model: torch.nn.Module, tokenizer, output: str) -> None:
    """Writes a model, and its tokenizer unless that is None, into a directory; see `check_new_directory`.

    Raises OSError if writing fails, which leaves the directory as it was.
    """
    try:
        with atomic.directory(output, last="config.json") as unfinished:
            model.save_pretrained(unfinished)
            if tokenizer is not None:
                tokenizer.save_pretrained(unfinished)
    except Exception as error:  # the libraries that write have errors of their own for a full disk
        raise OSError(f"{output}: the model was not written: {first_line(error)}") from error


def check_new_directory(output: str) -> None:
    """Raises ValueError unless --output is an empty directory, or one that can be made."""
    if not output or (os.path.exists(output) and not os.path.isdir(output)):
        got = f"the file {output}" if output else repr(output)
        raise ValueError(f"--output: expected a folder, got {got}")
    if held := atomic.contents(output):
        got = f"{output} with {min(held)} in it"
        raise ValueError(f"--output: expected a new or an empty folder, got {got}; choose another")


def check_new_file(output: str, inputs: Iterable[str | Path] = ()) -> None:
    """Raises ValueError unless --output can be made as a delta file, or is one that is none of the inputs.

    So no file of a model is overwritten.
    """
    target = Path(output)
    if not output or target.is_dir() or not target.parent.is_dir():
        got = f"the folder {output}" if target.is_dir() and output else repr(output)
        raise ValueError(f"--output: expected a file in an existing folder, got {got}")
    if not os.path.exists(target):
        return
    for source in inputs:
        if os.path.exists(source) and os.path.samefile(source, target):
            raise ValueError(f"--output: expected another file than the delta {source}, got {output}")
    if not is_delta(target):
        raise ValueError(f"--output: expected a new file or a delta to replace, got {output}, which is none")


def save_delta(delta: Delta, arguments: argparse.Namespace) -> dict[str, Any]:
    """Writes the delta to --output; returns the fields that all summaries share."""
    delta.save(arguments.output, arguments.compact, arguments.allow_nonfinite)
    counts = {
        name: delta.inspect()[name] for name in ("entries", "dense_entries", "originals", "fingerprint")
    }
    size = Path(arguments.output).stat().st_size
    return {"command": arguments.command, "output": arguments.output, "bytes": size, **counts}


def written(summary: dict[str, Any]) -> str:
    return f"written to {summary['output']} ({summary['bytes']:,} bytes)"


def print_summary(arguments: argparse.Namespace, summary: dict[str, Any], *lines: str) -> None:
    print(json.dumps(summary, indent=2) if arguments.json else "\n".join(lines))
