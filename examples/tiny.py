"""Arguments, tiny models, tokenizers and data for the examples.

`--model` takes a name on the hub or a folder in place of the tiny model; the data stays a toy.
"""

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "</s>"}
WORDS = [
    *SPECIAL.values(),
    *(
        "the",
        "film",
        "book",
        "song",
        "was",
        "is",
        "good",
        "bad",
        "fine",
        "awful",
        "red",
        "blue",
        "colour",
        "of",
    ),
]
THINGS = ("film", "book", "song")
WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def arguments(description: str, steps: int = 40) -> argparse.Namespace:
    """--model, --steps, --output (a Path, made if it is missing)."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", help="a hub name or a folder; left out: a tiny model with random weights")
    parser.add_argument("--steps", type=int, default=steps, help=f"optimizer steps (default {steps})")
    parser.add_argument("--output", type=Path, default=Path("runs/example"), help="default: runs/example")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    return args


def encoder(folder: Path) -> str:
    """Saves a BERT without a head in `folder`, with the same weights each time; returns the folder."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        max_position_embeddings=64,
        initializer_range=0.2,  # with 0.02 the outputs of so narrow a model hardly depend on the words
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **WIDTH,
    )
    return _save(BertModel(config), folder)


def decoder(folder: Path) -> str:
    """Saves a Llama in `folder`, with the same weights each time; returns the folder."""
    torch.manual_seed(0)
    end = WORDS.index(SPECIAL["eos_token"])
    config = LlamaConfig(
        vocab_size=len(WORDS),
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=0,
        **WIDTH,
    )
    return _save(LlamaForCausalLM(config), folder)


def _save(model, folder: Path) -> str:
    words = models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=SPECIAL["unk_token"])
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL).save_pretrained(folder)
    return str(folder)


def reviews(tokenizer, n: int = 64) -> list[dict]:
    """Tokenized sentences with `labels`: 1 for praise, 0 for blame."""
    words = [("good", 1), ("awful", 0), ("fine", 1), ("bad", 0)]
    rows = [(THINGS[i % 3], *words[i % 4]) for i in range(n)]
    return [{**tokenizer(f"the {thing} was {word}"), "labels": label} for thing, word, label in rows]


def facts(n: int = 64) -> list[dict]:
    """A prompt-completion dataset as TRL takes it."""
    rows = [(thing, "blue" if thing == "book" else "red") for thing in THINGS]
    texts = [
        {"prompt": f"the colour of the {thing} is", "completion": f" {colour}"} for thing, colour in rows
    ]
    return [texts[i % 3] for i in range(n)]


def preferences(n: int = 64) -> list[dict]:
    """A preference dataset as TRL takes it."""
    texts = [{"prompt": f"the {thing} was", "chosen": " good", "rejected": " awful"} for thing in THINGS]
    return [texts[i % 3] for i in range(n)]


def report(optimizer, delta: Path, before: float, after: float) -> None:
    """Prints the last lines of every example."""
    print(f"loss {before:.3f} before, {after:.3f} after {optimizer.steps_done} steps")
    trained = f"{optimizer.n_active} of {optimizer.n_entries} entries trained"
    print(f"{trained}; {delta}: {delta.stat().st_size} bytes")
