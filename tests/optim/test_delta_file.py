"""Delta files: what is stored, what is refused, mutated files, killed processes, full disks."""

import json
import random
import re
import struct

import pytest
import safetensors.torch
import torch
from hand_trained import Net, train_by_hand
from safetensors import safe_open
from torch import nn

from id3_optim.delta import DeltaError, load_delta, save_delta
from id3_optim.delta.file import KEY


@pytest.fixture
def path(tmp_path):
    return tmp_path / "delta.safetensors"


def save(path, originals=False, dtype=torch.float32, compact=False):
    model = Net(dtype)
    save_delta(path, model, train_by_hand(model), originals=originals, compact=compact)
    return path


def rewrite(path, change):
    """Lets `change(tensors, head)` edit the file's contents, which stays a valid safetensors file."""
    with safe_open(path, "pt") as file:
        head = json.loads(file.metadata()[KEY])
    tensors = safetensors.torch.load_file(path)
    change(tensors, head)
    safetensors.torch.save_file(tensors, path, {KEY: json.dumps(head)})


def rewrite_bytes(path, change):
    """Lets `change(header, body)` edit the raw bytes; the header's length is written anew."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header, body = change(content[8:end], content[end:])
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)


def test_what_is_stored(path):
    with safe_open(save(path, dtype=torch.bfloat16), "pt") as file:
        stored = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118 - not a mapping
    sparse = ["across", "conv.bias", "conv.weight", "embed.weight", "output.bias", "scale"]
    expected = {f"{name}.indices": "I32" for name in sparse} | {f"{name}.values": "BF16" for name in sparse}
    assert stored == expected | {"head.bias.dense": "BF16", "head.weight.dense": "BF16"}


def test_the_same_delta_gives_the_same_bytes(tmp_path):
    one, two = (save(tmp_path / name, originals=True).read_bytes() for name in "ab")
    assert one == two


def part(key, change):
    """Puts change(what is stored at key, or None) there."""
    return lambda tensors, head: tensors.__setitem__(key, change(tensors.get(key)))


def without(key):
    return lambda tensors, head: tensors.pop(key)


def head(*keys_and_value):
    *keys, last, value = keys_and_value

    def change(tensors, head):
        for key in keys:
            head = head[key]
        head[last] = value

    return change


INDICES, VALUES = "conv.weight.indices", "conv.weight.values"  # 40 of 135 entries changed
SHAPES = [
    "across",
    "conv.bias",
    "conv.weight",
    "embed.weight",
    "head.bias",
    "head.weight",
    "output.bias",
    "scale",
]
CONV = SHAPES.index("conv.weight")
BAD_CONTENTS = {
    "index too large": (part(INDICES, lambda i: i + 134), f"{INDICES}: expected 0 to 134, got 1.. to 2"),
    "index negative": (part(INDICES, lambda i: i - 135), f"{INDICES}: expected 0 to 134, got -"),
    "unsorted": (
        part(INDICES, lambda i: i.flip(0)),
        rf"{INDICES}: expected ascending, unique indices, got \[\[\d+, \d+\]\]",
    ),
    "repeated": (
        part(INDICES, lambda i: i * 0),
        rf"{INDICES}: expected ascending, unique indices, got \[\[0, 0\]\]",
    ),
    "int64 indices": (part(INDICES, lambda i: i.long()), f"{INDICES}: dtype: .*I32 or U8, got I64"),
    "float indices": (part(INDICES, lambda i: i.float()), f"{INDICES}: expected torch.int32 of shape"),
    "short values": (
        part(VALUES, lambda v: v[1:].clone()),
        "conv.weight.(indices|originals): expected .*39.*, got .*40",
    ),
    "other values": (
        part(VALUES, lambda v: v.short()),
        f"{VALUES}: dtype: expected F32 .*, got I16",
    ),
    "2-d values": (part(VALUES, lambda v: v.view(8, 5)), f"{VALUES}: expected torch.float32 of shape"),
    "no values": (
        lambda tensors, head: tensors.pop(VALUES),
        "conv.weight: expected indices or gaps, values .*, or dense, got originals and indices",
    ),
    "no indices": (
        lambda tensors, head: tensors.pop(INDICES),
        "conv.weight: expected indices or gaps, values .*, or dense, got originals and values",
    ),
    "dense too": (
        part("conv.weight.dense", lambda _: torch.zeros(5, 3, 3, 3)),
        "conv.weight: expected indices or",
    ),
    "dense shape": (part("head.bias.dense", lambda _: torch.zeros(4)), r"head.bias.dense: expected .*\(3,\)"),
    "short originals": (part("scale.originals", lambda _: torch.zeros(2)), "scale.originals: expected"),
    "other originals": (part("scale.originals", lambda o: o + 1), "originals: expected the fingerprint"),
    "a stranger": (part("other.values", lambda _: torch.zeros(2)), "other: expected indices or gaps, values"),
    "version": (head("version", 2), "version: expected 1, got 2"),
    "version true": (head("version", True), "version: expected 1, got True"),
    "fingerprint": (head("fingerprint", "12g4"), "fingerprint: expected 16 hex digits or null, got 12g4"),
    "settings": (head("settings", []), "settings: expected an object"),
    "no shapes": (head("shapes", 3), "shapes: expected a list, got 3"),
    "too few shapes": (head("shapes", [[1]]), "shapes: expected one for each of the 8 parameters, got 1"),
    "shape huge": (head("shapes", CONV, [2**20, 2**20]), r"shapes: expected fewer than 2\^31 entries"),
    "shape negative": (head("shapes", CONV, [-5, -27]), "shapes: expected"),
    "shape a word": (head("shapes", CONV, "135"), "shapes: expected"),
    "shape smaller": (head("shapes", CONV, [2, 2]), f"{INDICES}: expected 0 to 3, got"),
    "half originals": (
        part("scale.originals", lambda o: o.half()),
        "scale.originals: expected torch.float32",
    ),
    "originals and dense": (part("head.bias.originals", lambda _: torch.zeros(3)), "head.bias: expected"),
    "bytes for values": (part(VALUES, lambda v: v.byte()), f"{VALUES}: expected floating-point numbers"),
    "a name without a part": (part("lost", lambda _: torch.zeros(2)), "delta file: expected indices or"),
}


@pytest.mark.parametrize("case", BAD_CONTENTS)
def test_contents_that_make_no_sense(path, case):
    change, message = BAD_CONTENTS[case]
    rewrite(save(path, originals=True), change)
    with pytest.raises(DeltaError, match=message):
        load_delta(path)


def in_header(old, new):
    def change(header, body):
        assert old in header
        return header.replace(old, new, 1), body

    return change


SHAPE = b'"shape":['
BAD_BYTES = {
    "cut": (lambda header, body: (header, body[:-1]), r"bytes of tensors \(a truncated file\?\)"),
    "something behind": (lambda header, body: (header, body + b"x"), "bytes of tensors"),
    "not JSON": (lambda header, body: (header[:-5], body), "the header: expected JSON"),
    "deep": (lambda header, body: (b"[" * 200_000, body), "the header: expected JSON"),
    "a list": (lambda header, body: (b"[]", body), "expected the metadata entry 'id3_delta', got none"),
    "no metadata": (lambda header, body: (b"{}", b""), "expected the metadata entry"),
    "another format": (in_header(b"id3_delta", b"lora_file"), "expected the metadata entry"),
    "constant": (in_header(SHAPE, SHAPE + b"NaN,"), "the header: expected finite numbers, got NaN"),
    "long number": (in_header(SHAPE, SHAPE + b"9" * 9999), "the header: expected JSON"),
    "named twice": (
        in_header(b"across.values", b"across.indices"),
        "expected every name once, got 'across.indices' 2 times",
    ),
    "not UTF-8": (in_header(b'"method', b'"meth\xff'), "delta file: expected a safetensors file, got"),
    "overlapping": (
        lambda header, body: (re.sub(rb'offsets":\[\d+,', b'offsets":[0,', header), body),
        "delta file: expected a safetensors file, got",
    ),
}


@pytest.mark.parametrize("case", BAD_BYTES)
def test_bytes_that_make_no_sense(path, case):
    change, message = BAD_BYTES[case]
    rewrite_bytes(save(path), change)
    with pytest.raises(DeltaError, match=message):
        load_delta(path)


@pytest.mark.parametrize(
    "content", [b"", b"1234567", b"\xff" * 8, struct.pack("<Q", 2**40) + b"{}", b"\0" * 100]
)
def test_files_without_a_header(path, content):
    path.write_bytes(content)
    with pytest.raises(DeltaError, match=r"(delta file|the header): expected"):
        load_delta(path)


def mutate(content, rng):
    """One damaged copy: flipped bytes, a cut, bytes put in, or an edited number, word or index."""
    content, end = bytearray(content), 8 + int.from_bytes(content[:8], "little")
    kind = rng.randrange(6)
    if kind == 0:
        for _ in range(rng.randint(1, 8)):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del content[rng.randrange(len(content)) :]
    elif kind == 2:
        at = rng.randrange(len(content))
        content[at : at + rng.randint(0, 4)] = rng.randbytes(rng.randint(0, 16))
    elif kind == 3:
        at = end + 4 * rng.randrange((len(content) - end) // 4)
        content[at : at + 4] = struct.pack("<i", rng.choice([-1, 2**31 - 1, -(2**31), 0, 5, 134, 135]))
    else:
        header = content[8:end].decode()
        pattern = r"\d+" if kind == 4 else r"F32|I32|float32|conv\.\w+|indices|values|dense|null|shape"
        spot = rng.choice(list(re.finditer(pattern, header)))
        words = [
            "F32",
            "I32",
            "float16",
            "conv.bias",
            "conv.weight",
            "values",
            "dense",
            "0",
            "\\u0000",
            '"',
            "{",
        ]
        numbers = ["0", "1", "-1", "4294967296", "1e30", "99999999999999999999", "12", "2147483647"]
        word = rng.choice(numbers if kind == 4 else words)
        header = (header[: spot.start()] + word + header[spot.end() :]).encode()
        content[:end] = struct.pack("<Q", len(header)) + header
    return bytes(content)


class Guarded(nn.Module):
    """The parameters of a Net as windows of one buffer, so that a write outside any of them is seen."""

    def __init__(self):
        super().__init__()
        named = dict(Net().named_parameters())
        self.memory = torch.full((2048,), -7.0)
        self.windows, at = {}, 64
        for name, param in named.items():
            window = self.memory[at : at + param.numel()]
            window.copy_(param.detach().reshape(-1))
            self.windows[name] = (at, nn.Parameter(window.view(param.shape)))
            at += param.numel() + 64

    def named_parameters(self, *args, **kwargs):
        return ((name, param) for name, (_, param) in self.windows.items())


@pytest.mark.parametrize("compact", [False, True])
def test_a_thousand_mutated_files(path, compact):
    content, model = save(path, compact=compact).read_bytes(), Guarded()
    base, read, refused = model.memory.clone(), 0, 0
    for seed in range(1000):
        rng = random.Random(seed)
        path.write_bytes(mutate(content, rng))
        allowed = torch.zeros(2048, dtype=torch.bool)
        try:
            loaded = load_delta(path)
            undo = loaded.apply(model, strict=rng.random() < 0.2, allow_nonfinite=True)
        except DeltaError as error:
            assert len(str(error)) < 500
            refused += 1
            assert torch.equal(model.memory, base)
            continue
        read += 1
        for name, change in loaded.changes.items():
            if name in model.windows:
                at, param = model.windows[name]
                rows = torch.arange(param.numel()) if change.indices is None else change.indices.long()
                assert rows.min() >= 0 and rows.max() < param.numel() and param.shape == change.shape
                allowed[at + rows] = True
        assert torch.equal(model.memory[~allowed], base[~allowed])
        undo.revert()
        assert torch.equal(model.memory, base)
    assert refused > 500 and read > 100  # both ways were really taken
