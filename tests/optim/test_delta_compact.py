"""The compact form: gaps in LEB128, as checked as plain indices; and how large files are."""

import random

import pytest
import safetensors.torch
import torch
from hand_trained import Net, bits, same, train_by_hand
from safetensors import safe_open

from benchmarks.shapes import deberta
from id3_optim.delta import Change, Delta, DeltaError, load_delta, save_delta
from id3_optim.delta import gaps as delta_gaps
from id3_optim.delta.file import KEY


@pytest.fixture
def path(tmp_path):
    return tmp_path / "delta.safetensors"


def leb128(gap):
    """One gap, by the definition."""
    coded = []
    while gap >= 128:
        coded.append(gap % 128 + 128)
        gap //= 128
    return [*coded, gap]


EDGES = [0, 1, 126, 127, 128, 16383, 16384, 2**21 - 1, 2**21, 2**28 - 1, 2**28, 2**31 - 1]


@pytest.mark.parametrize("gap", EDGES)
def test_one_gap_is_as_defined(gap):
    coded = delta_gaps.encode(torch.tensor([gap], dtype=torch.int32))
    assert coded.tolist() == leb128(gap) and coded.dtype == torch.uint8
    assert delta_gaps.decode(coded, 1).tolist() == [gap]


@pytest.mark.parametrize("block_bytes", [5, 64, 1 << 20])
def test_gaps_round_trip(monkeypatch, block_bytes):
    """Of every width, in blocks that cut gaps in two."""
    monkeypatch.setattr(delta_gaps, "_BLOCK_BYTES", block_bytes)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        widths = torch.randint(1, 24, (200,), generator=generator)
        gaps = (torch.rand(200, generator=generator) * 2**widths).long()
        indices = (gaps + 1).cumsum(0) - 1
        coded = delta_gaps.encode(indices.int())
        assert coded.tolist() == [byte for gap in gaps.tolist() for byte in leb128(gap)]
        decoded = delta_gaps.decode(coded, 200)
        assert decoded.dtype == torch.int32 and torch.equal(decoded, indices.int())


def test_no_gaps():
    coded = delta_gaps.encode(torch.empty(0, dtype=torch.int32))
    assert coded.numel() == 0 and delta_gaps.decode(coded, 0).numel() == 0


def test_random_bytes_are_refused_or_are_what_encode_writes(monkeypatch):
    """One form for each set of indices: whatever decodes encodes to the same bytes."""
    monkeypatch.setattr(delta_gaps, "_BLOCK_BYTES", 7)
    accepted = 0
    for seed in range(3000):
        rng = random.Random(seed)
        stored = bytes(
            rng.choice((0, 1, 127, 128, 129, 255, rng.randrange(256))) for _ in range(rng.randrange(12))
        )
        count = sum(byte < 128 for byte in stored) + (rng.random() < 0.1)
        try:
            indices = delta_gaps.decode(torch.tensor(list(stored), dtype=torch.uint8), count)
        except ValueError:
            continue
        accepted += 1
        assert bytes(delta_gaps.encode(indices).tolist()) == stored
    assert 500 < accepted < 2500


