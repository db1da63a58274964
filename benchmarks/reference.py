"""`python -m benchmarks reference`: preference tuning with a copied reference model and with ReferenceModel.

A run of TRL's DPOTrainer in a fresh process for each, with released gradients; the losses must be equal to
the last bit. Needs transformers and trl.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from benchmarks.machine import describe, results_path
from benchmarks.memory import EAGER_FREE, forget_peak, resident_bytes
from benchmarks.render import RESULTS, Bar, bar_rows, bars_table

SIZES = {
    "small": {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 512},
    "85M": {"hidden_size": 768, "num_hidden_layers": 10, "intermediate_size": 2048, "vocab_size": 8192},
}
KINDS = ("copied", "shared")
ARGUMENTS = {"per_device_train_batch_size": 2, "gradient_checkpointing": False, "max_grad_norm": 0}
ARGUMENTS |= {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True, "bf16": False}
WORDS = ("the", "film", "book", "was", "is", "good", "awful", "fine", "bad")


def _base(size: str, folder: Path) -> None:
    """Saves a Llama with random weights and a tokenizer of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "</s>"}
    config = LlamaConfig(
        **SIZES[size], num_attention_heads=8, bos_token_id=None, eos_token_id=2, pad_token_id=0
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {word: i for i, word in enumerate([*special.values(), *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def in_process(options: argparse.Namespace) -> dict[str, object]:
    """Losses, peak bytes above those before the model was loaded, and the median seconds of a step."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from id3_optim import ID3AdamW, ReferenceModel
    from id3_optim.integrations.huggingface import ID3Callback

    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ends.append(perf_counter())

    torch.set_num_threads(options.threads)
    torch.nn.Linear(64, 64)(torch.ones(4, 64)).sum().backward()  # threads and libraries
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    rows = [{"prompt": "the film was", "chosen": " good", "rejected": " awful"}] * 4 * options.steps
    forget_peak()
    start = resident_bytes()
    model = AutoModelForCausalLM.from_pretrained(options.folder)
    named = model.named_parameters()
    optimizer = ID3AdamW(named, lr=1e-4, budget=0.0017, release_gradients=True)
    trainer = DPOTrainer(
        model,
        ref_model=ReferenceModel(model, optimizer) if options.kind == "shared" else None,
        args=DPOConfig(output_dir=options.folder, max_steps=options.steps, **ARGUMENTS),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        optimizers=(optimizer, None),
        callbacks=[ID3Callback(), Clock()],
    )  # fmt: skip
    trainer.train()
    taken = median(end - begin for begin, end in pairwise(ends))
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    weights = sum(p.nbytes for p in model.parameters())
    peak = resident_bytes(peak=True) - start
    return {"losses": losses, "peak_bytes": peak, "weight_bytes": weights, "seconds": taken}


def fresh(options: argparse.Namespace, kind: str, folder: str) -> dict[str, object]:
    command = [sys.executable, "-m", "benchmarks.reference", f"--in-process={kind}", f"--folder={folder}"]
    command += [f"--steps={options.steps}", f"--threads={options.threads}"]
    env = os.environ | EAGER_FREE | {"OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(options: argparse.Namespace) -> dict[str, object]:
    """The medians over rounds of both kinds, in turns. AssertionError where a loss differs."""
    runs = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        _base(options.size, Path(folder))
        for _ in range(options.rounds):
            for kind, rows in runs.items():
                rows.append(fresh(options, kind, folder))
    losses = [row["losses"] for rows in runs.values() for row in rows]
    assert len(losses[0]) == options.steps and all(row == losses[0] for row in losses), "the losses differ"
    return {
        kind: {name: median(row[name] for row in rows) for name in ("peak_bytes", "weight_bytes", "seconds")}
        for kind, rows in runs.items()
    } | {"losses": losses[0]}


def bars_of(results: dict) -> list[Bar]:
    shared, copied = results["shared"], results["copied"]
    return [
        Bar("DPO with the shared reference / a copied one: peak memory", 0.6,
            shared["peak_bytes"] / copied["peak_bytes"]),
        Bar("the same: time of a step", 1.1, shared["seconds"] / copied["seconds"]),
    ]  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks reference", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="85M")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS / "reference")
    parser.add_argument("--in-process", dest="kind", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.kind:
        print(json.dumps(in_process(options)))
        return
    results = {"machine": describe(options.threads), "size": options.size, **measure(options)}
    results["bars"] = bar_rows(bars_of(results))
    path = results_path(options.output, results["machine"])
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(bars_table(results["bars"]))


if __name__ == "__main__":
    main()
