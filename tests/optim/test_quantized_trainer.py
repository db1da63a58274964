"""`QuantizedSparse` in transformers' Trainer and in TRL: what a loop of one's own gives."""

import copy

import pytest
import torch

pytest.importorskip("transformers", reason="the Trainer comes with the extra `hf`")

from int8_model import dequantize, quantize
from safetensors.torch import load_file
from tiny_models import save_bert, save_llama
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

from id3_optim import load_delta
from id3_optim.integrations.quantized import SparseCallback, trainable
from id3_optim.quantized import QuantizedSparse

STEPS = 6
HEAD = ["classifier.weight", "classifier.bias"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_bert(folder / "bert")
    save_llama(folder / "llama")
    return folder


def classifier(folder):
    torch.manual_seed(0)
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = AutoModelForSequenceClassification.from_pretrained(folder / "bert", **none)
    return quantize(model, leave=["classifier"])


def rows(n=24):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 19, (n, 8), generator=generator)
    return [{"input_ids": row.tolist(), "labels": int(row[0] % 2), "unread": "x"} for row in tokens]


def arguments(output, **more):
    given = {"max_steps": STEPS, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_grad_norm": 0}
    given |= {"per_device_train_batch_size": 4, "train_sampling_strategy": "sequential", "report_to": []}
    given |= {"use_cpu": True, "logging_steps": 1, "save_steps": 3, "disable_tqdm": True}
    return TrainingArguments(str(output), **(given | more))


def fit(folder, output, resume=None, callback=None, budget=0.02, **more):
    """(the module, its Trainer) after training."""
    model = classifier(folder)
    sparse = QuantizedSparse(model, budget, STEPS, dequantize=dequantize)
    module = trainable(model, sparse, fresh=HEAD)
    callbacks = [callback or SparseCallback(max_grad_norm=0.5)]
    options = {"train_dataset": rows(), "eval_dataset": rows(), "callbacks": callbacks}
    trainer = Trainer(module, arguments(output, **more), **options)
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return module, trainer


@pytest.fixture(scope="module")
def ran(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    return output, *fit(folder, output, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True)


def test_the_trainer_is_a_loop_of_ones_own(folder, tmp_path):
    module, trainer = fit(folder, tmp_path)
    model = classifier(folder)
    model.requires_grad_(False)
    sparse = QuantizedSparse(model, 0.02, STEPS, dequantize=dequantize)
    head = [p.requires_grad_() for name, p in model.named_parameters() if name in HEAD]
    optimizer = torch.optim.AdamW([sparse.values, *head], lr=1e-2, weight_decay=0)
    for at in range(STEPS):
        given = rows()[4 * at : 4 * at + 4]
        batch = {"input_ids": [row["input_ids"] for row in given], "labels": [row["labels"] for row in given]}
        loss = model(**{name: torch.tensor(value) for name, value in batch.items()}).loss
        loss.backward()
        sparse.join()
        torch.nn.utils.clip_grad_norm_([sparse.values, *head], 0.5)
        optimizer.step()
        optimizer.zero_grad()
    history = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["n_active"] for log in history] == sorted({log["n_active"] for log in history})
    assert history[-1]["n_active"] == sparse.n_active == sparse.budget
    torch.testing.assert_close(module.values, sparse.values, rtol=1e-5, atol=1e-6)
    ours, own = (one.state_dict()["layers"] for one in (module.sparse, sparse))
    assert all(torch.equal(ours[name]["indices"], own[name]["indices"]) for name in ours)


def same(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_resumed_run_is_the_same(ran, folder, tmp_path):
    output, _, _ = ran
    resumed, trainer = fit(folder, tmp_path, resume=output / "checkpoint-3")
    assert trainer.state.global_step == STEPS
    whole, _ = fit(folder, tmp_path / "whole")
    same(resumed, whole)
    assert {"values", "n_active", "fresh.classifier.bias"} < load_file(
        output / "checkpoint-6/model.safetensors"
    ).keys()


def test_the_best_checkpoint_comes_back(ran):
    _, module, trainer = ran
    best = load_file(f"{trainer.state.best_model_checkpoint}/model.safetensors")
    assert all(torch.equal(value, best[name]) for name, value in module.state_dict().items())


def test_the_delta_makes_the_trained_model(ran, folder):
    _, module, trainer = ran
    plain = classifier(folder)
    for name, layer in list(plain.named_modules()):
        if (weight := dequantize(layer)) is not None:
            linear = torch.nn.Linear(*weight.shape[::-1])
            linear.weight.data, linear.bias.data = weight, layer.bias.data
            parent, _, own = name.rpartition(".")
            setattr(plain.get_submodule(parent), own, linear)
    x = torch.tensor([row["input_ids"] for row in rows()])
    delta = load_delta(f"{trainer.state.best_model_checkpoint}/delta.safetensors")
    assert delta.settings["config"]["architectures"] == ["BertForSequenceClassification"]
    delta.apply(plain)
    torch.testing.assert_close(plain.eval()(x).logits, module.eval()(x).logits, rtol=1e-5, atol=1e-5)


def test_accumulation_and_gradient_checkpoints(folder, tmp_path):
    """Recomputed layers choose and train the same."""
    modules = [
        fit(folder, tmp_path / str(on), gradient_accumulation_steps=2, gradient_checkpointing=on)[0]
        for on in (False, True)
    ]
    same(*modules)


def test_mixed_precision(folder, tmp_path):
    module, trainer = fit(folder, tmp_path, bf16=True)
    assert module.sparse.n_active == module.sparse.budget and module.values.dtype == torch.float32
    assert [log["loss"] < 2 for log in trainer.state.log_history if "loss" in log] == [True] * STEPS


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"max_grad_norm": 1.0}, r"max_grad_norm: expected 0 in TrainingArguments, got 1.0"),
        ({"weight_decay": 0.1}, r"weight_decay: expected 0, got 0.1"),
        ({"max_steps": 3}, r"total_steps: expected at most the run's 3, got 6"),
    ],
)
def test_what_is_refused(folder, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        fit(folder, tmp_path, **more)


def test_a_model_alone_or_of_another_kind_is_refused(folder, tmp_path):
    model = classifier(folder)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=rows(), callbacks=[SparseCallback()])
    with pytest.raises(ValueError, match="model: expected that of `trainable`, got BertFor"):
        trainer.train()
    sparse = QuantizedSparse(model, 20, STEPS, dequantize=dequantize)
    with pytest.raises(ValueError, match="fresh: expected names of the model's parameters, got 'head'"):
        trainable(model, sparse, fresh=["head"])
    module = trainable(model, sparse)
    with pytest.raises(
        ValueError, match="state: expected n_active, steps_done, values, got 1 tensors without"
    ):
        module.load_state_dict({"weight": torch.zeros(2)})


