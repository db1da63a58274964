"""capturable=True: the same bits as without, and a step that can be run again without its Python."""

import copy

import pytest
import torch
from parameters import one_parameter
from replayed import Recording

from id3_kernels.backend import native
from id3_optim import D3, ID3AdamW, Magnitude, Random
from id3_optim.running import Running
from id3_optim.schedules import cosine

BUDGET, STEPS = 180, 12


def groups_of(kind, model):
    a, b, c, d, e, f = model.parameters()
    if kind == "groups":
        return [{"params": [a, b, c]}, {"params": [d, e, f], "lr": 3e-3, "weight_decay": 0.0}]
    if kind == "dense head":
        return [{"params": [a, b, c, d]}, {"params": [e, f], "dense": True}]
    return [a, b, c, d, e, f]


def build(model, kind="plain", capturable=True, dtype=torch.float32, **options):
    twin = copy.deepcopy(model).to(dtype)
    if kind == "two dtypes":
        twin[0].to(torch.bfloat16)
    options = {"lr": 1e-2, "budget": BUDGET, "total_steps": STEPS} | options
    return twin, ID3AdamW(groups_of(kind, twin), capturable=capturable, **options)


def check_same(one, other):
    (model, optimizer), (twin, eager) = one, other
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    assert (optimizer.steps_done, optimizer.n_active) == (eager.steps_done, eager.n_active)
    states, expected = (o.state_dict()["state"] for o in (optimizer, eager))
    for i, state in expected.items():
        for name, value in state.items():
            same = value == states[i][name] if name == "shape" else torch.equal(value, states[i][name])
            assert same, (i, name)
    assert [shard.updated_at.tolist() for shard in optimizer._unmasking.active.shards] == [
        shard.updated_at.tolist() for shard in eager._unmasking.active.shards
    ]


VARIANTS = {
    "plain": {},
    "groups": {"kind": "groups"},
    "dense head": {"kind": "dense head"},
    "two dtypes": {"kind": "two dtypes"},
    "bfloat16": {"dtype": torch.bfloat16},
    "clipped": {"max_grad_norm": 0.5},
    "cosine": {"schedule": cosine},
    "every third": {"select_every": 3},
    "static": {"strategy": "static"},
    "by entry": {"bias_correction": "entry"},
    "warm-up": {"entry_warmup": 4, "dtype": torch.bfloat16},
    "cap": {"tensor_cap": 0.5},
    "exponent": {"heuristic": D3(eps=1e-3, exp=0.5)},
    "magnitude": {"heuristic": Magnitude()},
    "random": {"heuristic": Random(5)},
}


@pytest.mark.skipif(native() is None, reason="the reference reads numbers")
@pytest.mark.parametrize("variant", VARIANTS)
def test_replayed_steps_are_steps(model, give_gradients, variant):
    captured, eager = (
        build(model, capturable=capturable, **VARIANTS[variant]) for capturable in (True, False)
    )
    step = 0

    def next_gradients():
        nonlocal step
        before = [p.grad for p in captured[0].parameters()]
        give_gradients(step, eager[0].parameters(), captured[0].parameters())
        for p, grad in zip(captured[0].parameters(), before, strict=True):
            if grad is not None:  # a graph reads where they lay
                p.grad = grad.copy_(p.grad)
        step += 1

    for _ in range(3):
        next_gradients()
        captured[1].step()
        eager[1].step()
    check_same(captured, eager)
    next_gradients()
    with Recording() as recording:
        captured[1].step()
    eager[1].step()
    check_same(captured, eager)
    while step < STEPS + 3:
        next_gradients()
        recording.replay()
        eager[1].step()
        check_same(captured, eager)
    assert captured[1].n_active == BUDGET and captured[1].steps_done == STEPS + 3
    newest = captured[1].last_selection
    assert (newest.step, newest.count) == (STEPS + 2, 0)


def test_a_backend_that_reads_numbers_can_not_be_replayed(model, give_gradients):
    """So that the test above can fail."""
    captured, eager = (build(model, backend="reference") for _ in range(2))
    give_gradients(0, captured[0].parameters(), eager[0].parameters())
    captured[1].step()
    with Recording() as recording:
        captured[1].step()
    with pytest.raises((AssertionError, IndexError)):
        recording.replay()
        for _ in range(3):
            eager[1].step()
        check_same(captured, eager)


def test_what_could_not_be_selected_is_asked_for_again():
    param = one_parameter(20)
    optimizer = ID3AdamW([param], budget=10, total_steps=5, capturable=True)
    everything, param.grad = param.grad, torch.zeros(20)
    counts = []
    for step in range(8):
        param.grad.copy_(everything if step > 1 else torch.zeros(20))
        optimizer.step()
        counts.append(optimizer.n_active)
    assert counts == [0, 0, 6, 8, 10, 10, 10, 10]


