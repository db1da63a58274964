"""The original weights inside the trained model: exact, in the block alone, and out of autograd's sight."""

import copy

import pytest
import torch
from fake_gpu import NoWaiting, fake_gpu
from torch import nn

from id3_kernels import reference, table
from id3_optim import ID3AdamW, ReferenceModel, dense_copies, original_weights
from id3_optim.state import progress


def assert_same_bits(a, b):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p.view(torch.uint8), q.view(torch.uint8))


def differs(a, b):
    return any(not torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strategy", ["increment", "static", "repeat"])
def test_the_block_has_the_original_weights(model, make, train, strategy, dtype):
    model, optimizer = make(model, dtype=dtype, strategy=strategy)
    first = copy.deepcopy(model)
    for step in range(12):  # with and without a recent run
        train(model, optimizer, step, step + 1)
        trained = copy.deepcopy(model)
        with original_weights(model, optimizer) as inside:
            assert inside is model
            assert_same_bits(model, first)
        assert_same_bits(model, trained)
    assert differs(model, first)


def test_the_next_steps_are_the_same(model, make, train):
    (a, one), (b, two) = make(model, dtype=torch.bfloat16), make(model, dtype=torch.bfloat16)
    for step in range(6):
        train(a, one, step, step + 1)
        with original_weights(a, one):
            pass
        train(b, two, step, step + 1)
    assert_same_bits(a, b)


def test_an_error_leaves_the_trained_weights(model, make, train):
    model, optimizer = make(model)
    train(model, optimizer, 0, 3)
    trained = copy.deepcopy(model)
    with pytest.raises(KeyError), original_weights(model, optimizer):
        raise KeyError
    assert_same_bits(model, trained)


def test_what_was_computed_before_can_be_differentiated_after(model, make, train):
    """As in DPO: the policy's forward pass, the reference's, the backward pass."""
    model, optimizer = make(model)
    train(model, optimizer, 0, 3)
    x = torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
    optimizer.zero_grad()
    model(x).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    optimizer.zero_grad()
    loss = model(x).sum()
    with original_weights(model, optimizer), torch.no_grad():
        model(x)
    loss.backward()
    assert all(map(torch.equal, expected, (p.grad for p in model.parameters())))


def test_a_step_inside_is_refused(model, make, train):
    model, optimizer = make(model)
    train(model, optimizer, 0, 2)
    trained = copy.deepcopy(model)
    refused = pytest.raises(RuntimeError, match="step: does not apply inside original_weights")
    with refused, original_weights(model, optimizer):
        train(model, optimizer, 2, 3)
    assert_same_bits(model, trained)
    train(model, optimizer, 2, 3)


def with_a_head():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    body, head = list(model[0].named_parameters("0")), list(model[2].named_parameters("2"))
    groups = [{"params": body}, {"params": head, "dense": True}]
    return model, ID3AdamW(groups, lr=1e-2, budget=10, total_steps=9)


def test_dense_groups_by_a_copy(train):
    model, optimizer = with_a_head()
    first, kept = copy.deepcopy(model), dense_copies(model, optimizer)
    train(model, optimizer, 0, 3)
    trained = copy.deepcopy(model)
    with original_weights(model, optimizer, kept):
        assert_same_bits(model, first)
    assert_same_bits(model, trained)
    with original_weights(model, optimizer, {}):
        assert_same_bits(model[0], first[0])
        assert_same_bits(model[2], trained[2])
    with pytest.raises(ValueError, match="dense: expected copies of 2 parameters of dense groups, got None"):
        original_weights(model, optimizer).__enter__()
    with pytest.raises(ValueError, match=r"dense: expected parameters of the dense groups, got 0\.weight"):
        original_weights(model, optimizer, {"0.weight": torch.zeros(8, 8)}).__enter__()
    assert_same_bits(model, trained)


def test_unknown_originals_are_refused(model, make):
    model, optimizer = make(model, keep_originals=False)
    with pytest.raises(ValueError, match="optimizer: expected keep_originals=True"):
        original_weights(model, optimizer).__enter__()


def test_the_reference_is_the_first_model_in_evaluation_mode(train):
    model, optimizer = with_a_head()
    first = copy.deepcopy(model).eval()
    ref = ReferenceModel(model, optimizer, dense_copies(model, optimizer))
    train(model, optimizer, 0, 3)
    x = torch.ones(2, 8)
    model.train()
    model[1].eval()
    said = ref(x)
    assert torch.equal(said, first(x)) and not said.requires_grad
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert list(ref.parameters()) == []
    assert all(torch.equal(v, first.state_dict()[n]) for n, v in ref.state_dict().items())
    model.config = "of the model"
    assert ref.config == "of the model"
    with pytest.raises(AttributeError):
        ref.nothing  # noqa: B018


def test_no_synchronisation(monkeypatch):
    """On fake tensors: anything that reads a GPU raises."""

    class NoReport:
        def send(self, number):
            pass

        def newest(self, before, wait):
            return before

    monkeypatch.setattr(progress, "Report", NoReport)
    monkeypatch.setattr(table, "for_gpu", lambda: reference)
    with fake_gpu(monkeypatch):
        model = nn.Linear(30, 20, device="cuda:0", dtype=torch.bfloat16)
        optimizer = ID3AdamW(model.parameters(), budget=0.1, total_steps=10)
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        optimizer.step()
        with NoWaiting(), original_weights(model, optimizer):
            pass
