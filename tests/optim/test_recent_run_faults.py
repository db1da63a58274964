"""A recent run of the state leaves no infinity behind, joins nothing twice, and survives failed steps."""

import copy
import pickle

import pytest
import torch
from test_shards import same_gradients, shards

from id3_optim import GradScaler, ID3AdamW, Magnitude, save_delta
from id3_optim.state import shard as module


@pytest.fixture(autouse=True)
def small_runs(monkeypatch):
    monkeypatch.setattr(module, "RECENT_SHARE", 3)


READERS = {
    "touched": lambda model, optimizer, path: list(optimizer.touched()),
    "state_dict": lambda model, optimizer, path: optimizer.state_dict(),
    "save_delta": lambda model, optimizer, path: save_delta(path / "d.safetensors", model, optimizer),
}


@pytest.mark.parametrize("reader", READERS)
def test_an_overflow_is_forgotten_when_the_runs_are_merged(model, tmp_path, reader):
    optimizer = ID3AdamW(model.named_parameters(), budget=300, total_steps=60, release_gradients=True)
    scaler = GradScaler("cpu", init_scale=4.0)
    for t in range(20):
        generator = torch.Generator().manual_seed(t)
        loss = model(torch.randn(8, 40, generator=generator)).square().mean()
        scaler.scale(loss * (torch.inf if t == 10 else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if t == 10:
            assert len(shards(optimizer)[0].offsets) == 2
            READERS[reader](model, optimizer, tmp_path)
    assert optimizer.steps_done == 19 and scaler.get_scale() == 2.0


def unique(optimizer):
    return all((indices.diff() > 0).all() for _, indices, _ in optimizer.touched())


@pytest.mark.parametrize("name", ["stack", "zeros_like", "ones", "arange", "clone"])
def test_no_memory_at_any_allocation_of_a_join(model, make, monkeypatch, name):
    twin, optimizer = make(model, budget=300, total_steps=12)
    for t in range(12):
        same_gradients(t, twin)
        if t in (3, 4, 5):
            owner = torch.Tensor if name == "clone" else torch
            inner, calls = getattr(owner, name), []

            def fails(*args, inner=inner, calls=calls, **kwargs):
                calls.append(1)
                if len(calls) == 1:
                    raise torch.OutOfMemoryError("no memory left")
                return inner(*args, **kwargs)

            with monkeypatch.context() as patched:
                patched.setattr(owner, name, fails)
                try:
                    optimizer.step()
                except torch.OutOfMemoryError:
                    optimizer.step()
        else:
            optimizer.step()
    assert optimizer.n_active == 300 and unique(optimizer)


def test_a_failed_step_after_one_that_selected_nothing(monkeypatch):
    param = torch.nn.Parameter(torch.randn(4000))
    optimizer = ID3AdamW(
        [param], budget=2000, total_steps=4, strategy="static", heuristic=Magnitude(), max_grad_norm=1.0
    )
    optimizer.step()
    param.grad = torch.ones(4000)
    shard = shards(optimizer)[0]
    before = shard.kernels
    with monkeypatch.context() as patched:
        table = copy.copy(before)
        table.squared_norm = lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory left"))
        patched.setattr(shard, "kernels", table)
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.step()
    assert optimizer.n_active == 0
    optimizer.step()
    assert optimizer.n_active == 2000


PICKLED = [lambda x, p=protocol: pickle.loads(pickle.dumps(x, p)) for protocol in range(5)]


@pytest.mark.parametrize("copied", [copy.deepcopy, *PICKLED])
def test_a_copy_between_backward_and_step(model, copied):
    options = {"budget": 300, "total_steps": 12, "release_gradients": True}
    optimizer = ID3AdamW(model.parameters(), **options)
    scaler = GradScaler("cpu", init_scale=2.0)
    for _ in range(3):
        scaler.scale(model(torch.ones(2, 40)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    scaler.scale(model(torch.ones(2, 40)).sum()).backward()
    model, optimizer = copied((model, optimizer))
    scaler.scale(torch.ones(()))  # a new pass of the scaler, which knows nothing of the copy yet
    scaler.step(optimizer)
    scaler.update()
    model(torch.ones(2, 40)).sum().backward()
    optimizer.step()
    assert optimizer.steps_done == 5


def test_a_group_of_another_dtype_between_backward_and_step(model):
    optimizer = ID3AdamW(model.parameters(), budget=300, total_steps=12, release_gradients=True)
    scaler = GradScaler("cpu", init_scale=2.0)
    scaler.scale(model(torch.ones(2, 40)).sum()).backward()
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(5, dtype=torch.bfloat16))]})
    scaler.step(optimizer)
    assert optimizer.steps_done == 1


def test_a_shallow_copy_has_no_second_hook(model):
    optimizer = ID3AdamW(model.parameters(), budget=300, total_steps=12, release_gradients=True)
    twin = copy.copy(optimizer)
    optimizer.__setstate__(optimizer.__getstate__())
    model(torch.ones(2, 40)).sum().backward()
    twin.step()
    assert optimizer.steps_done == 1


def test_the_norm_may_be_set_between_steps(model):
    optimizer = ID3AdamW(model.parameters(), budget=300, total_steps=12)
    optimizer.max_grad_norm = 0.5
    assert optimizer.settings()["max_grad_norm"] == 0.5
    with pytest.raises(ValueError, match="max_grad_norm: expected"):
        optimizer.max_grad_norm = -1.0


def test_names_of_a_loaded_state(model):
    named = ID3AdamW(model.named_parameters(), budget=300, total_steps=12)
    plain = ID3AdamW(model.parameters(), budget=300, total_steps=12)
    plain.load_state_dict(named.state_dict())
    model[0].weight.grad = torch.ones(60, 40).to_sparse()
    with pytest.raises(ValueError, match=r"0\.weight"):
        plain.step()
