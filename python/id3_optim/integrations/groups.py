"""Param groups for ID3AdamW in any trainer: parameters under the budget, and parameters trained whole."""

from collections.abc import Iterable

import torch

from ..validation import check_fresh


def fresh_parameters(model: torch.nn.Module, loading_info: dict) -> set[str]:
    """Names of the parameters that have no values in the checkpoint, such as a new head.

    They start from random numbers, so there is no pre-trained value to stay near: train them densely.
    loading_info: as `from_pretrained(…, output_loading_info=True)` returns it.
    """
    mismatched = {
        entry[0] if isinstance(entry, tuple) else entry for entry in loading_info["mismatched_keys"]
    }
    missing = set(loading_info["missing_keys"]) | mismatched
    return {name for name, _ in model.named_parameters() if name in missing}


def parameter_groups(model: torch.nn.Module, fresh: Iterable[str] = (), **dense_options) -> list[dict]:
    """Param groups for ID3AdamW: pre-trained parameters share the budget, fresh ones are trained whole.

    fresh: names of the parameters of a `dense=True` group. dense_options: settings of that group alone, such
    as `lr`. Parameters with `requires_grad=False` are left out, and a group that would have none.
    Raises ValueError for a fresh name that is not in the model.
    """
    fresh = set(fresh)
    named = dict(model.named_parameters())
    check_fresh(named, fresh)
    trainable = [(name, p) for name, p in named.items() if p.requires_grad]
    pretrained = [(name, p) for name, p in trainable if name not in fresh]
    dense = [(name, p) for name, p in trainable if name in fresh]
    groups = [{"params": pretrained}] if pretrained or not dense else []
    if dense:
        groups.append({"params": dense, "dense": True, **dense_options})
    return groups
