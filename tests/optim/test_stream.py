"""A chain of updates from a run to a copy of its model: right to the bit, or refused by name."""

import copy
import random
from dataclasses import replace

import pytest
import torch
from torch import nn

from id3_optim import (
    DeltaError,
    ID3AdamW,
    ResendNeeded,
    WeightReceiver,
    WeightStream,
)


def same(a, b):
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return all(torch.equal(p.view(torch.uint8), q.view(torch.uint8)) for p, q in pairs)


@pytest.fixture
def chain(model, make):
    """A run, its stream, and a receiver with a copy of the first model."""

    def build(**options):
        trained, optimizer = make(model, **options)
        return trained, optimizer, WeightStream(trained, optimizer), WeightReceiver(copy.deepcopy(trained))

    return build


def receiver_model(receiver, trained):
    """The receiver's weights by the trained model's names, as a state dict."""
    return {name: receiver._weights[name] for name, _ in trained.named_parameters()}


def assert_right(receiver, trained):
    for name, weight in receiver_model(receiver, trained).items():
        param = trained.get_parameter(name)
        assert torch.equal(weight.view(torch.uint8), param.detach().view(torch.uint8)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strategy", ["increment", "static", "repeat"])
def test_a_receiver_follows_a_run(chain, train, strategy, dtype):
    model, optimizer, stream, receiver = chain(strategy=strategy, dtype=dtype)
    for step in range(0, 12, 3):
        train(model, optimizer, step, step + 3)
        update = stream.next()
        assert (update.base_step, update.target_step) == (step, step + 3)
        receiver.apply_patch(update)
        stream.acknowledge(update)
        assert_right(receiver, model)
        assert (
            (receiver.step, receiver.checksum)
            == (stream.step, stream.checksum)
            == (step + 3, update.target_checksum)
        )


def test_entries_whose_bits_did_not_change_are_left_out(chain, train):
    """In bfloat16 a small update rounds away."""
    model, optimizer, stream, receiver = chain(
        dtype=torch.bfloat16, lr=1e-5, strategy="static", weight_decay=0
    )
    before = copy.deepcopy(model)
    train(model, optimizer, 0, 2)
    update = stream.next()
    pairs = zip(before.parameters(), model.parameters(), strict=True)
    changed = sum(int((p.view(torch.int16) != q.view(torch.int16)).sum()) for p, q in pairs)
    assert 0 < changed < optimizer.n_active
    assert (update.entries, update.unchanged) == (changed, optimizer.n_active - changed)
    receiver.apply_patch(update)
    assert_right(receiver, model)


def test_a_full_update_suits_every_receiver(chain, train):
    model, optimizer, stream, behind = chain()
    fresh = WeightReceiver(copy.deepcopy(model))
    for step in range(3):
        train(model, optimizer, step, step + 1)
        update = stream.next()
        if step < 2:
            behind.apply_patch(update)
        stream.acknowledge(update)
    full = stream.next(full=True)
    assert (full.base_step, full.base_checksum) == (0, 0)
    assert full.target_checksum == stream.checksum
    for receiver in (behind, fresh, behind):
        receiver.apply_patch(full)
        assert_right(receiver, model)


def test_a_gap_and_a_wrong_base_are_refused_by_name(chain, train):
    model, optimizer, stream, receiver = chain()
    train(model, optimizer, 0, 2)
    first = stream.next()
    stream.acknowledge(first)
    train(model, optimizer, 2, 4)
    second = stream.next()
    held = copy.deepcopy(receiver_model(receiver, model))
    with pytest.raises(ResendNeeded, match=r"base_step: expected 0, .*got 2; send next\(full=True\)"):
        receiver.apply_patch(second)
    receiver.apply_patch(first)
    with pytest.raises(ResendNeeded, match=r"base_checksum: expected .* another run"):
        receiver.apply_patch(replace(second, base_checksum=second.base_checksum ^ 1))
    receiver.reset()
    assert all(torch.equal(held[name], w) for name, w in receiver_model(receiver, model).items())
    assert (receiver.step, receiver.checksum) == (0, 0)


def test_other_weights_than_the_base_are_found_out(chain, train):
    model, optimizer, stream, receiver = chain()
    train(model, optimizer, 0, 2)
    update = stream.next()
    name, change = next(iter(update.changes.items()))
    receiver._weights[name].view(-1)[change.indices[0]] += 1
    with pytest.raises(ResendNeeded, match=r"target_checksum: expected .* at step 2"):
        receiver.apply_patch(update)
    assert receiver.step == 0


@pytest.mark.parametrize("field", ["values", "indices"])
def test_a_damaged_update_changes_nothing(chain, train, field):
    model, optimizer, stream, receiver = chain()
    train(model, optimizer, 0, 2)
    update = stream.next()
    name, change = next((n, c) for n, c in update.changes.items() if c.values.numel() > 1)
    damaged = getattr(change, field).clone()
    damaged[0] = damaged[0] + 1 if field == "values" else (0 if damaged[0] else 1)
    before = copy.deepcopy(receiver_model(receiver, model))
    with pytest.raises(DeltaError):
        receiver.apply_patch(
            replace(update, changes=update.changes | {name: change._replace(**{field: damaged})})
        )
    assert all(torch.equal(before[name], w) for name, w in receiver_model(receiver, model).items())


def test_a_receiver_that_went_another_way_returns(chain, train, make):
    """Entries that a lost continuation of the run had changed hold the first model's values again."""
    model, optimizer, stream, receiver = chain()
    lost, lost_optimizer = make(model)
    lost_stream = WeightStream(lost, lost_optimizer)
    train(lost, lost_optimizer, 10, 14)
    receiver.apply_patch(lost_stream.next())
    train(model, optimizer, 0, 4)
    with pytest.raises(ResendNeeded):
        stream.acknowledge(first := stream.next())
        train(model, optimizer, 4, 5)
        receiver.apply_patch(stream.next())
    assert first.target_step == receiver.step == 4
    receiver.apply_patch(stream.next(full=True))
    assert_right(receiver, model)


def test_a_resumed_run_continues_the_chain(chain, train, make):
    model, optimizer, stream, receiver = chain()
    train(model, optimizer, 0, 4)
    receiver.apply_patch(update := stream.next())
    stream.acknowledge(update)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), stream.state_dict()))
    resumed, resumed_optimizer = make(model)
    resumed.load_state_dict(saved[0])
    resumed_optimizer.load_state_dict(saved[1])
    again = WeightStream(resumed, resumed_optimizer)
    again.load_state_dict(saved[2])
    train(resumed, resumed_optimizer, 4, 7)
    update = again.next()
    assert update.base_step == 4
    receiver.apply_patch(update)
    assert_right(receiver, resumed)


