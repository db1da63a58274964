"""The tasks of `id3-optim train`: the rows of both files, tokenising and padding."""

import functools
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch

from .chat import Conversation, encode_conversation
from .metrics import IGNORED
from .reading import Completion, LabelledText, TaggedText, read_completions, read_labelled, read_tagged
from .settings import Settings

KINDS = ("classification", "regression", "token-classification", "causal-lm")
_BY_ENDING = {
    ".csv": "classification",
    ".tsv": "classification",
    ".jsonl": "causal-lm",
    ".conll": "token-classification",
}
Row = LabelledText | TaggedText | Completion | Conversation
Rows = list[LabelledText] | list[TaggedText] | list[Completion | Conversation]
FEW_CLASSES = 20  # so many labels are classes, however few rows there are


@dataclass(frozen=True)
class Task:
    """`kind` is one of `KINDS`; `labels` (of texts or tokens) orders the classes.

    also: rows to measure on before and after training, apart from `eval`.
    """

    kind: str
    train: Rows
    eval: Rows
    labels: list[str]
    also: Rows = field(default_factory=list)


def texts_of(row: Row) -> tuple[str, ...]:
    """The texts of a row."""
    if isinstance(row, LabelledText):
        return row.texts
    if isinstance(row, Conversation):
        return tuple(message["content"] for message in row.messages)
    return (" ".join(row.words),) if isinstance(row, TaggedText) else tuple(row)


def infer_kind(path: str) -> str:
    """The task for the ending of a file's name. Raises ValueError for an unknown ending."""
    suffix = Path(path).suffix.lower()
    if suffix not in _BY_ENDING:
        raise ValueError(
            f"--train: expected a name in .csv, .tsv, .jsonl or .conll, got {path}; name it so or give --task"
        )
    return _BY_ENDING[suffix]


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
    if kind is None and _BY_ENDING.get(Path(eval).suffix.lower(), chosen) != chosen:
        raise ValueError(
            f"--eval: expected a file for {chosen} as --train, got {eval}; CSV and TSV are for "
            "classification, JSONL is for causal-lm"
        )
    if chosen in ("causal-lm", "token-classification") and delimiter is not None:
        form = "JSONL" if chosen == "causal-lm" else "columns between blanks"
        raise ValueError(f"--delimiter: does not apply to {chosen}: its files are {form}")
    if chosen == "causal-lm":
        return Task(chosen, read_completions(train, encoding), read_completions(eval, encoding), [])
    if chosen == "token-classification":
        return _read_tagged_task(train, eval, encoding)
    text_columns = text_columns or ["text"]
    rows, eval_rows = (
        read_labelled(path, text_columns, label_column, encoding, delimiter) for path in (train, eval)
    )
    if chosen == "regression":
        for path, read in ((train, rows), (eval, eval_rows)):
            check_scores(path, label_column, read)
        return Task(chosen, rows, eval_rows, [])
    labels = sorted_labels({row.label for row in rows})
    if len(labels) < 2:
        raise ValueError(
            f"{train}: expected two labels or more in column {label_column!r}, got {labels[0]!r} alone"
        )
    if kind is None:
        check_classes(train, label_column, labels, len(rows))
    check_known(eval, train, {row.label for row in eval_rows} - set(labels))
    return Task(chosen, rows, eval_rows, labels)


def task_of(settings: Settings) -> Task:
    """`read_task` of the settings of a run."""
    task = _read_with(settings, settings.eval)
    if settings.also_eval is None:
        return task
    return replace(task, also=_read_with(settings, settings.also_eval).eval)


def _read_with(settings: Settings, eval: str) -> Task:
    return read_task(
        settings.train,
        eval,
        kind=settings.task,
        text_columns=list(settings.text_column),
        label_column=settings.label_column,
        encoding=settings.encoding,
        delimiter=settings.delimiter,
    )


def _read_tagged_task(train: str, eval: str, encoding: str) -> Task:
    rows, eval_rows = read_tagged(train, encoding), read_tagged(eval, encoding)
    labels = sorted({tag for row in rows for tag in row.tags})
    check_known(eval, train, {tag for row in eval_rows for tag in row.tags} - set(labels))
    return Task("token-classification", rows, eval_rows, labels)


def check_known(eval: str, train: str, unknown: set[str]) -> None:
    """Raises ValueError where the file `eval` has labels that `train` lacks."""
    if unknown:
        raise ValueError(
            f"{eval}: expected labels that occur in {train}, got {', '.join(map(repr, sorted(unknown)[:5]))} "
            f"({len(unknown)} such labels)"
        )


