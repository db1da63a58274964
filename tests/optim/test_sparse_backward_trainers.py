"""sparse_backward in the Trainer, Lightning, TRL and the command line: the losses of a run without it.

Where batches are accumulated that run releases its gradients: the last micro-batch chooses in both."""

import json

import pytest
import torch
from torch import nn
from train_command import run, save_train_files, words
from trainer_run import HEAD, arguments, build, id3, rows, same_bits, tiny_bert
from transformers import Trainer

from id3_optim import load_delta, recipe, sparse_backward
from id3_optim.backward.weight import Weight
from id3_optim.integrations.huggingface import ID3Callback, id3_optimizer


@pytest.fixture
def taken(monkeypatch):
    """A list that grows with each weight gradient that a changed layer hands over."""
    calls, take = [], Weight.take
    monkeypatch.setattr(Weight, "take", lambda *args: calls.append(args) or take(*args))
    return calls


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def train(folder, checkpoint=None, released=True, accumulated=2, **callback):
    model = tiny_bert()
    optimizer = id3(model, select_every=4, max_grad_norm=1.0, release_gradients=released)
    args = arguments(folder, gradient_accumulation_steps=accumulated)
    trainer = build(args, model, ID3Callback(**callback), optimizers=(optimizer, None))
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer, optimizer


def test_the_trainer_has_the_losses_of_a_released_run_and_resumes_exactly(tmp_path, taken):
    released, _ = train(tmp_path / "released")
    assert not taken
    sparse, optimizer = train(tmp_path / "sparse", sparse_backward=True)
    assert taken
    assert losses(sparse) == pytest.approx(losses(released), rel=1e-3)
    assert optimizer.n_active == optimizer.budget
    for step in (3, 6):
        resumed, _ = train(tmp_path / "resumed", f"{tmp_path}/sparse/checkpoint-{step}", sparse_backward=True)
        assert same_bits(resumed.model, sparse.model)


def test_the_trainer_has_the_losses_of_a_dense_run(tmp_path, taken):
    dense, optimizer = train(tmp_path / "dense", released=False, accumulated=1)
    assert not taken
    sparse, other = train(tmp_path / "sparse", released=False, accumulated=1, sparse_backward=True)
    assert taken and len(losses(sparse)) == 8
    assert losses(sparse) == pytest.approx(losses(dense), rel=1e-3)
    for one, two in zip(optimizer.touched(), other.touched(), strict=True):
        assert torch.equal(one.indices, two.indices)


def test_a_second_train_of_one_trainer_begins_anew(tmp_path):
    callback = ID3Callback(sparse_backward=True)
    trainer, _ = train(tmp_path)
    trainer = build(arguments(tmp_path, max_steps=2), tiny_bert(), callback)
    trainer.train()
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("released", [False, True])
def test_clipping_of_a_head_alone_is_refused(tmp_path, released):
    """The Trainer's default is 1.0."""
    model = tiny_bert()
    callback = ID3Callback(sparse_backward=not released)
    optimizers = (id3(model, release_gradients=released), None)
    trainer = build(arguments(tmp_path, max_grad_norm=1.0), model, callback, optimizers=optimizers)
    with pytest.raises(ValueError, match=r"max_grad_norm in TrainingArguments: expected 0 .* got 1\.0"):
        trainer.train()
    assert type(model.bert.pooler.dense) is nn.Linear
    before = [p.detach().clone() for p in model.parameters()]
    Trainer(model, arguments(tmp_path, max_steps=2), train_dataset=rows()).train()
    assert not all(map(torch.equal, model.parameters(), before)), "another run finds its gradients"
    pytest.importorskip("lightning", reason="Lightning comes with the extra `lightning`")
    from test_lightning import Tagger, fit

    module = Tagger(release_gradients=True)
    with pytest.raises(ValueError, match="gradient_clip_val: expected 0 or none with released"):
        fit(tmp_path, None, module, gradient_clip_val=0.5)


def test_the_recipe_in_the_trainer(tmp_path, taken):
    """Its mask is drawn in the first step; the callback sets the number of steps."""
    model = tiny_bert()
    optimizer = recipe(model, HEAD, budget=0.05, head_options={"lr": 3e-2})
    callback = ID3Callback(sparse_backward=True)
    trainer = build(arguments(tmp_path), model, callback, optimizers=(optimizer, None))
    trainer.train()
    assert taken and (optimizer.total_steps, optimizer.n_active) == (8, optimizer.budget)
    assert [group["initial_lr"] for group in optimizer.param_groups] == [1e-2, 3e-2]
    base = tiny_bert()
    load_delta(tmp_path / "checkpoint-8/delta.safetensors").apply(base)
    assert same_bits(base, trainer.model)


def check_others_train(trainer, folder):
    """Another optimizer in another Trainer moves every tensor of the model."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    other = torch.optim.AdamW(trainer.model.parameters(), lr=1e-2)
    Trainer(
        trainer.model,
        arguments(folder, max_steps=2),
        train_dataset=trainer.train_dataset,
        data_collator=trainer.data_collator,
        optimizers=(other, None),
    ).train()
    assert not [name for name, p in trainer.model.named_parameters() if torch.equal(p, before[name])]


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "released"])
def test_after_training_another_optimizer_finds_gradients(tmp_path, sparse):
    trainer, optimizer = train(tmp_path, released=True, sparse_backward=sparse)
    assert type(trainer.model.bert.pooler.dense) is torch.nn.Linear and optimizer.steps_done
    check_others_train(trainer, tmp_path)


class Interrupted(Trainer):
    """A notebook's stop button."""

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return super().training_step(*args, **kwargs)


