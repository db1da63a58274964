"""transformers.Trainer in two processes: under DistributedDataParallel, and without it."""

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

pytest.importorskip("transformers", reason="the Trainer comes with the extra `hf`")

from trainer_run import same_bits, tiny_bert

from id3_optim import load_delta


def launch(folder, way):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [str(Path(__file__).parent / "trainer_run.py"), str(folder), way]
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("way", ["ddp", "sparse"])
def test_two_processes_train_and_resume_as_one(tmp_path, way):
    """One process writes the deltas, and both resume bit for bit."""
    launch(tmp_path, way)
    base = tiny_bert()
    load_delta(tmp_path / "checkpoint-4/delta.safetensors").apply(base)
    assert same_bits(base, load_file(tmp_path / "checkpoint-4/model.safetensors"))
