"""`merge`: the weighted sum of differences, rounded once, and the report of what collides."""

import copy
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hand_trained import BITS, Net, bits, same, train_by_hand

from id3_optim import diff, load_delta, merge, save_delta
from id3_optim.delta import Change, Delta, DeltaError
from id3_optim.delta.fingerprint import fingerprint
from id3_optim.delta.values import rounded

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def delta_of(name="w", shape=(8,), **columns):
    """A delta of one parameter from lists: indices, values, originals."""
    dtype = columns.pop("dtype", torch.float32)
    indices = torch.tensor(columns["indices"], dtype=torch.int32)
    values, originals = (torch.as_tensor(columns[k]).to(dtype) for k in ("values", "originals"))
    change = Change(shape, dtype, indices, values, originals)
    return Delta({name: change}, fingerprint({name: (indices, originals)}), {"name": "given"})


def of(name, *deltas, **options):
    merged, conflicts = merge(deltas, **options)
    change = merged.changes[name]
    return dict(zip(change.indices.tolist(), change.values.tolist(), strict=True)), conflicts[name]


A = {"indices": [0, 2, 5], "values": [1.5, 4.0, -1.0], "originals": [1.0, 2.0, 0.0]}
B = {"indices": [2, 3, 5], "values": [3.0, 9.0, 2.0], "originals": [2.0, 7.0, 0.0]}


def test_differences_are_added():
    values, conflict = of("w", delta_of(**A), delta_of(**B))
    assert values == {0: 1.5, 2: 5.0, 3: 9.0, 5: 1.0}
    assert conflict == (4, 2, 1) and conflict.overlapping == 2 and conflict.opposed == 1


def test_differences_are_weighted():
    values, conflict = of("w", delta_of(**A), delta_of(**B), weights=[0.5, -1])
    assert values == {0: 1.25, 2: 2.0, 3: 5.0, 5: -2.5}
    assert conflict == (4, 2, 1)


def test_a_delta_merged_with_itself_doubles_its_changes_and_overlaps_everywhere():
    values, conflict = of("w", delta_of(**A), delta_of(**A))
    assert values == {0: 2.0, 2: 6.0, 5: -2.0} and conflict == (3, 3, 0)


def test_an_entry_that_one_delta_holds_unchanged_does_not_overlap():
    """A delta holds entries that training may have changed; a merged one too."""
    still = delta_of(indices=[0, 2], values=[1.0, 3.0], originals=[1.0, 2.0])
    values, conflict = of("w", delta_of(**A), still)
    assert values == {0: 1.5, 2: 5.0, 5: -1.0} and conflict == (3, 1, 0)


