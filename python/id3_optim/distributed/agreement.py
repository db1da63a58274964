"""The check that all ranks run the same, without which ranks of different settings wait for each other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from ..method import Method
from ..param_groups import OPTIONS, named_parameters
from ..running import Running
from .many_ranks import ManyRanks
from .part import any_split, local, part_of
from .replicas import Replicas, checksum


def check_replicable(group: Any, method: Method, capturable: bool) -> None:
    """Refuses what gradients cannot be averaged for over a process group."""
    dist = torch.distributed
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"process_group: expected a group of torch.distributed that has this process, got {group!r}; "
            "torch.distributed.group.WORLD has all processes"
        )
    if method.strategy == "repeat":
        raise ValueError(
            "process_group: does not apply to strategy 'repeat': entries that come back would need gradients "
            "that no replica has whole; use DistributedDataParallel"
        )
    if isinstance(method.heuristic, Running):
        raise ValueError(
            "process_group: does not apply to the heuristic Running: it reads the gradients of one replica; "
            "use DistributedDataParallel"
        )
    for name in ("tensor_cap", "prune"):
        if getattr(method, name) is not None:
            raise ValueError(f"process_group: does not apply to {name}: no replica sees all gradients")
    if capturable:
        raise ValueError("process_group: does not apply to capturable: no graph replays its messages")


def check_replicas(
    replicas: Replicas,
    settings: dict[str, Any],
    groups: list[dict[str, Any]],
    state: list[Tensor],
    select_from: str,
) -> None:
    """`check_agreement` of replicas, which have the same values too, of the parameters and of the state.

    Raises ValueError for DTensors too.
    """
    if any_split(groups):
        raise ValueError(
            "process_group: does not apply to DTensor parameters: torch.distributed averages their "
            "gradients; leave it out"
        )
    home = groups[0]["params"][0].device
    values = {"values of params": [p for _, p in named_parameters(groups)], "state": state}
    sums = {name: f"checksum {checksum(tensors, home):x}" for name, tensors in values.items()}
    check_agreement(replicas.ranks, settings, groups, {"select_from": select_from, **sums})


def check_agreement(
    ranks: ManyRanks,
    settings: dict[str, Any],
    groups: list[dict[str, Any]],
    more: Mapping[str, str] | None = None,
) -> None:
    """Raises ValueError on every rank where one has other settings, parameters or versions than another.

    Every rank has to call this. Sends 8 bytes per setting, of which `more` has further ones, as text.
    """
    facts = _facts(settings, groups) | (more or {})
    digests = [hashlib.blake2b(fact.encode(), digest_size=8).digest() for fact in facts.values()]
    own = torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests])
    own = own.to(local(groups[0]["params"][0]).device)
    rows = ranks.rows(own, "the check that all ranks have the same settings").cpu()
    for i, (name, fact) in enumerate(facts.items()):
        if len(set(rows[:, i].tolist())) > 1:
            same = int((rows[:, i] == own[i].cpu()).sum())
            raise ValueError(
                f"{name}: expected the same on all {len(rows)} ranks, got {fact[:200]} on {same} of them, "
                "this one included; start every rank with the same program, arguments and seed"
            )


def _facts(settings: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, str]:
    """What has to agree, as text; the same names on all ranks."""
    named = list(named_parameters(groups))
    names = ("step", "total_steps", *(field.name for field in fields(Method) if field.name != "budget_given"))
    return {
        "id3-optim": _version(),
        "torch": torch.__version__,
        "budget": json.dumps(settings["budget_given"]),
        **{name: json.dumps(settings.get(name), default=str) for name in names},
        "param_groups": str([[(k, _plain(group.get(k))) for k in OPTIONS] for group in groups]),
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
