"""A model and its optimizer in a folder of torch.distributed.checkpoint, which is whole or not there.

`torch.distributed.checkpoint.save` into an older checkpoint's folder replaces its files one by one: after a
rank has been killed meanwhile, the folder may load and hold parts of both.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from ..atomic import sync_directory
from ..ranks import meet, writes_files
from .part import any_split


def save(folder: str | os.PathLike, model: nn.Module, optimizer: Any) -> None:
    """Writes `folder`, which appears when all ranks have written their parts. Every rank has to call this.

    All ranks see one file system. A killed process leaves `<folder>.unfinished`, which the next call with the
    same folder removes.
    Raises ValueError for parameters that are not split, FileExistsError where there is something of that name
    (a newer checkpoint goes into a new folder).
    """
    folder = Path(folder)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    if folder.exists():
        raise FileExistsError(f"folder: expected a new one, got {folder}, which exists; save into another")
    parts = _parts(model, optimizer)
    meet()  # all have looked
    if writes_files():
        shutil.rmtree(unfinished, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
    meet()
    dcp.save(parts, checkpoint_id=unfinished)  # returns when all have written
    if writes_files():
        os.rename(unfinished, folder)
        sync_directory(folder.parent)
    meet()


def load(folder: str | os.PathLike, model: nn.Module, optimizer: Any) -> None:
    """Takes over what `save` wrote, from any number of ranks. Mutates both. Every rank has to call this.

    Raises ValueError for a folder without a whole checkpoint, parameters that are not split, and a state that
    does not fit the optimizer.
    """
    if not (Path(folder) / ".metadata").is_file():
        raise ValueError(f"folder: expected a whole checkpoint, got {folder}, which has no .metadata")
    parts = _parts(model, optimizer)
    dcp.load(parts, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])


def _parts(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    if not any_split(optimizer.param_groups):  # the state's sizes are known in advance for these alone
        raise ValueError("optimizer: expected split parameters (DTensor), got whole ones; use torch.save")
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
