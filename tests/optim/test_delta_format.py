"""docs/delta-format.md: its reader, its fingerprint and its example file, as written on the page."""

import json
import re
from pathlib import Path

import pytest
import torch
from hand_trained import BITS, Net, train_by_hand

from id3_optim.delta import Change, Delta, gaps, load_delta, save_delta
from id3_optim.delta.fingerprint import fingerprint

PAGE = Path(__file__).parents[2] / "docs" / "delta-format.md"


@pytest.fixture(scope="module")
def page():
    return PAGE.read_text()


@pytest.fixture(scope="module")
def read_delta(page):
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    scope = {}
    exec(code, scope)
    return scope["read_delta"]


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_reader_on_the_page(tmp_path, read_delta, dtype, compact):
    model, path = Net(dtype), tmp_path / "delta"
    save_delta(path, model, train_by_hand(model), originals=True, compact=compact)
    parameters, mark, settings = read_delta(path)
    delta = load_delta(path)
    assert int(mark, 16) == delta.fingerprint and settings == delta.settings
    assert parameters.keys() == delta.changes.keys()
    for name, change in delta.changes.items():
        found = parameters[name]
        assert found["shape"] == change.shape
        if change.indices is None:
            pairs = [(found["dense"], change.values)]
        else:
            assert found["indices"].tolist() == change.indices.tolist()
            pairs = [(found["values"], change.values), (found["originals"], change.originals)]
        for stored, expected in pairs:
            assert stored.tobytes() == expected.contiguous().view(BITS[dtype.itemsize]).numpy().tobytes()


@pytest.mark.parametrize("compact", [False, True])
def test_the_reader_on_a_parameter_without_entries(tmp_path, read_delta, compact):
    none = torch.zeros(0)
    Delta({"w": Change((2, 3), none.dtype, none.int(), none, none)}, 0, {}).save(tmp_path / "d", compact)
    found = read_delta(tmp_path / "d")[0]["w"]
    assert found["shape"] == (2, 3) and found["indices"].shape == found["values"].shape == (0,)


def mix(z):
    mask = 2**64 - 1
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
    return z ^ z >> 31


EXAMPLE = {
    "b": (torch.tensor([0, 2], dtype=torch.int32), torch.tensor([1.0, -2.0], dtype=torch.bfloat16)),
    "w": (torch.tensor([1, 4], dtype=torch.int32), torch.tensor([1.0, -0.0])),
}


def test_the_fingerprint_on_the_page(page):
    rows = re.findall(
        r"^\| `(\w)` \| (\d) \| \S+ \| `(\w+)` \| `(\w+)` \| `(\w+)` \| `(\w+)` \|$", page, re.M
    )
    assert len(rows) == 4
    total = 0
    for name, index, *numbers in rows:
        bits, key, place, term = (int(number, 16) for number in numbers)
        indices, originals = EXAMPLE[name]
        at = indices.tolist().index(int(index))
        pattern = originals.view(BITS[originals.element_size()])[at].item()
        assert pattern % 2**64 == bits
        assert mix((key + int(index) * 0x9E3779B97F4A7C15) % 2**64) == place and mix(place ^ bits) == term
        total += term
    stated = int(re.search(r"The fingerprint is `(\w{16})`", page)[1], 16)
    assert total % 2**64 == stated == fingerprint(EXAMPLE)


def test_the_file_on_the_page(page, tmp_path, read_delta):
    new = {"b": torch.tensor([3.0, 4.0], dtype=torch.bfloat16), "w": torch.tensor([0.5, 2.0])}
    shapes = {"b": (3,), "w": (2, 3)}
    changes = {n: Change(shapes[n], v.dtype, EXAMPLE[n][0], v) for n, v in new.items()}
    Delta(changes, fingerprint(EXAMPLE), {"method": "example"}).save(tmp_path / "delta", compact=True)
    raw = (tmp_path / "delta").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    assert f"`{header.pop('__metadata__')['id3_delta']}`" in page
    listed = re.search(r"^w\.values .*$", page, re.M)[0]
    stated = {
        key: bytes.fromhex(text) for key, text in re.findall(r"(\w\.\w+) ((?: ?\b[0-9a-f]{2}\b)+)", listed)
    }
    assert stated.keys() == header.keys()
    for key, tensor in header.items():
        begin, end = tensor["data_offsets"]
        assert raw[start + begin : start + end] == stated[key]


def test_the_gaps_on_the_page():
    coded = gaps.encode(torch.tensor([200, 201, 400], dtype=torch.int32))
    assert bytes(coded.tolist()) == bytes.fromhex("c8 01 00 c6 01")
