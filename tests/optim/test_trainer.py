"""ID3AdamW in transformers.Trainer: both ways in, logs, deltas in checkpoints, the best model at the end."""

import copy
import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from id3_optim import D3, Bias, ID3AdamW, load_delta, save_delta

pytest.importorskip("transformers", reason="the Trainer comes with the extra `hf`")

import transformers
from trainer_run import HEAD, arguments, build, id3, rows, same_bits, tiny_bert

from id3_optim.integrations.huggingface import ID3Callback, id3_optimizer, parameter_groups
from id3_optim.wrappers import unwrapped


def test_the_pair_is_the_optimizer_made_by_hand(tmp_path):
    chosen = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6, "weight_decay": 0.1}
    args = arguments(tmp_path, learning_rate=3e-2, save_strategy="no", **chosen)
    options = {"budget": 0.03, "heuristic": D3(1.0, 1.0), "max_grad_norm": 1.0}
    by_pair = build(args, optimizer_cls_and_kwargs=id3_optimizer(args, HEAD, **options))
    by_pair.train()
    model = tiny_bert()
    numbers = {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    by_hand = build(args, model, optimizers=(id3(model, **numbers, **options), None))
    by_hand.train()
    assert same_bits(by_pair.model, by_hand.model)
    optimizer = unwrapped(by_pair.optimizer)
    assert (optimizer.total_steps, optimizer.n_active) == (8, optimizer.budget)
    sparse, dense = optimizer.param_groups
    assert set(dense["param_names"]) == HEAD and dense["dense"]
    assert "bert.embeddings.word_embeddings.weight" in sparse["param_names"]


def test_the_pair_serves_model_init_and_repeated_runs(tmp_path):
    """A pair that held parameters would train those of the first model."""
    args = arguments(tmp_path, max_steps=2, save_strategy="no")
    pair = id3_optimizer(args, budget=0.05)
    for _ in range(2):
        trainer = build(args, model_init=tiny_bert, optimizer_cls_and_kwargs=pair)
        trainer.train()
        assert not same_bits(trainer.model, tiny_bert())


@pytest.mark.parametrize(
    ("changes", "options", "error", "message"),
    [
        ({}, {"lr": 1e-3}, ValueError, "lr: expected it in TrainingArguments \\(learning_rate\\), got 0.001"),
        ({}, {"betas": (0.9, 0.99)}, ValueError, "betas: expected .*\\(adam_beta1 and adam_beta2\\), got"),
        ({}, {"budgets": 5}, TypeError, "budgets: expected an argument of ID3AdamW, got budgets=5"),
        ({}, {"budget": -1}, ValueError, "budget: "),
        ({}, {"strategy": "best"}, ValueError, "strategy: expected one of"),
        (
            {"max_grad_norm": 0.5},
            {"max_grad_norm": 1.0},
            ValueError,
            "max_grad_norm: expected .*got 0.5 there and 1.0 for the optimizer",
        ),
        (
            {"optim": "adafactor"},
            {},
            ValueError,
            "optim: expected TrainingArguments' default .*, got adafactor",
        ),
    ],
)
def test_contradictions_are_refused_before_the_trainer_exists(tmp_path, changes, options, error, message):
    with pytest.raises(error, match=message):
        id3_optimizer(arguments(tmp_path, **changes), **{"budget": 10} | options)


def test_names_reach_the_heuristics(tmp_path):
    args = arguments(tmp_path, max_steps=1, save_strategy="no")
    trainer = build(args, optimizer_cls_and_kwargs=id3_optimizer(args, HEAD, budget=20, heuristic=Bias()))
    trainer.train()
    touched = {id(t.param) for t in unwrapped(trainer.optimizer).touched() if len(t.indices)}
    assert touched
    assert all(n.endswith("bias") for n, p in trainer.model.named_parameters() if id(p) in touched)


def test_deepspeed_is_refused_at_both_entrances(tmp_path):
    """It gives the optimizer flat parts of the parameters, which bear no mark."""
    trainer = build(arguments(tmp_path))
    trainer.args.deepspeed_plugin = object()  # as `TrainingArguments(deepspeed=…)` sets it
    for begin in (trainer.train, lambda: id3_optimizer(trainer.args, budget=0.05)):
        with pytest.raises(ValueError, match="deepspeed: does not apply to ID3AdamW"):
            begin()


def test_a_fresh_name_that_the_model_has_not_is_refused():
    with pytest.raises(
        ValueError, match=r"fresh: expected names of the model's parameters, got 'score.weight'"
    ):
        parameter_groups(tiny_bert(), {"score.weight"})


def test_another_optimizer_is_named(tmp_path):
    model = tiny_bert()
    optimizers = (torch.optim.AdamW(model.parameters()), None)
    with pytest.raises(TypeError, match="optimizer: expected an ID3AdamW, got AdamW"):
        build(arguments(tmp_path), model, optimizers=optimizers).train()


def test_every_checkpoint_holds_its_delta(tmp_path):
    trainer = build(arguments(tmp_path), callback=ID3Callback(originals=True))
    trainer.train()
    base = tiny_bert()
    for step in (3, 6, 8):
        folder = tmp_path / f"checkpoint-{step}"
        delta = load_delta(folder / "delta.safetensors")
        assert delta.settings["step"] == step and delta.inspect()["originals"]
        with delta.applied(base):
            tuned = load_file(folder / "model.safetensors")
            assert same_bits(tuned, base)
    assert same_bits(base, tiny_bert())


def test_deltas_can_be_left_out(tmp_path):
    build(arguments(tmp_path, max_steps=3), callback=ID3Callback(save_deltas=False)).train()
    assert (tmp_path / "checkpoint-3/model.safetensors").exists()
    assert not (tmp_path / "checkpoint-3/delta.safetensors").exists()


def test_logs_say_where_the_budget_goes(tmp_path):
    trainer = build(arguments(tmp_path))
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in entries] == list(range(1, 9))
    assert entries[-1]["n_active"] == unwrapped(trainer.optimizer).budget
    for entry in entries:
        ranks = [entry[name] for name in ("threshold", "score_q10", "score_q50", "score_q90")]
        assert ranks == sorted(ranks) and 0 < ranks[0] < ranks[-1] and entry["sparsity_entropy"] > 0
    scores = unwrapped(trainer.optimizer).last_selection.scores
    assert entries[-1]["score_q50"] == pytest.approx(float(scores.median()), rel=0.05)
    written = json.loads((tmp_path / "checkpoint-8/trainer_state.json").read_text())["log_history"]
    assert [e["n_active"] for e in written if "loss" in e] == [e["n_active"] for e in entries]


