"""The tasks of `id3-optim train`: the rows of both files, tokenising, padding and metrics."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .reading import Completion, LabelledText, read_completions, read_labelled

FEW_CLASSES = 20  # so many labels are classes, however few rows there are
IGNORED = -100  # torch.nn.CrossEntropyLoss excludes targets of this value


@dataclass(frozen=True)
class Task:
    """`kind` is "classification" or "causal-lm"; `labels` (classification only) orders the classes."""

    kind: str
    train: list[LabelledText] | list[Completion]
    eval: list[LabelledText] | list[Completion]
    labels: list[str]


def infer_kind(path: str) -> str:
    """The task for the ending of a file's name. Raises ValueError for an unknown ending."""
    suffix = Path(path).suffix.lower()
    kinds = {".csv": "classification", ".tsv": "classification", ".jsonl": "causal-lm"}
    if suffix not in kinds:
        raise ValueError(
            f"--train: expected a name in .csv, .tsv or .jsonl, got {path}; name it so or give --task"
        )
    return kinds[suffix]


def read_task(
    train: str,
    eval: str,
    *,
    kind: str | None = None,
    text_columns: list[str] | None = None,
    label_column="label",
    encoding: str = "utf-8",
    delimiter: str | None = None,
) -> Task:
    """Reads both files. The label set is that of `train`; a label that only `eval` has is refused.

    kind: None: by the ending of `train`. Only then are labels refused that do not look like classes.
    """
    chosen = kind or infer_kind(train)
    if chosen == "causal-lm":
        if delimiter is not None:
            raise ValueError("--delimiter: does not apply to causal-lm: its files are JSONL")
        return Task(chosen, read_completions(train, encoding), read_completions(eval, encoding), [])
    text_columns = text_columns or ["text"]
    rows, eval_rows = (
        read_labelled(path, text_columns, label_column, encoding, delimiter) for path in (train, eval)
    )
    labels = sorted_labels({row.label for row in rows})
    if len(labels) < 2:
        raise ValueError(
            f"{train}: expected two labels or more in column {label_column!r}, got {labels[0]!r} alone"
        )
    if kind is None:
        check_classes(train, label_column, labels, len(rows))
    unknown = sorted({row.label for row in eval_rows} - set(labels))
    if unknown:
        raise ValueError(
            f"{eval}: expected labels that occur in {train}, got {', '.join(map(repr, unknown[:5]))} "
            f"({len(unknown)} such labels)"
        )
    return Task(chosen, rows, eval_rows, labels)


def check_classes(path: str, column: str, labels: list[str], rows: int) -> None:
    """Raises ValueError for labels that are scores, or that hardly any two rows share."""
    numbers = [_number(label) for label in labels]
    scores = [label for label, n in zip(labels, numbers, strict=True) if n is not None and n != int(n)]
    got = f"{len(labels)} different values in {rows} rows"
    if scores and None not in numbers:
        got = f"{len(labels)} numbers such as {scores[0]}, which are scores"
    elif len(labels) <= max(FEW_CLASSES, rows / 2):
        return
    raise ValueError(
        f"{path}: expected classes in column {column!r}, got {got}; "
        "--task classification trains each as a class"
    )


def _number(label: str) -> float | None:
    try:
        number = float(label)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def sorted_labels(labels: set[str]) -> list[str]:
    """By number where all are whole numbers (so that label 10 follows 9), else by text."""
    numeric = all(label.removeprefix("-").isdecimal() for label in labels)
    return sorted(labels, key=int if numeric else str)


def encode(rows: list, task: Task, tokenizer, max_length: int) -> list[dict]:
    """The model's inputs for each row (lists of ints, not padded), with `labels`."""
    if task.kind == "causal-lm":
        return [encode_completion(row, tokenizer, max_length) for row in rows]
    number = {label: i for i, label in enumerate(task.labels)}
    columns = zip(*(row.texts for row in rows), strict=True)
    encoded = tokenizer(*map(list, columns), truncation=True, max_length=max_length)
    return [
        {**{key: values[i] for key, values in encoded.items()}, "labels": number[row.label]}
        for i, row in enumerate(rows)
    ]


def encode_completion(row: Completion, tokenizer, max_length: int) -> dict:
    """Prompt, completion, end of text; the loss covers the last two. The prompt's beginning is cut first."""
    prompt = tokenizer(row.prompt)["input_ids"]
    completion = tokenizer(row.completion, add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        completion = [*completion, tokenizer.eos_token_id]
    # One token is reserved for the prompt: the first token of a sequence is never predicted.
    completion = completion[: max_length - 1]
    prompt = prompt[-(max_length - len(completion)) :]
    tokens = prompt + completion
    return {
        "input_ids": tokens,
        "attention_mask": [1] * len(tokens),
        "labels": [IGNORED] * len(prompt) + completion,
    }


def padding_token(tokenizer) -> int:
    """The padding token, else the end of text, else 0; attention and loss mask padding out."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0


def collate(rows: list[dict], pad_token_id: int) -> dict[str, torch.Tensor]:
    """A batch [rows, longest row], padded on the right; class labels stay [rows]."""
    filler = {"input_ids": pad_token_id, "labels": IGNORED}
    batch = {}
    for key, first in rows[0].items():
        values = [row[key] for row in rows]
        if not isinstance(first, int):
            longest = max(map(len, values))
            values = [value + [filler.get(key, 0)] * (longest - len(value)) for value in values]
        batch[key] = torch.tensor(values)
    return batch


def reduce_logits(kind: str):
    """The Trainer's `preprocess_logits_for_metrics`: reduces logits to [rows] or [rows, 2] numbers."""

    def predicted_class(logits, labels):
        return logits.argmax(-1)

    def summed_loss(logits, labels):
        logits = logits[0] if isinstance(logits, tuple) else logits
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(),
            labels[:, 1:].flatten(),
            ignore_index=IGNORED,
            reduction="none",
        ).view(len(labels), -1)
        return torch.stack([losses.sum(1), (labels[:, 1:] != IGNORED).sum(1)], dim=1)

    return summed_loss if kind == "causal-lm" else predicted_class


def metrics(kind: str):
    """The Trainer's `compute_metrics`: accuracy and Matthews, or a token's mean loss and perplexity."""

    def accuracy(prediction):
        predicted, labels = prediction.predictions, prediction.label_ids
        return {"accuracy": float(np.mean(predicted == labels)), "matthews": matthews(predicted, labels)}

    def perplexity(prediction):
        loss, tokens = prediction.predictions.sum(axis=0, dtype=np.float64)
        return {"token_loss": loss / tokens, "perplexity": math.exp(min(loss / tokens, 700.0))}

    return perplexity if kind == "causal-lm" else accuracy


def matthews(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Matthews' correlation of classes (Gorodkin's R_K for more than two); 0 where one side is constant."""
    classes = np.unique(np.concatenate([predicted, labels]))
    a, b = (np.equal.outer(side, classes).astype(np.float64) for side in (predicted, labels))
    a, b = a - a.mean(0), b - b.mean(0)
    scale = math.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / scale) if scale else 0.0
