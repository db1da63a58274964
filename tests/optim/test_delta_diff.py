"""`diff`: exactly the entries whose bits differ, by plain names, for modules and mappings."""

import copy

import pytest
import torch
from hand_trained import BITS, Net, bits, same, train_by_hand
from torch import nn

from id3_optim import diff, load_delta, save_delta
from id3_optim.delta import DeltaError
from id3_optim.delta import diff as diff_module

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def tuned_from(base, seed=1):
    tuned = copy.deepcopy(base)
    optimizer = train_by_hand(tuned, seed=seed)
    return tuned, optimizer


@pytest.mark.parametrize("chunk", [7, 1 << 22])
@pytest.mark.parametrize("dtype", DTYPES)
def test_base_and_diff_make_the_tuned_model(tmp_path, monkeypatch, dtype, chunk):
    monkeypatch.setattr(diff_module, "_CHUNK", chunk)
    base = Net(dtype)
    tuned, _ = tuned_from(base)
    kept = bits(base), bits(tuned)
    delta = diff(base, tuned)
    assert same(bits(base), kept[0]) and same(bits(tuned), kept[1])
    delta.save(tmp_path / "delta", compact=True)
    delta = load_delta(tmp_path / "delta")
    assert delta.settings == {"method": "diff"} and "output.weight" not in delta.changes
    for name, change in delta.changes.items():
        before, after = kept[0][name].reshape(-1), kept[1][name].reshape(-1)
        assert change.indices.dtype == torch.int32
        assert change.indices.tolist() == (before != after).nonzero().squeeze(1).tolist()
    undo = delta.apply(base)
    assert same(bits(base), kept[1])
    undo.revert()
    delta.apply(base)
    delta.revert(base)
    assert same(bits(base), kept[0])


def test_the_fingerprint_is_that_of_the_optimizers_delta(tmp_path):
    base = Net()
    tuned, optimizer = tuned_from(base)
    optimizer.param_groups[1]["params"] = []
    save_delta(tmp_path / "delta", tuned, optimizer, originals=True)
    with torch.no_grad():
        for ours, theirs in zip(base.head.parameters(), tuned.head.parameters(), strict=True):
            ours.copy_(theirs)
    saved, found = load_delta(tmp_path / "delta"), diff(base, tuned)
    assert found.fingerprint == saved.fingerprint and set(found.changes) == set(saved.changes)
    for name, change in found.changes.items():
        assert torch.equal(change.indices, saved.changes[name].indices)
        assert torch.equal(change.originals, saved.changes[name].originals)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_are_compared(dtype):
    """-0.0 is not 0.0, and a NaN differs from another by its payload alone."""
    width = dtype.itemsize
    nan = torch.tensor([0x7FC1]).item() << (8 * width - 16)
    before = torch.tensor([0, 0, nan, nan, 5]).to(BITS[width])
    after = torch.tensor([0, -1 << (8 * width - 1), nan, nan + 1, 5]).to(BITS[width])
    delta = diff({"w": before.view(dtype)}, {"w": after.view(dtype)})
    assert delta.changes["w"].indices.tolist() == [1, 3]
    assert delta.changes["w"].values.view(BITS[width]).tolist() == after[[1, 3]].tolist()


def test_nothing_differs():
    delta = diff(Net(), Net())
    assert delta.changes == {} and delta.inspect()["entries"] == 0


def test_without_originals():
    base = Net()
    tuned, _ = tuned_from(base)
    bare = diff(base, tuned, originals=False)
    assert all(change.originals is None for change in bare.changes.values())
    assert bare.fingerprint == diff(base, tuned).fingerprint
    bare.apply(base)
    assert same(bits(base), bits(tuned))


def test_state_dicts_and_wrapped_names():
    base = Net()
    tuned, _ = tuned_from(base)
    expected = diff(base, tuned)
    wrapped = {f"module._orig_mod.{name}": value for name, value in tuned.state_dict().items()}
    for theirs in (tuned.state_dict(), wrapped, nn.DataParallel(tuned), torch.compile(tuned)):
        found = diff(base.state_dict(), theirs)
        assert list(found.changes) == list(expected.changes) and found.fingerprint == expected.fingerprint


