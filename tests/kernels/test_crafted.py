"""Entries may come from a file or another program: none may reach outside its tensor."""

import itertools
import re

import oracle
import pytest
import torch
from updates import NUMBERS

import id3_kernels
from id3_kernels import Entries

NUMEL = 4


def entries(*indices, offsets=None, dtype=torch.int32):
    offsets = torch.tensor([0, len(indices)] if offsets is None else offsets)
    return Entries(offsets, torch.tensor(indices, dtype=dtype))


# Entries, and the error of the public functions.
CRAFTED = {
    "out of range": (entries(0, 4), "entries.indices: expected 0 to 3 in tensor 0, got 0 to 4"),
    "out of range between": (
        entries(0, 9, 1),
        "entries.indices: expected ascending indices within a tensor, got [9, 1] at 1",
    ),
    "negative": (entries(-1, 2), "entries.indices: expected 0 to 3 in tensor 0, got -1 to 2"),
    "descending": (
        entries(3, 1),
        "entries.indices: expected ascending indices within a tensor, got [3, 1] at 0",
    ),
    "twice": (entries(2, 2), "entries.indices: expected ascending indices within a tensor, got [2, 2] at 0"),
    "late start": (
        entries(0, 1, offsets=[1, 2]),
        "entries.offsets: expected a first offset of 0 and no decrease, got [1, 2]",
    ),
    "negative start": (
        entries(0, 1, offsets=[-1, 1]),
        "entries.offsets: expected a first offset of 0 and no decrease, got [-1, 1]",
    ),
    "decreasing": (
        entries(0, offsets=[0, -1]),
        "entries.offsets: expected a first offset of 0 and no decrease, got [0, -1]",
    ),
    "too few": (entries(0, offsets=[0, 3]), "entries.indices: expected 3 indices, got 1"),
    "far out": (entries(0, offsets=[0, 2**40]), "entries.indices: expected 1099511627776 indices, got 1"),
    "int64": (
        entries(0, dtype=torch.int64),
        "entries.indices: expected torch.int32 of shape (0,), got torch.int64 (1,)",
    ),
    "int32 offsets": (
        Entries(torch.tensor([0, 1], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)),
        "entries.offsets: expected torch.int64",
    ),
    "short offsets": (
        entries(offsets=[0]),
        "entries.offsets: expected torch.int64 of shape (2,), got torch.int64 (1,)",
    ),
    "2-d": (
        Entries(entries(0, 3).offsets, torch.ones(2, 2, dtype=torch.int32)),
        "entries.indices: expected torch.int32",
    ),
    "strided": (
        Entries(entries(0, 3).offsets, torch.zeros(8, dtype=torch.int32)[::2]),
        "entries.indices: expected a contiguous tensor",
    ),
}
# Those that reach outside the tensor, and outside the lists themselves. The C++ ops check them on their own.
OUTSIDE = ("out of range", "out of range between", "negative")
INCONSISTENT = ("negative start", "decreasing", "too few", "far out", "short offsets")
WRONG_LISTS = ("int64", "int32 offsets", "2-d", "strided")


class Surrounded:
    """Tensors of NUMEL elements, each a view into the middle of memory that must stay as it is."""

    def __init__(self, *dtypes):
        self.memory = [torch.arange(1, 65).to(dtype) for dtype in dtypes]
        self.before = [m.clone() for m in self.memory]
        self.views = [m[30 : 30 + NUMEL] for m in self.memory]

    def check_unchanged(self, but_the_views=False):
        for memory, before in zip(self.memory, self.before, strict=True):
            if but_the_views:
                before[30 : 30 + NUMEL] = memory[30 : 30 + NUMEL]
            oracle.check_bits(memory, before, "memory beside a tensor" if but_the_views else "a tensor")


def calls(s: Surrounded, e: Entries, functions, public: bool):
    """Per function a call that hands in the crafted entries. s: param, grad, two moments, age."""
    param, grad, m, v, age = s.views
    values, scalars = torch.ones(NUMEL), (False, *[None] * 4)
    step = torch.ones(1, dtype=torch.int64)
    if public:
        options = {**NUMBERS, "step": 1, "age": age}
        return {
            "select_topk": lambda: functions.select_topk([param], [grad], e, 2, eps=1.0, exp=2.0),
            "select_topk_by_score": lambda: functions.select_topk_by_score([grad], e, 2),
            "gather": lambda: functions.gather([param], e),
            "scatter_": lambda: functions.scatter_([param], e, values),
            "adamw_": lambda: functions.adamw_([param], [grad], e, m, v, None, **options),
            "adamw_compact_": lambda: functions.adamw_compact_([param], values, e, m, v, None, **options),
        }
    wanted = (torch.tensor([2]), 2)
    rest = (m, v, None, age, step, *NUMBERS.values(), *scalars)
    return {
        "select_topk": lambda: functions.select_topk([param], [grad], *e, *wanted, 1.0, 2.0),
        "select_topk_by_score": lambda: functions.select_topk_by_score([grad], *e, *wanted),
        "gather": lambda: functions.gather([param], *e),
        "scatter_": lambda: functions.scatter_([param], *e, values),
        "squared_norm": lambda: functions.squared_norm([grad], *e),
        "adamw_": lambda: functions.adamw_([param], [grad], *e, *rest),
        "adamw_compact_": lambda: functions.adamw_compact_([param], values, *e, *rest),
    }


