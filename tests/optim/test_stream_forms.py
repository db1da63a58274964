"""What a stream hands over: files, and the forms of inference servers."""

import copy
import json
from dataclasses import dataclass, fields, replace

import pytest
import torch

from id3_optim import DeltaError, WeightReceiver, WeightStream, diff, load_delta, load_update


@pytest.fixture
def update(model, make, train):
    """(the first model, the trained one, the update between them), in bfloat16."""
    trained, optimizer = make(model, dtype=torch.bfloat16)
    first, stream = copy.deepcopy(trained), WeightStream(trained, optimizer)
    train(trained, optimizer, 0, 3)
    return first, trained, stream.next()


def assert_same_bits(a, b):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p.view(torch.int16), q.view(torch.int16))


def test_an_update_as_a_file(update, tmp_path):
    first, trained, made = update
    made.save(tmp_path / "update.safetensors")
    read = load_update(tmp_path / "update.safetensors")
    for field in ("base_step", "target_step", "base_checksum", "target_checksum", "fingerprint", "unchanged"):
        assert getattr(read, field) == getattr(made, field), field
    followed = copy.deepcopy(first)
    WeightReceiver(followed).apply_patch(read)
    assert_same_bits(followed, trained)
    load_delta(tmp_path / "update.safetensors").apply(first)  # a delta file for every reader
    assert_same_bits(first, trained)
    assert (tmp_path / "update.safetensors").stat().st_size < 5 * made.entries + 4000


def test_a_file_that_is_no_update_is_refused(model, tmp_path):
    delta = diff(model, copy.deepcopy(model))
    delta.save(tmp_path / "delta.safetensors")
    with pytest.raises(DeltaError, match="stream: expected the place in a chain in the settings, got None"):
        load_update(tmp_path / "delta.safetensors")
    zero = "0" * 16
    whole = {"base_step": 0, "target_step": 1, "unchanged": 0}
    whole |= {"base_checksum": zero, "target_checksum": zero}
    for numbers, message in [
        ({"base_step": -1}, "base_step: expected an integer from 0, got -1"),
        ({"base_checksum": "x"}, "base_checksum: expected 16 hex digits, got x"),
    ]:
        replace(delta, settings={"stream": whole | numbers}).save(tmp_path / "bad.safetensors")
        with pytest.raises(DeltaError, match=message):
            load_update(tmp_path / "bad.safetensors")


def test_the_form_of_vllm(update):
    """vllm/backends/distributed/weight_transfer/sparse_nccl_engine.py of vllm-project/vllm at 055e47c2.

    The receiving half is load_checkpoint_weight_patches of vllm/model_executor/model_loader: whole tensors
    of NaN, in which the patch's values replace the weight's.
    """

    @dataclass
    class SparseWeightPatch:
        name: str
        indices: torch.Tensor
        values: torch.Tensor
        full_shape: tuple[int, ...]

    first, trained, made = update
    patches = made.vllm()
    assert type(patches[0])._fields == tuple(f.name for f in fields(SparseWeightPatch))
    for patch in patches:
        assert patch.indices.dtype == torch.int32 and patch.indices.ndim == patch.values.ndim == 1
        assert patch.indices.numel() == patch.values.numel() > 0
        assert patch.indices.is_contiguous() and patch.values.is_contiguous()
        assert type(patch.full_shape) is tuple
        whole = torch.full(patch.full_shape, torch.nan, dtype=patch.values.dtype)
        whole.view(-1).index_copy_(0, patch.indices.long(), patch.values)
        weight = first.get_parameter(patch.name).data
        weight.copy_(torch.where(whole.isnan(), weight, whole))
    assert_same_bits(first, trained)


def test_vllm_takes_no_nan(update):
    made = update[2]
    name, change = next(iter(made.changes.items()))
    bad = change._replace(values=torch.full_like(change.values, torch.nan))
    with pytest.raises(DeltaError, match=f"{name}: expected no NaN"):
        replace(made, changes=made.changes | {name: bad}).vllm()


@dataclass
class DeltaParam:
    name: str
    dtype: str
    shape: list[int]
    pos_start: int
    pos_end: int
    pos_width: int
    val_start: int
    val_end: int


@dataclass
class DeltaFlush:
    encoding: str
    params: list[DeltaParam]
    positions_cpu: torch.Tensor
    values_gpu: torch.Tensor
    checksum: int


def checksum(positions, values):
    p = int(torch.hash_tensor(positions).item()) if positions.numel() else 0
    v = int(torch.hash_tensor(values).item()) if values.numel() else 0
    return p ^ (v << 1)


def test_the_form_of_verl(update):
    """verl/checkpoint_engine/delta_sync/encode.py of verl-project/verl at 1dda039b, and the loader
    verl/workers/rollout/sglang_rollout/delta_loader.py at the same commit."""

    first, trained, made = update
    (flush,) = made.verl()
    assert type(flush)._fields == tuple(f.name for f in fields(DeltaFlush))
    assert type(flush.params[0])._fields == tuple(f.name for f in fields(DeltaParam))
    tensors = dict(flush.named_tensors())
    assert tensors.keys() == {"__delta_spec__", "__positions__", "__values__"}
    spec = json.loads(bytes(tensors["__delta_spec__"].numpy().tobytes()))
    positions, values = tensors["__positions__"], tensors["__values__"]
    assert spec["checksum"] == checksum(positions, values) and spec["encoding"] == "indices"
    for entry in spec["params"]:
        p = DeltaParam(**entry)
        assert p.pos_width == 4 and getattr(torch, p.dtype) == values.dtype
        at = positions[p.pos_start : p.pos_end].clone().view(torch.int32).long()
        weight = first.get_parameter(p.name).data
        assert list(weight.shape) == p.shape
        weight.view(-1)[at] = values[p.val_start : p.val_end]
    assert_same_bits(first, trained)


def test_verl_takes_one_dtype_at_a_time(update):
    made = update[2]
    wide = {
        f"{n}.wide": c._replace(dtype=torch.float32, values=c.values.float()) for n, c in made.changes.items()
    }
    flushes = replace(made, changes=made.changes | wide).verl()
    assert [f.values_gpu.dtype for f in flushes] == [torch.bfloat16, torch.float32]
    assert sum(f.values_gpu.numel() for f in flushes) == 2 * made.entries
