import cases
import numpy as np
import oracle
import pytest
import torch
from cases import F32, F64, NAN
from hypothesis import given
from hypothesis import strategies as st
from updates import NUMBERS, Update, run

from id3_kernels import Entries

LOW_PRECISION = (torch.bfloat16, torch.float16)


def check_equal(got: Update, want: Update) -> None:
    for name in ("exp_avg", "exp_avg_sq", "master", "age"):
        if getattr(want, name) is not None:
            oracle.check_bits(getattr(got, name), getattr(want, name), name)
    for j, (a, b) in enumerate(zip(got.params, want.params, strict=True)):
        oracle.check_bits(oracle.storage(a), oracle.storage(b), f"the memory of params[{j}]")


@pytest.mark.parametrize("backend", ["cpu", "triton"], indirect=True)
def test_same_bits_as_the_reference(backend):
    shapes = ((), (0,), (1,), (257,), (3, 5, 7)) if backend.is_slow else cases.SHAPES
    flag = st.sampled_from((None, 0.5, 2.0))

    @backend.examples(250, interpreted=25)
    @given(
        cases.recipes(backend.has_float64, writable=True, max_tensors=4, shapes=shapes),
        st.booleans(), st.booleans(), st.booleans(), st.booleans(), flag, flag,
    )  # fmt: skip
    def check(recipe, compact, with_master, with_age, maximize, grad_scale, clip):
        update = Update.of(cases.build(recipe), recipe.seed, with_master, with_age)
        scalars = {"maximize": maximize, "grad_scale": grad_scale, "clip": clip}
        want = run("reference", update.clone(), compact=compact, **scalars)
        got = run(backend.name, update.clone(backend.device), compact=compact, **scalars)
        check_equal(got, want)

    check()


@pytest.mark.parametrize("bias_correction", ["tensor", "entry"])
@pytest.mark.parametrize("maximize", [False, True])
def test_against_float64_dense_adamw_of_the_mask(backend, bias_correction, maximize):
    """A step rounds the weight twice (decay, difference) and an update of at most about lr some ten times.

    So after n steps the error is at most n·2⁻²³·(|θ| + 8·lr), with θ at its largest on the way.
    """
    steps = 3 if backend.is_slow else 40
    rng = np.random.default_rng(0)
    param = torch.from_numpy(rng.standard_normal((17, 31))).float()
    entries = cases.some_entries([param.numel()], 0.4, rng)
    mask = np.zeros(param.numel(), bool)
    mask[entries.indices.numpy()] = True
    w, m, v = oracle.array(param).astype(np.float64), np.zeros(param.numel()), np.zeros(param.numel())
    largest = np.abs(w)
    update = Update.fresh([param.clone()], entries, with_age=bias_correction == "entry").clone(backend.device)
    for step in range(1, steps + 1):
        grad = torch.from_numpy(rng.standard_normal(param.shape)).float()
        update.grads, update.step = backend.here([grad]), step
        run(backend.name, update, maximize=maximize)
        g = oracle.array(-grad if maximize else grad).astype(np.float64)
        oracle.dense_adamw(w, m, v, g, mask, step, *NUMBERS.values())
        largest = np.maximum(largest, np.abs(w))
    got = oracle.array(update.params[0]).astype(np.float64)
    assert (np.abs(got - w) <= steps * 2.0**-23 * (largest + 8 * NUMBERS["lr"])).all()
    np.testing.assert_array_equal(got[~mask], oracle.array(param)[~mask])


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_against_torch_adamw_on_the_active_values(backend, dtype):
    dtype = dtype if backend.has_float64 else F32
    rng = np.random.default_rng(1)
    params = [torch.from_numpy(rng.standard_normal(n)).to(dtype) for n in (40, 300)]
    entries = cases.some_entries([40, 300], 0.3, rng)
    update = Update.fresh([p.clone() for p in params], entries).clone(backend.device)
    active = torch.nn.Parameter(
        torch.cat([p[i.long()] for p, i in zip(params, entries.lists(), strict=True)])
    )
    names = {"lr": NUMBERS["lr"], "betas": (NUMBERS["beta1"], NUMBERS["beta2"]), "eps": NUMBERS["eps"]}
    optimizer = torch.optim.AdamW([active], weight_decay=NUMBERS["weight_decay"], foreach=False, **names)
    for step in range(1, (4 if backend.is_slow else 50) + 1):
        grads = [torch.from_numpy(rng.standard_normal(p.shape)).to(dtype) for p in params]
        update.grads, update.step = backend.here(grads), step
        run(backend.name, update)
        active.grad = torch.cat([g[i.long()] for g, i in zip(grads, entries.lists(), strict=True)])
        optimizer.step()
    got = backend.gather(update.params, update.entries).cpu()
    relative, absolute = (1e-6, 2e-5 * NUMBERS["lr"]) if dtype == F32 else (1e-13, 1e-13)
    torch.testing.assert_close(got, active.detach(), rtol=relative, atol=absolute)


