"""Two models of one class to compare: parameters in the dtypes that a checkpoint has, and configurations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..delta.file import STORED, VALUE_DTYPES
from .models import load, reading

# Of a configuration: what a delta's settings hold, and what says nothing of what a model computes.
_ELSEWHERE = {"architectures", "id2label", "label2id", "problem_type", "pad_token_id", "dtype"}
_ELSEWHERE |= {"_name_or_path", "transformers_version", "use_cache"}


def load_as_stored(config, source: str, option: str) -> tuple[torch.nn.Module, set[str]]:
    """As `load`, each parameter in the dtype that the checkpoint has for it, which may have several."""
    return _load_in(_stored_dtypes(Path(source), option), config.dtype, config, source, option)


def load_alike(config, source: str, other: torch.nn.Module, option: str) -> tuple[torch.nn.Module, set[str]]:
    """As `load`, each parameter in the dtype that it has in another model of the same class."""
    dtypes = {name: param.dtype for name, param in other.named_parameters()}
    return _load_in(dtypes, other.dtype, config, source, option)


def _load_in(
    dtypes: Mapping[str, torch.dtype], default: torch.dtype | None, config, source: str, option: str
) -> tuple[torch.nn.Module, set[str]]:
    """As `load`, in `dtypes` where they are several: transformers loads all parameters in one."""
    if len(set(dtypes.values())) < 2:
        return load(config, source, default or "auto", option)
    model, missing = load(config, source, torch.float32, option)
    for name, param in model.named_parameters():
        param.data = param.data.to(dtypes.get(name, default or torch.float32))
    return model, missing


def _stored_dtypes(folder: Path, option: str) -> dict[str, torch.dtype]:
    """Of the weights in a folder's safetensors files by name; {} for a hub name."""
    found = {}
    for path in sorted(folder.glob("model*.safetensors")) if folder.is_dir() else ():
        with reading(option, f"a model's weights in {folder}"), safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                found[name] = STORED.get(file.get_slice(name).get_dtype())
    return {name: dtype for name, dtype in found.items() if dtype in VALUE_DTYPES}


def differing(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> list[str]:
    """The fields of two configurations that differ and that no delta holds."""
    names = (base.keys() | tuned.keys()) - _ELSEWHERE
    return sorted(name for name in names if base.get(name) != tuned.get(name))
