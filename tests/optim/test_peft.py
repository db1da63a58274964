"""ID3AdamW over PEFT adapters: what the budget counts over, saving both ways, the Trainer's checkpoints."""

import functools

import pytest
import torch

pytest.importorskip("peft", reason="PEFT comes with the extra `peft`")

import peft
import transformers
from trainer_run import arguments, build, rows, same_bits, tiny_bert

from id3_optim import DeltaError, ID3AdamW, load_delta, save_delta
from id3_optim.integrations.huggingface import id3_optimizer
from id3_optim.integrations.peft import adapter_groups
from id3_optim.wrappers import unwrapped


def lora(base=None, **changes):
    config = peft.LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS", **changes)
    return peft.get_peft_model(base or tiny_bert(), config)


def classified():
    """A batch for a classifier of two classes."""
    return {"input_ids": torch.stack([r["input_ids"] for r in rows(8)]), "labels": torch.arange(8) % 2}


def train(model, batch=None, **options):
    optimizer = ID3AdamW(adapter_groups(model), **{"lr": 1e-2, "budget": 0.24, "total_steps": 5} | options)
    for _ in range(5):
        model(**batch or classified()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def test_the_budget_counts_over_the_adapter_alone():
    model = lora()
    optimizer = train(model)
    sparse, dense = optimizer.param_groups
    assert all(".lora_A." in n or ".lora_B." in n for n in sparse["param_names"])
    assert optimizer.n_entries == 2 * 2 * 2 * 4 * 16  # layers, query and value, A and B, rank, width
    assert optimizer.n_active == int(0.24 * 512) == 122
    assert [n.split(".")[-1] for n in dense["param_names"]] == ["weight", "bias"]
    assert all("classifier.modules_to_save." in n for n in dense["param_names"])
    tuned = {n.replace(".base_layer", ""): p for n, p in model.get_base_model().named_parameters()}
    assert all(torch.equal(tuned[f"bert.{n}"], p) for n, p in tiny_bert().bert.named_parameters())


def test_only_some_of_the_adapter():
    model = lora()
    initial = {n: p.clone() for n, p in model.named_parameters()}
    groups = adapter_groups(model, only=("lora_B",))
    assert groups[0]["params"] and all("lora_B" in n for n, _ in groups[0]["params"])
    optimizer = ID3AdamW(groups, budget=1.0, total_steps=1)
    model(input_ids=rows(1)[0]["input_ids"][None], labels=torch.tensor([1])).loss.backward()
    optimizer.step()
    assert all(torch.equal(p, initial[n]) for n, p in model.named_parameters() if "lora_A" in n)
    assert any(not torch.equal(p, initial[n]) for n, p in model.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=2, use_dora=True, target_modules=["query"]),
        peft.IA3Config(target_modules=["key"], feedforward_modules=[]),
        peft.OFTConfig(oft_block_size=4, target_modules=["query"]),
    ],
    ids=lambda config: config.peft_type,
)
def test_any_peft_method(config):
    assert_trains(peft.get_peft_model(tiny_bert(), config))


def assert_trains(model, **batch):
    """The optimizer fills its budget within the adapter, and the adapter is what PEFT saves."""
    optimizer = train(model, batch, budget=0.5)
    assert optimizer.n_active == optimizer.budget == int(0.5 * optimizer.n_entries)
    saved = peft.get_peft_model_state_dict(model)
    in_adapter = sum(p.numel() for g in optimizer.param_groups for p in g["params"])
    assert in_adapter >= sum(v.numel() for v in saved.values()) > 0


