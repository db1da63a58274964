"""Released gradients against dense ones: the same entries and the same bits."""

import importlib.util

import pytest
import torch
from short import short
from twins import Twins, batch, loss_at

from id3_optim import D3, Bias, Fisher, ID3AdamW, Magnitude, Random


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("options", [{}, {"strategy": "static"}, {"max_grad_norm": 0.05}], ids=str)
def test_300_steps_give_the_same_bits(model, dtype, backend, options):
    twins = Twins(model, dtype, backend=backend, total_steps=280, **options)
    for step in range(300):
        twins.step(loss_at(step))
        assert all(p.grad is None for p in twins.released[0].parameters())
    twins.check_same()
    assert twins.released[1].n_active == twins.released[1].budget


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_triton_gives_the_same_bits(model, dtype):
    twins = Twins(model, dtype, backend="triton", total_steps=3, max_grad_norm=0.05)
    for step in range(4):
        twins.step(loss_at(step))
    twins.check_same()


@pytest.mark.parametrize("exp", [0.0, 0.5, 1.0, 2.0])
def test_exponents(model, exp):
    twins = Twins(model, heuristic=D3(1.0, exp), budget=0.3, bias_correction="entry")
    for step in range(45):
        twins.step(loss_at(step))
    twins.check_same()


def by_square(param, grad):
    return grad.float() ** 2


@pytest.mark.parametrize("heuristic", [Magnitude(), Random(3), Bias(), by_square], ids=short)
def test_heuristics_that_score_whole_tensors(model, heuristic):
    twins = Twins(model, heuristic=heuristic, budget=70, total_steps=7)
    for step in range(9):
        twins.step(loss_at(step))
    twins.check_same()


def test_fisher_scores(model):
    fisher = Fisher({name: torch.rand(p.shape) for name, p in model.named_parameters()})
    twins = Twins(model, heuristic=fisher, budget=70, total_steps=7)
    for step in range(9):
        twins.step(loss_at(step))
    twins.check_same()


def test_mixed_dtypes_compete_for_one_budget(model):
    def low(model):
        model[0].weight.data = model[0].weight.data.bfloat16()
        return list(model.named_parameters())

    twins = Twins(model, groups=low, max_grad_norm=0.1)
    for step in range(20):
        g = batch(step, 1, 3617).flatten()
        parts = g.split([p.numel() for p in model.parameters()])
        for net, optimizer in (twins.dense, twins.released):
            for p, part in zip(net.parameters(), parts, strict=True):
                p.grad = part.view(p.shape).to(p.dtype)
            optimizer.step()
    twins.check_same()


def test_float64(model):
    twins = Twins(model, torch.float64)
    for step in range(12):
        twins.step(loss_at(step))
    twins.check_same()


def test_groups_dense_groups_and_clipping(model):
    def groups(model):
        head = {"params": model[2].parameters(), "dense": True}
        return [{"params": model[0].parameters(), "lr": 3e-3}, {"params": model[1].parameters()}, head]

    twins = Twins(model, groups=groups, max_grad_norm=0.02, budget=0.2)
    for step in range(12):
        twins.step(loss_at(step))
    twins.check_same()
    for p, q in zip(twins.dense[0][2].parameters(), twins.released[0][2].parameters(), strict=True):
        assert torch.equal(p, q)


def test_nan_and_infinite_gradients(model):
    """At an active entry they do what they do in a dense step; elsewhere they are never selected."""
    twins = Twins(model, budget=0.2, total_steps=4)
    for step in range(4):
        scale = {2: float("inf"), 3: float("nan")}.get(step, 1.0)
        twins.step(lambda net, scale=scale, step=step: loss_at(step)(net) + net[0].weight.sum() * scale)
    twins.check_same()
    assert twins.released[0][0].weight.isnan().any()


def test_accumulation_with_clipping_is_the_dense_sum(model):
    """8 micro-batches; which entries are active is settled at the first step."""
    twins = Twins(model, strategy="static", max_grad_norm=0.01)
    twins.step(loss_at(0))
    for step in range(1, 5):
        twins.step(lambda net, step=step: [loss_at(8 * step + i)(net) / 8 for i in range(8)])
    twins.check_same()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_last_micro_batch_chooses(model, dtype):
    """The same entries as a dense step on the last micro-batch alone; others keep their sums."""
    twins = Twins(model, dtype, budget=300, total_steps=3)
    net, optimizer = twins.released
    for i in (1, 2, 0):
        loss_at(i)(net).backward()
    optimizer.step()
    twins.dense[0].zero_grad()
    loss_at(0)(twins.dense[0]).backward()
    twins.dense[1].step()
    twins.check_same()


def test_max_chooses_by_the_best_score_of_any_micro_batch(model):
    twins = Twins(model, select_from="max", budget=300, total_steps=3)
    net, optimizer = twins.released
    gradients = [torch.autograd.grad(loss_at(i)(net), list(net.parameters())) for i in range(3)]
    for p, *rows in zip(twins.dense[0].parameters(), *gradients, strict=True):
        stacked = torch.stack(rows)
        p.grad = stacked.gather(0, stacked.abs().argmax(0, keepdim=True))[0]
    twins.dense[1].step()
    for i in range(3):
        loss_at(i)(net).backward()
    optimizer.step()
    twins.check_same()


def test_one_gradient_at_a_time(model):
    optimizer = ID3AdamW(model.parameters(), budget=50, total_steps=5, release_gradients=True)
    alive = []
    for p in model.parameters():
        p.register_hook(lambda g: alive.append(sum(q.grad is not None for q in model.parameters())))
    for step in range(2):
        loss_at(step)(model).backward()
        optimizer.step()
    assert alive == [0] * 12


def test_memory_report_counts_accumulator_and_candidates(model):
    for dtype, most in ((torch.float32, 20), (torch.bfloat16, 22)):
        net, optimizer = Twins(model, dtype, budget=200, total_steps=4).released
        loss_at(0)(net).backward()
        report = optimizer.memory_report()
        assert report["candidates"] == 50 * 16
        per_entry = ("indices", "moments", "masters", "originals", "ages", "accumulator")
        assert sum(report[kind] for kind in per_entry) == most * 200
        assert report["total"] == sum(size for kind, size in report.items() if kind != "total")
        optimizer.step()
        assert optimizer.memory_report()["candidates"] == 0
