"""Parameters that a trainer splits over ranks are refused by name on each rank, before anything changes."""

import json
from pathlib import Path

import pytest
import torch
from torchrun import launch

from id3_optim import ID3AdamW
from id3_optim.wrappers import plain_names

EXPECTED = {
    "fsdp1 True": "_fsdp_wrapped_module.0.weight: expected a whole parameter, got one split by Fully",
    "fsdp1 False": "_fsdp_wrapped_module._flat_param: expected a whole parameter, got one split by Fully",
    "fsdp1 True, step": "0.weight: expected a whole parameter, got one split by FullyShardedData",
    "fsdp1 True, save": "model: expected whole parameters, got one in FullyShardedDataParallel",
    "fsdp1 False, save": "model: expected whole parameters, got one in FullyShardedDataParallel",
    "fsdp2, save": "model: expected the one that the optimizer trains, got one with none of its 4",
    "zero": "optimizer_class: expected an optimizer that works on some of the parameters, got ID3",
    "zero, partial": "optimizer_class: expected an optimizer that works on some of the parameters, got ID3",
}


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """(folder, the errors of each of two processes by case)."""
    folder = tmp_path_factory.mktemp("sharded")
    done = launch(Path(__file__).parent / "sharded_run.py", folder, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("case", EXPECTED)
def test_split_parameters_are_refused_by_name(errors, case):
    for found in errors[1]:
        assert found[case] is not None and found[case].startswith(EXPECTED[case])
        assert "\n" not in found[case]
        assert "DistributedDataParallel" in found[case] or case == "fsdp2, save"


def test_what_works_works(errors):
    folder, ranks = errors
    for found in ranks:
        works = ("ddp", "zero, AdamW", "fsdp2", "fsdp2, step")
        assert found.keys() == {*EXPECTED, *works}
        assert [found[name] for name in works] == [None] * 4
    assert not list(folder.glob("*.safetensors"))


def test_a_parameter_of_deepspeed_is_refused():
    param = torch.nn.Parameter(torch.zeros(4))
    param.ds_id = 0
    with pytest.raises(ValueError, match="expected a whole parameter, got one split by DeepSpeed ZeRO"):
        ID3AdamW([param], budget=1, total_steps=1)


def test_a_step_that_is_refused_changes_nothing(model, make, give_gradients):
    twin, optimizer = make(model)
    give_gradients(0, twin.parameters())
    first = next(iter(twin.parameters()))
    first._fsdp_flattened = True
    with pytest.raises(ValueError, match=r"0\.weight: expected a whole parameter"):
        optimizer.step()
    assert optimizer.n_entries is None and optimizer.steps_done == 0
    assert all(map(torch.equal, twin.parameters(), model.parameters()))
    del first._fsdp_flattened
    optimizer.step()
    assert optimizer.steps_done == 1


def test_a_module_of_that_name_alone_is_refused():
    """A part of a model may be wrapped, the rest not."""
    model = torch.nn.Module()
    model.inner = torch.nn.Module()
    model.inner._fsdp_wrapped_module = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"\(inner\._fsdp_wrapped_module\.weight\), which is not supported"):
        plain_names(model)
