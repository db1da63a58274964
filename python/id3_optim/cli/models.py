"""What the commands on deltas read: deltas, models, their configurations and tokenizers."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..delta import Delta
from ..delta.facts import model_facts
from ..extras import require
from ..integrations.groups import fresh_parameters
from .failures import first_line


def quiet_transformers() -> None:
    """Turns the messages of transformers off. Raises ImportError where it is not installed."""
    require("transformers", extra="hf")
    import huggingface_hub
    import transformers

    transformers.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def facts_of(delta: Delta, folder: Path) -> dict[str, Any]:
    """`model_facts` from the delta's settings, else from the configuration in `folder`; {} without both."""
    if "config" in delta.settings:
        return _checked(delta.settings["config"])
    file = folder / "config.json"
    if not file.is_file():
        return {}
    with reading(str(file), "a configuration in JSON"):
        return _checked(model_facts(json.loads(file.read_text(encoding="utf-8"))))


def _checked(facts: Any) -> dict[str, Any]:
    """The facts. Raises ValueError unless they can be put into a configuration."""
    labels, names = {}, None
    if isinstance(facts, dict):
        labels, names = facts.get("id2label", {}), facts.get("architectures")
    fits = isinstance(facts, dict) and isinstance(labels, dict) and isinstance(names, list | None)
    fits = fits and all(isinstance(name, str) for name in names or ())
    fits = fits and all(isinstance(label, str) for label in labels.values())
    fits = fits and all(number.isdecimal() for number in map(str, labels))
    fits = fits and isinstance(facts.get("problem_type"), str | None)
    if not (fits and isinstance(facts.get("pad_token_id"), int | None)):
        raise ValueError(f"settings: expected a config of architectures and labels, got {facts}")
    return facts


def load_model(
    delta: Delta,
    folder: Path,
    source: str,
    config: str | None = None,
    brings_whole: bool = True,
    cast: bool = False,
) -> torch.nn.Module:
    """The model at `source` that `delta` fits, each parameter in the dtype that the delta has for it.

    The configuration, which gives the class, is the one at `config`. Without `config` it is the one in
    `folder`, else the one at `source`, with the class and the labels that the delta recorded.
    brings_whole: the delta's whole parameters will be written to the model, so the checkpoint may lack them.
    cast: the parameters keep the dtype of the checkpoint instead.
    Raises ValueError if the checkpoint lacks any further parameter, which would hold random numbers.
    """
    beside = (folder / "config.json").is_file()
    place, option = (folder, "delta") if beside else (source, "--model")
    stored = load_config(source).dtype
    described = load_config(*((config, "--config") if config else (place, option)))
    if config is None:
        _put(delta.settings.get("config", {}), described)
    dtypes = {change.dtype for change in delta.changes.values() if change.indices is not None}
    dtype = dtypes.pop() if len(dtypes) == 1 else described.dtype or torch.float32
    # transformers loads all parameters in one dtype; float32 represents 16-bit values without loss.
    mixed = any(change.dtype != dtype for change in delta.changes.values())
    if cast:
        described.dtype = stored
    model, fresh = load(described, source, "auto" if cast else torch.float32 if mixed else dtype)
    whole = {name for name, change in delta.changes.items() if change.indices is None and brings_whole}
    check_held("--model", fresh - whole, source)
    for name, param in model.named_parameters():
        change = delta.changes.get(name)
        kept = model.dtype if cast else dtype if change is None else change.dtype
        param.data = param.data.to(kept)
    return model


def _put(facts: dict[str, Any], config) -> None:
    """Writes the recorded facts into a transformers configuration, in place."""
    _checked(facts)
    with reading("settings", "a config of architectures and labels"):
        for name in ("architectures", "problem_type", "pad_token_id"):
            if name in facts:
                setattr(config, name, facts[name])
        if "id2label" in facts:
            config.id2label = {int(i): label for i, label in facts["id2label"].items()}
            config.label2id = {label: i for i, label in config.id2label.items()}


def check_held(option: str, missing: set[str], source: str) -> None:
    """Raises ValueError, with the command line's option, where a checkpoint lacks parameters."""
    if missing:
        raise ValueError(f"{option}: expected weights for {min(missing)} in {source}, got none")


