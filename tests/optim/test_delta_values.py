"""Deltas of values that are not finite are refused unless allowed by name, and a delta fits other dtypes by
`cast` alone."""

import copy
import math

import pytest
import torch
from hand_trained import HandTrained, Net, bits, same, train_by_hand
from torch import nn

from id3_optim import DeltaSeries, ID3AdamW, diff, load_delta, merge, save_delta
from id3_optim.delta import Change, Delta, DeltaError
from id3_optim.delta.fingerprint import fingerprint
from id3_optim.optimizer import Touched

# --- values that are not finite ------------------------------------------------------------------------


def pair(value, dtype=torch.float32, whole=False):
    """A base, and the same with `value` in entry 5; whole: as a delta that stores it whole."""
    base = nn.Linear(4, 3, bias=False).to(dtype)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.weight.view(-1)[3:6] = torch.tensor([1.0, 2.0, value], dtype=dtype)
    return base, tuned, diff({} if whole else base, tuned)


BAD = pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
WHOLE = pytest.mark.parametrize("whole", [False, True])


@BAD
@DTYPES
@WHOLE
def test_they_are_refused_and_taken_by_name(tmp_path, value, dtype, whole):
    base, tuned, delta = pair(value, dtype, whole)
    before = bits(base)
    message = rf"weight: expected finite values, got {value} at index 5 \(1 such values in all"
    for refused in (delta.save, lambda path: delta.apply(base), lambda path: merge([delta])):
        with pytest.raises(DeltaError, match=message):
            refused(tmp_path / "delta")
    with pytest.raises(DeltaError, match=message), delta.applied(base):
        pass
    assert same(bits(base), before) and not (tmp_path / "delta").exists()
    delta.save(tmp_path / "delta", allow_nonfinite=True)
    loaded = load_delta(tmp_path / "delta")
    assert loaded.nonfinite() == {"weight": 1}
    undo = loaded.apply(base, allow_nonfinite=True)
    assert same(bits(base), bits(tuned))
    undo.revert()
    with loaded.applied(base, allow_nonfinite=True):
        assert same(bits(base), bits(tuned))
    assert same(bits(base), before)
    merged = merge([loaded], allow_nonfinite=True).delta
    merged.apply(base, allow_nonfinite=True)
    assert same(bits(base), bits(tuned))
    if not whole:
        loaded.revert(base)  # the way back needs no permission
        assert same(bits(base), before)


@WHOLE
def test_save_delta_refuses_a_run_that_diverged(tmp_path, whole):
    model = nn.Linear(4, 2)
    touched = Touched(model.weight, torch.arange(3, dtype=torch.int32), torch.zeros(3))
    optimizer = HandTrained([touched], [model.bias])
    save_delta(tmp_path / "delta", model, optimizer)
    good = (tmp_path / "delta").read_bytes()
    with torch.no_grad():
        (model.bias if whole else model.weight.view(-1))[1] = math.nan
    with pytest.raises(DeltaError, match="expected finite values, got nan at index 1"):
        save_delta(tmp_path / "delta", model, optimizer)
    assert (tmp_path / "delta").read_bytes() == good
    save_delta(tmp_path / "delta", model, optimizer, allow_nonfinite=True)
    assert load_delta(tmp_path / "delta").nonfinite() == {"bias" if whole else "weight": 1}


def test_a_series_takes_them_by_name(tmp_path):
    for allowed in (False, True):
        model = nn.Linear(4, 2, bias=False)
        optimizer = ID3AdamW(model.parameters(), lr=math.inf, budget=4, total_steps=1)
        series = DeltaSeries(tmp_path, model, optimizer, [4], allow_nonfinite=allowed)
        model.weight.grad = torch.ones(2, 4)
        if allowed:
            optimizer.step()
            assert load_delta(series.paths[0]).nonfinite() == {"weight": 4}
        else:
            with pytest.raises(DeltaError, match="expected finite values"):
                optimizer.step()
            assert not list(tmp_path.iterdir())


def test_a_finite_delta_has_none():
    assert pair(3.0)[2].nonfinite() == {}


def test_a_sum_that_overflows():
    _, _, delta = pair(40_000.0, torch.float16)
    with pytest.raises(DeltaError, match="sum: weight: expected finite values, got inf at index 5"):
        merge([delta, delta])
    merged = merge([delta, delta], allow_nonfinite=True).delta
    assert merged.nonfinite() == {"weight": 1}


