"""Predicted memory: from a configuration alone, against passes that run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import save_bert, save_llama, write_completions, write_reviews
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.release import config_of
from id3_optim import ID3AdamW, sparse_backward
from id3_optim.cli import main
from id3_optim.cli.estimate import predicted_memory
from id3_optim.cli.train import Settings, train
from id3_optim.estimate import LiveBytes, entry_bytes, estimate, estimate_from_config
from id3_optim.step.products import BLOCK_ENTRIES


def loss_of(model, rows=2, length=24):
    ids = torch.zeros(rows, length, dtype=torch.int64)
    return model(input_ids=ids, labels=ids, use_cache=False).loss


@pytest.mark.parametrize("bf16", [False, True])
def test_the_prediction_is_what_real_passes_hold(tmp_path, bf16):
    dtype = torch.bfloat16 if bf16 else torch.float32
    real = AutoModelForCausalLM.from_pretrained(save_llama(tmp_path), dtype=dtype).train()
    want = estimate(real, loss_of, 200, steps=10)
    got = estimate_from_config(tmp_path, 200, batch=2, length=24, steps=10, bf16=bf16)
    for name, kinds in want.items():
        assert got[name] == {kind: pytest.approx(size, rel=0.1) for kind, size in kinds.items()}
        assert got[name]["weights"] == kinds["weights"]
    assert got["released"]["optimizer_state"] == 200 * (22 if bf16 else 20)
    assert got["released"]["candidates"] == 20 * 16


def test_live_bytes_of_known_tensors():
    kept = torch.zeros(1000)
    with LiveBytes([kept]) as live:
        a = kept.view(10, 100) + 1
        b = a.t().clone()
        del a
        c = b * 2
        del b, c
    assert (live.peak, live.now) == (8000, 0)


def test_released_gradients_stay_within_one_tensor():
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, num_hidden_layers=6, num_attention_heads=4, intermediate_size=128
    )
    report = estimate(LlamaForCausalLM(config).train(), lambda net: loss_of(net, 1, 4), 0.01)
    released, dense = report["released"], report["dense"]
    assert released["forward"] == dense["forward"]
    assert released["pass"] < 3 * released["gradients"] < dense["gradients"] < dense["pass"]
    assert report["adamw"]["optimizer_state"] == 2 * dense["weights"]


def test_bytes_of_an_entry_are_the_optimizers():
    for dtype in (torch.float32, torch.bfloat16):
        for release in (False, True):
            param = torch.nn.Parameter(torch.ones(100, dtype=dtype))
            optimizer = ID3AdamW([param], budget=100, total_steps=1, release_gradients=release)
            param.grad = torch.ones_like(param)
            optimizer.step()
            kinds = ("indices", "moments", "masters", "originals", "accumulator")
            report = optimizer.memory_report()
            assert sum(report[kind] for kind in kinds) == 100 * entry_bytes(dtype, release)


def test_command(tmp_path, capsys):
    arguments = ["estimate", "--model", str(save_llama(tmp_path)), "--budget", "200", "--length", "24"]
    assert main(arguments) == 0
    assert "optimizer state" in capsys.readouterr().out
    assert main([*arguments, "--json", "--checkpointing", "--bf16"]) == 0
    assert json.loads(capsys.readouterr().out)["released"]["optimizer_state"] == 200 * 22
    assert main([*arguments, "--batch", "0"]) == 2
    assert "--batch: expected at least 1, got 0" in capsys.readouterr().err
    assert main([*arguments, "--select-every", "0"]) == 2
    assert "--select-every: expected at least 1, got 0" in capsys.readouterr().err
    assert main([*arguments, "--length", "64"]) == 2
    assert "error: --length: expected at most 32 (max_position_embeddings), got 64" in capsys.readouterr().err
    assert main([*arguments, "--budget", "200000000"]) == 2
    assert "error: --budget: expected 0 to " in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([*arguments[:3], "--budget", "2.5"])
    assert "--budget: expected entries (320000) or a share" in capsys.readouterr().err


def test_the_page_has_what_the_command_says(tmp_path, capsys):
    """docs/gradient-release.md, of Llama-2-7B."""
    config_of("Llama-2-7B").save_pretrained(tmp_path)
    words = ["estimate", "--model", str(tmp_path), "--budget", "7000000", "--batch", "1", "--length", "2048"]
    assert main([*words, "--bf16", "--checkpointing", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    gib = {way: f"{said[way]['peak'] / 2**30:.1f}" for way in ("sparse", "released", "dense", "adamw")}
    mib = {way: f"{said[way]['gradients'] / 2**20:.0f}" for way in ("sparse", "released")}
    page = (Path(__file__).parents[2] / "docs" / "gradient-release.md").read_text()
    assert (
        f"{gib['sparse']} GiB with a sparse backward pass and {gib['released']} with released gradients "
        f"({mib['sparse']} MiB and {mib['released']} MiB of gradients at once), {gib['dense']} with dense "
        f"gradients and {gib['adamw']} with AdamW"
    ) in " ".join(page.split())


def test_train_releases_and_reports(tmp_path):
    save_bert(tmp_path / "bert")
    reviews = str(write_reviews(tmp_path / "reviews.csv"))
    settings = Settings(
        model=str(tmp_path / "bert"), train=reviews, eval=reviews, output=str(tmp_path / "out"),
        budget=300, steps=8, batch_size=8, lr=1e-2, cpu=True, max_length=16,
    )  # fmt: skip
    _, dense, _ = train(settings)
    again = replace(settings, output=str(tmp_path / "released"), release_gradients=True, memory_report=True)
    report, released, _ = train(again)
    assert all(map(torch.equal, dense.model.parameters(), released.model.parameters()))
    predicted, measured = report["memory"]["predicted"], report["memory"]["measured"]
    assert measured["candidates"] == 16 * -(-300 // 8) == predicted["candidates"]
    assert measured["weights"] == pytest.approx(predicted["weights"], rel=0.05)  # a head and a pooler
    assert measured["peak"] >= 0 and predicted["optimizer_state"] == 300 * 20


def test_the_prediction_is_that_of_the_method(tmp_path):
    """A mask that is drawn before training joins at once; ages take memory; an adapter has no entries."""
    save_bert(tmp_path / "bert")
    plain = Settings(model=str(tmp_path / "bert"), train="", eval="", output="", budget=300)
    found = {
        name: predicted_memory(replace(plain, **changes), steps=30)
        for name, changes in {
            "id3": {},
            "recipe": {"method": "recipe"},
            "mask": {"mask": "delta.safetensors"},
            "ages": {"entry_warmup": 3},
        }.items()
    }
    released = {
        name: predicted_memory(replace(plain, release_gradients=True, **changes), 30)["candidates"]
        for name, changes in {"id3": {}, "recipe": {"method": "recipe"}}.items()
    }
    assert released == {"id3": 16 * 10, "recipe": 16 * 300}
    assert found["id3"] == found["recipe"] == found["mask"]
    assert found["ages"]["optimizer_state"] > found["id3"]["optimizer_state"]
    with pytest.raises(ValueError, match="--memory-report: does not apply to --method lora"):
        predicted_memory(replace(plain, method="lora"), 30)


@pytest.mark.parametrize("bf16", [False, True])
def test_sparse_backward_holds_what_is_predicted(bf16):
    """The real optimizer's passes, in a step that selects; its layers are larger than a block."""
    config = LlamaConfig(
        vocab_size=6000, hidden_size=1024, num_hidden_layers=2, num_attention_heads=4, intermediate_size=2048,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16 if bf16 else torch.float32).train()
    predicted = estimate(model, lambda net: loss_of(net, 1, 8), 1000, steps=10)
    optimizer = ID3AdamW(model.named_parameters(), budget=1000, total_steps=10)
    sparse_backward(model, optimizer)
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        loss_of(model, 1, 8).backward()
    size = 2 if bf16 else 4
    assert predicted["sparse"]["gradients"] == BLOCK_ENTRIES * size
    assert live.peak == pytest.approx(predicted["sparse"]["pass"], rel=0.1)
    assert predicted["sparse"]["pass"] < 0.7 * predicted["released"]["pass"]