def test_prefix_tuning_of_a_language_model():
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, pad_token_id=0, **size))
    model = peft.get_peft_model(base, peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    tokens = torch.stack([r["input_ids"] for r in rows(8)])
    assert_trains(model, input_ids=tokens, labels=tokens)


def test_prefix_tuning_of_a_classifier_is_refused_where_peft_cannot_run_it():
    """Whether PEFT can depends on the release of transformers, so that PEFT itself is what decides here."""
    model = prefix_tuned_classifier()
    try:
        model(**classified())
    except ValueError as error:
        assert "past key values" in str(error)
        with pytest.raises(ValueError, match=r"model: expected a base model .* got BertForSequenceClassif"):
            adapter_groups(model)
    else:
        assert_trains(model)


@pytest.mark.parametrize("part", ["base", "backbone", None])
def test_prefix_tuning_of_a_classifier_needs_an_argument_of_the_base_or_its_backbone(part, monkeypatch):
    model = prefix_tuned_classifier()
    base = model.get_base_model()
    for name, module in {"base": base, "backbone": base.bert}.items():
        takes = (lambda past_key_values=None: None) if name == part else (lambda cache=None: None)
        monkeypatch.setattr(module, "forward", takes)
    if part is None:
        with pytest.raises(
            ValueError, match="forward takes past_key_values, as PEFT's prefix tuning for SEQ_CLS"
        ):
            adapter_groups(model)
    else:
        assert adapter_groups(model)[0]["params"]


def prefix_tuned_classifier():
    config = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS")
    return peft.get_peft_model(tiny_bert(), config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_as_an_adapter_and_as_a_delta_over_the_initial_one(tmp_path, dtype):
    """B is zero at first and A is random: the delta needs the same A, so the initial adapter is saved."""
    model = lora(tiny_bert(dtype), use_rslora=True)
    model.save_pretrained(tmp_path / "initial")
    optimizer = train(model)
    model.save_pretrained(tmp_path / "tuned")
    save_delta(tmp_path / "delta.safetensors", model, optimizer)

    whole = peft.PeftModel.from_pretrained(tiny_bert(dtype), tmp_path / "tuned")
    assert same_bits(whole, model)
    again = peft.PeftModel.from_pretrained(tiny_bert(dtype), tmp_path / "initial")
    assert not same_bits(again, model)
    undo = load_delta(tmp_path / "delta.safetensors").apply(again)
    assert same_bits(again, model)
    undo.revert()
    delta = load_delta(tmp_path / "delta.safetensors")
    assert any(".lora_A." in name for name in delta.changes)  # else the fingerprint could not tell another A
    base = tiny_bert(dtype)
    torch.manual_seed(99)
    with pytest.raises(DeltaError, match="expected the base with fingerprint"):
        delta.apply(lora(base, use_rslora=True))


def test_the_same_seed_makes_the_initial_adapter_again(tmp_path):
    model = lora(tiny_bert())  # which seeds: A follows from it
    save_delta(tmp_path / "delta.safetensors", model, train(model))
    again = lora(tiny_bert())
    load_delta(tmp_path / "delta.safetensors").apply(again)
    assert same_bits(again, model)


def start(folder, **changes):
    args = arguments(folder, **changes)
    pair = id3_optimizer(args, groups=adapter_groups, budget=0.06)
    return build(args, lora(), optimizer_cls_and_kwargs=pair)


def test_trainer_resumes_an_adapter_bit_for_bit(tmp_path):
    straight = start(tmp_path / "straight")
    straight.train()
    resumed = start(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight/checkpoint-3"))
    assert same_bits(straight.model, resumed.model)
    base = lora()
    load_delta(tmp_path / "straight/checkpoint-8/delta.safetensors").apply(base)
    assert same_bits(base, straight.model)


def test_the_best_adapter_at_the_end(tmp_path):
    args = arguments(
        tmp_path,
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="given",
    )
    falling = iter((3.0, 2.0, 1.0))
    pair = id3_optimizer(args, groups=functools.partial(adapter_groups, lr=1e-3), budget=0.06)
    trainer = build(
        args,
        lora(),
        optimizer_cls_and_kwargs=pair,
        eval_dataset=rows(4),
        compute_metrics=lambda prediction: {"given": next(falling)},
    )
    trainer.train()
    best = peft.PeftModel.from_pretrained(tiny_bert(), tmp_path / "checkpoint-3")
    assert same_bits(best, trainer.model)
    save_delta(tmp_path / "delta.safetensors", trainer.model, trainer.optimizer)
    again = lora()
    load_delta(tmp_path / "delta.safetensors").apply(again)
    assert same_bits(again, best)
    assert unwrapped(trainer.optimizer).param_groups[1]["initial_lr"] == 1e-3


def test_refusals(tmp_path):
    model = lora()
    with pytest.raises(ValueError, match=r"only: expected parts of the adapter's .* got 'lora_C'"):
        adapter_groups(model, only=["lora_C"])
    model.save_pretrained(tmp_path)
    frozen = peft.PeftModel.from_pretrained(tiny_bert(), tmp_path)
    with pytest.raises(ValueError, match="model: expected an adapter with trainable parameters, got none"):
        adapter_groups(frozen)