def test_an_overflow_changes_nothing_and_nobody_waits_for_it(model, give_gradients):
    captured, eager = (build(model, "dense head", capturable) for capturable in (True, False))
    for step in range(6):
        give_gradients(step, eager[0].parameters(), captured[0].parameters())
        overflows = step in (1, 3)
        for _, optimizer in (captured, eager):
            optimizer.found_inf = torch.tensor([1.0 if overflows else 0.0])
            optimizer.grad_scale = torch.tensor([4.0])
            optimizer.step()
        check_same(captured, eager)
        assert captured[1].steps_done == step + 1 - [0, 1, 1, 2, 2, 2][step]


@pytest.mark.parametrize("capturable", [True, False])
def test_a_learning_rate_in_a_tensor_is_read_at_each_step(model, give_gradients, capturable):
    lr = torch.tensor(1e-2)
    tensor, plain = (build(model, "dense head", capturable, lr=rate) for rate in (lr, lr.item()))
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.8) for o in (tensor[1], plain[1])]
    for step in range(6):
        give_gradients(step, tensor[0].parameters(), plain[0].parameters())
        for (_, optimizer), scheduler in zip((tensor, plain), schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        for group, other in zip(tensor[1].param_groups, plain[1].param_groups, strict=True):
            other["lr"] = group["lr"].item()  # which is float32
        check_same(tensor, plain)


def test_resumed_from_either_kind(model, train):
    for first, second in ((True, False), (False, True)):
        straight = build(model, capturable=first)
        train(*straight, 0, 5)
        resumed = build(model, capturable=second)
        resumed[0].load_state_dict(straight[0].state_dict())
        resumed[1].load_state_dict(straight[1].state_dict())
        for pair in (straight, resumed):
            train(*pair, 5, 9)
        check_same(straight, resumed)


def test_a_copy_goes_on_by_itself(model, train):
    twin, optimizer = build(model)
    train(twin, optimizer, 0, 3)
    other_twin, other = copy.deepcopy((twin, optimizer))
    train(other_twin, other, 3, 6)
    assert (optimizer.steps_done, other.steps_done) == (3, 6)


def test_the_same_number_of_steps_again_leaves_the_counters_where_a_graph_reads_them(model, train):
    twin, optimizer = build(model)
    train(twin, optimizer, 0, 2)
    done = optimizer._unmasking.progress.done
    optimizer.set_total_steps(STEPS)
    train(twin, optimizer, 2, 3)
    assert optimizer._unmasking.progress.done is done and optimizer.steps_done == 3


def test_a_group_on_another_device_is_refused(model, train):
    twin, optimizer = build(model)
    train(twin, optimizer, 0, 2)
    with pytest.raises(ValueError, match="one device, got cpu, meta"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3, device="meta"))]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "option",
    [
        {"strategy": "repeat"},
        {"release_gradients": True},
        {"heuristic": Running("sum"), "select_every": 4},
        {"heuristic": Running("adam")},
    ],
)
def test_what_no_graph_can_hold_is_refused(option):
    with pytest.raises(ValueError, match="capturable"):
        ID3AdamW([one_parameter()], budget=3, total_steps=5, capturable=True, **option)


def test_a_pattern_of_missing_gradients_stays_where_a_graph_reads_it():
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(8)]
    optimizer = ID3AdamW(params, budget=3, total_steps=300, capturable=True)
    shard, places = None, []
    for pattern in range(1, 130):
        for i, p in enumerate(params):
            p.grad = torch.ones(3) if pattern >> i & 1 else None
        optimizer.step()
        (shard,) = optimizer._unmasking.active.shards
        places.append(shard.mask([p.grad is not None for p in params]).data_ptr())
    for p in params:
        p.grad = None
    params[0].grad = torch.ones(3)
    assert shard.mask([True] + [False] * 7).data_ptr() == places[0] and len(set(places)) == 129


@pytest.mark.parametrize(
    ("capturable", "begun", "error"),
    [(False, True, "expected capturable=True"), (True, False, "expected a step before"), (True, True, None)],
)
def test_a_capture_that_could_not_be_replayed_is_refused(monkeypatch, capturable, begun, error):
    optimizer = ID3AdamW([one_parameter()], budget=3, total_steps=5, capturable=capturable)
    if begun:
        optimizer.step()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    if error is None:
        optimizer.step()
    else:
        with pytest.raises(RuntimeError, match=error):
            optimizer.step()