def test_without_its_state_a_resumed_stream_begins_anew(chain, train, make):
    model, optimizer, stream, receiver = chain()
    train(model, optimizer, 0, 4)
    receiver.apply_patch(update := stream.next())
    stream.acknowledge(update)
    resumed, resumed_optimizer = make(model)
    resumed_optimizer.load_state_dict(optimizer.state_dict())
    train(resumed, resumed_optimizer, 4, 6)
    update = WeightStream(resumed, resumed_optimizer).next()
    assert update.base_step == 0  # applies at every step
    receiver.apply_patch(update)
    assert_right(receiver, resumed)


def test_twenty_kills_never_leave_a_wrong_weight(chain, train, make):
    """The trainer or the receiver stops at a random place and starts from a checkpoint or the first model."""
    draw = random.Random(0)
    model, optimizer, stream, receiver = chain(total_steps=400)
    first, refused = copy.deepcopy(model), 0
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), stream.state_dict()))
    for round_ in range(80):
        at = optimizer.steps_done
        train(model, optimizer, at + 1000 * round_, at + 1000 * round_ + draw.randint(1, 3))
        update = stream.next()
        if draw.random() < 0.8:  # the update arrives
            try:
                receiver.apply_patch(update)
            except ResendNeeded:
                refused += 1
                update = stream.next(full=True)
                receiver.apply_patch(update)
            assert_right(receiver, model)
            if draw.random() < 0.8:  # the acknowledgement, too
                stream.acknowledge(update)
        if draw.random() < 0.3:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), stream.state_dict()))
        if round_ % 4 == 3:  # 20 kills
            if draw.random() < 0.5:
                receiver = WeightReceiver(copy.deepcopy(first))
            else:
                model, optimizer = make(first, total_steps=400)
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
                stream = WeightStream(model, optimizer)
                stream.load_state_dict(saved[2])
    assert refused > 5


def test_an_acknowledgement_of_another_update_is_refused(chain, train):
    model, optimizer, stream, _ = chain()
    train(model, optimizer, 0, 1)
    first = stream.next()
    train(model, optimizer, 1, 2)
    stream.next()
    with pytest.raises(ValueError, match=r"expected the newest of next.*to step 2, got the one to step 1"):
        stream.acknowledge(first)


def test_dense_groups_are_sent_by_their_changed_entries(train):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    body, head = list(model[0].named_parameters("0")), list(model[1].named_parameters("1"))
    optimizer = ID3AdamW([{"params": body}, {"params": head, "dense": True}], budget=10, total_steps=9)
    stream, receiver = WeightStream(model, optimizer), WeightReceiver(copy.deepcopy(model))
    for step in range(0, 6, 2):
        train(model, optimizer, step, step + 2)
        receiver.apply_patch(update := stream.next())
        stream.acknowledge(update)
        assert_right(receiver, model)
    late = WeightStream(model, optimizer)
    with pytest.raises(ValueError, match="expected its making before the first step of a dense group"):
        late.next()
    late.load_state_dict(stream.state_dict())
    train(model, optimizer, 6, 7)
    receiver.apply_patch(late.next())
    assert_right(receiver, model)


def test_split_parameters_are_refused_by_name(model, make, monkeypatch):
    model, optimizer = make(model)
    monkeypatch.setattr("id3_optim.delta.chain.is_split", lambda param: True)
    with pytest.raises(ValueError, match="expected a whole parameter, got a DTensor; use weight_patches"):
        WeightStream(model, optimizer)


def test_what_a_stream_cannot_follow_is_refused(model, make, train):
    model, optimizer = make(model, keep_originals=False)
    with pytest.raises(ValueError, match="optimizer: expected keep_originals=True"):
        WeightStream(model, optimizer)
    trained, optimizer = make(model)
    with pytest.raises(ValueError, match="expected the one that the optimizer trains"):
        WeightStream(model, optimizer)
    stream = WeightStream(trained, optimizer)
    train(trained, optimizer, 0, 1)
    with torch.no_grad():
        touched = next(t for t in optimizer.touched() if t.indices.numel())
        touched.param.view(-1)[touched.indices[0]] = torch.nan
    with pytest.raises(DeltaError, match="expected finite values, got nan"):
        stream.next()
    bad = stream.state_dict()
    bad["known"] = {"nothing": {"indices": None, "values": None}}
    with pytest.raises(ValueError, match="nothing: expected a parameter that the optimizer trains"):
        stream.load_state_dict(bad)
