"""Checkpoints without the optimizer's state: a Trainer goes on from their weights, which fit no delta."""

import pytest
import torch

pytest.importorskip("transformers", reason="the Trainer comes with the extra `hf`")

from trainer_run import HEAD, arguments, build, id3, same_bits, tiny_bert

from id3_optim import load_delta
from id3_optim.integrations.huggingface import ID3Callback, id3_optimizer
from id3_optim.wrappers import unwrapped

FRESH = {"save_deltas": False, "fresh_optimizer": True}


def written_by(folder, lost, **changes):
    """The checkpoint of step 3 of a run, without what is lost."""
    build(arguments(folder, save_only_model=lost == "save_only_model", **changes)).train()
    checkpoint = folder / "checkpoint-3"
    if lost != "save_only_model":
        (checkpoint / lost).unlink()
    return str(checkpoint)


@pytest.mark.parametrize("lost", ["save_only_model", "optimizer.pt", "scheduler.pt"])
def test_a_run_without_the_optimizers_state_is_refused(tmp_path, lost):
    checkpoint = written_by(tmp_path, lost)
    again = build(arguments(tmp_path))
    with pytest.raises(
        ValueError, match=r"resume: expected an optimizer with 3 steps done, as .*, got 0; .*fresh_optimizer"
    ):
        again.train(resume_from_checkpoint=checkpoint)
    assert unwrapped(again.optimizer).steps_done == 0


def test_one_that_is_built_late_too(tmp_path):
    checkpoint = written_by(tmp_path, "optimizer.pt")
    args = arguments(tmp_path)
    again = build(args, optimizer_cls_and_kwargs=id3_optimizer(args, HEAD, budget=0.05))
    with pytest.raises(ValueError, match="resume: expected an optimizer with 3 steps done"):
        again.train(resume_from_checkpoint=checkpoint)


def test_a_checkpoint_that_does_not_say_how_far_its_optimizer_was(tmp_path):
    """One of 0.1.0, or one written without the callback."""
    model = tiny_bert()
    trainer = build(arguments(tmp_path), model, optimizers=(id3(model, total_steps=8), None))
    trainer.remove_callback(ID3Callback)
    trainer.train()
    whole = build(arguments(tmp_path / "whole"))
    whole.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same_bits(whole.model, trainer.model)
    (tmp_path / "checkpoint-3/optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"resume: expected an optimizer with 3 steps done, .*, got 0"):
        build(arguments(tmp_path)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_an_optimizer_that_is_further_than_its_checkpoint(tmp_path):
    """The Trainer loads the weights of step 3 beside an optimizer that has gone on to step 8."""
    trainer = build(arguments(tmp_path, save_only_model=True))
    trainer.train()
    with pytest.raises(ValueError, match=r"resume: expected an optimizer with 3 steps done, .*, got 8"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_fresh_optimizer_on_request_spends_its_budget_over_the_steps_that_are_left(tmp_path):
    checkpoint = written_by(tmp_path / "lost", "save_only_model")
    again = build(arguments(tmp_path / "again"), callback=ID3Callback(**FRESH))
    again.train(resume_from_checkpoint=checkpoint)
    optimizer = unwrapped(again.optimizer)
    assert (again.state.global_step, optimizer.steps_done, optimizer.total_steps) == (8, 5, 5)
    assert optimizer.n_active == optimizer.budget
    assert not list((tmp_path / "again").rglob("delta.safetensors"))
    third = build(arguments(tmp_path / "third"), callback=ID3Callback(**FRESH))
    third.train(resume_from_checkpoint=str(tmp_path / "again/checkpoint-6"))
    assert same_bits(third.model, again.model)
    assert unwrapped(third.optimizer).steps_done == 5


def test_a_fresh_optimizer_is_no_deltas(tmp_path):
    with pytest.raises(
        ValueError, match="fresh_optimizer: needs save_deltas=False: the deltas would not fit"
    ):
        ID3Callback(fresh_optimizer=True)


def test_a_whole_checkpoint_needs_no_fresh_optimizer(tmp_path):
    """Asked for where there is nothing to replace, it changes nothing."""
    straight = build(arguments(tmp_path / "straight"))
    straight.train()
    resumed = build(arguments(tmp_path / "resumed"), callback=ID3Callback(**FRESH))
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight/checkpoint-3"))
    assert same_bits(straight.model, resumed.model)
    whole = build(arguments(tmp_path / "new"), callback=ID3Callback(**FRESH))
    whole.train()
    assert same_bits(straight.model, whole.model)


def test_a_resumed_run_ends_with_a_delta_of_the_base(tmp_path):
    """With all files there, data skipped or not."""
    build(arguments(tmp_path)).train()
    args = arguments(tmp_path / "again", save_steps=8, ignore_data_skip=True)
    again = build(args)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    base = tiny_bert()
    load_delta(tmp_path / "again/checkpoint-8/delta.safetensors").apply(base)
    assert same_bits(base, again.model)


def test_steps_that_overflowed_are_no_lost_steps(tmp_path):
    """The Trainer counts them, the optimizer does not: here the first two of three."""

    def overflow(optimizer, *args):
        optimizer.calls = getattr(optimizer, "calls", 0) + 1
        optimizer.grad_scale = torch.ones(())
        optimizer.found_inf = torch.tensor(float(optimizer.calls <= 2))

    def start(folder, calls=0):
        trainer = build(arguments(folder))
        trainer.optimizer.calls = calls
        trainer.optimizer.register_step_pre_hook(overflow)
        return trainer

    straight = start(tmp_path / "straight")
    straight.train()
    assert unwrapped(straight.optimizer).steps_done == 6
    resumed = start(tmp_path / "resumed", calls=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight/checkpoint-3"))
    assert same_bits(straight.model, resumed.model)
