"""The Trainer and Accelerate with `fsdp_version: 2`, in two processes on the CPU."""

from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the Trainer comes with the extra `hf`")


from safetensors.torch import load_file
from torchrun import launch
from transformers import AutoModelForCausalLM

from id3_optim import load_delta

SCRIPT = Path(__file__).parent / "trainer_fsdp2_run.py"
EXAMPLE = Path(__file__).parents[2] / "examples" / "trainer_fsdp2.py"


def run(*arguments):
    done = launch(*arguments, timeout=250)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_accelerates_fsdp2_trains_saves_and_resumes(tmp_path):
    run(SCRIPT, tmp_path)


def test_the_example_trains_the_same_split_and_whole(tmp_path):
    """Without an accelerator Accelerate wraps the whole model; told of one, it splits it."""
    assert len(EXAMPLE.read_text().splitlines()) <= 60
    said = [
        run(EXAMPLE, "--output", tmp_path / "whole", "--steps", 6),
        run(SCRIPT, "example", EXAMPLE, "--output", tmp_path / "split", "--steps", 6),
    ]
    assert all(text.count("entries trained") == 1 and "after 6 steps" in text for text in said)
    whole, split = (tmp_path / name / "checkpoint-6/delta.safetensors" for name in ("whole", "split"))
    assert whole.read_bytes() == split.read_bytes()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "split/base")
    load_delta(split).apply(base)
    tuned = load_file(tmp_path / "split/tuned/model.safetensors")
    assert all(p.equal(tuned[name]) for name, p in base.named_parameters())
