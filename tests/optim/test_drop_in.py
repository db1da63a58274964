"""ID3AdamW where torch.optim.AdamW stood: groups, closures, schedulers, scalers, odd parameters, errors."""

import copy
import gc

import pytest
import torch
from parameters import Tied, one_parameter

from id3_optim import D3, ID3AdamW


def test_closure_runs_with_gradients_and_its_loss_is_returned(model):
    x = torch.randn(8, 40)
    optimizer = ID3AdamW(model.parameters(), lr=1e-2, budget=0.2, total_steps=10)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(10)]
    assert losses[-1] < losses[0]


def test_scheduler_and_group_learning_rates_are_read_at_each_step():
    a, b = one_parameter(), one_parameter()
    groups = [{"params": [a], "lr": 1.0}, {"params": [b], "lr": torch.tensor(0.5)}]
    optimizer = ID3AdamW(groups, budget=200, total_steps=1, weight_decay=0.0, eps=0.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    moved = []
    for _ in range(2):
        before = a.detach().clone(), b.detach().clone()
        optimizer.step()
        moved.append(
            [(x - y).abs().mean().item() for x, y in zip(before, (a.detach(), b.detach()), strict=True)]
        )
        scheduler.step()
    assert moved[0] == pytest.approx([1.0, 0.5], rel=1e-4)
    assert moved[1] == pytest.approx([0.1, 0.05], rel=1e-4)


def test_maximize_goes_the_other_way():
    up, down = one_parameter(), one_parameter()
    ID3AdamW([down], budget=100, total_steps=1, weight_decay=0.0).step()
    ID3AdamW([up], budget=100, total_steps=1, weight_decay=0.0, maximize=True).step()
    start = one_parameter().detach()
    torch.testing.assert_close(up.detach() - start, start - down.detach())


def test_parameters_without_gradient_are_neither_updated_nor_decayed(model, give_gradients):
    optimizer = ID3AdamW(model.parameters(), budget=1.0, total_steps=1, lr=1e-2, weight_decay=0.5)
    give_gradients(0, model.parameters())
    optimizer.step()
    first = model[0].weight
    kept = first.detach().clone()
    give_gradients(1, model.parameters())
    first.grad = None
    optimizer.step()
    assert torch.equal(first, kept)
    assert optimizer.state_dict()["state"][0]["step"] == 1 and optimizer.state_dict()["state"][1]["step"] == 2
    assert optimizer.steps_done == 2


def test_frozen_parameters_do_not_count_in_n(model, give_gradients):
    model[0].weight.requires_grad_(False)
    optimizer = ID3AdamW(model.parameters(), budget=1.0, total_steps=1)
    give_gradients(0, model.parameters())
    model[0].weight.grad = None
    optimizer.step()
    assert optimizer.n_entries == optimizer.n_active == 3617 - 2400


def test_dense_groups_are_torchs_adamw_and_count_in_nothing(model, give_gradients):
    twin = copy.deepcopy(model)
    groups = [{"params": model[:2].parameters()}, {"params": model[2].parameters(), "dense": True}]
    optimizer = ID3AdamW(groups, lr=1e-2, budget=60, total_steps=5)
    plain = torch.optim.AdamW(twin[2].parameters(), lr=1e-2, fused=True)
    for step in range(5):
        give_gradients(step, model.parameters(), twin.parameters())
        optimizer.step()
        plain.step()
    assert optimizer.n_entries == 2580 and optimizer.n_active == 60
    assert all(map(torch.equal, model[2].parameters(), twin[2].parameters()))
    assert len(list(optimizer.touched())) == 4


def test_max_grad_norm_is_over_what_the_step_updates(give_gradients):
    a, head = one_parameter(), one_parameter(7)
    groups = [{"params": [a]}, {"params": [head], "dense": True}]
    optimizer = ID3AdamW(groups, budget=10, total_steps=1, max_grad_norm=0.5, heuristic=D3(1.0, 0.0))
    optimizer.step()
    (indices,) = (t.indices.long() for t in optimizer.touched())
    norm = torch.cat([a.grad[indices], head.grad]).norm()
    torch.testing.assert_close(
        optimizer.state_dict()["state"][0]["exp_avg"], a.grad[indices] * 0.1 * 0.5 / norm
    )
    torch.testing.assert_close(optimizer.state[head]["exp_avg"], head.grad * 0.1 * 0.5 / norm)


def test_add_param_group_extends_n_but_not_a_fixed_budget(model, give_gradients):
    optimizer = ID3AdamW(model[0].parameters(), budget=0.1, total_steps=10)
    give_gradients(0, model.parameters())
    optimizer.step()
    optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 5e-3})
    for step in range(1, 10):
        give_gradients(step, model.parameters())
        optimizer.step()
    assert optimizer.n_entries == 2460 + 1037
    assert optimizer.budget == optimizer.n_active == 246
    assert sum(t.indices.numel() for t in list(optimizer.touched())[2:]) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_do_not_matter(dtype):
    plain = torch.nn.Conv2d(8, 16, 3).to(dtype)
    strided = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    transposed = torch.nn.Parameter(plain.weight.detach().flatten(1).t().contiguous().t())
    assert not strided.weight.is_contiguous() and not transposed.is_contiguous()
    results = []
    for weight in (plain.weight, strided.weight, transposed):
        optimizer = ID3AdamW([weight], lr=1e-2, budget=100, total_steps=4)
        for step in range(6):
            g = torch.randn(weight.numel(), generator=torch.Generator().manual_seed(step)).to(dtype)
            weight.grad = torch.empty_like(weight).copy_(g.view(weight.shape))
            assert weight.grad.stride() == weight.stride()
            optimizer.step()
        results.append((next(optimizer.touched()).indices, weight.detach().reshape(-1)))
    for indices, values in results[1:]:
        assert torch.equal(indices, results[0][0]) and torch.equal(values, results[0][1])