def surrounded() -> Surrounded:
    return Surrounded(*[torch.float32] * 4, torch.int32)


PUBLIC = ("select_topk", "select_topk_by_score", "gather", "scatter_", "adamw_", "adamw_compact_")


@pytest.mark.parametrize("function", PUBLIC)
@pytest.mark.parametrize("name", CRAFTED)
def test_public_functions_refuse_before_anything_changes(backend, name, function):
    crafted, message = CRAFTED[name]
    s = surrounded()
    if function.startswith("select"):
        message = message.replace("entries.", "active.")
    with pytest.raises(ValueError, match=re.escape(message)):
        calls(s, crafted, backend, public=True)[function]()
    s.check_unchanged()


@pytest.mark.parametrize(
    ("function", "name"),
    [
        *itertools.product([*PUBLIC, "squared_norm"], [*INCONSISTENT, *WRONG_LISTS]),
        *itertools.product(["gather", "scatter_"], ["late start"]),
        *itertools.product(["gather", "scatter_", "squared_norm", "adamw_", "adamw_compact_"], OUTSIDE),
    ],
)
def test_native_ops_refuse_before_anything_changes(cpu, name, function):
    s = surrounded()
    with pytest.raises((ValueError, RuntimeError)):
        calls(s, CRAFTED[name][0], torch.ops.id3, public=False)[function]()
    s.check_unchanged()


@pytest.mark.parametrize("function", ["select_topk", "select_topk_by_score"])
@pytest.mark.parametrize("k", [1, NUMEL])
@pytest.mark.parametrize("name", [*OUTSIDE, "descending", "twice"])
def test_native_selection_stays_inside_the_tensors(cpu, name, k, function):
    s = surrounded()
    arguments = ([s.views[0]], [s.views[1]]) if function == "select_topk" else ([s.views[1]],)
    numbers = (torch.tensor([k]), k, 1.0, 2.0)[: 4 if function == "select_topk" else 2]
    offsets, indices, _ = getattr(torch.ops.id3, function)(*arguments, *CRAFTED[name][0], *numbers)
    assert 0 < int(offsets[-1]) <= k
    assert set(indices[: int(offsets[-1])].tolist()) <= set(range(NUMEL))
    s.check_unchanged()


@pytest.mark.parametrize(
    ("k", "capacity"),
    [
        (torch.tensor([1, 1]), 1),
        (torch.tensor([], dtype=torch.int64), 1),
        (torch.tensor([1], dtype=torch.int32), 1),
        (torch.tensor([1.0]), 1),
        (torch.tensor([1]), -1),
    ],
    ids=str,
)
def test_native_selection_refuses_what_is_no_count(cpu, k, capacity):
    for call in (
        lambda: torch.ops.id3.select_topk(
            [torch.ones(4)], [torch.ones(4)], *entries(0), k, capacity, 1.0, 2.0
        ),
        lambda: torch.ops.id3.select_topk_by_score([torch.ones(4)], *entries(0), k, capacity),
    ):
        with pytest.raises(ValueError, match="capacity" if capacity < 0 else "k: expected"):
            call()


@pytest.mark.parametrize("lr", [torch.ones(2), torch.ones(0), torch.ones(1, dtype=torch.int64)], ids=str)
@pytest.mark.parametrize("function", ["adamw_", "adamw_compact_"])
def test_native_update_refuses_what_is_no_learning_rate(cpu, function, lr):
    param, moments, step = torch.ones(NUMEL), torch.zeros(2, 2), torch.ones(1, dtype=torch.int64)
    gradient = [param] if function == "adamw_" else torch.ones(2)
    rest = (*moments, None, None, step, *NUMBERS.values(), False, None, None, None, lr)
    with pytest.raises(ValueError, match="lr: expected"):
        getattr(torch.ops.id3, function)([param], gradient, *entries(0, 3), *rest)
    assert param.tolist() == [1.0] * NUMEL