def test_which_delta_of_a_merge_has_them_and_which_are_not_needed():
    _, _, good = pair(1.0)
    _, _, bad = pair(math.nan)
    bad.changes["weight"] = bad.changes["weight"]._replace(originals=good.changes["weight"].originals)
    with pytest.raises(DeltaError, match=r"deltas\[1\]: weight: expected finite values, got nan"):
        merge([good, bad])
    first, second = pair(1.0, whole=True)[2], pair(math.nan, whole=True)[2]
    assert merge([first, second], whole="first").delta.nonfinite() == {}
    assert merge([first, second], whole="drop").delta.changes == {}


# --- other dtypes --------------------------------------------------------------------------------------

PAIRS = [(a, b) for a in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
         for b in (torch.float32, torch.bfloat16, torch.float16, torch.float64) if a != b]  # fmt: skip


def trained(tmp_path, base, **options):
    tuned = copy.deepcopy(base)
    save_delta(tmp_path / "delta", tuned, train_by_hand(tuned), **options)
    return load_delta(tmp_path / "delta"), tuned


@pytest.mark.parametrize(("own", "other"), PAIRS)
def test_another_dtype_is_refused_with_the_remedy(tmp_path, own, other):
    delta, _ = trained(tmp_path, Net(own), originals=True)
    model = Net(own).to(other)
    before = bits(model)
    for refused in (delta.apply, delta.revert):
        for options in ({}, {"strict": False}) if refused == delta.apply else ({},):
            with pytest.raises(DeltaError, match=rf"got {other} .*; apply\(cast=True\) rounds"):
                refused(model, **options)
    assert same(bits(model), before)


@pytest.mark.parametrize("originals", [False, True])
@pytest.mark.parametrize(("own", "other"), PAIRS)
def test_cast_by_name(tmp_path, own, other, originals):
    """The model's entries are the delta's values, rounded once; undone bit for bit."""
    delta, tuned = trained(tmp_path, Net(own), originals=originals)
    base = Net(own).to(other)  # wider: exact; narrower: known from the originals alone
    before = bits(base)
    fits = originals or same(bits(copy.deepcopy(base).to(own)), bits(Net(own)))
    if not fits:
        with pytest.raises(DeltaError, match="expected the base with fingerprint"):
            delta.apply(base, cast=True)
        assert same(bits(base), before)
    undo = delta.apply(base, strict=fits, cast=True)
    assert same(bits(base), bits(tuned.to(other)))
    undo.revert()
    assert same(bits(base), before)
    with delta.applied(base, strict=fits, cast=True):
        assert same(bits(base), bits(tuned))
    assert same(bits(base), before)


def test_a_wide_base_that_was_narrowed_for_the_training(tmp_path):
    """`train --bf16` loads a float32 model so. Entries outside the delta keep their float32 values."""
    base = Net(torch.float32)
    delta, _ = trained(tmp_path, copy.deepcopy(base).bfloat16())
    before = bits(base)
    of_base = delta.cast(base)
    undo = delta.apply(base, cast=True)
    for name, change in of_base.changes.items():
        held = base.get_parameter(name).detach().reshape(-1)
        if change.indices is not None:
            rows = change.indices.long()
            assert torch.equal(held[rows], delta.changes[name].values.float())
            held = held.clone()
            held[rows] = change.originals
            assert torch.equal(held.view(torch.int32), before[name].reshape(-1))
    undo.revert()
    assert same(bits(base), before)


def test_another_base_is_not_taken_for_a_rounded_one(tmp_path):
    delta, _ = trained(tmp_path, Net(torch.float32), originals=True)
    stranger = Net(torch.float32, seed=5).bfloat16()
    with pytest.raises(DeltaError, match="expected the base with fingerprint"):
        delta.apply(stranger, cast=True)
    changed = Net(torch.float32).bfloat16()
    with torch.no_grad():
        changed.across.add_(1)
    with pytest.raises(DeltaError, match="expected the base with fingerprint"):
        delta.cast(changed)
    assert delta.cast(changed, strict=False).changes["across"].dtype == torch.bfloat16


