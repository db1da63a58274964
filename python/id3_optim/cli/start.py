"""The start of `id3-optim train`: a model and its tokenizer, which must fit each other and the task."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from ..method_table import trains_entries
from . import tasks
from .chat import check_template
from .models import hub_options, load_config, load_mean_pooling, load_pretrained, reading
from .settings import Settings
from .tasks import Task

_AUTO = {
    "classification": AutoModelForSequenceClassification,
    "regression": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "causal-lm": AutoModelForCausalLM,
}
_KNOWN = {
    "classification": transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "regression": transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "token-classification": transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    "causal-lm": transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
}
_SAMPLED = 200  # rows whose tokens are counted
_SHORTEST = 2  # tokens of a text, as for --max-length


# Decoders classify by the last token that is no padding of the configuration's: it has to be the rows'.
_WHOLE_TEXTS = ("classification", "regression")


@dataclass
class Start:
    """A model before training; `fresh` names its parameters that no checkpoint held.

    merge: what folds a LoRA into the weights after training, or None.
    """

    model: torch.nn.Module
    tokenizer: object
    fresh: set[str]
    merge: Callable[[], torch.nn.Module] | None = None


def load_start(settings: Settings, task: Task, device: torch.device | str = "cpu") -> Start:
    """Loads model and tokenizer; the seed fixes the numbers of a new head.

    With `bf16` and a method that trains entries the weights are bfloat16 (each active entry owns a float32
    master), except for fresh parameters, which are float32. Methods that train whole tensors or an adapter,
    and other optimizers, have no masters: the weights are float32 and the arithmetic alone is bfloat16.
    Raises ValueError or OSError for a model that does not fit the task, or a tokenizer that does not fit the
    texts.
    """
    check_model(settings.model, task, settings.pooling)
    transformers.set_seed(settings.seed)
    tokenizer = load_tokenizer(settings.model)
    check_fast(settings.model, tokenizer, task)
    check_tokenizer(settings.model, tokenizer, task)
    check_template(settings.model, tokenizer, [*task.train, *task.eval, *task.also])
    whole = settings.optimizer != "id3" or not trains_entries(settings.method)
    low = settings.bf16 and not whole
    dtype = torch.bfloat16 if low else torch.float32
    if settings.pooling == "mean":
        model, fresh = load_mean_pooling(settings.model, dtype, **label_options(task))
    else:
        options = {"dtype": dtype, **label_options(task)}
        options |= {"ignore_mismatched_sizes": True} if task.kind != "causal-lm" else {}
        model, fresh = load_pretrained(_AUTO[task.kind], settings.model, **options)
    for config in (model.config, model.config.get_text_config()):
        if config.pad_token_id is None or task.kind in _WHOLE_TEXTS:
            config.pad_token_id = tasks.padding_token(tokenizer)
    model.config.architectures = [type(model).__name__]
    # The optimizer chooses its backend by the parameters' device.
    model = model.to(device)
    if task.kind == "causal-lm":
        check_causal(settings.model, model)
    return Start(model, tokenizer, fresh)


def label_options(task: Task) -> dict:
    """The part of the model's configuration that the labels decide."""
    if task.kind == "regression":
        return {"num_labels": 1, "problem_type": "regression"}
    if not task.labels:
        return {}
    labels = dict(enumerate(task.labels))
    options = {"id2label": labels, "label2id": {label: i for i, label in labels.items()}}
    if task.kind == "classification":  # the model may come from another kind of task
        options["problem_type"] = "single_label_classification"
    return options


def check_model(source: str, task: Task, pooling: str = "first") -> None:
    """Raises ValueError where there is no model, or one of a kind that has no such task."""
    if pooling == "mean" and task.kind not in ("classification", "regression"):
        raise ValueError(f"--pooling: does not apply to {task.kind}: it has no vector of a whole text")
    config = load_config(source)
    if pooling == "mean" and type(config) in transformers.MODEL_MAPPING:
        return
    if type(config) not in _KNOWN[task.kind]:
        raise ValueError(f"--model: expected one that {task.kind} can train, got a {config.model_type}")


def load_tokenizer(source: str):
    """The tokenizer at `source`. Raises ValueError where a folder has none, or one that cannot be read."""
    with reading("--model", f"a tokenizer in {source}"):
        tokenizer = AutoTokenizer.from_pretrained(source, **hub_options(source))
    # Without these files transformers builds a tokenizer whose vocabulary is its special tokens.
    names = sorted(set(tokenizer.vocab_files_names.values()))
    if Path(source).is_dir() and names and not any((Path(source) / name).is_file() for name in names):
        raise ValueError(f"--model: expected a tokenizer ({' or '.join(names)}) in {source}, got none")
    limit = tokenizer.model_max_length
    if not isinstance(limit, int | float) or not limit >= _SHORTEST:
        raise ValueError(
            f"--model: expected a tokenizer whose model_max_length is a number of at least {_SHORTEST}, "
            f"got {limit!r}; correct tokenizer_config.json in {source}"
        )
    return tokenizer


def check_fast(source: str, tokenizer, task: Task) -> None:
    """Raises ValueError where tokens of words are needed, and the tokenizer does not tell them."""
    if task.kind == "token-classification" and not tokenizer.is_fast:
        raise ValueError(
            f"--model: expected a fast tokenizer (tokenizer.json) for token-classification, got "
            f"{type(tokenizer).__name__} in {source}"
        )


def check_tokenizer(source: str, tokenizer, task: Task) -> None:
    """Raises ValueError where most tokens of the training texts are the tokenizer's unknown one."""
    texts = [text for row in task.train[:_SAMPLED] for text in tasks.texts_of(row)]
    with reading("--model", f"a tokenizer in {source}"):
        rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    tokens = [token for ids in rows for token in ids]
    unknown = tokens.count(tokenizer.unk_token_id)
    if not tokens or 2 * unknown > len(tokens):
        got = f"{unknown} of {len(tokens)} tokens unknown ({tokenizer.unk_token})"
        raise ValueError(f"--model: expected a tokenizer for the texts of --train, got one with {got}")


def longest_input(start: Start) -> int:
    """How many tokens the tokenizer and the model's positions allow."""
    positions = getattr(start.model.config, "max_position_embeddings", None)
    return int(min(start.tokenizer.model_max_length, positions or start.tokenizer.model_max_length))


def check_tokens(source: str, model: torch.nn.Module, rows: list[dict]) -> None:
    """Raises ValueError where a row has a token that the model has no embedding for.

    rows: as `tasks.encode` returns them.
    """
    known = model.get_input_embeddings().weight.shape[0]
    largest = max((token for row in rows for token in row["input_ids"]), default=0)
    if largest >= known:
        raise ValueError(
            f"--model: expected a tokenizer within the model's {known} tokens, got token {largest} from the "
            f"one in {source}"
        )


@torch.no_grad()
def check_causal(source: str, model: torch.nn.Module) -> None:
    """Raises ValueError where a logit depends on a later token, as in an encoder, which sees its targets."""
    tokens = torch.arange(4, device=next(model.parameters()).device).repeat(2, 1)
    tokens[1, -1] = 0  # the last token alone differs
    model.eval()
    logits = model(input_ids=tokens).logits[:, :-1].float()
    difference, largest = (logits[0] - logits[1]).abs().max(), logits.abs().max()
    # Equal but for rounding; an encoder's logits differ by about their own size.
    if difference > 0.01 * largest:
        raise ValueError(
            f"--model: expected a causal language model for JSONL, got {source}, a "
            f"{type(model).__name__} whose tokens see later ones; an encoder trains on CSV"
        )
