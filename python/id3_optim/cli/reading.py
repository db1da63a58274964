"""The files of `id3-optim train` as rows: labelled text (CSV, TSV), tagged words (CoNLL), prompts with
completions and conversations (JSONL).

A mistake in a file raises ValueError with the file and the line.
"""

import codecs
import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .chat import Conversation, conversation
from .failures import shortened

# The first bytes of a file: its encoding. UTF-32's begin with UTF-16's, so they come first.
_MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}
_MARKS |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_LONGEST_FIELD = 2**31 - 1  # characters; Python's own limit, 131,072, is less than a long document


class LabelledText(NamedTuple):
    """A row of a classification task."""

    texts: tuple[str, ...]  # one sentence, or the two of a pair
    label: str


class TaggedText(NamedTuple):
    """A row of a token classification task: a tag for each word."""

    words: tuple[str, ...]
    tags: tuple[str, ...]


class Completion(NamedTuple):
    """A row of a causal language model's task."""

    prompt: str
    completion: str


def check_columns(texts: tuple[str, ...], label: str) -> None:
    """Raises ValueError unless these are one or two text columns, and the label another one."""
    if len(texts) not in (1, 2):
        raise ValueError(f"--text-column: expected one or two columns, got {len(texts)}")
    if len({*texts, label}) < len(texts) + 1:
        given = ", ".join(map(repr, texts))
        raise ValueError(
            f"--text-column: expected each column once and not --label-column, {label!r}, got {given}"
        )


def check_format(encoding: str, delimiter: str | None) -> None:
    """Raises ValueError for an encoding that is none of text, or a delimiter that is no single character."""
    try:
        codecs.lookup(encoding)
        "".encode(encoding)  # refuses codecs that are no encodings of text, such as hex
    except LookupError:
        raise ValueError(
            f"--encoding: expected a name such as utf-8, utf-16 or latin-1, got {encoding!r}"
        ) from None
    if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n \0'):
        raise ValueError(f"--delimiter: expected one character, such as ';' or tab, got {delimiter!r}")


def read_text(path: str, encoding: str = "utf-8") -> str:
    """The file's text without a byte order mark; line ends as they are."""
    data = Path(path).read_bytes()
    marked = next((name for mark, name in _MARKS.items() if data.startswith(mark)), None)
    wide = "16" in encoding or "32" in encoding
    if marked and not wide:
        raise ValueError(
            f"{path}:1: expected {encoding}, got the first bytes of {marked}; --encoding {marked}"
        )
    try:
        text = data.decode(encoding)
    except UnicodeError as error:
        before = data[: error.start] if isinstance(error, UnicodeDecodeError) else b""
        line, wrong = before.count(b"\n") + 1, data[len(before) : len(before) + 1].hex()
        raise ValueError(
            f"{path}:{line}: expected {encoding}, got the byte 0x{wrong}; "
            "choose with --encoding, such as latin-1 or utf-16"
        ) from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise ValueError(f"{path}:{line}: expected text, got a zero byte; --encoding utf-16-le?")
    return text.removeprefix("\ufeff")


def read_labelled(
    path: str,
    text_columns: list[str],
    label_column: str,
    encoding: str = "utf-8",
    delimiter: str | None = None,
) -> list[LabelledText]:
    """Reads CSV with quoting, or TSV (by the file's ending) without; the first row names the columns.

    delimiter: None: a tab for TSV, else a comma.
    """
    records = _records(path, encoding, delimiter)
    _, columns = next(records, (1, []))
    places = [_place(path, columns, name) for name in (*text_columns, label_column)] if columns else []
    rows = []
    for line, fields in records:
        if len(fields) != len(columns):
            raise ValueError(f"{path}:{line}: expected {len(columns)} fields, got {len(fields)}")
        *texts, label = (fields[place] for place in places)
        label = label.strip()
        if not any(text.strip() for text in texts):
            raise ValueError(
                f"{path}:{line}: expected a text in column {text_columns[0]!r}, got {texts[0]!r}"
            )
        if label.lower() in ("", "nan"):
            raise ValueError(f"{path}:{line}: expected a label in column {label_column!r}, got {label!r}")
        rows.append(LabelledText(tuple(texts), label))
    if not rows:
        raise ValueError(f"{path}: expected rows, got none")
    return rows


