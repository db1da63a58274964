"""What a delta's settings hold of a model of transformers: its class, its labels, its padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..wrappers import unwrapped_model

# A configuration file omits the labels where they have transformers' default values, which are these.
TWO_LABELS = {"0": "LABEL_0", "1": "LABEL_1"}
_WHERE_SET = ("problem_type", "pad_token_id")


def model_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a `config.json` that a delta's settings hold; {} for one that names no class."""
    if not config.get("architectures"):
        return {}
    labels = {str(i): label for i, label in (config.get("id2label") or TWO_LABELS).items()}
    facts = {"architectures": config["architectures"], "id2label": labels}
    return facts | {name: config[name] for name in _WHERE_SET if config.get(name) is not None}


def setting_of_model(model: nn.Module) -> dict[str, Any]:
    """What a delta's settings get: `config` with `model_facts` of a model of transformers itself, as it would
    be saved; nothing for another."""
    model = unwrapped_model(model)
    # FSDP2 gives a model a class of its own, before that of the model.
    kind = next(k for k in type(model).__mro__ if not k.__module__.startswith("torch.distributed."))
    own = kind.__module__.startswith("transformers.models.")
    if not own or not hasattr(getattr(model, "config", None), "to_dict"):
        return {}
    return {"config": model_facts(model.config.to_dict() | {"architectures": [kind.__name__]})}
