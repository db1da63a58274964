"""transformers.Trainer's own checkpoints: a run resumed from one ends where the uninterrupted run does."""

import pytest
import torch

pytest.importorskip("transformers", reason="the Trainer comes with the extra `hf`")

import transformers
from trainer_run import HEAD, arguments, build, id3, rows, same_bits, tiny_bert

from id3_optim.integrations.huggingface import ID3Callback, id3_optimizer
from id3_optim.wrappers import unwrapped


def same_state(a, b):
    """The optimizers' states agree in every bit."""
    a, b = unwrapped(a).state_dict(), unwrapped(b).state_dict()
    assert a["state"].keys() == b["state"].keys()
    for position, mine in a["state"].items():
        theirs = b["state"][position]
        assert all(torch.equal(v, theirs[k]) for k, v in mine.items() if isinstance(v, torch.Tensor))
    return a["param_groups"] == b["param_groups"]


@pytest.mark.parametrize("checkpoint", [3, 6])
def test_resume_is_bit_exact(tmp_path, checkpoint):
    straight = build(arguments(tmp_path / "straight"))
    straight.train()
    resumed = build(arguments(tmp_path / "resumed"))
    resumed.train(resume_from_checkpoint=str(tmp_path / f"straight/checkpoint-{checkpoint}"))
    optimizer = unwrapped(resumed.optimizer)
    assert (optimizer.steps_done, optimizer.total_steps, optimizer.n_active) == (8, 8, optimizer.budget)
    assert same_bits(straight.model, resumed.model)
    assert same_state(straight.optimizer, resumed.optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_exact_with_everything_on(tmp_path, dtype):
    """Accumulation with a short last one, epochs, warm-up and cosine decay, bf16 autocast, both clippings,
    gradient checkpointing, per-entry bias correction; the run dies in the middle of an epoch."""

    def start(folder):
        args = arguments(
            folder,
            max_steps=-1,
            num_train_epochs=2,
            gradient_accumulation_steps=3,
            per_device_train_batch_size=4,
            lr_scheduler_type="cosine",
            warmup_steps=2,
            weight_decay=0.1,
            bf16=True,
            save_steps=1,
        )
        pair = id3_optimizer(args, HEAD, budget=0.05, max_grad_norm=1.0, bias_correction="entry")
        model = tiny_bert(dtype)
        model.gradient_checkpointing_enable()
        return build(args, model, optimizer_cls_and_kwargs=pair)

    straight = start(tmp_path / "straight")
    straight.train()
    assert unwrapped(straight.optimizer).total_steps == 6
    for step in (2, 3, 5):
        resumed = start(tmp_path / f"resumed-{step}")
        resumed.train(resume_from_checkpoint=str(tmp_path / f"straight/checkpoint-{step}"))
        assert same_bits(straight.model, resumed.model)
        assert same_state(straight.optimizer, resumed.optimizer)


def test_fewer_steps_are_refused_and_more_train_what_is_active(tmp_path):
    build(arguments(tmp_path)).train()
    shorter = build(arguments(tmp_path, max_steps=6))
    with pytest.raises(ValueError, match=r"expected at least 8, over .*, got 6 .*; set max_steps=8"):
        shorter.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for checkpoint in ("checkpoint-3", "checkpoint-8", "checkpoint-12"):  # longer and longer
        longer = build(arguments(tmp_path, max_steps=14 if checkpoint == "checkpoint-12" else 12))
        with pytest.warns(UserWarning, match="max_steps: 1[24], more than the 8, over which"):
            longer.train(resume_from_checkpoint=str(tmp_path / checkpoint))
        optimizer = unwrapped(longer.optimizer)
        assert (optimizer.total_steps, optimizer.n_active) == (8, optimizer.budget)
        assert optimizer.steps_done == longer.args.max_steps


def test_a_static_mask_needs_no_number_of_steps(tmp_path, recwarn):
    def start(max_steps):
        model = tiny_bert()
        optimizer = id3(model, strategy="static")
        return build(arguments(tmp_path, max_steps=max_steps), model, optimizers=(optimizer, None))

    start(8).train()
    for steps in (6, 12):
        start(steps).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert not [warning for warning in recwarn if "max_steps" in str(warning.message)]


def test_a_given_number_of_steps_stands_in_every_run(tmp_path):
    def start(max_steps):
        model = tiny_bert()
        args = arguments(tmp_path, max_steps=max_steps)
        return build(args, model, optimizers=(id3(model, total_steps=20, budget=100), None))

    start(8).train()
    longer = start(12)
    longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    optimizer = unwrapped(longer.optimizer)
    assert (optimizer.total_steps, optimizer.steps_done, optimizer.n_active) == (20, 12, 60)


def test_a_second_training_goes_on(tmp_path):
    trainer = build(arguments(tmp_path, save_strategy="no"))
    trainer.train()
    once = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    assert unwrapped(trainer.optimizer).steps_done == 16
    assert not same_bits(once, trainer.model)
    trainer.args.max_steps = 4
    with pytest.raises(ValueError, match=r"max_steps: expected at least 8, over which .*, got 4"):
        trainer.train()


def test_a_smaller_batch_is_tried_again_with_its_own_steps(tmp_path):
    """`auto_find_batch_size` begins the run again, with more steps, when memory runs out."""

    class OutOfMemoryAtFour(transformers.Trainer):
        def training_step(self, model, inputs, *args):
            if len(inputs["labels"]) > 2:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
            return super().training_step(model, inputs, *args)

    args = arguments(
        tmp_path,
        max_steps=-1,
        num_train_epochs=1,
        auto_find_batch_size=True,
        per_device_train_batch_size=4,
        save_strategy="no",
    )
    model = tiny_bert()
    trainer = OutOfMemoryAtFour(
        model, args, train_dataset=rows(), optimizers=(id3(model), None), callbacks=[ID3Callback()]
    )
    trainer.train()
    optimizer = unwrapped(trainer.optimizer)
    assert trainer.state.max_steps == optimizer.total_steps == optimizer.steps_done > 4
    assert optimizer.n_active == optimizer.budget


def test_another_budget_is_refused_with_both(tmp_path):
    build(arguments(tmp_path)).train()
    model = tiny_bert()
    other = build(arguments(tmp_path), model, optimizers=(id3(model, budget=7), None))
    with pytest.raises(ValueError, match="budget: expected 7 as in the optimizer, got"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
