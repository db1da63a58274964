"""Mixtures of experts: trained, saved, applied, inspected; weights of more entries than int32 counts."""

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="the experts are those of transformers' models")

import transformers
from safetensors.torch import load_file

from id3_optim import Delta, ID3AdamW, WeightReceiver, diff, load_delta, merge, pieces, save_delta
from id3_optim.cli.main import main
from id3_optim.delta import Change, DeltaError
from id3_optim.delta.coordinates import checkpoint_parts
from id3_optim.delta.fingerprint import fingerprint

SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 1, "intermediate_size": 24}


def mixtral():
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=4))


def assert_same_bits(a, b):
    assert all(map(torch.equal, a.parameters(), b.parameters()))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with `base`, `tuned` and `delta.safetensors`, and the tuned model."""
    folder, model = tmp_path_factory.mktemp("moe"), mixtral()
    model.save_pretrained(folder / "base")
    optimizer = ID3AdamW(model.named_parameters(), lr=1e-2, budget=0.5, total_steps=3)
    for step in range(3):
        ids = torch.arange(2 * step, 2 * step + 8)[None]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_delta(folder / "delta.safetensors", model, optimizer)
    model.save_pretrained(folder / "tuned")
    return folder, model


def test_a_delta_of_experts_makes_the_tuned_model(trained):
    folder, tuned = trained
    model = mixtral()
    delta = load_delta(folder / "delta.safetensors")
    experts = delta.changes["model.layers.0.mlp.experts.gate_up_proj"]
    assert experts.shape == (4, 48, 16) and len((experts.indices // (48 * 16)).unique()) > 1
    undo = delta.apply(model)
    assert_same_bits(model, tuned)
    undo.revert()
    assert_same_bits(model, mixtral())


def test_apply_on_the_command_line_writes_the_checkpoint(trained, tmp_path):
    folder, _ = trained
    paths = [str(folder / name) for name in ("delta.safetensors", "base")]
    main(["apply", paths[0], "--model", paths[1], "--config", paths[1], "--output", str(tmp_path / "out")])
    made, tuned = (load_file(at / "model.safetensors") for at in (tmp_path / "out", folder / "tuned"))
    assert made.keys() == tuned.keys() and all(torch.equal(made[name], tuned[name]) for name in tuned)


def test_a_delta_by_the_names_of_the_checkpoint_fits_the_model(trained):
    """One expert is a weight of its own there, and a part of a parameter here."""
    folder, tuned = trained
    files = [load_file(folder / name / "model.safetensors") for name in ("base", "tuned")]
    delta = diff(*files)
    assert any(".block_sparse_moe.experts.2.w1." in name for name in delta.changes)
    model = mixtral()
    undo = delta.apply(model)
    assert_same_bits(model, tuned)
    delta.revert(model)
    assert_same_bits(model, mixtral())
    undo = delta.apply(model)
    undo.revert()
    assert_same_bits(model, mixtral())


def test_a_parameter_and_its_part_in_one_delta_are_refused(trained):
    """The merge of a delta of a model in memory with one of checkpoint files."""
    folder, tuned = trained
    base = mixtral()
    files = [load_file(folder / name / "model.safetensors") for name in ("base", "tuned")]
    merged, _ = merge([diff(base, tuned), diff(*files)], whole="first")
    with pytest.raises(DeltaError, match="expected changes of the checkpoint's weights alone, got those of"):
        merged.apply(base)
    assert_same_bits(base, mixtral())
    twice, _ = merge([diff(base, tuned)] * 2)
    assert twice.apply(base)


def test_inspect_counts_the_entries_of_each_expert(trained, capsys):
    folder, _ = trained
    main(["inspect", str(folder / "delta.safetensors")])
    said = capsys.readouterr().out
    assert "changed entries by layer and expert" in said
    main(["inspect", str(folder / "delta.safetensors"), "--json"])
    report = json.loads(capsys.readouterr().out)["experts"]
    delta = load_delta(folder / "delta.safetensors")
    for layer in (0, 1):
        counts = torch.zeros(4, dtype=torch.int64)
        for name, size in (("gate_up_proj", 48 * 16), ("down_proj", 16 * 24)):
            change = delta.changes[f"model.layers.{layer}.mlp.experts.{name}"]
            counts += torch.bincount(change.indices // size, minlength=4)
        assert report[str(layer)] == {str(expert): n for expert, n in enumerate(counts.tolist())}


def test_inspect_finds_experts_by_the_names_of_the_checkpoint(trained, tmp_path, capsys):
    """The same counts from a delta whose experts are weights of their own."""
    folder, _ = trained
    files = [load_file(folder / name / "model.safetensors") for name in ("base", "tuned")]
    reports = []
    for delta in (diff(*files), diff(mixtral(), trained[1])):
        delta.save(tmp_path / "delta.safetensors")
        main(["inspect", str(tmp_path / "delta.safetensors"), "--json"])
        reports.append(json.loads(capsys.readouterr().out)["experts"])
    assert reports[0] == reports[1]


def test_without_experts_nothing_is_said_of_them(tmp_path, capsys):
    base = nn.Linear(4, 4)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.weight[0, 0] += 1
    diff(base, tuned).save(tmp_path / "delta.safetensors")
    main(["inspect", str(tmp_path / "delta.safetensors")])
    assert "layer and expert" not in capsys.readouterr().out


def test_a_large_weight_is_ranges_of_rows(monkeypatch):
    """A limit of 100 entries stands for 2^31 - 1."""
    torch.manual_seed(0)
    base = nn.Linear(16, 20)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.weight.view(-1)[::7] += 1
        tuned.bias += 1
    monkeypatch.setattr(pieces, "LARGEST", 100)
    names = [part.name for part in checkpoint_parts(base)["weight"]]
    assert names == ["weight[0:6]", "weight[6:12]", "weight[12:18]", "weight[18:20]"]
    delta = diff(base, tuned)
    assert delta.changes.keys() == {*names, "bias"}
    model = copy.deepcopy(base)
    with delta.applied(model):
        assert_same_bits(model, tuned)
    assert_same_bits(model, base)
    assert WeightReceiver(model)._weights.keys() == {*names, "bias"}
    monkeypatch.setattr(pieces, "LARGEST", 10)
    with pytest.raises(ValueError, match="weight: expected rows of at most 10 entries, got 16"):
        checkpoint_parts(base)


def test_more_than_two_to_the_31_entries(tmp_path):
    """Experts [3, 2^10, 2^20] of bfloat16, of which six entries alone are ever in memory."""
    places = [(expert, *place) for expert in range(3) for place in [(0, 0), (1023, 2**20 - 1)]]
    model = nn.Module()
    model.experts = nn.Parameter(torch.empty(3, 2**10, 2**20, dtype=torch.bfloat16), requires_grad=False)
    for place in places:
        model.experts[place] = 0
    names = [part.name for part in checkpoint_parts(model)["experts"]]
    assert names == ["experts[0:1]", "experts[1:2]", "experts[2:3]"]
    changes = {}
    for i, name in enumerate(names):
        at, values = torch.tensor([0, 2**30 - 1], dtype=torch.int32), torch.tensor([1, 2]) + 2 * i
        values, kept = values.bfloat16(), torch.zeros(2, dtype=torch.bfloat16)
        changes[name] = Change((1, 2**10, 2**20), torch.bfloat16, at, values, kept)
    mark = fingerprint({name: (c.indices, c.originals) for name, c in changes.items()})
    Delta(changes, mark, {}).save(tmp_path / "delta.safetensors")
    with load_delta(tmp_path / "delta.safetensors").applied(model):
        assert [model.experts[place].item() for place in places] == [1, 2, 3, 4, 5, 6]
    assert [model.experts[place].item() for place in places] == [0] * 6


def pages_of_zeros(*shape):
    """bfloat16 zeros that take no memory before they are written to: torch.zeros writes to all."""
    return torch.from_numpy(np.zeros(shape, dtype=np.int16)).view(torch.bfloat16)


def test_more_than_two_to_the_31_entries_are_trained(tmp_path):
    """Experts [3, 2^10, 2^20], whose pages of zeros take no memory before they are written to."""
    places = [(0, 0, 7), (0, 1023, 2**20 - 1), (1, 511, 3), (2, 0, 0), (2, 1023, 2**20 - 1)]
    model = nn.Module()
    model.experts = nn.Parameter(pages_of_zeros(3, 2**10, 2**20))
    optimizer = ID3AdamW(model.named_parameters(), budget=5, total_steps=2, lr=0.5)
    for _ in range(2):
        model.experts.grad = pages_of_zeros(3, 2**10, 2**20)
        for i, place in enumerate(places):
            model.experts.grad[place] = 1 + i
        optimizer.step()
    (touched,) = optimizer.touched()
    assert touched.indices.dtype == torch.int64
    assert touched.indices.tolist() == [(e << 30) + (r << 20) + c for e, r, c in places]
    held = [model.experts[place].item() for place in places]
    assert held == pytest.approx([-0.372, -0.372, -0.372, -1, -1], abs=0.005)  # three are new in step 2
    save_delta(tmp_path / "delta", model, optimizer, originals=True)
    assert load_delta(tmp_path / "delta").changes.keys() == {"experts[0:1]", "experts[1:2]", "experts[2:3]"}
    state = optimizer.state_dict()
    again = ID3AdamW(model.named_parameters(), budget=5, total_steps=2, lr=0.5)
    again.load_state_dict(state)
    (reloaded,) = again.touched()
    assert torch.equal(reloaded.indices, touched.indices)
