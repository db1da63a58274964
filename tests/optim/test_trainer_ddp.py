"""transformers.Trainer in two processes: under DistributedDataParallel, and without it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers", reason="the Trainer comes with the extra `hf`")

from torchrun import launch
from trainer_run import SparseTrainer, arguments, build, same_bits, tiny_bert
from transformers import PrinterCallback, Trainer

from id3_optim import load_delta
from id3_optim.integrations.data_parallel import SparseDataParallel, leave_plain


@pytest.mark.parametrize("way", ["ddp", "sparse"])
def test_two_processes_train_and_resume_as_one(tmp_path, way):
    """One process writes the deltas, and both resume bit for bit."""
    done = launch(Path(__file__).parent / "trainer_run.py", tmp_path, way)
    assert done.returncode == 0, done.stderr[-3000:]
    base = tiny_bert()
    load_delta(tmp_path / "checkpoint-4/delta.safetensors").apply(base)
    assert same_bits(base, load_file(tmp_path / "checkpoint-4/model.safetensors"))


def test_models_are_moved_as_the_trainer_asks():
    """A reference model is prepared too, and only accelerate moves it to the GPU."""

    class Accelerator:
        def prepare_model(self, *args, **options):
            return args, options

    accelerator = Accelerator()
    leave_plain(accelerator)
    asked = accelerator.prepare_model("reference", device_placement=True)
    assert asked == (("reference",), {"device_placement": True, "evaluation_mode": True})


def test_in_one_process_nothing_changes(tmp_path):
    trainers = []
    for kind in (SparseTrainer, Trainer):
        trainers.append(build(arguments(tmp_path, max_steps=1), kind=kind))
        trainers[-1].train()
    trainer = trainers[0]
    assert same_bits(trainer.model, trainers[1].model)
    optimizer = torch.optim.AdamW(trainer.model.parameters())
    changes = {"optimizers": (optimizer, None), "model": trainer.model, "callback": PrinterCallback()}
    build(arguments(tmp_path, max_steps=1), kind=SparseTrainer, **changes).train()


def test_the_trainer_comes_second():
    with pytest.raises(TypeError, match="Wrong: expected SparseDataParallel before the"):
        type("Wrong", (Trainer, SparseDataParallel), {})
