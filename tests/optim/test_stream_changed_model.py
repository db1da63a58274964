"""A stream whose model or optimizer has changed since it was made: refused by name, never stale numbers."""

import pytest

from id3_optim import ID3AdamW, WeightReceiver, WeightStream


def test_a_moved_or_cast_model_is_refused_by_name(model, make, train):
    """Its parameters lie elsewhere: the stream would send nothing, the receiver write into dead memory."""
    trained, optimizer = make(model)
    stream, receiver = WeightStream(trained, optimizer), WeightReceiver(model)
    train(trained, optimizer, 0, 2)
    update = stream.next()
    stream.acknowledge(update)
    receiver.apply_patch(update)
    for moved in (trained, model):
        for param in moved.parameters():
            param.data = param.data.clone()  # as `model.to(device)` does
    with pytest.raises(ValueError, match=r"0\.weight: expected the memory .* when the stream was made"):
        stream.next()
    again = WeightStream(trained, optimizer)
    again.load_state_dict(stream.state_dict())
    train(trained, optimizer, 2, 4)
    update = again.next()
    assert update.base_step == 2
    for call in (lambda: receiver.apply_patch(update), receiver.reset):
        with pytest.raises(ValueError, match=r"0\.weight: expected the memory .* when the receiver was made"):
            call()


@pytest.mark.parametrize("dense", [False, True])
def test_a_later_param_group_is_refused_by_name(model, make, train, dense):
    """Its entries would be left out, with checksums that agree."""
    trained, _ = make(model)
    late = trained[0].weight
    named = [(name, p) for name, p in trained.named_parameters() if p is not late]
    optimizer = ID3AdamW(named, lr=1e-2, budget=20, total_steps=8)
    stream = WeightStream(trained, optimizer)
    train(trained, optimizer, 0, 2)
    stream.acknowledge(stream.next())
    optimizer.add_param_group({"params": [("0.weight", late)], "dense": dense})
    train(trained, optimizer, 2, 8)
    assert dense or any(t.param is late and t.indices.numel() for t in optimizer.touched())
    with pytest.raises(ValueError, match=r"0\.weight: expected a parameter that the optimizer had when"):
        stream.next()