def simple_update(backend, dtype=F32, grad_dtype=None, **kwargs) -> Update:
    """Two tensors of 300 entries, of which every third is active."""
    rng = np.random.default_rng(2)
    params = [cases.tensor("normal", (300,), dtype, "plain", rng) for _ in range(2)]
    entries = Entries.from_lists([range(0, 300, 3)] * 2)
    update = Update.fresh(params, entries, **kwargs)
    update.grads = [cases.tensor("normal", (300,), grad_dtype or dtype, "plain", rng) for _ in range(2)]
    return update.clone(backend.device)


@pytest.mark.parametrize("special", [NAN, cases.INF, 1e-40])
def test_entries_outside_keep_their_bits_whatever_stands_there(backend, special):
    update = simple_update(backend)
    for tensor in (*update.params, *update.grads):
        tensor[1::3] = special
    before = update.clone()
    run(backend.name, update)
    for p, q in zip(update.params, before.params, strict=True):
        oracle.check_bits(p[1::3], q[1::3])
        oracle.check_bits(p[2::3], q[2::3])
        assert p[::3].isfinite().all()
        assert (p[::3].cpu() != q[::3]).all()


def test_nan_gradient_stays_in_its_entry(backend):
    update = simple_update(backend)
    update.grads[0][6] = NAN
    run(backend.name, update)
    for tensor in (update.params[0][::3], update.exp_avg[:100], update.exp_avg_sq[:100]):
        assert tensor.isnan().nonzero().flatten().tolist() == [2]


def test_found_inf_changes_nothing(backend):
    update = simple_update(backend, torch.bfloat16, with_master=True, with_age=True)
    before = update.clone()
    run(backend.name, update, found_inf=1.0)
    check_equal(update, before)
    run(backend.name, update, found_inf=0.0)
    assert not torch.equal(update.params[0].cpu(), before.params[0])


def test_tensor_without_gradient_changes_in_nothing(backend):
    update = simple_update(backend, torch.float16, with_master=True, with_age=True)
    before = update.clone()
    update.grads[0] = None
    run(backend.name, update)
    oracle.check_bits(update.params[0], before.params[0])
    for name in ("exp_avg", "exp_avg_sq", "master", "age"):
        oracle.check_bits(getattr(update, name)[:100], getattr(before, name)[:100], name)
    assert not torch.equal(update.params[1].cpu(), before.params[1])
    assert update.age[100:200].tolist() == (before.age[100:200] + 1).tolist()


def test_scale_clip_and_maximize_are_arithmetic_on_the_gradient(backend):
    update = simple_update(backend)
    plain = update.clone(backend.device)
    plain.grads = [-(g / 8.0 * 0.3) for g in plain.grads]
    check_equal(run(backend.name, update, grad_scale=8.0, clip=0.3, maximize=True), run(backend.name, plain))


def test_each_tensor_has_its_own_step(backend):
    update = simple_update(backend)
    expected = [update.clone(backend.device) for _ in range(2)]
    update.step = backend.here(torch.tensor([1, 1000]))
    run(backend.name, update)
    for j, step in enumerate((1, 1000)):
        expected[j].step = step
        run(backend.name, expected[j])
        oracle.check_bits(update.params[j], expected[j].params[j])
    assert not torch.equal(expected[0].params[0], expected[1].params[0])


def test_age_takes_the_place_of_step(backend):
    aged, stepped = simple_update(backend, with_age=True), simple_update(backend)
    aged.age[:] = 4
    aged.step, stepped.step = 999, 5
    run(backend.name, aged)
    run(backend.name, stepped)
    assert aged.age[: aged.count].eq(5).all()
    for p, q in zip(aged.params, stepped.params, strict=True):
        oracle.check_bits(p, q)


