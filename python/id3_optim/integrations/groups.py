"""Param groups for ID3AdamW in any trainer: what competes for the budget, and what is trained whole."""

from collections.abc import Iterable

import torch


def fresh_parameters(model: torch.nn.Module, loading_info: dict) -> set[str]:
    """Names of the parameters that `from_pretrained(…, output_loading_info=True)` found in no checkpoint
    file.

    These start from random numbers, so there is no pre-trained value to stay near: train them densely.
    """
    mismatched = {
        entry[0] if isinstance(entry, tuple) else entry for entry in loading_info["mismatched_keys"]
    }
    missing = set(loading_info["missing_keys"]) | mismatched
    return {name for name, _ in model.named_parameters() if name in missing}


def parameter_groups(model: torch.nn.Module, fresh: Iterable[str] = (), **dense_options) -> list[dict]:
    """Param groups for ID3AdamW: what was pre-trained competes for the budget, `fresh` is a `dense=True`
    group.

    dense_options: settings of the dense group alone, such as `lr`. Frozen parameters are left out.
    Raises ValueError for a fresh name that the model has not.
    """
    fresh = set(fresh)
    named = dict(model.named_parameters())
    if unknown := sorted(fresh - named.keys()):
        raise ValueError(f"fresh: expected names of the model's parameters, got {unknown[0]!r}")
    trainable = [(name, p) for name, p in named.items() if p.requires_grad]
    groups = [{"params": [(name, p) for name, p in trainable if name not in fresh]}]
    dense = [(name, p) for name, p in trainable if name in fresh]
    if dense:
        groups.append({"params": dense, "dense": True, **dense_options})
    return groups
