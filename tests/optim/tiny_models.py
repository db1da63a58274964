"""Models and data small enough to train within a test, saved as `from_pretrained` expects them."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["good", "bad", "fine", "awful", "film", "book", "the", "a", "was", "red", "blue", "is", "one", "two"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "</s>"]


def word_tokenizer(**special) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if "cls_token" in special:
        tokenizer.post_processor = processors.BertProcessing(
            ("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **special)


def save_bert(folder: Path) -> Path:
    """An encoder without a classification head: its head is missing when it is loaded for classification."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        initializer_range=0.2,  # with 0.02 so narrow a model hardly tells one word from another
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    word_tokenizer(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]").save_pretrained(folder)
    return folder


def save_llama(folder: Path) -> Path:
    """A decoder whose tokenizer has an end of text, and no padding token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        initializer_range=0.2,  # with 0.02 so narrow a model hardly tells one word from another
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=SPECIAL.index("</s>"),
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    word_tokenizer(eos_token="</s>").save_pretrained(folder)
    return folder


def write_reviews(path: Path, rows: int = 40) -> Path:
    """Reviews whose one telling word gives the label; columns `text`, `label`."""
    separator = "\t" if path.suffix == ".tsv" else ","
    telling = [("good", "praise"), ("awful", "blame"), ("fine", "praise"), ("bad", "blame")]
    lines = [f"text{separator}label"]
    for i in range(rows):
        word, label = telling[i % 4]
        lines.append(f"the {'film' if i % 3 else 'book'} was {word}{separator}{label}")
    path.write_text("\n".join(lines) + "\n")
    return path


def write_completions(path: Path, rows: int = 24) -> Path:
    facts = [("the film is", "red"), ("the book is", "blue"), ("a film is", "one two")]
    lines = [json.dumps({"prompt": p, "completion": c}) for p, c in (facts[i % 3] for i in range(rows))]
    path.write_text("\n".join(lines) + "\n")
    return path