def test_a_tied_weight_is_whole_in_a_step_that_selects():
    config = LlamaConfig(
        vocab_size=5000, hidden_size=256, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    report = estimate(LlamaForCausalLM(config).train(), lambda net: loss_of(net, 1, 4), 1000)
    assert report["sparse"]["gradients"] == report["released"]["gradients"] == 5000 * 256 * 4


def test_the_model_is_as_before(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_llama(tmp_path)).train()
    classes = [type(layer) for layer in model.modules()]
    estimate(model, loss_of, 200)
    assert [type(layer) for layer in model.modules()] == classes
    loss_of(model).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_run_with_sparse_backward_reports_what_it_uses(tmp_path):
    save_llama(tmp_path / "llama")
    facts = str(write_completions(tmp_path / "facts.jsonl"))
    settings = Settings(
        model=str(tmp_path / "llama"), train=facts, eval=facts, output=str(tmp_path / "out"), budget=300,
        steps=8, select_every=4, batch_size=8, lr=1e-2, cpu=True, sparse_backward=True, memory_report=True,
    )  # fmt: skip
    memory = train(settings)[0]["memory"]  # --max-length is 256, the model has 32 positions
    assert memory["measured"]["candidates"] == memory["predicted"]["candidates"] == 16 * 150
    options = {"steps": 8, "select_every": 4}
    by_way = estimate_from_config(tmp_path / "llama", 300, batch=8, length=32, **options)
    assert memory["predicted"] == by_way["sparse"]


def test_a_prediction_that_fails_loses_no_run(tmp_path):
    save_bert(tmp_path / "bert")
    reviews = str(write_reviews(tmp_path / "reviews.csv"))
    settings = Settings(
        model=str(tmp_path / "bert"), train=reviews, eval=reviews, output=str(tmp_path / "out"),
        budget=10**6, steps=8, batch_size=8, lr=1e-2, cpu=True, memory_report=True,
    )  # fmt: skip
    with pytest.raises(
        ValueError, match=r"^--budget: expected 0 to \d+ entries .all that train., got 1000000"
    ):
        train(settings)
    assert not (tmp_path / "out").exists()