def test_a_cast_delta_is_one_of_its_base(tmp_path):
    """It saves, applies strictly, reverts and merges with deltas of that base."""
    base = Net(torch.float32).bfloat16()
    wide, tuned = trained(tmp_path, Net(torch.float32), originals=True)
    wide.cast(base).save(tmp_path / "narrow", compact=True)
    narrow, model = load_delta(tmp_path / "narrow"), copy.deepcopy(base)
    assert narrow.settings == wide.settings
    narrow.apply(model)
    assert same(bits(model), bits(tuned.bfloat16()))
    narrow.revert(model)
    for name, param in base.named_parameters():
        assert name.startswith("head.") or torch.equal(param, model.get_parameter(name))
    other = copy.deepcopy(base)
    save_delta(tmp_path / "other", other, train_by_hand(other, seed=9), originals=True)
    assert merge([narrow, load_delta(tmp_path / "other")], whole="first").conflicts["across"].overlapping > 0


def test_a_cast_to_the_same_dtypes_changes_nothing(tmp_path):
    delta, _ = trained(tmp_path, Net(), originals=True)
    again = delta.cast(Net())
    assert again.fingerprint == delta.fingerprint and again.changes.keys() == delta.changes.keys()
    for name, change in delta.changes.items():
        for one, two in zip(change, again.changes[name], strict=True):
            assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


def test_float64_to_16_bits_is_rounded_once():
    """torch alone would round through float32, to 1 + 2^-7 here."""
    exact = 1 + 2**-8 + 2**-40  # just above the middle of 1 and 1 + 2^-7
    below = 1 + 3 * 2**-8 - 2**-40  # just below the middle of 1 + 2^-7 and 1 + 2^-6
    values, originals = torch.tensor([exact, below], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    indices = torch.tensor([0, 1], dtype=torch.int32)
    change = Change((1, 2), torch.float64, indices, values, originals)
    delta = Delta({"weight": change}, fingerprint({"weight": (indices, originals)}), {})
    base = nn.Linear(2, 1, bias=False).bfloat16()
    with torch.no_grad():
        base.weight.zero_()
    delta.apply(base, cast=True)
    assert base.weight[0].tolist() == [1 + 2**-7, 1 + 2**-7]
    assert values.bfloat16().tolist() != base.weight[0].tolist()


def test_a_cast_that_overflows_is_refused():
    _, _, delta = pair(1e6)
    base = nn.Linear(4, 3, bias=False).half()
    with pytest.raises(DeltaError, match="expected finite values, got inf at index 5"):
        delta.apply(base, strict=False, cast=True)
    delta.apply(base, strict=False, cast=True, allow_nonfinite=True)
    assert base.weight.view(-1)[5].item() == math.inf


def test_names_that_the_model_lacks(tmp_path):
    delta, _ = trained(tmp_path, Net(), originals=True)
    part = nn.Module()
    part.across = Net().bfloat16().across
    with pytest.raises(DeltaError, match="expected a parameter of this name in the model, got none"):
        delta.apply(part, cast=True)
    delta.apply(part, strict=False, cast=True)
    change = delta.changes["across"]
    assert torch.equal(part.across.reshape(-1)[change.indices.long()], change.values.bfloat16())


def test_another_shape_is_refused_with_a_cast_too(tmp_path):
    delta, _ = trained(tmp_path, Net(), originals=True)
    model = Net().bfloat16()
    model.across = nn.Parameter(torch.zeros(7, 4, dtype=torch.bfloat16))
    with pytest.raises(DeltaError, match=r"across: expected a parameter of .* \(4, 7\), got .* \(7, 4\)$"):
        delta.apply(model, cast=True)


@pytest.mark.parametrize("other", [torch.bfloat16, torch.float64])
def test_a_model_that_is_cast_after_training_has_no_delta(tmp_path, other):
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    optimizer = ID3AdamW(model.named_parameters(), budget=9, total_steps=2)
    for _ in range(2):
        model(torch.randn(3, 8)).square().mean().backward()
        optimizer.step()
    model.to(other)
    message = rf"(weight|bias): expected torch.float32, as it was trained, got {other}: save it before"
    with pytest.raises(ValueError, match=message):
        save_delta(tmp_path / "delta", model, optimizer)
    assert not (tmp_path / "delta").exists()
    save_delta(tmp_path / "delta", model.to(torch.float32), optimizer)
