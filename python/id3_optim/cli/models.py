"""The models and their configurations that the commands on deltas load and write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..delta import Delta
from ..extras import require
from ..integrations.groups import fresh_parameters

# A configuration file omits the labels where they have transformers' default values, which are these.
_TWO_LABELS = {"0": "LABEL_0", "1": "LABEL_1"}


def quiet_transformers() -> None:
    """Turns the messages of transformers off. Raises ImportError where it is not installed."""
    require("transformers", extra="hf")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def model_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a `config.json` that a delta's settings hold: the model's class and its labels."""
    if not config.get("architectures"):
        return {}
    facts = {"architectures": config["architectures"], "id2label": config.get("id2label", _TWO_LABELS)}
    return facts | ({"problem_type": config["problem_type"]} if config.get("problem_type") else {})


def facts_of(delta: Delta, folder: Path) -> dict[str, Any]:
    """`model_facts` from the delta's settings, else from the configuration in `folder`; {} without both."""
    if "config" in delta.settings:
        return delta.settings["config"]
    file = folder / "config.json"
    return model_facts(json.loads(file.read_text())) if file.is_file() else {}


def load_model(
    delta: Delta, folder: Path, source: str, config: str | None = None, brings_whole: bool = True
) -> torch.nn.Module:
    """The model at `source` that `delta` fits, each parameter in the dtype that the delta has for it.

    The configuration, which gives the class, is the one at `config`. Without `config` it is the one in
    `folder`, else the one at `source`, with the class and the labels that the delta recorded.
    brings_whole: the delta's whole parameters will be written to the model, so the checkpoint may lack them.
    Raises ValueError if the checkpoint lacks any further parameter, which would hold random numbers.
    """
    beside = folder if (folder / "config.json").is_file() else source
    described = load_config(config or beside)
    if config is None:
        _put(delta.settings.get("config", {}), described)
    dtypes = {change.dtype for change in delta.changes.values() if change.indices is not None}
    dtype = dtypes.pop() if len(dtypes) == 1 else described.dtype or torch.float32
    # transformers loads all parameters in one dtype; float32 represents 16-bit values without loss.
    mixed = any(change.dtype != dtype for change in delta.changes.values())
    model, fresh = load(described, source, torch.float32 if mixed else dtype)
    whole = {name for name, change in delta.changes.items() if change.indices is None and brings_whole}
    check_held("--model", fresh - whole, source)
    for name, param in model.named_parameters():
        change = delta.changes.get(name)
        param.data = param.data.to(dtype if change is None else change.dtype)
    return model


def _put(facts: dict[str, Any], config) -> None:
    """Writes the recorded facts into a transformers configuration, in place."""
    if not isinstance(facts, dict) or not isinstance(facts.get("id2label", {}), dict):
        raise ValueError(f"settings: expected a config of architectures and labels, got {facts}")
    for name in ("architectures", "problem_type"):
        if name in facts:
            setattr(config, name, facts[name])
    if "id2label" in facts:
        config.id2label = {int(i): label for i, label in facts["id2label"].items()}
        config.label2id = {label: i for i, label in config.id2label.items()}


def check_held(option: str, missing: set[str], source: str) -> None:
    """Raises ValueError, with the command line's option, where a checkpoint lacks parameters."""
    if missing:
        raise ValueError(f"{option}: expected weights for {min(missing)} in {source}, got none")


def load_config(source: str | Path):
    """The configuration of transformers in a directory, or of a hub name."""
    import transformers

    return transformers.AutoConfig.from_pretrained(source)


def load_pretrained(model_class: type, source: str, **options) -> tuple[torch.nn.Module, set[str]]:
    """The model, and the names of its parameters that the checkpoint lacks; these are float32.

    options: of `from_pretrained`.
    """
    model, loading_info = model_class.from_pretrained(source, output_loading_info=True, **options)
    fresh = fresh_parameters(model, loading_info)
    for name, parameter in model.named_parameters():
        if name in fresh:
            parameter.data = parameter.data.float()
    return model, fresh


def load(config, source: str, dtype: torch.dtype | str) -> tuple[torch.nn.Module, set[str]]:
    """The model, and the names of its parameters that the checkpoint at `source` lacks."""
    import safetensors
    import transformers

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
    """Copies the tokenizer of the first source that has one; a source that is no directory is a hub name."""
    import transformers

    for source in sources:
        if not Path(source).is_dir() or (Path(source) / "tokenizer_config.json").is_file():
            transformers.AutoTokenizer.from_pretrained(source).save_pretrained(output)
            return True
    return False
