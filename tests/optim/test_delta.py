"""The sparse delta on models: what it stores and writes, and what is refused before a weight changes."""

import hashlib
import json

import pytest
import torch
from hand_trained import BITS, Net, bits, same, train_by_hand
from torch import nn

from id3_optim import ID3AdamW
from id3_optim.delta import DeltaError, load_delta, save_delta
from id3_optim.delta import fingerprint as delta_fingerprint

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "delta.safetensors"


@pytest.mark.parametrize("originals", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip(path, dtype, originals):
    tuned, model = Net(dtype), Net(dtype)
    base = bits(model)
    optimizer = train_by_hand(tuned)
    save_delta(path, tuned, optimizer, originals=originals)
    loaded = load_delta(path)
    undo = loaded.apply(model)
    assert same(bits(model), bits(tuned))
    assert model.conv.weight.stride() == Net().conv.weight.stride() and not model.across.is_contiguous()
    undo.revert()
    assert same(bits(model), base)
    assert loaded.settings == optimizer.settings()
    assert list(loaded.changes) == sorted(loaded.changes)
    trained = {id(t.param): t for t in optimizer.touched()}
    for name, param in tuned.named_parameters():
        change, touched = loaded.changes[name], trained.get(id(param))
        if touched is None:
            assert change.indices is None and torch.equal(change.values, param)
            continue
        assert torch.equal(change.indices, touched.indices)
        assert change.originals is None or torch.equal(change.originals, touched.originals)
        assert (change.originals is not None) == originals


def test_wrapped_models_have_plain_names(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        save_delta(tmp_path / "plain", tuned := Net(), train_by_hand(tuned))
        nested = Net()
        nested.conv = torch.compile(nested.conv)
        models = [Net(), Net(), Net()]
        models[2].requires_grad_(True)
        wrapped = [torch.compile(models[0]), nn.DataParallel(models[1]),
                   torch.compile(nn.parallel.DistributedDataParallel(models[2])), nested]  # fmt: skip
        for i, model in enumerate(wrapped):
            load_delta(tmp_path / "plain").apply(model).revert()
            plain = model if model is nested else models[i]
            optimizer = train_by_hand(plain)
            save_delta(tmp_path / "wrapped", model, optimizer)
            assert (tmp_path / "wrapped").read_bytes() == (tmp_path / "plain").read_bytes()
    finally:
        torch.distributed.destroy_process_group()


def test_a_module_called_module_keeps_its_name(path):
    model = nn.ModuleDict({"module": nn.Linear(3, 3)})
    save_delta(path, model, train_by_hand(model))
    assert set(load_delta(path).changes) == {"module.weight", "module.bias"}


def test_a_tied_weight_is_found_by_any_of_its_names(path):
    model, target = Net(), Net()
    save_delta(path, model, train_by_hand(model))
    loaded = load_delta(path)
    assert "output.weight" not in loaded.changes
    loaded.changes["output.weight"] = loaded.changes.pop("embed.weight")
    loaded.apply(target, strict=False)
    assert same(bits(target), bits(model))
    loaded.changes["embed.weight"] = loaded.changes["output.weight"]
    with pytest.raises(
        DeltaError, match=r"embed.weight: expected a tensor of its own, got the one of output.weight"
    ):
        loaded.apply(Net(), strict=False)


class Odd(nn.Parameter):
    pass


def break_shape(model):
    model.across = nn.Parameter(torch.zeros(7, 4))


def break_dtype(model):
    model.conv.half()


def break_name(model):
    del model.scale


def break_type(model):
    model.scale = Odd(model.scale.data)


def break_kind(model):
    model.scale = nn.Parameter(model.scale.data.to(torch.int8), requires_grad=False)


def break_device(model):
    model.conv.to("meta")


def break_memory(model):
    model.across = nn.Parameter(torch.zeros(1, 7).expand(4, 7))


def break_base(model):
    with torch.no_grad():
        model.conv.bias.add_(1e-3)


@pytest.mark.parametrize(
    ("damage", "message", "waived"),
    [
        (
            break_shape,
            r"across: expected a parameter of torch.float32 \(4, 7\), got torch.float32 \(7, 4\)",
            False,
        ),
        (break_dtype, r"conv.\w+: expected a parameter of torch.float32 .*, got torch.float16", False),
        (break_name, "scale: expected a parameter of this name in the model, got none", True),
        (break_type, "scale: expected a plain dense tensor, got Odd, which is not supported", False),
        (break_kind, "scale: expected a plain dense tensor, got torch.int8, which is not supported", False),
        (break_device, r"conv.\w+: expected a tensor with values, got one on the meta device", False),
        (break_memory, "across: expected memory for each entry, got an expanded tensor", False),
        (break_base, r"model: expected the base with fingerprint \w{16}, got \w{16}", True),
    ],
)
def test_models_that_do_not_fit(path, damage, message, waived):
    tuned, model = Net(), Net()
    optimizer = train_by_hand(tuned, share=1.0)
    save_delta(path, tuned, optimizer)
    damage(model)
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(DeltaError, match=message):
        load_delta(path).apply(model)
    assert all(p.is_meta or torch.equal(p, kept[n]) for n, p in model.named_parameters())
    if waived:
        load_delta(path).apply(model, strict=False)
        assert all(torch.equal(p, tuned.get_parameter(n)) for n, p in model.named_parameters())
    else:
        with pytest.raises(DeltaError, match=message):
            load_delta(path).apply(model, strict=False)


def test_a_model_without_any_of_the_names(path):
    save_delta(path, tuned := Net(), train_by_hand(tuned))
    with pytest.raises(
        DeltaError, match="model: expected some of the delta's 8 parameters, got none of them"
    ):
        load_delta(path).apply(nn.Linear(2, 2), strict=False)


def test_without_originals_there_is_no_fingerprint(path):
    tuned, model = Net(), Net()
    optimizer = train_by_hand(tuned, keep_originals=False)
    with pytest.raises(ValueError, match="originals: expected an optimizer with keep_originals=True"):
        save_delta(path, tuned, optimizer, originals=True)
    save_delta(path, tuned, optimizer)
    assert load_delta(path).inspect()["fingerprint"] is None
    with pytest.raises(DeltaError, match="fingerprint: expected one in the delta, got none"):
        load_delta(path).apply(model)
    load_delta(path).apply(model, strict=False)
    assert same(bits(model), bits(tuned))


def test_save_refuses_other_optimizers_and_models(path):
    model = Net()
    with pytest.raises(TypeError, match="optimizer: expected an ID3AdamW, got AdamW"):
        save_delta(path, model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(
        ValueError, match="model: expected the one that the optimizer trains, got one with none"
    ):
        save_delta(path, Net(), train_by_hand(model))
    assert not path.exists()


def test_inspect(path):
    model = Net()
    optimizer = train_by_hand(model)
    save_delta(path, model, optimizer)
    report = load_delta(path).inspect()
    assert json.loads(json.dumps(report)) == report
    assert report["entries"] == sum(t.indices.numel() for t in optimizer.touched())
    assert report["dense_entries"] == 21 and report["originals"] is False
    assert report["tensor_bytes"] == 8 * report["entries"] + 4 * 21
    assert report["tensors"]["scale"] == {"kind": "sparse", "shape": [], "dtype": "float32", "entries": 1}
    assert report["tensors"]["head.bias"]["kind"] == "dense"
    assert report["settings"]["step"] == 7


def test_fingerprint_is_the_written_hash():
    mask, increment = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return z ^ (z >> 31)

    rows, expected = {}, 0
    for name, dtype in [("a.weight", torch.float32), ("b", torch.bfloat16), ("ü", torch.float64)]:
        values = torch.linspace(-1, 1, 5).to(dtype)
        rows[name] = (torch.arange(3, 13, 2, dtype=torch.int32), values)
        key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
        for index, pattern in zip(
            range(3, 13, 2), values.view(BITS[values.element_size()]).tolist(), strict=True
        ):
            expected += mix(mix(key + index * increment & mask) ^ (pattern & mask))
    assert (
        delta_fingerprint.fingerprint(rows) == expected % 2**64 == 0x1AA6E45CA0975679
    )  # part of the file format
    assert delta_fingerprint.fingerprint(dict(reversed(rows.items()))) == expected % 2**64


@pytest.mark.parametrize("strategy", ["increment", "static", "repeat"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_optimizer_trained(path, dtype, strategy):
    """A model trained by ID3AdamW and its base with the delta are the same bits, dense group included."""
    tuned, model = Net(dtype), Net(dtype)
    body = [(n, p) for n, p in tuned.named_parameters() if not n.startswith("head.")]
    groups = [{"params": body}, {"params": list(tuned.head.named_parameters(prefix="head")), "dense": True}]
    optimizer = ID3AdamW(groups, lr=0.05, budget=0.2, total_steps=6, strategy=strategy)
    save_delta(path, tuned, optimizer)
    with load_delta(path).applied(model):
        assert same(bits(model), bits(tuned))
    for seed in range(6):
        torch.manual_seed(seed)
        for p in tuned.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    save_delta(path, tuned, optimizer, originals=True)
    assert not same(bits(model), bits(tuned))
    with load_delta(path).applied(model):
        assert same(bits(model), bits(tuned))
    assert same(bits(model), bits(Net(dtype)))
    assert load_delta(path).settings["step"] == 6