def test_a_copy_answers_as_its_model(folder):
    model = classifier(folder)
    module = copy.deepcopy(trainable(model, QuantizedSparse(model, 20, STEPS, dequantize=dequantize)))
    assert module.config.hidden_size == 16 and type(module).__name__ == type(model).__name__
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        _ = module.nothing_of_that_name


def test_four_bits_in_trl(folder, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is no extra of this package")
    trl = pytest.importorskip("trl", reason="TRL is an extra")
    from datasets import Dataset
    from transformers import BitsAndBytesConfig

    four = BitsAndBytesConfig(load_in_4bit=True)
    model = AutoModelForCausalLM.from_pretrained(folder / "llama", quantization_config=four)
    tokenizer = AutoTokenizer.from_pretrained(folder / "llama", pad_token="[PAD]")
    facts = [{"prompt": "the film is", "completion": " red"}, {"prompt": "a book is", "completion": " blue"}]
    sparse = QuantizedSparse(model, 0.05, STEPS)
    given = {"max_steps": STEPS, "learning_rate": 1e-2, "max_grad_norm": 0, "logging_steps": 1}
    given |= {"use_cpu": True, "save_steps": 3, "report_to": [], "lr_scheduler_type": "constant"}
    trainer = trl.SFTTrainer(
        trainable(model, sparse),
        trl.SFTConfig(str(tmp_path), **given),
        train_dataset=Dataset.from_list(facts * 8),
        processing_class=tokenizer,
        callbacks=[SparseCallback()],
    )
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < losses[0] and sparse.n_active == sparse.budget
    assert sparse.values.dtype == torch.float32  # TRL rounds the adapters of a quantised model to bfloat16
    assert load_delta(tmp_path / "checkpoint-6/delta.safetensors").changes
