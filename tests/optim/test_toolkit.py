"""Summaries of the method's own toolkit: read without its code, and without running any."""

import os
import pickle
import sys
import types
from dataclasses import dataclass

import pytest
import torch
from tiny_models import save_bert, save_llama
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from id3_optim import DeltaError, load_delta, load_toolkit_summary
from id3_optim.cli import main


@dataclass
class SelectivePeftSummary:
    """The toolkit's class, field by field; `saved` pickles it under the toolkit's own name."""

    values: list
    pointers: list
    shapes: list
    bn_metadata: list
    budget_used: object


SelectivePeftSummary.__module__ = "selective_optimizers.load_store"


@pytest.fixture
def saved(tmp_path, monkeypatch):
    package = types.ModuleType("selective_optimizers")
    module = types.ModuleType("selective_optimizers.load_store")
    module.SelectivePeftSummary = SelectivePeftSummary

    def save(summary, **options):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "selective_optimizers", package)
            patch.setitem(sys.modules, "selective_optimizers.load_store", module)
            torch.save(summary, tmp_path / "summary.pt", **options)
        return tmp_path / "summary.pt"

    return save


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 4)
        self.scale = nn.Parameter(torch.randn(()))
        self.conv = nn.Conv1d(4, 3, 2)
        self.output = nn.Linear(4, 9, bias=False)
        self.output.weight = self.embed.weight


def summary_of(model, generator=None):
    """What the toolkit makes of an optimizer: coordinates and values, in parameter order."""
    generator = generator or torch.Generator().manual_seed(1)
    rows = []
    for param in model.parameters():
        mask = torch.rand(param.shape, generator=generator) < 0.3
        rows.append((torch.randn(int(mask.sum()), generator=generator), mask.nonzero(), param.shape))
    values, pointers, shapes = (list(column) for column in zip(*rows, strict=True))
    return SelectivePeftSummary(values, pointers, shapes, [], 17)


def test_it_gives_the_toolkits_model(saved):
    model, expected = Net(), Net()
    summary = summary_of(model)
    for param, values, pointers in zip(expected.parameters(), summary.values, summary.pointers, strict=True):
        if values.numel():
            param.data[tuple(pointers.t())] = values  # as the toolkit's set_chosen does
    delta = load_toolkit_summary(saved(summary), model)
    undo = delta.apply(model)
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)
    undo.revert()
    assert torch.equal(model.embed.weight, Net().embed.weight)
    assert delta.settings["budget_used"] == 17


def test_unchosen_and_wholly_chosen_parameters(saved):
    model = Net()
    summary = summary_of(model)
    summary.values[1] = summary.pointers[1] = summary.shapes[1] = None  # frozen
    mask = torch.ones(model.conv.weight.shape, dtype=torch.bool)
    summary.values[2], summary.pointers[2] = torch.randn(mask.numel()), mask.nonzero()
    delta = load_toolkit_summary(saved(summary), model)
    assert "embed.weight" not in delta.changes
    assert delta.changes["conv.weight"].indices is None
    assert torch.equal(delta.changes["conv.weight"].values.flatten(), summary.values[2])


def test_pointers_in_any_order(saved):
    """Of entries, and of a tensor chosen whole."""
    model = Net()
    summary = summary_of(model)
    n = model.conv.weight.numel()
    summary.values[2], summary.pointers[2] = torch.randn(n), torch.ones(3, 4, 2).nonzero()
    expected = load_toolkit_summary(saved(summary), model).changes
    for i, values in enumerate(summary.values):
        order = torch.randperm(values.numel(), generator=torch.Generator().manual_seed(i))
        summary.values[i], summary.pointers[i] = values[order], summary.pointers[i][order]
    found = load_toolkit_summary(saved(summary), model).changes
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        for one, other in zip(change, found[name], strict=True):
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_a_count_on_a_tensor_as_older_versions_wrote_it(saved):
    summary = summary_of(Net())
    summary.budget_used = torch.tensor(5)
    assert load_toolkit_summary(saved(summary), Net()).settings["budget_used"] == 5


def other_shape(summary):
    summary.shapes[1] = torch.Size([4, 9])
    return "embed.weight: expected torch.float32 \\(9, 4\\) as in the base"


def other_dtype(summary):
    summary.values[1] = summary.values[1].double()
    return "embed.weight: expected torch.float32 \\(9, 4\\) as in the base, got torch.float64"


def fewer(summary):
    del summary.values[-1], summary.pointers[-1], summary.shapes[-1]
    return "expected the summary's 3 parameters, got 4"


def outside(summary):
    summary.pointers[1][0, 0] = 9
    return "expected pointers inside \\(9, 4\\), got \\[-?\\d, \\d\\]"


def negative(summary):
    summary.pointers[1][0, 0] = -1
    return "expected pointers inside \\(9, 4\\), got \\[-?\\d, \\d\\]"


def twice(summary):
    summary.pointers[1][1] = summary.pointers[1][0]
    return "embed.weight: expected every entry once, got index \\d+ more than once"