def test_a_callback_of_an_earlier_trainer_leaves_total_steps_alone(tmp_path):
    callback, args = ID3Callback(), arguments(tmp_path, save_strategy="no")
    for given, expected in ((None, 8), (50, 50)):
        model = tiny_bert()
        optimizer = id3(model, total_steps=given)
        build(args, model, callback, optimizers=(optimizer, None)).train()
        assert optimizer.total_steps == expected


def test_no_deltas_in_a_hyperparameter_search(tmp_path):
    class Search(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            state.is_hyper_param_search = True

    trainer = build(arguments(tmp_path, max_steps=3))
    trainer.add_callback(Search())
    trainer.train()
    assert (tmp_path / "checkpoint-3").exists() and not list(tmp_path.rglob("delta.safetensors"))


class RisingLoss:
    """Evaluation losses 3, 4, 5: the first checkpoint is the best."""

    def __init__(self):
        self.losses = iter((3.0, 4.0, 5.0))

    def __call__(self, prediction):
        return {"given": next(self.losses)}


def best_at_end(folder, dtype):
    args = arguments(
        folder,
        eval_strategy="steps",
        eval_steps=3,
        max_steps=9,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="given",
        greater_is_better=False,
    )
    trainer = build(args, tiny_bert(dtype), eval_dataset=rows(4), compute_metrics=RisingLoss())
    trainer.train()
    return trainer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_best_model_wins_over_the_masters(tmp_path, dtype):
    """After `load_best_model_at_end` the optimizer's state is the last step's: the weights are step 3's."""
    trainer = best_at_end(tmp_path, dtype)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]
    best = load_file(tmp_path / "checkpoint-3/model.safetensors")
    assert same_bits(best, trainer.model)
    save_delta(tmp_path / "best.safetensors", trainer.model, trainer.optimizer)
    base = tiny_bert(dtype)
    load_delta(tmp_path / "best.safetensors").apply(base)
    assert same_bits(base, trainer.model)

    optimizer = unwrapped(trainer.optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for p in trainer.model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert same_bits(best, trainer.model)
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    optimizer.step()
    moved = sum(int((p != best[n]).sum()) for n, p in trainer.model.named_parameters() if n not in HEAD)
    assert 0 < moved <= optimizer.n_active


def test_gradient_checkpointing_changes_no_bit(tmp_path):
    models = []
    for on in (False, True):
        model = tiny_bert()
        if on:
            model.gradient_checkpointing_enable()
        build(arguments(tmp_path, save_strategy="no"), model).train()
        models.append(model)
    assert same_bits(*models)


@pytest.mark.parametrize("measured", [False, True])
def test_float16_with_a_grad_scaler(measured):
    """On the CPU Accelerate's fp16 neither casts nor scales; this is what it does on a GPU, where the Trainer
    unscales the gradients before the step to measure their norm."""
    model = tiny_bert()
    before = copy.deepcopy(model.state_dict())
    optimizer = ID3AdamW(parameter_groups(model, HEAD), lr=1e-2, budget=60, total_steps=6, max_grad_norm=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=100)
    batch = torch.stack([row["input_ids"] for row in rows(4)])
    seen = []
    for step in range(7):
        with torch.autocast("cpu", torch.float16):
            loss = model(input_ids=batch, labels=torch.tensor([0, 1, 0, 1])).loss
        scaler.scale(loss).backward()
        if step == 0:
            model.classifier.bias.grad[0] = torch.inf
        if measured:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        seen.append((optimizer.steps_done, optimizer.n_active, scaler.get_scale()))
        if step == 0:
            assert same_bits(before, model)
    assert seen == [(0, 0, 128.0)] + [(n, 10 * n, 128.0) for n in range(1, 7)]


def test_options_of_the_dense_group(tmp_path):
    args = arguments(tmp_path, max_steps=1, save_strategy="no", lr_scheduler_type="constant")
    groups = partial(parameter_groups, lr=5e-3)
    trainer = build(args, optimizer_cls_and_kwargs=id3_optimizer(args, HEAD, groups, budget=20))
    trainer.train()
    assert [g["lr"] for g in unwrapped(trainer.optimizer).param_groups] == [1e-2, 5e-3]


def test_a_compiled_model_saves_plain_names(tmp_path):
    args = arguments(tmp_path, max_steps=3, torch_compile=True, torch_compile_backend="eager")
    trainer = build(args, optimizer_cls_and_kwargs=id3_optimizer(args, HEAD, budget=20))
    trainer.train()
    base = tiny_bert()
    load_delta(tmp_path / "checkpoint-3/delta.safetensors").apply(base)
    assert same_bits(base, trainer.model)


def test_the_pair_may_release_gradients(tmp_path):
    models = []
    for options in ({}, {"release_gradients": True}):
        args = arguments(tmp_path, save_strategy="no", gradient_accumulation_steps=1)
        pair = id3_optimizer(args, HEAD, budget=0.05, max_grad_norm=1.0, **options)
        trainer = build(args, optimizer_cls_and_kwargs=pair)
        trainer.train()
        models.append(trainer.model)
        assert unwrapped(trainer.optimizer).defaults["weight_decay"] == 0.0
    assert same_bits(*models)


def test_a_frozen_body_has_no_group():
    """For a head that is trained first: torch refuses an empty group without names beside one with names."""
    model = tiny_bert()
    model.base_model.requires_grad_(False)
    groups = parameter_groups(model, HEAD)
    assert [group.get("dense", False) for group in groups] == [True]
    optimizer = ID3AdamW(groups, lr=1e-2, budget=0, total_steps=2)
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) > 0
