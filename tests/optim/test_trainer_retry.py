"""`auto_find_batch_size`: a run whose memory runs out after some steps begins again from its beginning."""

import pytest
import torch

pytest.importorskip("transformers", reason="the Trainer comes with the extra `hf`")

import transformers
from trainer_run import arguments, id3, rows, same_bits, tiny_bert

from id3_optim import ID3AdamW, load_delta
from id3_optim.integrations.huggingface import ID3Callback
from id3_optim.wrappers import unwrapped


class SmallMemory(transformers.Trainer):
    """Runs out of memory at the third step, of a batch of more than 2; `tried`: the weights at each start."""

    def training_step(self, model, inputs, *args):
        if len(inputs["labels"]) > 2 and self.state.global_step == self.fails_at:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return super().training_step(model, inputs, *args)


class Starts(transformers.TrainerCallback):
    """Keeps the weights that each attempt begins with, behind ID3Callback."""

    def __init__(self):
        self.weights = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.weights.append({name: x.clone() for name, x in model.state_dict().items()})


def start(folder, fails_at=2, model=None, optimizer=None, **changes):
    args = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 4, "save_strategy": "no"}
    args = arguments(folder, **args | {"auto_find_batch_size": True} | changes)
    model = model or tiny_bert()
    starts = Starts()
    trainer = SmallMemory(
        model,
        args,
        train_dataset=rows(),
        optimizers=(optimizer or id3(model), None),
        callbacks=[ID3Callback(), starts],
    )
    trainer.fails_at, trainer.starts = fails_at, starts.weights
    return trainer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strategy": "repeat"},
        {"release_gradients": True},
        {"bias_correction": "entry", "max_grad_norm": 1.0},
        {"total_steps": 6},
    ],
    ids=str,
)
def test_a_smaller_batch_begins_again_after_some_steps(tmp_path, options):
    model = tiny_bert()
    model.classifier.weight.data.mul_(2)  # the dense group's, which has no originals
    trainer = start(tmp_path, model=model, optimizer=id3(model, **options), warmup_steps=2)
    trainer.train()
    optimizer = unwrapped(trainer.optimizer)
    first, *retries = trainer.starts
    assert trainer.state.train_batch_size == 2 and len(retries) == 2  # with 3 in between
    assert all(same_bits(first, weights) for weights in retries)
    assert optimizer.steps_done == trainer.state.max_steps == trainer.state.global_step
    assert optimizer.total_steps == options.get("total_steps", optimizer.steps_done)
    assert optimizer.n_active == optimizer.budget


def test_it_ends_as_a_run_that_began_with_the_smaller_batch(tmp_path):
    """Without dropout and shuffling, which go on from the random numbers that the first attempt has drawn."""

    def calm():
        model = tiny_bert().eval()
        model.train = lambda mode=True: model
        return model

    retried = start(tmp_path, model=calm(), dataloader_num_workers=0, train_sampling_strategy="sequential")
    retried.train()
    assert len(retried.starts) == 3
    small = retried.state.train_batch_size
    straight = start(
        tmp_path,
        model=calm(),
        per_device_train_batch_size=small,
        auto_find_batch_size=False,
        train_sampling_strategy="sequential",
    )
    straight.train()
    assert same_bits(straight.model, retried.model)


def test_its_delta_fits_the_base(tmp_path):
    trainer = start(tmp_path, save_strategy="epoch")
    trainer.train()
    base = tiny_bert()
    load_delta(tmp_path / f"checkpoint-{trainer.state.max_steps}/delta.safetensors").apply(base)
    assert same_bits(base, trainer.model)


def test_without_originals_it_is_refused(tmp_path):
    model = tiny_bert()
    trainer = start(tmp_path, model=model, optimizer=id3(model, keep_originals=False))
    with pytest.raises(ValueError, match="auto_find_batch_size: needs keep_originals=True to undo"):
        trainer.train()
    model = tiny_bert()
    early = start(tmp_path, 0, model, id3(model, keep_originals=False))  # nothing to undo
    early.train()
    assert unwrapped(early.optimizer).steps_done == early.state.max_steps


def test_a_resumed_run_is_refused(tmp_path):
    """The Trainer loads the checkpoint's optimizer again, and leaves the weights of the failed attempt."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    start(tmp_path, fails_at=-1, **options).train()
    again = start(tmp_path, fails_at=3, **options)
    with pytest.raises(ValueError, match="auto_find_batch_size: expected memory for batches of 4 in a run"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_second_training_is_refused_too(tmp_path):
    trainer = start(tmp_path, fails_at=-1)
    trainer.train()
    trainer.fails_at = 2
    with pytest.raises(ValueError, match=r"in a run that began with 4 steps done, got too little"):
        trainer.train()


def test_an_interrupted_training_goes_on(tmp_path):
    """The same batch again is no retry: `train` was called anew, on the weights that are there."""

    class Interrupt(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    trainer = start(tmp_path, fails_at=-1)
    trainer.add_callback(Interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Interrupt)
    stopped = {name: x.clone() for name, x in trainer.model.state_dict().items()}
    trainer.train()
    assert same_bits(trainer.starts[-1], stopped)
    assert isinstance(unwrapped(trainer.optimizer), ID3AdamW)
