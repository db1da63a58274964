"""Taking deltas off again: bit for bit, in order, and never by mistake."""

import pytest
import torch
from hand_trained import BITS, Net, bits, same, train_by_hand
from torch import nn

from id3_optim.delta import DeltaError, load_delta, save_delta


@pytest.fixture
def path(tmp_path):
    return tmp_path / "delta.safetensors"


def test_revert_from_the_file_alone(path):
    base, tuned = Net(), Net()
    head = [p.detach().clone() for p in base.head.parameters()]
    save_delta(path, tuned, train_by_hand(tuned), originals=True)
    delta = load_delta(path)
    kept = [p.detach().clone() for p in tuned.head.parameters()]
    delta.revert(tuned)
    for (name, p), q in zip(tuned.named_parameters(), base.parameters(), strict=True):
        assert name.startswith("head.") or torch.equal(p, q)
    assert all(map(torch.equal, tuned.head.parameters(), kept)) and not torch.equal(kept[0], head[0])
    with pytest.raises(DeltaError, match="expected the values of this delta in the model, got others"):
        delta.revert(tuned)
    save_delta(path, tuned, train_by_hand(tuned))
    with pytest.raises(DeltaError, match="originals: expected them in the delta"):
        load_delta(path).revert(tuned)


def odd_conv(dtype):
    """Weights of which ten are NaNs with payloads, -0.0, -Inf and subnormals, in channels_last order."""
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 5, 3, bias=False, dtype=dtype)})
    with torch.no_grad():
        model["conv"].weight.copy_(torch.linspace(-1, 1, 135, dtype=torch.float64).view(5, 3, 3, 3))
    model.to(memory_format=torch.channels_last)
    width = model["conv"].weight.element_size()
    patterns = torch.tensor([0x7FC1, 0x7F81, -0x8000, -0x0080, 0x0001]).repeat(2) << (8 * width - 16)
    logical = model["conv"].weight.data.permute(0, 2, 3, 1).reshape(-1)
    assert logical.data_ptr() == model["conv"].weight.data_ptr()
    logical.view(BITS[width])[40:50] = patterns + torch.arange(10).clamp(max=5)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_thousand_times_on_and_off(path, dtype):
    tuned, model = odd_conv(dtype), odd_conv(dtype)
    before = bits(model)
    save_delta(path, tuned, train_by_hand(tuned, share=0.9))
    loaded, after = load_delta(path), bits(tuned)
    for _ in range(1000):
        undo = loaded.apply(model)
        assert same(bits(model), after)
        undo.revert()
        assert same(bits(model), before)


def test_revert_works_once(path):
    tuned, model = Net(), Net()
    save_delta(path, tuned, train_by_hand(tuned))
    undo = load_delta(path).apply(model)
    undo.revert()
    with torch.no_grad():
        model.conv.weight.fill_(3.0)
    undo.revert()
    assert (model.conv.weight == 3.0).all()


def test_hot_swap_ends_with_the_base_even_after_an_error(path):
    tuned, model = Net(), Net()
    base = bits(model)
    save_delta(path, tuned, train_by_hand(tuned))
    with pytest.raises(KeyError), load_delta(path).applied(model) as same_model:
        assert same_model is model and same(bits(model), bits(tuned))
        raise KeyError
    assert same(bits(model), base)


def test_stacked_deltas_come_off_in_reverse_order(tmp_path):
    model = Net()
    states = [bits(model)]
    undos = []
    for seed in (1, 2, 3):
        tuned = Net()
        tuned.load_state_dict(model.state_dict())
        save_delta(tmp_path / str(seed), tuned, train_by_hand(tuned, seed=seed))
        undos.append(load_delta(tmp_path / str(seed)).apply(model))
        states.append(bits(model))
    for undo, state in zip(reversed(undos), reversed(states[:-1]), strict=True):
        undo.revert()
        assert same(bits(model), state)