def interrupted(folder, sparse):
    """(the Trainer, its callback, its optimizer) after an interrupt."""
    model, callback = tiny_bert(), ID3Callback(sparse_backward=sparse)
    optimizer = id3(model, select_every=4, release_gradients=not sparse)
    options = {"kind": Interrupted, "optimizers": (optimizer, None)}
    trainer = build(arguments(folder), model, callback, **options)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    return trainer, callback, optimizer


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "released"])
def test_after_an_interrupt_another_run_begins(tmp_path, sparse):
    """It takes the gradients over from the one before, which a notebook still holds."""
    trainer, _, before = interrupted(tmp_path, sparse)
    optimizer = id3(trainer.model, select_every=4, release_gradients=not sparse)
    callback = ID3Callback(sparse_backward=sparse)
    again = build(arguments(tmp_path), trainer.model, callback, optimizers=(optimizer, None))
    again.train()
    assert optimizer.n_active == optimizer.budget and before.steps_done == 3
    check_others_train(again, tmp_path)


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "released"])
def test_after_an_interrupt_remove_gives_the_model_back(tmp_path, sparse):
    trainer, callback, _ = interrupted(tmp_path, sparse)
    callback.remove()
    check_others_train(trainer, tmp_path)


def test_a_trainer_leaves_a_sparse_backward_of_the_user_alone(tmp_path, taken):
    model = tiny_bert()
    optimizer = id3(model, select_every=4)
    sparse_backward(model, optimizer)
    trainer = build(arguments(tmp_path), model, ID3Callback(), optimizers=(optimizer, None))
    trainer.train()
    assert taken and optimizer.n_active == optimizer.budget


def test_lightning_gives_the_model_back_after_an_error(tmp_path):
    pytest.importorskip("lightning", reason="Lightning comes with the extra `lightning`")
    from test_lightning import Tagger, fit

    from id3_optim.integrations.lightning import ID3Callback as LightningCallback

    class Fails(Tagger):
        def training_step(self, batch, batch_idx):
            if self.global_step == 3:
                raise OSError("disk")
            return super().training_step(batch, batch_idx)

    module = Fails(select_every=4)
    with pytest.raises(OSError, match="disk"):
        fit(tmp_path, None, module, LightningCallback(sparse_backward=True))
    assert type(module.net[0]) is torch.nn.Linear
    module.net(torch.ones(2, module.net[0].in_features)).sum().backward()
    assert all(p.grad is not None for p in module.net.parameters())


@pytest.mark.parametrize("accumulated", [1, 2], ids=["dense", "released"])
def test_lightning_has_the_losses_of_a_run_without(tmp_path, taken, accumulated):
    pytest.importorskip("lightning", reason="Lightning comes with the extra `lightning`")
    from test_lightning import Tagger, fit

    from id3_optim.integrations.lightning import ID3Callback as LightningCallback

    class Noted(Tagger):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            seen.append(outputs["loss"].item())

    nets, curves = [], []
    for sparse in (False, True):
        seen = []
        module = Noted(max_grad_norm=1.0, select_every=4, release_gradients=accumulated > 1)
        callback = LightningCallback(sparse_backward=sparse)
        nets.append(
            fit(tmp_path / str(sparse), None, module, callback, accumulate_grad_batches=accumulated)[0]
        )
        curves.append(seen)
        assert bool(taken) == sparse
    assert len(curves[0]) == 20 and curves[1] == pytest.approx(curves[0], rel=1e-3)
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert type(nets[1].net[0]) is torch.nn.Linear


def test_trl(tmp_path):
    pytest.importorskip("trl", reason="TRL comes with the extra `trl`")
    from test_trl import ARGUMENTS, llama, pieces
    from trl import SFTConfig, SFTTrainer

    runs = []
    for sparse in (False, True):
        args = SFTConfig(output_dir=tmp_path / str(sparse), logging_steps=1, **ARGUMENTS)
        pair = id3_optimizer(args, budget=0.05, max_grad_norm=1.0, select_every=2)
        data = pieces([{"prompt": "the film was", "completion": " good"}])
        data["callbacks"] = [ID3Callback(sparse_backward=sparse)]
        runs.append(SFTTrainer(llama(), args, optimizer_cls_and_kwargs=pair, **data))
        runs[-1].train()
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-3)


def test_the_command_line(tmp_path, capsys):
    files = save_train_files(tmp_path)
    reports = []
    for name, more in (("dense", ()), ("sparse", ("--sparse-backward",))):
        report = tmp_path / f"{name}.json"
        options = ("--select-every", "2", "--delta-only", "--report", str(report), "--log-every", "1", *more)
        status, _, err = run(capsys, words(files, tmp_path / name, *options))
        assert status == 0, err
        reports.append(json.loads(report.read_text()))
    dense, sparse = ([row["loss"] for row in r["history"] if "loss" in row] for r in reports)
    assert sparse == pytest.approx(dense, rel=1e-2)
    deltas = [load_delta(tmp_path / name / "delta.safetensors") for name in ("dense", "sparse")]
    assert deltas[0].changes.keys() == deltas[1].changes.keys()


def test_the_command_line_refuses_repeat(tmp_path, capsys):
    files = save_train_files(tmp_path)
    status, _, err = run(capsys, words(files, tmp_path / "out", "--strategy", "repeat", "--sparse-backward"))
    assert status == 2
    assert "--sparse-backward: does not apply to --strategy repeat" in err
