"""A model and its optimizer in a folder of torch.distributed.checkpoint, which is whole or not there.

`torch.distributed.checkpoint.save` into an older checkpoint's folder replaces its files one by one: after a
rank has been killed meanwhile, the folder may load and hold parts of both.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_model_state_dict

from ..atomic import sync_directory
from ..ranks import writes_files
from ..state.flat import KEY
from ..wrappers import unwrapped
from .part import any_split


def save(folder: str | os.PathLike, model: nn.Module, optimizer: Any) -> None:
    """Writes `folder`, which appears when all ranks have written their parts. Every rank has to call this.

    All ranks see one file system. A killed process leaves `<folder>.unfinished`, which the next call with the
    same folder removes.
    Raises, on every rank, ValueError for parameters that are not split and for the strategy "repeat";
    FileExistsError where there is something of that name (a newer checkpoint goes into a new folder); OSError
    if a rank cannot write.
    """
    folder = Path(folder)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    parts = _parts(model, optimizer)
    _by_the_first(lambda: _begin(folder, unfinished))
    try:
        dcp.save(parts, checkpoint_id=unfinished)  # returns when all have written
    except CheckpointException as error:  # on every rank; it is no Exception
        raise OSError(f"{unfinished}: expected every rank to write, got {_first(error)}") from error
    _by_the_first(lambda: _finish(folder, unfinished))


def load(folder: str | os.PathLike, model: nn.Module, optimizer: Any) -> None:
    """Takes over what `save` wrote, from any number of ranks. Mutates both. Every rank has to call this.

    Raises ValueError for a folder without a whole checkpoint, parameters that are not split, the strategy
    "repeat", and, before the model changes, for a state that does not fit the optimizer.
    """
    if not (Path(folder) / ".metadata").is_file():
        raise ValueError(f"folder: expected a whole checkpoint, got {folder}, which has no .metadata")
    parts = _parts(model, optimizer)
    _fit(parts["optimizer"]["state"], dcp.FileSystemReader(folder).read_metadata().state_dict_metadata)
    _read("optimizer", parts, folder)
    optimizer.load_state_dict(parts["optimizer"])  # torch's way drops the state of what is frozen now
    _read("model", parts, folder)
    set_model_state_dict(model, parts["model"])


def _read(name: str, parts: dict[str, Any], folder: str | os.PathLike) -> None:
    try:
        dcp.load({name: parts[name]}, checkpoint_id=folder)
    except CheckpointException as error:  # on every rank
        raise ValueError(f"{name}: expected one that fits {folder}, got {_first(error)}") from error


def _begin(folder: Path, unfinished: Path) -> None:
    if folder.exists():
        raise FileExistsError(f"folder: expected a new one, got {folder}, which exists; save into another")
    shutil.rmtree(unfinished, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)


def _finish(folder: Path, unfinished: Path) -> None:
    os.rename(unfinished, folder)
    sync_directory(folder.parent)


def _first(error: CheckpointException) -> str:
    """What one of the ranks says."""
    rank, (failed, _) = next(iter(error.failures.items()))
    return f"{failed!r} on rank {rank}"


def _by_the_first(action: Callable[[], None]) -> None:
    """The first rank acts, and the other ranks wait for it; its error is raised on every rank."""
    failed: list[Exception | None] = [None]
    if writes_files():
        try:
            action()
        except Exception as error:
            failed = [error]
    torch.distributed.broadcast_object_list(failed)
    if failed[0] is not None:
        raise failed[0]


def _fit(states: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Makes a new optimizer's arrays those of the saved ones, in place and size. Mutates states.

    They lie beside the first parameter that trained, and are as long as the budget, which may have grown.
    """
    names = [name for name in states if f"optimizer.state.{name}.{KEY}.settings" in saved]
    own = next((s[KEY] for s in states.values() if "settings" in s.get(KEY, {})), None)
    if not names or own is None:
        return
    if KEY not in states[names[0]]:
        raise ValueError(
            f"{names[0]}: expected a parameter to select from, as saved, got one of a dense group"
        )
    arrays = {name: own.pop(name) for name in list(own) if name == "settings" or isinstance(own[name], dict)}
    states[names[0]][KEY] |= arrays
    rows = [("settings", arrays)]
    rows += [(f"{kind}.{column}", held) for kind, held in arrays.items()
             if isinstance(held, dict) for column in held]  # fmt: skip
    for path, holder in rows:
        found, name = saved.get(f"optimizer.state.{names[0]}.{KEY}.{path}"), path.rpartition(".")[2]
        if found is not None and found.size != holder[name].shape:
            holder[name] = holder[name].new_empty(found.size)


def _parts(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    if not any_split(optimizer.param_groups):  # the state's sizes are known in advance for these alone
        raise ValueError("optimizer: expected split parameters (DTensor), got whole ones; use torch.save")
    if unwrapped(optimizer).strategy == "repeat":
        raise ValueError(
            "strategy: expected one whose state has a size that is known in advance, got 'repeat'; "
            "use full_state_dict of torch.distributed.checkpoint.state_dict and torch.save"
        )
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
