"""torch.distributed.checkpoint's state-dict functions, which key parameters by name."""

import copy
import io

import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from id3_optim import ID3AdamW


def with_head(model):
    named = list(model.named_parameters())
    groups = [{"params": named[:4]}, {"params": named[4:], "dense": True}]
    return ID3AdamW(groups, lr=1e-2, budget=100, total_steps=20)


def test_asking_for_the_state_takes_no_step(model):
    before = copy.deepcopy(model.state_dict())
    optimizer = with_head(model)
    assert get_optimizer_state_dict(model, optimizer)["state"] == {}
    assert optimizer.steps_done == 0 and optimizer.n_entries is None
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_state_by_names_resumes_bit_for_bit(model, train):
    optimizer = with_head(model)
    train(model, optimizer, 0, 8)
    state = get_optimizer_state_dict(model, optimizer)
    assert set(state["state"]) == {name for name, _ in model.named_parameters()}
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    twin = copy.deepcopy(model)
    resumed = with_head(twin)
    set_optimizer_state_dict(twin, resumed, torch.load(file, weights_only=True))
    assert resumed.steps_done == 8
    train(model, optimizer, 8, 20)
    train(twin, resumed, 8, 20)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert resumed.n_active == optimizer.n_active == 100
    assert get_optimizer_state_dict(twin, resumed).keys() == state.keys()  # loaded, it still takes no step
    assert resumed.steps_done == 20