@pytest.mark.parametrize("originals", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_forms_read_the_same(path, dtype, originals):
    tuned, model = Net(dtype), Net(dtype)
    optimizer = train_by_hand(tuned)
    save_delta(path, tuned, optimizer, originals=originals)
    plain = load_delta(path)
    save_delta(path, tuned, optimizer, originals=originals, compact=True)
    assert {key.rpartition(".")[2] for key in safetensors.torch.load_file(path)} == {
        *("gaps", "values", "dense"),
        *(["originals"] if originals else []),
    }
    compact = load_delta(path)
    assert (compact.settings, compact.fingerprint) == (plain.settings, plain.fingerprint)
    for name, change in plain.changes.items():
        for one, other in zip(change, compact.changes[name], strict=True):
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    compact.apply(model)
    assert same(bits(model), bits(tuned))
    content = path.read_bytes()
    compact.save(path, compact=True)
    assert path.read_bytes() == content
    compact.save(path)
    assert load_delta(path).changes.keys() == plain.changes.keys()


def bytes_of(*values):
    return torch.tensor(values, dtype=torch.uint8)


FIVE = [0xFF, 0xFF, 0xFF, 0xFF]
BAD_GAPS = {  # for a parameter of 135 entries, 4 of them changed
    "unterminated": (bytes_of(1, 1, 1, 129), "expected gaps that end, got a gap without a last byte"),
    "nothing but continued": (
        bytes_of(*[0x80] * 20),
        "expected gaps that end, got a gap without a last byte",
    ),
    "over-long": (bytes_of(1, 1, 1, *FIVE, 0x80, 0), "expected gaps of at most 5 bytes, got 6"),
    "zero in two bytes": (
        bytes_of(1, 1, 1, 0x80, 0),
        "expected gaps in as few bytes as they need, got a zero as last byte",
    ),
    "five in two bytes": (
        bytes_of(0x85, 0, 1, 1, 1),
        "expected gaps in as few bytes as they need, got a zero as last byte",
    ),
    "too many": (bytes_of(1, 1, 1, 1, 1), "expected 4 gaps, got at least 5"),
    "too few": (bytes_of(1, 1, 0x81, 1), "expected 4 gaps, got 3"),
    "beyond 32 bits": (bytes_of(*FIVE, 0x7F, 1, 1, 1), r"expected indices below 2\^31, got 34359738"),
    "beyond by the sum": (bytes_of(*[*FIVE, 0x07] * 4), r"expected indices below 2\^31, got 858993"),
    "just beyond": (bytes_of(1, 1, 1, 0x82, 1), "expected 0 to 134, got 1 to 136"),
    "too short": (bytes_of(1, 1, 1), "expected torch.uint8 of 4 to 20 bytes, got .*3"),
    "too long": (bytes_of(*[1] * 21), "expected torch.uint8 of 4 to 20 bytes, got .*21"),
    "empty": (bytes_of(), "expected torch.uint8 of 4 to 20 bytes, got .*0"),
    "two rows": (bytes_of(1, 1, 1, 1).view(2, 2), "expected torch.uint8 of 4 to 20 bytes"),
    "wide": (torch.ones(4, dtype=torch.int32), "expected torch.uint8 of 4 to 20 bytes"),
}


@pytest.mark.parametrize("case", BAD_GAPS)
def test_gaps_that_make_no_sense(path, case):
    gaps, message = BAD_GAPS[case]
    change = Change((5, 27), torch.float32, torch.tensor([0, 5, 9, 134], dtype=torch.int32), torch.ones(4))
    Delta({"conv.weight": change}, None, {}).save(path, compact=True)
    assert load_delta(path).changes["conv.weight"].indices.tolist() == [0, 5, 9, 134]
    with safe_open(path, "pt") as file:
        head = file.metadata()[KEY]
    safetensors.torch.save_file(
        {"conv.weight.gaps": gaps, "conv.weight.values": torch.ones(4)}, path, {KEY: head}
    )
    with pytest.raises(DeltaError, match=rf"conv\.weight\.gaps: {message}"):
        load_delta(path)


def test_gaps_and_indices_of_one_parameter_are_refused(path):
    parts = {"w.gaps": bytes_of(0), "w.indices": torch.zeros(1, dtype=torch.int32), "w.values": torch.ones(1)}
    head = '{"version":1,"shapes":[[3]],"fingerprint":null,"settings":{}}'
    safetensors.torch.save_file(parts, path, {KEY: head})
    with pytest.raises(DeltaError, match=r"w: expected indices or gaps, .* got \w+ and \w+ and \w+"):
        load_delta(path)


# A run's settings as ID3AdamW gives them.
SETTINGS = {
    "method": "id3", "step": 3000, "total_steps": 3000, "budget": 320000, "budget_given": 320000,
    "n_entries": 183_831_552, "strategy": "increment", "heuristic": {"name": "d3", "eps": 1.0, "exp": 2.0},
    "schedule": "uniform", "bias_correction": "tensor", "max_grad_norm": 1.0, "keep_originals": True,
}  # fmt: skip


def deberta_delta(density, clustered, dtype):
    """Changes in all of DeBERTa-v3-base's 198 tensors: evenly, or most of them in few tensors and rows."""
    generator, changes = torch.Generator().manual_seed(0), {}
    for name, shape in deberta():
        n = torch.Size(shape).numel()
        skew = float(torch.randn((), generator=generator).mul_(2).sub_(2).exp_()) if clustered else 1.0
        count = min(max(1, round(density * skew * n)), n // 4)
        if clustered and len(shape) == 2:
            rows = torch.randint(shape[0], (max(1, count // 40),), generator=generator)
            places = rows.repeat_interleave(40) * shape[1] + torch.randint(
                shape[1], (len(rows) * 40,), generator=generator
            )
        else:
            places = torch.randint(n, (count,), generator=generator)
        indices = places.unique().int()
        values = torch.zeros(len(indices), dtype=dtype)
        changes[f"deberta.{name}"] = Change(shape, dtype, indices, values)
    return Delta(changes, 2**64 - 1, SETTINGS)


@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize("density", [0.0005, 0.0017, 0.01])
def test_bytes_per_entry(path, density, clustered):
    """4 B of index or about 2 B of gap, the value, and at most 300 B for each tensor, long names too."""
    delta = deberta_delta(density, clustered, torch.bfloat16)
    assert "deberta.encoder.layer.11.attention.self.query_proj.weight" in delta.changes
    entries, tensors = delta.inspect()["entries"], len(delta.changes)
    delta.save(path)
    assert path.stat().st_size <= 6 * entries + 300 * tensors
    delta.save(path, compact=True)
    assert path.stat().st_size <= 4.2 * entries + 300 * tensors


def test_bytes_of_the_header(path):
    """At most 300 B for a tensor with a long name, not on average alone."""
    sizes, indices = [], torch.arange(999, dtype=torch.int32)
    for count in (500, 600):
        names = [f"deberta.encoder.layer.{i}.attention.self.query_proj.weight" for i in range(count)]
        values = torch.zeros(count, 999, dtype=torch.bfloat16)
        changes = {
            n: Change((768, 768), v.dtype, indices.clone(), v) for n, v in zip(names, values, strict=True)
        }
        Delta(changes, 2**64 - 1, SETTINGS).save(path)
        sizes.append(path.stat().st_size)
    assert sizes[1] - sizes[0] <= 100 * (300 + 6 * 999)