def test_three_deltas_and_their_settings():
    merged = merge([delta_of(**A)] * 3, weights=[1, 2, 3])
    assert merged.delta.settings == {
        "method": "merge",
        "weights": [1.0, 2.0, 3.0],
        "whole": "agree",
        "merged": [{"name": "given"}] * 3,
    }
    assert merged.delta.changes["w"].values.tolist() == [4.0, 14.0, -6.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_merged_delta_on_the_base(tmp_path, dtype):
    """Applied strictly, saved and loaded, reverted: a delta like any other."""
    base, deltas = Net(dtype), []
    for seed in (1, 2):
        tuned = copy.deepcopy(base)
        optimizer = train_by_hand(tuned, seed=seed)
        save_delta(tmp_path / "one", tuned, optimizer, originals=True)
        deltas.append(load_delta(tmp_path / "one"))
    merged = merge(deltas).delta
    merged.save(tmp_path / "merged", compact=True)
    model = copy.deepcopy(base)
    load_delta(tmp_path / "merged").apply(model)
    for name, param in model.named_parameters():
        wide = base.get_parameter(name).detach().double()
        if name.startswith("head."):
            assert torch.equal(param, base.get_parameter(name) + 1)
            continue
        expected = wide.clone().reshape(-1)
        for delta in deltas:
            change = delta.changes[name]
            expected[change.indices.long()] += change.values.double() - change.originals.double()
        assert torch.allclose(param.double().reshape(-1), expected, rtol=2 * torch.finfo(dtype).eps)
    merged.revert(model)
    for name, param in model.named_parameters():
        assert name.startswith("head.") or torch.equal(param, base.get_parameter(name))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_entry_of_one_delta_keeps_its_bits(dtype):
    """-0.0, infinities, subnormals and NaN payloads, over originals of every kind."""
    width = dtype.itemsize
    top = torch.tensor([0x7FC1, 0x7F81, -0x8000, -0x0080, 0x0001, 0x3C00, 0x7F80, 0x7C01]) << (8 * width - 16)
    values = top.to(BITS[width]).view(dtype)
    originals = values.flip(0)
    one = delta_of(indices=list(range(8)), values=values, originals=originals, dtype=dtype)
    other = delta_of("v", indices=[0], values=[1.0], originals=[2.0], dtype=dtype)
    found = merge([one, other], allow_nonfinite=True).delta.changes["w"]
    assert torch.equal(found.values.view(BITS[width]), values.view(BITS[width]))
    assert torch.equal(found.originals.view(BITS[width]), originals.view(BITS[width]))


def test_nothing_moved_keeps_the_bits_of_the_original():
    one = delta_of(indices=[0, 1], values=[3.0, -0.0], originals=[-0.0, -0.0])
    merged = merge([one, one], weights=[1, -1]).delta.changes["w"]
    assert torch.equal(merged.values.view(torch.int32), merged.originals.view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_once(dtype):
    """Against exact fractions: sums just beside the middle of two 16-bit numbers, which float32 hides."""
    generator = torch.Generator().manual_seed(0)
    originals = torch.randn(2000, generator=generator).to(dtype)
    next_one = (originals.view(torch.int16) + 1).view(dtype)
    steps = [next_one.double() - originals.double(), torch.randn(2000, generator=generator).double()]
    everywhere = {"indices": list(range(2000)), "originals": originals, "dtype": dtype, "shape": (2000,)}
    deltas = [delta_of(values=originals.double() + step, **everywhere) for step in steps]
    weights = [0.5, 2.0**-40]
    found = merge(deltas, weights).delta.changes["w"].values
    for i in range(2000):
        exact = Fraction(originals[i].item()) + sum(
            Fraction(w) * (Fraction(d.changes["w"].values[i].item()) - Fraction(originals[i].item()))
            for w, d in zip(weights, deltas, strict=True)
        )
        near = [found[i : i + 1].view(torch.int16).add(step).view(dtype).item() for step in (-1, 0, 1)]
        gaps = [abs(exact - Fraction(value)) for value in near]
        assert gaps[1] <= min(gaps[0], gaps[2]), i


def test_rounding_agrees_with_numpy():
    near_middle = [1 + 2**-11 + 2**-40, 1 + 2**-11, 1 - 2**-12 - 2**-50, 65520.0 - 2**-30, 65520.0]
    small = [2.0**-25, -(2.0**-25) * (1 + 2**-40), -0.0]
    exact = torch.tensor([*near_middle, *small, 1e300, math.nan, -math.inf], dtype=torch.float64)
    with np.errstate(over="ignore"):
        expected = exact.numpy().astype(np.float16)
    assert rounded(exact, torch.float16).numpy().tobytes() == expected.tobytes()
    middle = torch.tensor([1 + 2**-8, 1 + 2**-8 + 2**-40, 1 + 3 * 2**-8 - 2**-40], dtype=torch.float64)
    assert rounded(middle, torch.bfloat16).tolist() == [1.0, 1 + 2**-7, 1 + 2**-7]


def test_merging_one_gives_it_again(tmp_path):
    base, tuned = Net(), Net()
    train_by_hand(tuned)
    one = diff(base, tuned)
    again = merge([one]).delta
    assert again.fingerprint == one.fingerprint
    again.apply(base)
    assert same(bits(base), bits(tuned))


def whole(value, shape=(3,)):
    return Delta({"head": Change(shape, torch.float32, None, torch.full(shape, value))}, 0, {})


def test_whole_parameters_are_taken_over():
    other = delta_of(**A)
    for deltas in ([whole(2.0), other], [other, whole(2.0)], [whole(2.0), other, whole(2.0)]):
        merged, conflicts = merge(deltas, weights=[0.5] * len(deltas))
        assert merged.changes["head"].values.tolist() == [2.0] * 3 and set(conflicts) == {"w"}


def test_whole_parameters_that_differ():
    """Also in shape, as heads for other numbers of labels do."""
    deltas = [delta_of(**A), whole(1.0), whole(2.0, shape=(4,))]
    merged, conflicts = merge(deltas, whole="first")
    assert merged.changes["head"].values.tolist() == [1.0] * 3 and merged.settings["whole"] == "first"
    merged, conflicts = merge(deltas, whole="drop")
    assert merged.changes.keys() == conflicts.keys() == {"w"} and merged.settings["whole"] == "drop"
    for option in ("first", "drop"):
        with pytest.raises(
            DeltaError, match=r"deltas\[1\]: head: expected it stored whole as in deltas\[0\], got entries"
        ):
            merge([whole(1.0), HEAD_ENTRIES], whole=option)


def test_arguments_that_do_not_fit():
    with pytest.raises(TypeError, match="deltas: expected a list of deltas, got one Delta"):
        merge(delta_of(**A))
    with pytest.raises(ValueError, match="whole: expected one of agree, first, drop, got 'last'"):
        merge([delta_of(**A)], whole="last")


NO_ORIGINALS = Delta({"w": delta_of(**A).changes["w"]._replace(originals=None)}, None, {})
OTHER_BASE = delta_of(**(B | {"originals": [2.5, 7.0, 0.0]}))
SHORT = delta_of(shape=(6,), **B)
HALF = delta_of(dtype=torch.float16, **B)
HEAD_ENTRIES = delta_of("head", shape=(3,), indices=[1], values=[1.0], originals=[0.0])


@pytest.mark.parametrize(
    ("deltas", "message"),
    [
        ([], "deltas: expected at least one, got none"),
        (
            [delta_of(**A), NO_ORIGINALS],
            r"deltas\[1\]: w: expected originals, got none; save the delta with originals=True",
        ),
        ([NO_ORIGINALS], r"deltas\[0\]: w: expected originals, got none"),
        (
            [delta_of(**A), delta_of(**A), OTHER_BASE],
            r"deltas\[2\]: w: expected the original \S+ at index \d as in deltas\[1\], got 2.5",
        ),
        ([delta_of(**A), SHORT], r"deltas\[1\]: w: expected shape \(8,\) as in deltas\[0\], got \(6,\)"),
        (
            [delta_of(**A), HALF],
            r"deltas\[1\]: w: expected dtype torch.float32 as in deltas\[0\], got torch.float16",
        ),
        (
            [whole(1.0), delta_of(**A), whole(2.0)],
            r"deltas\[2\]: head: expected 1.0 at index 0 as in deltas\[0\], got 2.0",
        ),
        (
            [whole(0.0), whole(-0.0)],
            r"deltas\[1\]: head: expected 0.0 .* got -0.0; .* with whole='first'",
        ),
        (
            [whole(1.0), HEAD_ENTRIES],
            r"deltas\[1\]: head: expected it stored whole as in deltas\[0\], got entries",
        ),
        (
            [HEAD_ENTRIES, whole(1.0)],
            r"deltas\[0\]: head: expected it stored whole as in deltas\[1\], got entries",
        ),
    ],
)
def test_what_can_not_be_merged(deltas, message):
    with pytest.raises(ValueError, match=message) as caught:
        merge(deltas)
    assert isinstance(caught.value, DeltaError) == bool(deltas)


@pytest.mark.parametrize("weights", [[], [1.0], [1, 2, 3], [1.0, float("nan")], [1.0, float("inf")]])
def test_weights_that_do_not_fit(weights):
    with pytest.raises(ValueError, match="weights: expected 2 finite numbers, got"):
        merge([delta_of(**A), delta_of(**B)], weights)