def test_a_parameter_of_the_tuned_model_alone_is_stored_whole():
    base, tuned = Net(), Net()
    tuned.extra = nn.Linear(4, 2)
    tuned.copy = nn.Linear(4, 2)
    tuned.copy.weight = tuned.extra.weight
    delta = diff(base, tuned)
    assert set(delta.changes) == {"extra.weight", "extra.bias", "copy.bias"}
    assert all(change.indices is None and change.originals is None for change in delta.changes.values())
    stored = delta.changes["extra.weight"].values
    kept = stored.clone()
    with torch.no_grad():
        tuned.extra.weight.zero_()
    assert torch.equal(stored, kept) and stored.any()


def test_weights_tied_in_the_tuned_model_alone():
    base, tuned = Net(), Net()
    base.output.weight = nn.Parameter(torch.zeros(20, 6))
    with torch.no_grad():
        tuned.embed.weight[0, 0] = 3.0
    delta = diff(base, tuned)
    assert delta.changes["embed.weight"].indices.tolist() == [0]
    delta.apply(base)
    assert torch.equal(base.output.weight, tuned.output.weight)


def test_weights_tied_in_the_base_alone():
    base, tuned = Net(), Net()
    tuned.output.weight = nn.Parameter(tuned.embed.weight.detach().clone())
    assert diff(base, tuned).changes == {}
    with torch.no_grad():
        for weight in (tuned.embed.weight, tuned.output.weight):
            weight[1, 1] = 3.0
    assert set(diff(base, tuned).changes) == {"embed.weight"}
    with torch.no_grad():
        tuned.output.weight[1, 2] = 3.0
    with pytest.raises(DeltaError, match=r"output\.weight: expected the same change as in embed\.weight"):
        diff(base, tuned)


def test_other_tensors_of_a_mapping_must_not_differ():
    base = {"positions": torch.arange(4), "mask": torch.tensor([True]), "w": torch.zeros(2)}
    assert set(diff(base, base | {"w": torch.ones(2)}).changes) == {"w"}
    with pytest.raises(DeltaError, match=r"positions: expected a plain dense tensor, got torch\.int64"):
        diff(base, base | {"positions": torch.arange(4) + 1})


class Huge(torch.Tensor):
    pass


ZEROS = torch.zeros(3)


@pytest.mark.parametrize(
    ("base", "tuned", "message"),
    [
        ({"w": ZEROS}, {"w": [0.0, 0.0, 0.0]}, "w: expected a tensor, got list"),
        (
            {"w": ZEROS, "v": ZEROS},
            {"w": ZEROS},
            "v: expected a tensor of this name in tuned as in the base, got none",
        ),
        ({"w": ZEROS}, {"w": torch.zeros(4)}, r"w: expected torch.float32 \(3,\) in tuned .*, got .* \(4,\)"),
        ({"w": ZEROS}, {"w": ZEROS.half()}, r"w: expected torch.float32 .* in tuned .*, got torch.float16"),
        ({"w": ZEROS}, {"w": ZEROS.as_subclass(Huge)}, "w: expected a plain dense tensor, got Huge"),
        ({"w": ZEROS.to_sparse()}, {"w": ZEROS}, r"w: expected a plain dense tensor, got torch.sparse_coo"),
        ({}, {"w": torch.zeros(3, device="meta")}, "w: expected a tensor with values, got one on the meta"),
        ({}, {"w": torch.zeros(1).expand(2**31)}, r"w: expected fewer than 2\^31 entries, got 2147483648"),
        ({}, {"w": ZEROS, "w._orig_mod": ZEROS}, "w: expected one tensor of this name in the mapping"),
    ],
)
def test_models_that_do_not_fit(base, tuned, message):
    with pytest.raises(DeltaError, match=message):
        diff(base, tuned)


def test_no_wide_temporary_beyond_a_chunk(monkeypatch):
    """All entries of a tensor differ: no int64 tensor ever has more entries than a chunk."""
    monkeypatch.setattr(diff_module, "_CHUNK", 1 << 10)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.int64:
                largest = max(largest, out.numel())
            return out

    ours, theirs = torch.zeros(100, 1000), torch.ones(100, 1000)
    with Watch():
        change = diff_module._change("w", ours, theirs)
    assert change.indices.numel() == 100_000 and 0 < largest <= 1 << 10
