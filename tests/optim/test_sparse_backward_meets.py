"""sparse_backward and released gradients where they meet what else a program does: each result is that of
whole gradients, or an error says what to do."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import id3_optim
from id3_optim import ID3AdamW, sparse_backward
from id3_optim.analysis import tensor_sparsity
from id3_optim.schedules import after
from id3_optim.step import candidates, grad_scaler, products

WAYS = ("dense", "released", "sparse")


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def started(way, model=None, **options):
    """(model, its optimizer, the handle of sparse_backward or None)."""
    model = model or net()
    given = {"lr": 1e-2, "budget": 0.2, "total_steps": 12} | options
    optimizer = ID3AdamW(model.named_parameters(), release_gradients=way == "released", **given)
    return model, optimizer, sparse_backward(model, optimizer) if way == "sparse" else None


def batch(step=0):
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(step))


def entries(optimizer):
    return [touched.indices.tolist() for touched in optimizer.touched()]


# --- loss scales -----------------------------------------------------------------------------------------


def test_the_first_scaled_step_sees_an_overflow(monkeypatch):
    """The candidates of a forward pass are made before the first loss is scaled."""
    monkeypatch.setattr(candidates, "SCALED", scaled := set())
    monkeypatch.setattr(grad_scaler, "SCALED", scaled)
    model, optimizer, _ = started("sparse")
    model(batch()).square().mean().backward()
    optimizer.step()
    scaler = id3_optim.GradScaler("cpu", init_scale=2.0**60)
    with torch.autocast("cpu", torch.float16):
        loss = model(batch(1)).float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    assert optimizer.steps_done == 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("strategy", ["increment", "static"])
def test_an_overflow_is_seen_before_anything_is_active(way, strategy):
    """The step is skipped and the scale falls; a static mask is not chosen among what did not overflow."""
    found = []
    for scale in (2.0**7, 2.0**14):  # at 2^14 some gradients overflow in fp16
        model, optimizer, _ = started(way, strategy=strategy, select_every=3 if way == "sparse" else 1)
        scaler, skipped = id3_optim.GradScaler("cpu", init_scale=scale), 0
        while optimizer.steps_done < 4:
            with torch.autocast("cpu", torch.float16):
                loss = (model(batch(optimizer.steps_done)).float() - 20).square().sum()
            scaler.scale(loss).backward()
            before = optimizer.steps_done
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            skipped += optimizer.steps_done == before
        found.append((skipped > 0, entries(optimizer)))
    (early, alone), (late, scaled) = found
    assert not early and late and optimizer.n_active > 0
    same = sum(len(set(a) & set(b)) for a, b in zip(alone, scaled, strict=True))
    assert same >= 0.95 * optimizer.n_active  # fp16 rounds otherwise at another scale


# --- between forward and backward ------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_a_weight_that_is_frozen_before_backward_gets_no_gradient(way):
    model, optimizer, _ = started(way, nn.Linear(8, 4), budget=1.0, total_steps=4, select_every=2)
    model(batch()).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    before = model.weight.detach().clone()
    loss = model(batch()).sum()
    model.weight.requires_grad_(False)
    loss.backward()
    model.weight.requires_grad_(True)
    optimizer.step()
    assert torch.equal(model.weight, before)


def test_a_discriminator_that_is_frozen_before_backward_is_left_alone():
    model, optimizer, _ = started("sparse")
    score = model(batch().requires_grad_()).mean()
    model.requires_grad_(False)
    score.backward()
    assert optimizer.n_active == 0


def test_the_optimizer_may_be_looked_at():
    """Sparsity, a state dict, a delta: they settle the state, whose order changes, and no entry does."""
    runs = []
    for looks in (False, True):
        torch.manual_seed(0)
        options = {"budget": 3200, "total_steps": 320, "select_every": 4}  # a recent run lasts some windows
        model, optimizer, _ = started("sparse", nn.Linear(64, 64), **options)
        for step in range(60):
            loss = model(torch.randn(4, 64, generator=torch.Generator().manual_seed(step))).square().mean()
            if looks:
                tensor_sparsity(optimizer)
                optimizer.state_dict()
            loss.backward()
            optimizer.step()
        runs.append((entries(optimizer), model.weight))
    assert runs[0][0] == runs[1][0] and torch.equal(runs[0][1], runs[1][1])


@pytest.mark.parametrize("way", WAYS)
def test_a_budget_that_grows_after_a_forward_pass_grows_in_this_step(way):
    model, optimizer, _ = started(way)
    model[2].requires_grad_(False)
    counts = []
    for step in range(8):
        loss = model(batch(step)).square().mean()
        if step == 5:
            model[2].requires_grad_(True)
            optimizer.grow_budget()
            loss = model(batch(step)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        counts.append(optimizer.n_active)
    alone, reference = started("dense")[:2]
    alone[2].requires_grad_(False)
    for step in range(8):
        if step == 5:
            alone[2].requires_grad_(True)
            reference.grow_budget()
        alone(batch(step)).square().mean().backward()
        reference.step()
        reference.zero_grad()
        assert counts[step] == reference.n_active


def test_a_graph_that_is_merely_alive_makes_no_whole_gradient(monkeypatch):
    whole = []
    original = products.Product.whole
    monkeypatch.setattr(products.Product, "whole", lambda *a: whole.append(a) or original(*a))
    model, optimizer, _ = started("sparse")
    kept = []
    for step in range(4):
        kept.append(model(batch(step + 50)).mean())  # of validation, say
        model(batch(step)).square().mean().backward()
        optimizer.step()
    assert not whole
    (model(batch()) + model(batch(1))).square().mean().backward()  # in one pass: neither part has all of it
    assert whole


# --- schedules -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "share", "joins"), [(1, 0.2, 20), (16, 0.2, 32), (32, 0.2, 32), (64, 0.5, 64), (64, 0.8, 64)]
)
def test_a_schedule_that_waits_does_so_with_windows(every, share, joins):
    targets = id3_optim.schedules.tabulate(after(share), 100, 10, every)
    assert targets == [0] * joins + [10] * (100 - joins)


# --- layers and hooks ------------------------------------------------------------------------------------


def test_a_layer_with_a_forward_of_its_own_is_reported_as_released():
    model = net()
    plain = model[0].forward
    model[0].forward = lambda x: plain(x) * 2
    _, optimizer, handle = started("sparse", model)
    assert [w.way for w in handle.ways if w.name == "0.weight"] == ["released"]
    assert "of a Linear with a forward of its own" in handle.report()
    model(batch()).sum().backward()
    optimizer.step()


def test_a_forward_that_something_has_kept_works_after_remove():
    model, _, handle = started("sparse")
    kept = model[0].forward
    handle.remove()
    assert torch.equal(kept(batch()), model[0](batch()))


def test_a_parametrization_put_over_a_layer_survives_remove():
    model, _, handle = started("sparse")
    parametrizations.weight_norm(model[0])
    handle.remove()
    assert model(batch()).shape == (6, 4) and "weight" not in dict(model[0].named_parameters(recurse=False))
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    again = started("sparse", model)[2]
    assert [way.way for way in again.ways if way.name == "0.weight"] == ["sparse"]
    again.remove()
    assert type(model[0]) is nn.Linear


def test_a_refused_call_changes_nothing():
    model, optimizer, _ = started("sparse")
    classes = [type(layer) for layer in model]
    with pytest.raises(ValueError, match="select_from"):
        sparse_backward(model, optimizer, select_from="max")
    assert [type(layer) for layer in model] == classes


def test_a_hook_after_accumulation_sees_the_gradient():
    model = net()
    seen = []
    model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.norm().item()))
    _, optimizer, _ = started("sparse", model, select_every=3)
    for step in range(5):
        model(batch(step)).square().mean().backward()
        optimizer.step()
    assert len(seen) == 5 and all(norm > 0 for norm in seen)


def test_nested_tensors_pass():
    model, optimizer, _ = started("sparse", select_every=2)
    rows = torch.nested.nested_tensor([batch()[:2], batch()[2:]], layout=torch.jagged)
    for _ in range(3):
        model(rows).values().square().mean().backward()
        optimizer.step()
    assert optimizer.n_active > 0


def test_torch_fx_takes_a_changed_layer_as_a_leaf():
    model, _, _ = started("sparse")
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == [*"01234"]


def test_copies_and_pickles_are_plain():
    model, _, _ = started("sparse")
    packed = pickle.dumps(model)
    assert b"id3_optim" not in packed
    for twin in (copy.deepcopy(model), pickle.loads(packed)):
        assert type(twin[0]) is nn.Linear and torch.equal(twin(batch()), model(batch()))


def test_lazy_layers_wait_for_their_shape():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    handle = sparse_backward(model, ID3AdamW(model.named_parameters(), budget=0.5, total_steps=3))
    assert "0.weight" in handle.report()


def test_a_weight_that_only_its_own_gradient_needs_may_change():
    """Nothing needs it for the gradient of an input that has none."""
    model, optimizer, _ = started("sparse", nn.Linear(8, 4), total_steps=1)
    y = model(batch())
    with torch.no_grad():
        model.weight.mul_(0.5)
    y.square().mean().backward()
    optimizer.step()
    assert optimizer.n_active > 0


@pytest.mark.parametrize("way", ["released", "sparse"])
def test_a_cell_that_is_run_again_takes_the_gradients_over(way):
    """The optimizer before it, which a notebook still holds, would take them from the new one."""
    model = net()
    before = ID3AdamW(model.named_parameters(), budget=0.2, total_steps=12, release_gradients=True)
    model(batch()).square().mean().backward()
    before.step()
    _, optimizer, _ = started(way, model)
    for step in range(3):
        model(batch(step)).square().mean().backward()
        optimizer.step()
    assert optimizer.n_active > 0 and before.n_active < optimizer.n_active
