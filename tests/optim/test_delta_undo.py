"""Taking deltas off again: bit for bit, in order, and never by mistake."""

import copy

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
    with pytest.raises(DeltaError, match=r"expected \S+ at index \d+, as in this delta, got \S+; revert"):
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


def tuned_delta(path, model, seed=1, **options):
    """The delta of a training that starts where `model` stands; `model` itself stays as it is."""
    tuned = copy.deepcopy(model)
    save_delta(path, tuned, train_by_hand(tuned, seed=seed), **options)
    return load_delta(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_thousand_times_with_tied_and_strided_weights(path, dtype):
    model = Net(dtype)
    assert model.output.weight is model.embed.weight and not model.across.is_contiguous()
    before, delta = bits(model), tuned_delta(path, model)
    for _ in range(500):
        delta.apply(model).revert()
        with delta.applied(model):
            pass
    assert same(bits(model), before)


def test_hot_swap_ends_with_the_base_even_after_an_error(path):
    tuned, model = Net(), Net()
    base = bits(model)
    save_delta(path, tuned, train_by_hand(tuned))
    with pytest.raises(KeyError), load_delta(path).applied(model) as same_model:
        assert same_model is model and same(bits(model), bits(tuned))
        raise KeyError
    assert same(bits(model), base)


def test_nested_blocks(tmp_path, recwarn):
    """Two deltas of one base that share entries: the inner one wins inside, each block ends as it began."""
    model = Net()
    base = bits(model)
    first, second = tuned_delta(tmp_path / "a", model, 1), tuned_delta(tmp_path / "b", model, 2)
    with first.applied(model):
        outer = bits(model)
        with pytest.raises(DeltaError, match="expected the base with fingerprint"), second.applied(model):
            raise AssertionError
        with second.applied(model, strict=False):
            assert not same(bits(model), outer)
        assert same(bits(model), outer)
    assert same(bits(model), base)
    assert not [warning for warning in recwarn if issubclass(warning.category, UserWarning)]


def test_what_a_block_trained_on_the_entries_is_lost_and_said(path):
    model = Net()
    base, delta = bits(model), tuned_delta(path, model)
    with (
        pytest.warns(UserWarning, match="scale: changed while the delta was on") as warned,
        delta.applied(model),
        torch.no_grad(),
    ):
        model.scale.add_(1.0)
    assert same(bits(model), base) and warned[0].filename == __file__
    frozen = next(i for i in range(20 * 6) if i not in delta.changes["embed.weight"].indices.tolist())
    with delta.applied(model), torch.no_grad():
        model.embed.weight.view(-1)[frozen] = 5.0
    assert model.embed.weight.view(-1)[frozen] == 5.0
    with pytest.raises(KeyError), pytest.warns(UserWarning, match="scale: changed"), delta.applied(model):
        model.scale.data.add_(1.0)
        raise KeyError
    model.embed.weight.data.view(-1)[frozen] = Net().embed.weight.view(-1)[frozen]
    assert same(bits(model), base)


def test_stacked_deltas_come_off_in_reverse_order(tmp_path):
    model = Net()
    states, undos = [bits(model)], []
    for seed in (1, 2, 3):
        undos.append(tuned_delta(tmp_path / str(seed), model, seed).apply(model))
        states.append(bits(model))
    for undo, state in zip(reversed(undos), reversed(states[:-1]), strict=True):
        undo.revert()
        assert same(bits(model), state)


def test_the_wrong_order_is_refused_and_nothing_changes(tmp_path):
    model = Net()
    base = bits(model)
    first = tuned_delta(tmp_path / "a", model, 1).apply(model)
    second = tuned_delta(tmp_path / "b", model, 2).apply(model)
    both = bits(model)
    with pytest.raises(DeltaError, match=r"expected \S+ at index \d+, as this delta wrote, got \S+ \(by"):
        first.revert()
    assert same(bits(model), both)
    second.revert()
    first.revert()
    assert same(bits(model), base)


def test_deltas_that_share_nothing_come_off_in_any_order(tmp_path):
    model = Net()
    base = bits(model)
    deltas = [tuned_delta(tmp_path / "a", model) for _ in range(2)]
    names = sorted(deltas[0].changes)
    for name in names[::2]:
        del deltas[0].changes[name]
    for name in names[1::2]:
        del deltas[1].changes[name]
    first, second = (delta.apply(model, strict=False) for delta in deltas)
    first.revert()
    second.revert()
    assert same(bits(model), base)


def test_training_on_top_is_noticed_and_can_be_overridden(path):
    model = Net()
    base = bits(model)
    undo = tuned_delta(path, model).apply(model)
    with torch.no_grad():
        model.conv.bias.add_(1.0)
    trained = bits(model)
    with pytest.raises(
        DeltaError, match=r"conv\.bias: expected \S+ at index \d+, as this delta wrote, got \S+ \(by"
    ):
        undo.revert()
    assert same(bits(model), trained)
    undo.revert(strict=False)
    changed = {name for name, value in bits(model).items() if not torch.equal(value, base[name])}
    assert changed == {"conv.bias"}  # the entries beside the delta's keep what training did
    undo.revert()


def test_a_whole_parameter_that_changed_is_noticed(path):
    model = Net()
    undo = tuned_delta(path, model).apply(model)
    with torch.no_grad():
        model.head.weight[0, 0] = -0.0 if model.head.weight[0, 0] != 0 else 1.0
    with pytest.raises(DeltaError, match=r"head\.weight: expected \S+ at index \d+, as this delta wrote"):
        undo.revert()


def test_a_replaced_parameter_is_found_by_its_name(path):
    model = Net()
    base, undo = bits(model), tuned_delta(path, model).apply(model)
    model.conv.bias = nn.Parameter(model.conv.bias.detach().clone())
    undo.revert()
    assert same(bits(model), base)


@pytest.mark.parametrize("strict", [True, False])
def test_a_model_in_another_dtype_is_refused_even_when_told(path, strict):
    model = Net()
    undo = tuned_delta(path, model).apply(model)
    model.half()
    kept = bits(model)
    with pytest.raises(DeltaError, match=r"expected a parameter of torch.float32 .*, got torch.float16"):
        undo.revert(strict=strict)
    assert same(bits(model), kept)
