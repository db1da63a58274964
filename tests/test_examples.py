"""Every example runs as a user runs it, and its delta makes what it trained out of what it began with."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the examples need the extras `hf`, `peft`, `trl`, `lightning`")

from safetensors.torch import load_file
from tiny_models import save_bert, write_reviews
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from id3_optim import load_delta
from id3_optim.cli.settings import Settings

ROOT = Path(__file__).parent.parent
# demo.py is what `make demo` runs; those for torchrun run in two processes elsewhere; the rest is imported.
NOT_ALIKE = {"data_parallel.py", "demo.py", "dense_masking.py", "fsdp2.py", "lightning_fsdp2.py", "tiny.py"}
NOT_ALIKE |= {"trainer_fsdp2.py"}
EXAMPLES = sorted({path.name for path in (ROOT / "examples").glob("*.py")} - NOT_ALIKE)


def whole_models(auto):
    """(before, after): the base with its fresh head, and what `save_pretrained` wrote after training."""

    def read(output):
        return [auto.from_pretrained(output / folder) for folder in ("base", "tuned")]

    return read


def lora(output):
    from peft import PeftModel

    models = []
    for folder in ("initial", "tuned"):
        torch.manual_seed(1)  # PEFT keeps the head that the base had, unused, beside the one that it trains
        base = AutoModelForSequenceClassification.from_pretrained(output / "base")
        models.append(PeftModel.from_pretrained(base, output / folder))
    return models


def adapters(output):
    """The adapters and the head as a model of their own: parameters under their names, dots as they are."""
    models = []
    for name in ("initial", "tuned"):
        model = torch.nn.Module()
        for path, value in load_file(output / f"{name}.safetensors").items():
            *folders, leaf = path.split(".")
            owner = model
            for folder in folders:
                if folder not in owner._modules:
                    owner.add_module(folder, torch.nn.Module())
                owner = owner._modules[folder]
            owner.register_parameter(leaf, torch.nn.Parameter(value))
        models.append(model)
    return models


READ = {
    "accelerate_loop.py": whole_models(AutoModelForSequenceClassification),
    "bottleneck_adapter.py": adapters,
    "lightning_module.py": whole_models(AutoModelForSequenceClassification),
    "peft_lora.py": lora,
    "trainer_classification.py": whole_models(AutoModelForSequenceClassification),
    "trl_dpo.py": whole_models(AutoModelForCausalLM),
    "trl_sft.py": whole_models(AutoModelForCausalLM),
    "weight_stream.py": whole_models(AutoModelForCausalLM),
}


def run(name, output, *options):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(ROOT / "examples" / name), "--output", str(output), *options]
    done = subprocess.run(command, env=environment, cwd=output, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_example_is_known_and_short():
    assert set(EXAMPLES) == set(READ)
    assert all(len((ROOT / "examples" / name).read_text().splitlines()) <= 60 for name in EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name, tmp_path):
    said = run(name, tmp_path, "--steps", "6")
    path = tmp_path / "delta.safetensors"
    delta = load_delta(path)
    assert (
        f"after 6 steps\n{delta.settings['budget']} of {delta.settings['n_entries']} entries trained" in said
    )
    assert f"{path.stat().st_size} bytes" in said
    entries = sum(c.values.numel() for c in delta.changes.values() if c.indices is not None)
    assert entries == delta.settings["budget"] > 0

    model, tuned = READ[name](tmp_path)
    expected = dict(tuned.named_parameters())
    assert any(not torch.equal(p, expected[n]) for n, p in model.named_parameters())
    delta.apply(model)
    assert all(torch.equal(p, expected[n]) for n, p in model.named_parameters())


def test_the_server_of_the_stream_follows_each_step(tmp_path):
    """Each step prints the bytes sent and what the other process generated with the new weights."""
    said = run("weight_stream.py", tmp_path, "--steps", "12")
    sent = re.findall(r"^step (\d+): (\d+) bytes of (\d+), (\d+) entries: (.*)$", said, re.MULTILINE)
    assert [int(row[0]) for row in sent] == list(range(1, 13))
    assert all(int(row[1]) < int(row[2]) / 20 for row in sent)
    folder = tmp_path / "tuned"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    prompt = tokenizer("the colour of the book is", return_tensors="pt").input_ids
    text = model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)[0]
    assert sent[-1][4] == tokenizer.decode(text) != sent[0][4]


def test_the_demo_compares_and_draws(tmp_path, monkeypatch, capsys):
    """All that `make demo` does behind the loading of MiniLM, on a tiny model and rows of its own."""
    pytest.importorskip("matplotlib", reason="the demo's picture needs the extra `plot`")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import demo

    (tmp_path / "rows.csv").write_text(
        write_reviews(tmp_path / "reviews.csv").read_text().replace("text,label", "text,category")
    )
    rows, output = str(tmp_path / "rows.csv"), tmp_path / "out"
    settings = Settings(
        str(save_bert(tmp_path / "bert")),
        rows,
        rows,
        str(output),
        steps=12,
        head_lr=1e-2,
        max_grad_norm=0.0,
        cpu=True,
    )
    demo.run_all(settings, parity_steps=2)
    printed = capsys.readouterr().out
    assert "same gradients, 2 steps: largest difference" in printed and "; 0 of " in printed
    assert (output / "demo.png").stat().st_size > 0
