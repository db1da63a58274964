"""step() asks a GPU for nothing: on tensors that have no values, anything that is asked raises.

Fake tensors know shape, dtype and device alone. They also refuse to mix devices, so a model over two GPUs is
tried here as well.
"""

import pytest
import torch
from fake_gpu import NoWaiting, fake_gpu

from id3_kernels import reference, table
from id3_optim import D3, Fisher, ID3AdamW, Magnitude, Random, heuristics
from id3_optim.state import progress

SHAPES = ((300,), (40, 30), (7, 5, 3), (1,))


class NoReport:
    """Of a number that is always on its way: there are no events here."""

    def send(self, number):
        assert number.shape == (1,) and number.device.type == "cuda"

    def newest(self, before, wait):
        assert not wait
        return before


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(progress, "Report", NoReport)
    monkeypatch.setattr(table, "for_gpu", lambda: reference)
    monkeypatch.setattr(heuristics, "_random_key", lambda *_: 7)  # of the host, and without a value here
    with fake_gpu(monkeypatch):
        yield


def parameter(shape, device="cuda:0", dtype=torch.bfloat16):
    p = torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
    p.grad = torch.empty(shape, device=device, dtype=dtype)
    return p


def model(**kind):
    return [parameter(shape, **kind) for shape in SHAPES]


def several_steps(params, **options):
    optimizer = ID3AdamW(params, budget=0.1, total_steps=10, **options)
    optimizer.step()  # which makes the state, and may wait
    with NoWaiting():
        for _ in range(3):
            optimizer.step()
    return optimizer


VARIANTS = {
    "plain": {},
    "clipped": {"max_grad_norm": 1.0},
    "by entry": {"bias_correction": "entry"},
    "warm-up": {"entry_warmup": 4},
    "cap": {"tensor_cap": 0.5},
    "static": {"strategy": "static"},
    "exponent": {"heuristic": D3(eps=1e-3, exp=0.7)},
    "magnitude": {"heuristic": Magnitude()},
    "function": {"heuristic": lambda param, grad: grad.float().abs()},
    "random": {"heuristic": Random(3)},
    "released, random": {"heuristic": Random(3), "release_gradients": True},
    "no originals": {"keep_originals": False},
    "capturable": {"capturable": True},
    "released": {"release_gradients": True},
    "released, max, clipped": {"release_gradients": True, "select_from": "max", "max_grad_norm": 1.0},
    "released, magnitude": {"release_gradients": True, "heuristic": Magnitude()},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kinds", ["one dtype", "two dtypes", "two GPUs"])
def test_a_step_asks_for_nothing(variant, kinds):
    params = model()
    if kinds == "two dtypes":
        params += model(dtype=torch.float32)
    if kinds == "two GPUs":
        params += model(device="cuda:1")
        if variant == "capturable":
            with pytest.raises(ValueError, match="one device, got cuda:0, cuda:1"):
                several_steps(params, capturable=True)
            return
    several_steps(params, **VARIANTS[variant])


@pytest.mark.parametrize("released", [False, True])
def test_groups_and_a_dense_head(released):
    groups = [
        {"params": model()},
        {"params": model(), "weight_decay": 0.0},
        {"params": [parameter((4, 4))], "dense": True},
    ]
    several_steps(groups, max_grad_norm=1.0, release_gradients=released)


def test_a_parameter_without_gradient():
    params = model()
    params[1].grad = None
    for options in ({}, {"release_gradients": True, "max_grad_norm": 1.0}):
        several_steps(params, **options)


def test_a_learning_rate_on_the_device():
    optimizer = several_steps(model(), capturable=True)
    for group in optimizer.param_groups:
        group["lr"] = torch.empty((), device="cuda:0")
    optimizer.step()


def test_fisher(monkeypatch):
    monkeypatch.setattr(heuristics, "_checksum", lambda scores: 0)  # of the constructor, which may ask
    several_steps(model(), heuristic=Fisher([torch.empty(shape, device="cuda:0") for shape in SHAPES]))


def test_the_verdict_of_a_scaler_stays_on_the_device_where_it_is_capturable():
    optimizer = several_steps(model(), capturable=True)
    optimizer.found_inf = torch.zeros(1, device="cuda:0")
    optimizer.grad_scale = torch.ones((), device="cuda:0")
    optimizer.step()


def test_what_the_gpu_reported_bounds_what_is_looked_for(monkeypatch):
    reported, capacities = iter([0, 0, 6, 12, 18, 18]), []
    wanted = progress.Progress.wanted

    def spy(self, active):
        found = wanted(self, active)
        capacities.append(found and found.capacity)
        return found

    monkeypatch.setattr(NoReport, "newest", lambda self, before, wait: next(reported))
    monkeypatch.setattr(progress.Progress, "wanted", spy)
    optimizer = ID3AdamW(model(), budget=18, total_steps=3)
    for _ in range(6):
        optimizer.step()
    assert capacities == [6, 12, 12, 6, None, None]  # the targets are 6, 12, 18


@pytest.mark.parametrize("copy", [lambda x: x.cpu(), lambda x: x.to("cpu"), lambda x: x.to("cuda:1")])
def test_a_copy_that_waits_is_noticed(monkeypatch, copy):
    """Likewise."""
    wanted = progress.Progress.wanted

    def copying(self, active):
        copy(active.shards[0].offsets)
        return wanted(self, active)

    monkeypatch.setattr(progress.Progress, "wanted", copying)
    with pytest.raises(AssertionError, match="that waits"):
        several_steps(model())


@pytest.mark.parametrize("ask", ["n_active", "steps_done", "bounds"])
def test_these_do_ask(ask):
    """So that the tests above can fail."""
    optimizer = several_steps(model(), capturable=True)
    owner = optimizer._unmasking.active.shards[0] if ask == "bounds" else optimizer
    with pytest.raises(Exception, match=r"_local_scalar_dense|not linked|Cannot"):
        getattr(owner, ask)
