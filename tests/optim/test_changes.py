"""What changed since a step: a superset of the changed bits, in the form an inference server takes."""

import copy
from typing import NamedTuple

import pytest
import torch
from parameters import one_parameter
from torch import nn

from id3_optim import ID3AdamW, weight_patches


def parameters_after(model, patches):
    """A copy of `model` with the patches written into it as vLLM's sparse engine does (vllm#40096)."""
    twin = copy.deepcopy(model)
    for patch in patches:
        param = twin.get_parameter(patch.name)
        assert param.data.is_contiguous()
        assert patch.indices.dtype == torch.int32 and patch.values.dtype == param.dtype
        assert patch.indices.ndim == patch.values.ndim == 1
        assert patch.indices.numel() == patch.values.numel() > 0
        assert patch.indices.is_contiguous() and patch.values.is_contiguous()
        param.data.view(-1).index_copy_(0, patch.indices.long(), patch.values)
    return twin.state_dict()


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strategy", ["increment", "static", "repeat"])
def test_patches_bring_an_old_copy_up_to_date(model, make, train, strategy, dtype):
    model, optimizer = make(model, dtype=dtype, strategy=strategy)
    train(model, optimizer, 0, 5)
    server = copy.deepcopy(model)
    train(model, optimizer, 5, 9)
    assert any(not torch.equal(a, b) for a, b in zip(server.parameters(), model.parameters(), strict=True))
    assert_same_bits(parameters_after(server, weight_patches(model, optimizer, since=5)), model.state_dict())


def test_the_fields_are_those_of_vllm(model, make, train):
    class SparseWeightPatch(NamedTuple):  # as vLLM declares it
        name: str
        indices: torch.Tensor
        values: torch.Tensor

    model, optimizer = make(model)
    train(model, optimizer, 0, 3)
    patches = list(weight_patches(model, optimizer))
    assert patches[0]._fields == SparseWeightPatch._fields
    metadata = {
        "names": [p.name for p in patches],
        "dtype_names": [str(p.values.dtype).removeprefix("torch.") for p in patches],
        "shapes": [list(model.get_parameter(p.name).shape) for p in patches],
        "num_updates_list": [p.indices.numel() for p in patches],
    }
    assert getattr(torch, metadata["dtype_names"][0]) == torch.float32
    assert sum(metadata["num_updates_list"]) == optimizer.n_active


def test_patches_are_copies_that_later_steps_leave_alone(model, make, train):
    model, optimizer = make(model)
    train(model, optimizer, 0, 3)
    patches = list(weight_patches(model, optimizer))
    kept = [(p.indices.clone(), p.values.clone()) for p in patches]
    train(model, optimizer, 3, 6)
    for patch, (indices, values) in zip(patches, kept, strict=True):
        assert torch.equal(patch.indices, indices) and torch.equal(patch.values, values)


def test_nothing_changed_since_the_newest_step(model, make, train):
    model, optimizer = make(model)
    train(model, optimizer, 0, 3)
    assert list(optimizer.changed_since(3)) == []
    assert [t.indices.numel() for t in optimizer.changed_since(2)] == [
        t.indices.numel() for t in optimizer.touched() if t.indices.numel()
    ]


def test_a_tensor_without_gradient_is_left_out(model, make, give_gradients):
    model, optimizer = make(model)
    give_gradients(0, model.parameters())
    optimizer.step()
    optimizer.zero_grad()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    optimizer.step()
    assert [t.param is model[0].weight for t in optimizer.changed_since(1)] == [True]
    assert len(list(optimizer.changed_since(0))) > 1


def test_dense_groups_come_whole(train):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    body, head = list(model[0].named_parameters("0")), list(model[1].named_parameters("1"))
    optimizer = ID3AdamW([{"params": body}, {"params": head, "dense": True}], budget=10, total_steps=4)
    before = copy.deepcopy(model)
    train(model, optimizer, 0, 2)
    patches = {p.name: p for p in weight_patches(model, optimizer)}
    assert patches["1.weight"].indices.tolist() == list(range(24))
    assert_same_bits(parameters_after(before, patches.values()), model.state_dict())
    assert list(weight_patches(model, optimizer, since=2)) == []


def test_after_loading_a_state_everything_active_counts(model, make, train):
    model, optimizer = make(model)
    train(model, optimizer, 0, 4)
    _, resumed = make(model)
    resumed.load_state_dict(optimizer.state_dict())
    assert sum(t.indices.numel() for t in resumed.changed_since(3)) == resumed.n_active
    assert list(resumed.changed_since(4)) == []


@pytest.mark.parametrize("step", [-1, 1, 7])
def test_a_step_that_is_not_done_is_refused(step):
    optimizer = ID3AdamW([one_parameter()], budget=3, total_steps=5)
    with pytest.raises(ValueError, match=f"step: expected 0 to 0 .*got {step}"):
        optimizer.changed_since(step)


def test_a_parameter_outside_the_model_is_refused(model, make, train):
    model, optimizer = make(model)
    train(model, optimizer, 0, 1)
    with pytest.raises(ValueError, match="expected every trained parameter in it"):
        list(weight_patches(nn.Linear(2, 2), optimizer))


def test_wrapped_models_and_optimizers_are_looked_through(model, make, train):
    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    model, optimizer = make(model)
    train(model, optimizer, 0, 2)
    plain = [p.name for p in weight_patches(model, optimizer)]
    compiled = torch.compile(model, backend="eager")
    assert [p.name for p in weight_patches(compiled, Wrapper(optimizer))] == plain
    with pytest.raises(TypeError, match="expected an ID3AdamW, got SGD"):
        weight_patches(model, torch.optim.SGD(model.parameters()))