def check_scores(path: str, column: str, rows: list[LabelledText]) -> None:
    """Raises ValueError for a label that is no finite number."""
    wrong = next((row.label for row in rows if _number(row.label) is None), None)
    if wrong is not None:
        raise ValueError(f"{path}: expected numbers in column {column!r}, got {wrong!r}")


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
        "--task classification trains each as a class, --task regression learns scores"
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


class Encoded(NamedTuple):
    """The model's inputs for each row (lists of ints, not padded), with `labels`. cut: how many rows had more
    tokens."""

    rows: list[dict]
    cut: int


def encode(rows: list, task: Task, tokenizer, max_length: int) -> Encoded:
    """The rows as inputs of at most `max_length` tokens."""
    if task.kind == "causal-lm":
        pairs = [
            (encode_conversation if isinstance(row, Conversation) else encode_completion)(
                row, tokenizer, max_length
            )
            for row in rows
        ]
        return Encoded([row for row, _ in pairs], sum(cut for _, cut in pairs))
    if task.kind == "token-classification":
        return encode_tagged(rows, task.labels, tokenizer, max_length)
    number = {label: i for i, label in enumerate(task.labels)}
    columns = zip(*(row.texts for row in rows), strict=True)
    encoded = tokenizer(*map(list, columns), truncation=True, max_length=max_length)
    labels = [number[row.label] if number else float(row.label) for row in rows]
    found = [
        {**{key: values[i] for key, values in encoded.items()}, "labels": label}
        for i, label in enumerate(labels)
    ]
    return Encoded(found, _cut(encoded))


def _cut(encoded) -> int:
    """How many rows a tokenizer has cut; 0 from one in Python, which does not tell."""
    return sum(bool(row.overflowing) for row in encoded.encodings or ())


def encode_tagged(rows: list[TaggedText], labels: list[str], tokenizer, max_length: int) -> Encoded:
    """The first token of each word has the word's tag; other tokens have `IGNORED`."""
    number = {label: i for i, label in enumerate(labels)}
    words = [list(row.words) for row in rows]
    encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=max_length)
    found = []
    for i, row in enumerate(rows):
        owners = encoded.word_ids(i)
        first = [word is not None and word not in owners[:at] for at, word in enumerate(owners)]
        tags = [
            number[row.tags[word]] if begins else IGNORED for word, begins in zip(owners, first, strict=True)
        ]
        found.append({**{key: values[i] for key, values in encoded.items()}, "labels": tags})
    return Encoded(found, _cut(encoded))


def encode_completion(row: Completion, tokenizer, max_length: int) -> tuple[dict, bool]:
    """Prompt, completion, end of text, of which the loss covers the last two; and whether they are cut, the
    prompt's beginning first."""
    prompt = list(tokenizer(row.prompt)["input_ids"])
    if _ends_texts(tokenizer) and len(prompt) > 1:  # what follows is no new text
        prompt.pop()
    completion = tokenizer(row.completion, add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        completion = [*completion, tokenizer.eos_token_id]
    whole = len(prompt) + len(completion)
    # One token is reserved for the prompt: the first token of a sequence is never predicted.
    completion = completion[: max_length - 1]
    prompt = prompt[-(max_length - len(completion)) :]
    tokens = prompt + completion
    labels = [IGNORED] * len(prompt) + completion
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}, len(tokens) < whole


@functools.lru_cache(maxsize=8)
def _ends_texts(tokenizer) -> bool:
    """Whether the tokenizer puts the end of text behind every text."""
    bare, whole = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    return len(whole) > len(bare) and whole[-1] == tokenizer.eos_token_id and whole[-len(bare) :] != bare


def padding_token(tokenizer) -> int:
    """The padding token, else the end of text, else 0; attention and loss mask padding out."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0


def collate(rows: list[dict], pad_token_id: int) -> dict[str, torch.Tensor]:
    """A batch [rows, longest row], padded on the right; labels of whole texts stay [rows]."""
    filler = {"input_ids": pad_token_id, "labels": IGNORED}
    batch = {}
    for key, first in rows[0].items():
        values = [row[key] for row in rows]
        if isinstance(first, list):
            longest = max(map(len, values))
            values = [value + [filler.get(key, 0)] * (longest - len(value)) for value in values]
        batch[key] = torch.tensor(values)
    return batch