@pytest.mark.parametrize("function", ["gather", "scatter_", "squared_norm", "adamw_", "adamw_compact_"])
@pytest.mark.parametrize("name", ["descending", "twice"])
def test_native_ops_stay_inside_the_tensors_even_out_of_order(cpu, name, function):
    s = surrounded()
    calls(s, CRAFTED[name][0], torch.ops.id3, public=False)[function]()
    s.check_unchanged(but_the_views=True)


@pytest.mark.parametrize("state", ["exp_avg", "exp_avg_sq", "master", "age", "step", "values"])
def test_native_ops_refuse_short_arrays(cpu, state):
    param, short = torch.ones(NUMEL, dtype=torch.bfloat16), torch.zeros(0)
    arrays = {n: torch.zeros(NUMEL) for n in ("exp_avg", "exp_avg_sq", "master")}
    arrays |= {"age": torch.zeros(NUMEL, dtype=torch.int32), "step": torch.ones(1, dtype=torch.int64)}
    arrays |= {"values": torch.ones(NUMEL)}
    arrays[state] = short.to(arrays[state].dtype)
    names = ("exp_avg", "exp_avg_sq", "master", "age", "step")
    rest = (*(arrays[n] for n in names), *NUMBERS.values(), False, *[None] * 4)
    with pytest.raises((ValueError, RuntimeError)):
        torch.ops.id3.adamw_compact_([param], arrays["values"], *entries(0, 3), *rest)
    with pytest.raises((ValueError, RuntimeError)):
        if state == "values":
            torch.ops.id3.scatter_([param], *entries(0, 3), short.to(param.dtype))
        else:
            torch.ops.id3.adamw_([param], [param], *entries(0, 3), *rest)
    assert param.tolist() == [1.0] * NUMEL


@pytest.mark.parametrize("added", [(0, 2, 5), (3, 1), (3, 3, 3), (-5, 2**31 - 1), ()], ids=str)
@pytest.mark.parametrize("held", [(1, 4), (4, 1), (2**31 - 1, -1), ()], ids=str)
def test_native_join_stays_inside_its_arrays(cpu, held, added):
    """It knows no tensor sizes; whatever the indices are, it writes within the given capacity."""
    s = Surrounded(torch.int32, torch.float32)
    capacity = len(held) + len(added)
    arrays = [m[30 : 30 + capacity] for m in s.memory]
    arrays[0][: len(held)] = torch.tensor(held, dtype=torch.int32)
    values = torch.full((len(added),), 3.0)
    torch.ops.id3.join_(arrays, torch.tensor([0, len(held)]), *entries(*added), [values])
    assert arrays[1].eq(3.0).sum() == len(added)
    for memory, before in zip(s.memory, s.before, strict=True):
        before[30 : 30 + capacity] = memory[30 : 30 + capacity]
        oracle.check_bits(memory, before, "memory beside an array")


def test_native_join_refuses_elements_that_it_can_not_move(cpu):
    arrays = [torch.tensor([1, 0], dtype=torch.int32), torch.zeros(2, dtype=torch.complex128)]
    with pytest.raises(ValueError, match="16 bytes"):
        torch.ops.id3.join_(arrays, torch.tensor([0, 1]), *entries(2), [None])
    assert arrays[0].tolist() == [1, 0]


@pytest.mark.parametrize("short", [0, 1])
def test_native_join_refuses_too_little_capacity(cpu, short):
    s = Surrounded(torch.int32, torch.float32)
    arrays = [m[30 : 30 + 3 + (j != short)] for j, m in enumerate(s.memory)]
    offsets = torch.tensor([0, 2])
    with pytest.raises((ValueError, RuntimeError)):
        torch.ops.id3.join_(arrays, offsets, *entries(1, 2), [None])
    s.check_unchanged()
    assert offsets.tolist() == [0, 2]


def test_native_union_of_crafted_entries(cpu):
    with pytest.raises((ValueError, RuntimeError)):
        torch.ops.id3.union(*entries(0, offsets=[0, 9]), *entries(1))
    offsets, indices, *positions = torch.ops.id3.union(*entries(3, 1, 1), *entries(2, -1))
    assert 0 <= int(offsets[-1]) <= indices.numel() == 5
    assert all(0 <= p < 5 for where in positions for p in where.tolist())


def test_public_functions_check_before_python_indexes(backend):
    """Tensor 1 of 2 is the one that does not fit."""
    two = [torch.ones(NUMEL), torch.ones(2)]
    with pytest.raises(
        ValueError, match=re.escape("entries.indices: expected 0 to 1 in tensor 1, got 0 to 2")
    ):
        backend.gather(two, Entries.from_lists([[3], [0, 2]]))
    assert id3_kernels.gather(two, Entries.from_lists([[3], [0, 1]])).tolist() == [1.0] * 3