def miscounted(summary):
    summary.values[1] = summary.values[1][1:]
    return "expected int64 pointers of shape"


def uneven(summary):
    del summary.shapes[-1]
    return "lists of one length, got \\[4, 4, 3\\]"


def statistics(summary):
    summary.bn_metadata = [{"running_mean": torch.zeros(2)}]
    return "statistics of 1 layers.*strict=False"


def no_count(summary):
    summary.budget_used = None
    return "expected a count as budget_used .*, got NoneType and list"


def plain_list(summary):
    summary.values[1] = [1.0, 2.0]
    return "summary: expected Tensor or None, got list"


def number(summary):
    summary.shapes[1] = 5
    return "summary: expected Size or None, got int"


def sparse(summary):
    summary.values[1] = summary.values[1].to_sparse()
    return "summary: expected Tensor or None, got torch.sparse_coo"


@pytest.mark.parametrize(
    "spoil",
    [
        *(other_shape, other_dtype, fewer, outside, negative, twice, miscounted, uneven, statistics),
        *(no_count, plain_list, number, sparse),
    ],
)
def test_what_does_not_fit_is_refused(saved, spoil):
    summary = summary_of(Net())
    message = spoil(summary)
    with pytest.raises(DeltaError, match=message):
        load_toolkit_summary(saved(summary), Net())


def test_batch_norm_statistics_are_dropped_on_request(saved):
    summary = summary_of(Net())
    statistics(summary)
    assert load_toolkit_summary(saved(summary), Net(), strict=False).changes


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def test_a_crafted_file_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(Evil(), "summary.pt")
    with pytest.raises(DeltaError, match="summary: expected a file of the toolkit"):
        load_toolkit_summary("summary.pt", Net())
    with open("plain.pt", "wb") as file:
        pickle.dump(Evil(), file)
    with pytest.raises(DeltaError, match="summary: expected a file of the toolkit"):
        load_toolkit_summary("plain.pt", Net())
    assert not (tmp_path / "evil").exists()


def test_a_bare_pickle_of_a_good_summary_is_refused(saved, tmp_path):
    """torch.load would take it; only the archives that the toolkit writes are read."""
    load_toolkit_summary(saved(summary_of(Net())), Net())
    saved(summary_of(Net()), _use_new_zipfile_serialization=False)
    with pytest.raises(DeltaError, match=r"got .*summary\.pt, which is no torch archive"):
        load_toolkit_summary(tmp_path / "summary.pt", Net())


@pytest.mark.parametrize("content", [b"", b"\x80\x02", b"PK\x03\x04 cut", b"text"])
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "summary.pt").write_bytes(content)
    with pytest.raises(DeltaError, match="summary: expected a file of the toolkit"):
        load_toolkit_summary(tmp_path / "summary.pt", Net())


def test_a_state_dict_is_not_a_summary(tmp_path):
    torch.save(Net().state_dict(), tmp_path / "summary.pt")
    with pytest.raises(DeltaError, match="summary: expected values, pointers"):
        load_toolkit_summary(tmp_path / "summary.pt", Net())


def test_the_command_writes_a_delta(saved, tmp_path, capsys):
    folder = save_llama(tmp_path / "llama")
    base = AutoModelForCausalLM.from_pretrained(folder)
    summary = summary_of(base)
    command = [
        "convert",
        str(saved(summary)),
        "--model",
        str(folder),
        "--output",
        str(tmp_path / "d.safetensors"),
    ]
    assert main(command) == 0
    assert "entries" in capsys.readouterr().out
    load_delta(tmp_path / "d.safetensors").apply(base)
    expected = AutoModelForCausalLM.from_pretrained(folder)
    for param, values, pointers in zip(expected.parameters(), summary.values, summary.pointers, strict=True):
        param.data[tuple(pointers.t())] = values
    assert all(map(torch.equal, base.parameters(), expected.parameters()))
    assert main([*command[:3], str(tmp_path), *command[4:]]) == 2  # no model there


def test_the_command_refuses_entries_of_random_numbers(saved, tmp_path, capsys):
    """A configuration with a head, here by --config, over a checkpoint without one."""
    folder = save_bert(tmp_path / "bert")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path / "config")
    summary = summary_of(model)
    path, output = saved(summary), tmp_path / "d.safetensors"
    command = ["convert", str(path), "--model", str(folder), "--config", str(tmp_path / "config")]
    assert main([*command, "--output", str(output)]) == 2
    assert "--model: expected weights for classifier." in capsys.readouterr().err and not output.exists()
    for i, (name, param) in enumerate(model.named_parameters()):
        if name.startswith("classifier."):  # chosen whole: nothing of the base is in it
            summary.values[i], summary.pointers[i] = (
                param.detach().flatten(),
                torch.ones_like(param).nonzero(),
            )
    saved(summary)
    assert main([*command, "--output", str(output)]) == 0
    assert main(["apply", str(output), "--model", str(folder), "--output", str(tmp_path / "out")]) == 0
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(found.classifier.weight, model.classifier.weight)
