"""Conversations: the rows of JSONL that have `messages`, as the tokenizer's chat template renders them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .failures import first_line, shortened
from .metrics import IGNORED

_TAIL = 60  # characters of a text, its end alone, in an error
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Conversation:
    """A row of a causal language model's task: messages with `role` and `content`, in order. where: the file
    and line that it is from, for errors."""

    messages: tuple[dict[str, str], ...]
    where: str = field(default="messages", compare=False)


def conversation(where: str, messages: Any) -> Conversation:
    """The value of `messages`, checked. Raises ValueError that begins with `where`, the file and line."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: messages: expected a list of objects, got {shortened(messages)}")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            expected = 'objects such as {"role": "user", "content": "a text"}'
            raise ValueError(f"{where}: messages: expected {expected}, got {shortened(message)}")
        if message.get("role") not in ROLES:
            got = shortened(message.get("role"))
            raise ValueError(f"{where}: messages: expected a role of {', '.join(ROLES)}, got {got}")
    answers = [message["content"] for message in messages[1:] if message["role"] == "assistant"]
    if not answers or not all(answer.strip() for answer in answers):
        got = "none" if not answers else "an empty one"
        raise ValueError(f"{where}: messages: expected an answer of the assistant to learn, got {got}")
    return Conversation(tuple(messages), where)


def check_template(source: str, tokenizer, rows: Sequence[Any]) -> None:
    """Raises ValueError for conversations and a tokenizer without a chat template, or without offsets."""
    if not any(isinstance(row, Conversation) for row in rows):
        return
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            "--model: expected a tokenizer with a chat template for rows with messages, got none in "
            f"{source}; take an instruct model, or rows with prompt and completion"
        )
    if not tokenizer.is_fast:
        raise ValueError(f"--model: expected a fast tokenizer (tokenizer.json) for rows with messages, got "
                         f"{type(tokenizer).__name__} in {source}")  # fmt: skip


def encode_conversation(row: Conversation, tokenizer, max_length: int) -> tuple[dict, bool]:
    """The model's inputs and whether they are cut: the tokens up to the assistant's last turn.

    The loss covers the assistant's turns, each with what the template puts after it, but not a greeting
    before the first message. A conversation that is too long loses its beginning; of a last turn that is too
    long by itself the end is cut, so that its first token has one before it.
    Raises ValueError for a conversation that the template refuses, or whose earlier turns it changes later.
    """
    text, turns = _rendered(row, tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens, ends = encoded["input_ids"], [end for _, end in encoded["offset_mapping"]]
    learnt = [any(begin < end <= last for begin, last in turns) for end in ends]
    labels = [token if learn else IGNORED for token, learn in zip(tokens, learnt, strict=True)]
    answer = next((i for i, end in enumerate(ends) if end > turns[-1][0]), len(ends))
    first, cut = max(0, min(len(tokens) - max_length, answer - 1)), len(tokens) > max_length
    tokens, labels = tokens[first : first + max_length], labels[first : first + max_length]
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}, cut


def _rendered(row: Conversation, tokenizer) -> tuple[str, list[tuple[int, int]]]:
    """The text up to the assistant's last turn, and where each of these turns begins and ends.

    A turn begins behind the template's prompt for one, as far as the turn repeats it: the prompt of some
    reasoning models goes on with a thought that finished turns lack.
    """
    text, turns = "", []
    for i, message in enumerate(row.messages):
        if message["role"] != "assistant" or i == 0:
            continue
        before, after = (_render(row, n, tokenizer, prompt=False) for n in (i, i + 1))
        if not (before.startswith(text) and after.startswith(before)):
            raise ValueError(
                f"{row.where}: expected a chat template that leaves earlier turns as they were, got "
                f"one that changes them in {shortened(before[-_TAIL:])}; write a row for each answer of the "
                "assistant"
            )
        shared = _common(_render(row, i, tokenizer, prompt=True), after)
        text = after
        turns.append((max(shared, len(before)), len(after)))
    return text, turns


def _common(a: str, b: str) -> int:
    """How many characters both begin with."""
    differing = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differing, min(len(a), len(b)))


def _render(row: Conversation, n: int, tokenizer, prompt: bool) -> str:
    """The first n messages. prompt: with the beginning of an answer behind them."""
    messages = list(row.messages[:n])
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except Exception as error:  # a template raises what it likes
        raise ValueError(
            f"{row.where}: expected a conversation that the chat template takes, got "
            f"{first_line(error)} for {shortened(row.messages[0]['content'])}"
        ) from error
