"""A small causal language model, trained from scratch on what every Python has: its documentation.

Fine-tuning is then judged by its loss on the new task and by what it forgets: the loss on texts of the first
kind that no training has seen.
"""

from __future__ import annotations

import ast
import json
import sysconfig
from pathlib import Path

import torch

BLOCK = 128  # tokens of a text to train or to measure on
STEPS, BATCH, LR = 1500, 16, 2e-3
_KEPT = 20  # one text of so many is kept aside
_NOT_DOCUMENTATION = {"site-packages", "test", "tests", "idlelib", "lib2to3"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def corpus() -> list[str]:
    """The topics of `help()` and the docstrings of the standard library, in a fixed order for one version."""
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if not _NOT_DOCUMENTATION & set(path.relative_to(library).parts):
            documented = (x for x in ast.walk(ast.parse(path.read_bytes())) if isinstance(x, _DOCUMENTED))
            texts += [text for node in documented if (text := ast.get_docstring(node)) and len(text) > 100]
    return texts


def make_base(folder: Path, steps: int = STEPS, texts: list[str] | None = None) -> Path:
    """The folder with model, tokenizer, `kept.jsonl` and `base.json`, made where missing."""
    if (folder / "base.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    texts = corpus() if texts is None else texts
    seen = [text for i, text in enumerate(texts) if i % _KEPT]
    tokenizer = _tokenizer(seen)
    kept = _blocks(texts[::_KEPT], tokenizer)
    rows = [{"prompt": "", "completion": tokenizer.decode(block)} for block in kept]
    (folder / "kept.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = _trained(_blocks(seen, tokenizer), tokenizer, steps)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    about = {"steps": steps, "texts": len(texts), "entries": model.num_parameters()}
    (folder / "base.json").write_text(json.dumps(about) + "\n")
    return folder


def _tokenizer(texts: list[str]):
    """Byte-level BPE of 2048 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2048, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    pairs.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=pairs, eos_token="<end>", pad_token="<end>")


def _blocks(texts: list[str], tokenizer) -> torch.Tensor:
    """int64[n, BLOCK]: the texts one after the other, each with its end."""
    ids = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    return torch.tensor(ids[: len(ids) // BLOCK * BLOCK]).view(-1, BLOCK)


def _trained(blocks: torch.Tensor, tokenizer, steps: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=192, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512,
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, steps, pct_start=0.05)
    for _ in range(steps):
        batch = blocks[torch.randint(len(blocks), (BATCH,))]
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model
