"""The models and their configurations that the commands on deltas load and write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .extras import require

if TYPE_CHECKING:
    import torch

    from .delta import Delta

# A configuration file leaves out what has transformers' default value.
_TWO_LABELS = {"0": "LABEL_0", "1": "LABEL_1"}


def quiet_transformers() -> None:
    require("transformers", extra="hf")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def model_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a delta's settings keep of the content of a `config.json`: the model's class and its labels."""
    if not config.get("architectures"):
        return {}
    facts = {"architectures": config["architectures"], "id2label": config.get("id2label", _TWO_LABELS)}
    return facts | ({"problem_type": config["problem_type"]} if config.get("problem_type") else {})


def facts_of(delta: Delta, folder: Path) -> dict[str, Any]:
    """`model_facts` as the delta's settings have them, or by the configuration beside it; {} if neither."""
    if "config" in delta.settings:
        return delta.settings["config"]
    file = folder / "config.json"
    return model_facts(json.loads(file.read_text())) if file.is_file() else {}


def load_model(
    delta: Delta, folder: Path, source: str, config: str | None = None, brings_whole: bool = True
) -> torch.nn.Module:
    """The model at `source`, as `delta` wants it; each parameter in the dtype that the delta tells.

    Its configuration, and so its class: that at `config`; or that beside the delta, or else at `source`, with
    the class and the labels that the delta recorded. brings_whole: the delta's whole parameters will be
    written to the model, so that the checkpoint may lack these. Raises ValueError if it lacks others, which
    would be left with random numbers.
    """
    import torch
    import transformers

    beside = folder if (folder / "config.json").is_file() else source
    described = transformers.AutoConfig.from_pretrained(config or beside)
    if config is None:
        _put(delta.settings.get("config", {}), described)
    told = {change.dtype for change in delta.changes.values() if change.indices is not None}
    dtype = told.pop() if len(told) == 1 else described.dtype or torch.float32
    # transformers loads all parameters in one dtype; float32 holds those of half width without loss.
    mixed = any(change.dtype != dtype for change in delta.changes.values())
    model, fresh = load(described, source, torch.float32 if mixed else dtype)
    whole = {name for name, change in delta.changes.items() if change.indices is None and brings_whole}
    check_held("--model", fresh - whole, source)
    for name, param in model.named_parameters():
        change = delta.changes.get(name)
        param.data = param.data.to(dtype if change is None else change.dtype)
    return model


def _put(facts: dict[str, Any], config) -> None:
    """The recorded facts over those of a transformers configuration, in place."""
    if not isinstance(facts, dict) or not isinstance(facts.get("id2label", {}), dict):
        raise ValueError(f"settings: expected a config of architectures and labels, got {facts}")
    for name in ("architectures", "problem_type"):
        if name in facts:
            setattr(config, name, facts[name])
    if "id2label" in facts:
        config.id2label = {int(i): label for i, label in facts["id2label"].items()}
        config.label2id = {label: i for i, label in config.id2label.items()}


def check_held(option: str, missing: set[str], source: str) -> None:
    if missing:
        raise ValueError(f"{option}: expected weights for {min(missing)} in {source}, got none")


def load(config, source: str, dtype: torch.dtype | str) -> tuple[torch.nn.Module, set[str]]:
    """The model, and the names of its parameters that the checkpoint at `source` lacks."""
    import safetensors
    import transformers

    from .train import load_pretrained

    name = (config.architectures or ["AutoModel"])[0]
    model_class = getattr(transformers, str(name), None)
    known = isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)
    if name != "AutoModel" and not known:
        raise ValueError(f"architectures: expected a model class of transformers, got {name}")
    if known and not isinstance(config, model_class.config_class or type(config)):
        raise ValueError(f"--model: expected one that {name} can hold, got a {config.model_type}")
    options = {"config": config, "dtype": dtype, "ignore_mismatched_sizes": True}
    try:
        return load_pretrained(model_class, source, **options)
    except safetensors.SafetensorError as error:
        raise OSError(f"{source}: expected weights as safetensors, got: {error}") from error


def save_tokenizer(sources: list[str], output: str) -> bool:
    """Copies the first tokenizer found; a source that is no directory is a hub name."""
    import transformers

    for source in sources:
        if not Path(source).is_dir() or (Path(source) / "tokenizer_config.json").is_file():
            transformers.AutoTokenizer.from_pretrained(source).save_pretrained(output)
            return True
    return False