def _records(path: str, encoding: str, delimiter: str | None) -> Iterator[tuple[int, list[str]]]:
    """The fields of each record that is not blank, after the number of its first line."""
    tab = Path(path).suffix.lower() == ".tsv"
    quoting = csv.QUOTE_NONE if tab else csv.QUOTE_MINIMAL
    lines = io.StringIO(read_text(path, encoding), newline="")
    separator = delimiter or ("\t" if tab else ",")
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(lines, delimiter=separator, quoting=quoting, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(
                f"{path}:{line}: expected a record of CSV, got none that can be read ({error}); is a quote "
                "not closed, or a quote within quotes not written twice?"
            ) from None
        if fields:
            yield line, fields


def _place(path: str, columns: list[str], name: str) -> int:
    """Where the column is. Raises ValueError for a name that no column has, or several have."""
    if columns.count(name) > 1:
        raise ValueError(
            f"{path}: expected one column {name!r}, got {columns.count(name)}; rename all but one"
        )
    if name not in columns:
        if columns[0].lstrip().startswith("{"):
            got = shortened(",".join(columns))
            raise ValueError(
                f"{path}: expected CSV or TSV with a column {name!r}, got {got}, which looks like JSONL; "
                "--task causal-lm reads it"
            )
        other = next((mark for mark in ";\t|" if len(columns) == 1 and mark in columns[0]), None)
        hint = f"--delimiter {other!r}" if other else "--text-column and --label-column"
        raise ValueError(
            f"{path}: expected a column {name!r}, got {', '.join(map(repr, columns))}; choose with {hint}"
        )
    return columns.index(name)


def read_completions(path: str, encoding: str = "utf-8") -> list[Completion | Conversation]:
    """Reads JSONL: an object per line, with `messages` or the strings `prompt` and `completion`; other keys
    are ignored."""
    rows = []
    for number, line in enumerate(read_text(path, encoding).split("\n"), 1):
        if not line.strip():
            continue
        row = _object(f"{path}:{number}", line)
        if isinstance(row, dict) and row.get("messages") is not None and "completion" not in row:
            rows.append(conversation(f"{path}:{number}", row["messages"]))
            continue
        for key in ("prompt", "completion"):
            if not isinstance(row, dict) or not isinstance(row.get(key), str):
                raise ValueError(
                    f"{path}:{number}: expected an object with the string {key!r}, got {shortened(row)}"
                )
        if not row["completion"].strip():
            raise ValueError(
                f"{path}:{number}: completion: expected a text to learn, got {shortened(row['completion'])}"
            )
        rows.append(Completion(row["prompt"], row["completion"]))
    if not rows:
        raise ValueError(f"{path}: expected rows, got none")
    return rows


def read_tagged(path: str, encoding: str = "utf-8") -> list[TaggedText]:
    """Reads the format of CoNLL: a word a line, its tag in the last column, a blank line between sentences.

    Blanks or tabs separate columns; lines that begin with `-DOCSTART-` do not count.
    """
    rows: list[TaggedText] = []
    sentence: list[tuple[str, str]] = []
    for number, line in enumerate([*read_text(path, encoding).splitlines(), ""], 1):
        fields = line.split()
        if fields and fields[0] != "-DOCSTART-":
            if len(fields) < 2:
                raise ValueError(f"{path}:{number}: expected a word and its tag, got {shortened(line)}")
            sentence.append((fields[0], fields[-1]))
        elif sentence:
            rows.append(TaggedText(*zip(*sentence, strict=True)))
            sentence = []
    if not rows:
        raise ValueError(f"{path}: expected rows, got none")
    return rows


def _object(where: str, line: str) -> Any:
    """The JSON value of a line. Raises ValueError for text that is no JSON, and for a key given twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = next((key for key in ("prompt", "completion", "messages") if keys.count(key) > 1), None)
        if twice:
            raise ValueError(f"{where}: expected the key {twice!r} once, got it {keys.count(twice)} times")
        return dict(pairs)

    try:
        row = json.loads(line, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        got = shortened(line.strip())
        raise ValueError(f"{where}: expected JSON, got {got} ({error.msg})") from None
    except RecursionError:
        raise ValueError(f"{where}: expected an object, got {shortened(line)}, nested too deeply") from None
    if "\\ud" in line.lower():
        _check_surrogates(where, row)
    return row


def _check_surrogates(where: str, row: Any) -> None:
    """Raises ValueError for half of a surrogate pair, which is no character and which no tokenizer takes."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise ValueError(f"{where}: expected whole characters, got {half} alone, half of a pair") from None