def test_tied_weights_are_one_parameter():
    model = Tied()
    optimizer = ID3AdamW(model.named_parameters(), budget=1.0, total_steps=1)
    model(torch.arange(20)).square().sum().backward()
    optimizer.step()
    assert optimizer.n_entries == 160 == optimizer.n_active


def test_odd_shapes():
    params = [torch.nn.Parameter(torch.ones(s)) for s in ((), (0,), (1,), (257,), (2, 3, 4, 5, 2))]
    optimizer = ID3AdamW(params, budget=1.0, total_steps=1)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all((p < 1).all() for p in params) and optimizer.n_active == 1 + 1 + 257 + 240


def test_grad_scaler_unscales_and_an_overflow_changes_nothing(model):
    twin = copy.deepcopy(model)
    data = torch.randn(16, 40, generator=torch.Generator().manual_seed(1))
    options = {"lr": 1e-2, "budget": 0.1, "total_steps": 6, "max_grad_norm": 0.1}
    optimizer, plain = ID3AdamW(model.parameters(), **options), ID3AdamW(twin.parameters(), **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    for step in range(6):
        for net, opt in ((model, optimizer), (twin, plain)):
            opt.zero_grad()
            loss = net(data).square().mean()
            (scaler.scale(loss) if opt is optimizer else loss).backward()
        if step == 3:  # an overflow: the same step again is what the unscaled twin does once
            kept = [p.detach().clone() for p in model.parameters()], optimizer.n_active
            good = [p.grad.clone() for p in model.parameters()]
            next(model.parameters()).grad[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update(1024.0)
            assert all(map(torch.equal, model.parameters(), kept[0])) and optimizer.n_active == kept[1]
            assert optimizer.steps_done == 3
            for p, g in zip(model.parameters(), good, strict=True):
                p.grad = g
        scaler.step(optimizer)
        scaler.update(1024.0)
        plain.step()
    assert optimizer.steps_done == 6
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_an_in_place_update_between_forward_and_backward_is_noticed():
    weight = torch.nn.Parameter(torch.ones(4))
    loss = (weight * weight).sum()
    weight.grad = torch.ones(4)
    ID3AdamW([weight], budget=4, total_steps=1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_memory_report_is_at_most_24_bytes_per_active_entry(model, make, train):
    for dtype, how, most in (
        (torch.float32, "entry", 20),
        (torch.bfloat16, "entry", 22),
        (torch.float32, "tensor", 16),
    ):
        twin, optimizer = make(model, dtype, bias_correction=how)
        train(twin, optimizer, 0, 3)
        report = optimizer.memory_report()
        per_entry = ("indices", "moments", "masters", "originals", "ages", "ever_active")
        assert sum(report[kind] for kind in per_entry) == most * optimizer.budget
        assert report["total"] == sum(size for kind, size in report.items() if kind != "total")
        assert list(report)[-1] == "total"


def test_budget_zero_trains_nothing(model, make, train):
    twin, optimizer = make(model, budget=0)
    train(twin, optimizer, 0, 3)
    assert optimizer.n_active == 0 and all(map(torch.equal, twin.parameters(), model.parameters()))


@pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="this torch ties a gradient's dtype to its parameter"
)
def test_a_float32_gradient_of_a_bfloat16_parameter():
    param = one_parameter(dtype=torch.bfloat16)
    param.grad = None
    param.grad_dtype = torch.float32
    param.grad = torch.linspace(-1, 1, 100)
    optimizer = ID3AdamW([param], budget=100, total_steps=1, lr=1e-2)
    optimizer.step()
    exp_avg = optimizer.state_dict()["state"][0]["exp_avg"]
    torch.testing.assert_close(exp_avg, torch.linspace(-1, 1, 100) * 0.1)


def test_a_half_precision_head_under_a_large_loss_scale():
    head, body = one_parameter(8, torch.float16), one_parameter()
    start = head.detach().clone()
    optimizer = ID3AdamW(
        [{"params": [body]}, {"params": [head], "dense": True}], budget=5, total_steps=2, lr=0.1
    )
    head.grad = torch.full_like(head, 65.6)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(65536.0), torch.tensor(0.0)
    optimizer.step()
    assert optimizer.state[head]["exp_avg"].float().mean().item() == pytest.approx(1e-4, rel=0.01)
    assert not torch.equal(head, start)


def test_ddp_ranks_choose_the_same_entries(tmp_path):
    torch.multiprocessing.spawn(_train_one_rank, args=(str(tmp_path),), nprocs=2)
    a, b = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(map(torch.equal, a["indices"], b["indices"])) and all(
        map(torch.equal, a["params"], b["params"])
    )
    assert sum(map(len, a["indices"])) == 50


def _train_one_rank(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    _train_under_ddp(rank, folder)
    gc.collect()  # what still holds the group must go before it does, or the two may wait for each other
    torch.distributed.destroy_process_group()


def _train_under_ddp(rank, folder):
    torch.manual_seed(0)
    net = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(30, 10))
    optimizer = ID3AdamW(net.parameters(), budget=50, total_steps=5)
    for step in range(6):
        torch.manual_seed(10 * step + rank)  # each rank has data of its own
        net(torch.randn(4, 30)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    indices = [t.indices for t in optimizer.touched()]
    torch.save({"indices": indices, "params": [p.detach() for p in net.parameters()]}, f"{folder}/{rank}.pt")
