"""Scores from the gradients of several steps."""

import copy
import pickle

import pytest
import torch
from test_resume import same, through_a_file

from id3_kernels import d3_score
from id3_optim import D3, ID3AdamW
from id3_optim.running import Running

BETAS = (0.8, 0.95)


def expected_size(kind, grads, selected):
    if kind == "sum":
        return torch.stack(grads[selected:]).sum(0)
    m = v = torch.zeros_like(grads[0])
    for g in grads:
        m, v = m + (1 - BETAS[0]) * (g - m), v + (1 - BETAS[1]) * (g**2 - v)
    n = len(grads)
    return m if kind == "mean" else (m / (1 - BETAS[0] ** n)) / (v / (1 - BETAS[1] ** n)).sqrt()


@pytest.mark.parametrize("kind", ["sum", "mean", "adam"])
def test_the_best_entries_by_all_steps_join(kind):
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(40, 5))
    running = Running(kind, D3(1.0, 1.0), BETAS)
    optimizer = ID3AdamW([param], budget=40, total_steps=8, heuristic=running, select_every=4, lr=1e-2)
    grads, active = [], set()
    for step in range(8):
        param.grad = torch.randn(40, 5)
        grads.append(param.grad.clone())
        if step % 4 == 0:
            size = expected_size(kind, grads, max(step - 3, 0))
            score = d3_score(param, size, eps=1.0, exp=1.0).flatten()
            score[list(active)] = 0
            active |= set(score.topk(20).indices.tolist())
        optimizer.step()
        (touched,) = optimizer.touched()
        assert set(touched.indices.tolist()) == active


def test_after_one_step_the_sum_is_the_gradient():
    param = torch.nn.Parameter(torch.randn(30))
    twin, running = copy.deepcopy(param), Running("sum")
    optimizers = [
        ID3AdamW([p], budget=9, total_steps=3, heuristic=h) for p, h in ((param, running), (twin, D3()))
    ]
    for _ in range(3):
        param.grad = torch.randn(30)
        twin.grad = param.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(param, twin)


@pytest.mark.parametrize("kind", ["sum", "mean", "adam"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_at_every_step_is_bit_exact(model, make, train, kind, dtype):
    """The sums are float32 whatever the parameters are: torch's loader would round them."""

    def begun(parent):
        return make(parent, dtype, total_steps=8, select_every=4, heuristic=Running(kind))

    straight, optimizer = begun(model)
    train(straight, optimizer, 0, 9)
    for stop in range(9):
        half, first = begun(model)
        train(half, first, 0, stop)
        state = through_a_file(first.state_dict())
        resumed, second = begun(half)
        second.load_state_dict(state)
        train(half, first, stop, 9)  # what was saved is a copy
        train(resumed, second, stop, 9)
        assert same(second.state_dict(), optimizer.state_dict())
        assert all(map(torch.equal, resumed.parameters(), straight.parameters()))


def test_a_state_of_another_kind_is_refused(model, make, train):
    begun, first = make(model, heuristic=Running("mean"))
    train(begun, first, 0, 2)
    with pytest.raises(ValueError, match=r"heuristic: expected .*'kind': 'adam'.*, got .*'kind': 'mean'"):
        make(begun, heuristic=Running("adam"))[1].load_state_dict(first.state_dict())


def test_what_is_refused():
    with pytest.raises(ValueError, match="kind: expected one of sum, mean, adam, got 'max'"):
        Running("max")
    with pytest.raises(ValueError, match="heuristic Running: expected the gradients of a step of ID3AdamW"):
        Running("mean")(torch.ones(3), torch.ones(3))


def test_released_gradients_are_refused_by_name():
    param = torch.nn.Parameter(torch.randn(30))
    options = {"budget": 9, "total_steps": 3, "heuristic": Running("sum")}
    refused = "release_gradients: does not apply to the heuristic Running"
    with pytest.raises(ValueError, match=refused):
        ID3AdamW([param], release_gradients=True, **options)
    with pytest.raises(ValueError, match=refused):
        ID3AdamW([param], **options).release_gradients()


def test_the_state_of_torch_distributed_checkpoint(model, make, train):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    begun, optimizer = make(model, heuristic=Running("mean"))
    train(begun, optimizer, 0, 2)
    state = get_optimizer_state_dict(begun, optimizer)
    resumed, second = make(begun, heuristic=Running("mean"))
    second.load_state_dict(state)
    for twin, own in ((begun, optimizer), (resumed, second)):
        train(twin, own, 2, 5)
    assert all(map(torch.equal, begun.parameters(), resumed.parameters()))
    assert "running" not in second.param_groups[0]


def of_a_line(kind):
    torch.manual_seed(0)
    model = torch.nn.Linear(16, 16)
    options = {"budget": 40, "total_steps": 8, "heuristic": Running(kind), "select_every": 2}
    return model, ID3AdamW(model.named_parameters(), lr=1e-2, **options)


def closures(model, optimizer, first, last):
    """Closures whose gradients are not there before the step."""
    for step in range(first, last):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))

        def closure(x=x):
            optimizer.zero_grad()
            loss = (model(x) - x.flip(1)).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["sum", "mean", "adam"])
def test_closures_and_copies(kind):
    straight, optimizer = of_a_line(kind)
    for step in range(8):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (straight(x) - x.flip(1)).square().mean().backward()
        optimizer.step()
    assert optimizer.n_active == 40
    begun = of_a_line(kind)
    closures(*begun, 0, 3)
    for model, own in (copy.deepcopy(begun), pickle.loads(pickle.dumps(begun)), begun):
        closures(model, own, 3, 8)
        assert torch.equal(model.weight, straight.weight) and same(own.state_dict(), optimizer.state_dict())
