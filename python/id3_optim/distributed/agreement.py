"""The check that all ranks run the same, without which ranks of different settings wait for each other."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from importlib import metadata
from typing import Any

import torch

from ..method import Method
from ..param_groups import named_parameters
from .many_ranks import ManyRanks
from .part import local, part_of


def check_agreement(ranks: ManyRanks, settings: dict[str, Any], groups: list[dict[str, Any]]) -> None:
    """Raises ValueError on every rank where one has other settings, parameters or versions than another.

    Every rank has to call this. Sends 8 bytes per setting.
    """
    facts = _facts(settings, groups)
    digests = [hashlib.blake2b(fact.encode(), digest_size=8).digest() for fact in facts.values()]
    own = torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests])
    own = own.to(local(groups[0]["params"][0]).device)
    rows = ranks.rows(own, "the check that all ranks have the same settings").cpu()
    for i, (name, fact) in enumerate(facts.items()):
        if len(set(rows[:, i].tolist())) > 1:
            same = int((rows[:, i] == own[i].cpu()).sum())
            raise ValueError(
                f"{name}: expected the same on all {len(rows)} ranks, got {fact[:200]} on {same} of them, "
                "this one included; start every rank with the same program and arguments"
            )


def _facts(settings: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, str]:
    """What has to agree, as text; the same names on all ranks."""
    named = list(named_parameters(groups))
    names = ("step", "total_steps", *(field.name for field in fields(Method) if field.name != "budget_given"))
    plain = [{k: v for k, v in group.items() if k not in ("params", "param_names")} for group in groups]
    return {
        "id3-optim": _version(),
        "torch": torch.__version__,
        "budget": json.dumps(settings["budget_given"]),
        **{name: json.dumps(settings.get(name), default=str) for name in names},
        "param_groups": str([{k: _plain(v) for k, v in group.items()} for group in plain]),
        "params": str([(name, str(p.dtype), p.requires_grad) for name, p in named]),
        "shapes": str([part_of(p).layout for _, p in named]),
    }


def _version() -> str:
    try:
        return metadata.version("id3-optim")
    except metadata.PackageNotFoundError:  # run from a source tree
        return "none installed"


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