@contextlib.contextmanager
def reading(what: str, expected: str) -> Iterator[None]:
    """Turns the errors of libraries that read a damaged file, which can be of any type, into ValueError.

    Errors of this package, whose messages have its form, pass.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError | TypeError) and re.match(r"[\w.: -]+: expected ", str(error)):
            raise
        raise ValueError(f"{what}: expected {expected}, got {first_line(error)}") from error


def check_source(option: str, source: str | Path) -> None:
    """Raises ValueError for a model that is neither a file or directory here nor a possible hub name."""
    text = str(source)
    if not text.strip():
        raise ValueError(f"{option}: expected a folder or the name of a model on the hub, got {text!r}")
    is_path = os.path.isabs(text) or text[0] in ".~" or text.endswith(os.sep) or text.count(os.sep) > 1
    is_path |= os.sep in text and os.path.exists(os.path.dirname(text))
    if is_path and not os.path.exists(text):
        raise ValueError(
            f"{option}: expected a folder or the name of a model on the hub, got {text}, which does not exist"
        )


def hub_options(source: str | Path) -> dict[str, bool]:
    """Options of `from_pretrained`: a hub name is read from the cache alone where the hub is out of reach.

    Without them the client tries again for 20 seconds, for each file.
    """
    from huggingface_hub import constants

    return {} if os.path.exists(source) or _answers(constants.ENDPOINT) else {"local_files_only": True}


@functools.lru_cache
def _answers(endpoint: str) -> bool:
    from huggingface_hub import constants, get_session

    try:
        get_session().head(endpoint, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception:  # its class depends on the release of the client
        return False
    return True


def load_config(source: str | Path, option: str = "--model"):
    """The configuration of transformers in a folder, or of a hub name. option: its name in an error."""
    import transformers

    from ..integrations import mean_pooling  # noqa: F401 - makes its configuration known

    check_source(option, source)
    if os.path.isdir(source) and not os.path.isfile(Path(source) / "config.json"):
        raise ValueError(f"{option}: expected a config.json in {source}, got none")
    if os.path.exists(source):
        with reading(option, f"a model's configuration in {source}"):
            return transformers.AutoConfig.from_pretrained(source)
    try:
        return transformers.AutoConfig.from_pretrained(source, **hub_options(source))
    except Exception as error:
        if any("gated" in str(cause).lower() for cause in (error, error.__cause__)):
            raise ValueError(
                f"{option}: expected a model that this login may load, got {source}, which is gated: accept "
                "its terms on its page on the hub, then `hf auth login`"
            ) from error
        raise ValueError(
            f"{option}: expected a folder or the name of a model on the hub, got {source}: there "
            "is no such folder, and the hub gave none of that name (is it private, is there a network?)"
        ) from error


def load_pretrained(
    model_class: type, source: str, option: str = "--model", **options
) -> tuple[torch.nn.Module, set[str]]:
    """The model, and the names of its parameters that the checkpoint lacks; these are float32.

    options: of `from_pretrained`. Raises ValueError, which begins with `option`, for what cannot be loaded.
    """
    check_source(option, source)
    with reading(option, f"a model's weights in {source}"):
        options = options | hub_options(source) | {"output_loading_info": True}
        model, loading_info = model_class.from_pretrained(source, **options)
    fresh = fresh_parameters(model, loading_info)
    for name, parameter in model.named_parameters():
        if name in fresh:
            parameter.data = parameter.data.float()
    return model, fresh


def load_mean_pooling(
    source: str, dtype: torch.dtype | str, option: str = "--model", **settings
) -> tuple[torch.nn.Module, set[str]]:
    """As `load_pretrained`: a classifier over the mean of the encoder's states, or one that is saved there.

    settings: of the classifier's configuration, such as `id2label`.
    """
    from transformers import AutoModel

    from ..integrations.mean_pooling import MeanPoolingClassifier, MeanPoolingConfig, without_pooler

    config = load_config(source, option)
    if isinstance(config, MeanPoolingConfig):
        options = {"dtype": dtype, "ignore_mismatched_sizes": True, **settings}
        return load_pretrained(MeanPoolingClassifier, source, option, **options)
    encoder, missing = load_pretrained(AutoModel, source, option, dtype=dtype, **without_pooler(config))
    model = MeanPoolingClassifier(MeanPoolingConfig(encoder.config.to_dict(), **settings))
    model.encoder = encoder
    head = {name for name, _ in model.named_parameters() if name.startswith("classifier.")}
    return model, head | {f"encoder.{name}" for name in missing}


def load(
    config, source: str, dtype: torch.dtype | str, option: str = "--model"
) -> tuple[torch.nn.Module, set[str]]:
    """The model, and the names of its parameters that the checkpoint at `source` lacks."""
    import transformers

    if config.model_type == "mean_pooling":
        settings = {"id2label": config.id2label, "problem_type": config.problem_type}
        return load_mean_pooling(source, dtype, option, **settings)
    names = config.architectures or ["AutoModel"]
    name = names[0] if isinstance(names, list) else names
    model_class = getattr(transformers, str(name), None)
    known = isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)
    if name != "AutoModel" and not known:
        raise ValueError(f"architectures: expected a model class of transformers, got {name}")
    if known and not isinstance(config, model_class.config_class or type(config)):
        raise ValueError(f"{option}: expected one that {name} can hold, got a {config.model_type}")
    options = {"config": config, "dtype": dtype, "ignore_mismatched_sizes": True}
    return load_pretrained(model_class, source, option, **options)


def load_tokenizer(sources: Mapping[str, str]):
    """The tokenizer of the first source that has one, or None; a source that is no directory is a hub name.

    sources: by the option that gives them.
    """
    import transformers

    for option, source in sources.items():
        if not Path(source).is_dir() or (Path(source) / "tokenizer_config.json").is_file():
            with reading(option, f"a tokenizer in {source}"):
                return transformers.AutoTokenizer.from_pretrained(source, **hub_options(source))
    return None