def test_state_behind_the_last_entry_is_untouched(backend):
    update = simple_update(backend, torch.bfloat16, with_master=True, with_age=True, capacity=64)
    before = update.clone()
    run(backend.name, update)
    for name in ("exp_avg", "exp_avg_sq", "master", "age"):
        oracle.check_bits(getattr(update, name)[update.count :], getattr(before, name)[update.count :], name)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_masters_collect_what_the_parameter_can_not_show(backend, dtype):
    """The masters go the way of the same run in float32, bit for bit."""
    update = simple_update(backend, dtype, F32, with_master=True)
    params = [p.clone() for p in update.params]
    wide = update.clone(backend.device)
    wide.params, wide.master = [p.float() for p in wide.params], None
    for step in (1, 2, 3):
        update.step = wide.step = step
        run(backend.name, update, lr=1e-5)
        run(backend.name, wide, lr=1e-5)
    unchanged = torch.cat([(p == q)[::3] for p, q in zip(update.params, params, strict=True)])
    assert unchanged.float().mean() > 0.5  # 1e-5 is below half an ulp of most of them
    oracle.check_bits(update.master[:200], torch.cat([p[::3] for p in wide.params]))
    rounded = update.master[:200].to(dtype)
    oracle.check_bits(torch.cat([p[::3] for p in update.params]), rounded)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_the_parameter_wins_over_a_stale_master(backend, dtype):
    update = simple_update(backend, dtype, with_master=True)
    fresh = update.clone(backend.device)
    update.master[:50] = 1000.0
    update.master[50:60] = NAN
    run(backend.name, update)
    run(backend.name, fresh)
    check_equal(update, fresh)


def test_a_master_is_for_low_precision_only(backend):
    update = simple_update(backend)
    update.master = torch.full_like(update.exp_avg, 123.0)
    plain = update.clone(backend.device)
    plain.master = None
    run(backend.name, update)
    run(backend.name, plain)
    assert update.master.eq(123.0).all()
    for p, q in zip(update.params, plain.params, strict=True):
        oracle.check_bits(p, q)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("with_age", [False, True])
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_a_learning_rate_that_is_a_tensor(backend, shape, with_age, compact, dtype):
    """The bits of the float of its value, whatever its dtype."""
    update = simple_update(backend, torch.bfloat16, with_master=True, with_age=with_age)
    plain = update.clone(backend.device)
    lr = torch.full(shape, 0.003, dtype=dtype, device=backend.device)
    run(backend.name, update, lr=lr, compact=compact)
    check_equal(update, run(backend.name, plain, lr=lr.item(), compact=compact))


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize(("first", "last"), [(0, 2), (1, 3), (2, 5), (4, 5)])
def test_a_part_of_the_tensors_by_a_part_of_the_offsets(backend, first, last, compact):
    """With the whole arrays, of which the rest keeps its bits."""
    rng = np.random.default_rng(7)
    params, grads = (
        [cases.tensor("normal", (n,), torch.bfloat16, "plain", rng) for n in (300, 20, 257, 0, 100)]
        for _ in range(2)
    )
    problem = cases.Problem(params, grads, None, 0)
    whole = Update.of(problem, 7, with_master=True, with_age=True).clone(backend.device)
    alone, before = whole.clone(backend.device).part(first, last), whole.clone(backend.device)
    run(backend.name, alone, compact=compact)
    begin, end = whole.entries.offsets[[first, last]].tolist()
    run_table(backend, whole, first, last, compact)
    for got, want in zip(whole.params[first:last], alone.params, strict=True):
        oracle.check_bits(got, want)
    for name in ("exp_avg", "exp_avg_sq", "master", "age"):
        expected = getattr(before, name)
        expected[begin:end] = getattr(alone, name)
        oracle.check_bits(getattr(whole, name), expected, name)


def run_table(backend, u: Update, first: int, last: int, compact: bool) -> None:
    """The unchecked op on the tensors first .. last, with all entries and all of the state."""
    gradient, op = u.grads[first:last], backend.table.adamw_
    if compact:
        gradient, op = backend.gather(u.grads, u.entries).float(), backend.table.adamw_compact_
    entries = u.entries.offsets[first : last + 1], u.entries.indices
    state = (u.exp_avg, u.exp_avg_sq, u.master, u.age, u.step[first:last])
    op(u.params[first:last], gradient, *entries, *state, *NUMBERS.values(), False, *[None] * 4)


@pytest.mark.parametrize("n", [1000, 60_000])
def test_same_bits_for_every_thread_count_run_and_instruction_set(cpu, threads, simd_levels, n):
    rng = np.random.default_rng(3)
    params = [cases.tensor("normal", (n,), dtype, "plain", rng) for dtype in (F32, torch.bfloat16)]
    update = Update.fresh(params, cases.some_entries([n, n], 0.5, rng), with_master=True, with_age=True)
    update.grads = [cases.tensor("normal", (n,), F32, "plain", rng) for _ in range(2)]
    want = run("reference", update.clone())
    for _ in simd_levels():
        for repeat in range(6):
            threads(1 + repeat % 3)
            check_equal(run("cpu", update.clone()), want)


def test_autograd_sees_the_write(backend):
    update = simple_update(backend)
    update.params = [torch.nn.Parameter(p) for p in update.params]
    versions = [p._version for p in update.params]
    run(backend.name, update)
    assert all(p._version > v for p, v in zip(update.params, versions, strict=True))
