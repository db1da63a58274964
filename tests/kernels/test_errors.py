"""Every refusal by its message: the argument, what was expected, what came. And nothing changes before it."""

import re

import pytest
import torch
from cases import BF16, F16, F64
from updates import NUMBERS

import id3_kernels
from id3_kernels import Entries

V = torch.ones(4)
D64 = torch.ones(4, dtype=F64)
INT = torch.ones(4, dtype=torch.int32)
HUGE = torch.empty(1).expand(2**31)  # takes four bytes
E = Entries.from_lists([[0, 3]])
TWO = Entries.from_lists([[0], [1]])


class Quantised(torch.Tensor):
    """Stands for DTensor and other subclasses."""


SUBCLASS = torch.ones(4).as_subclass(Quantised)


def entries(*indices, offsets=None, dtype=torch.int32):
    offsets = torch.tensor([0, len(indices)] if offsets is None else offsets)
    return Entries(offsets, torch.tensor(indices, dtype=dtype))


def score(param=V, grad=V, eps=1.0, exp=2.0):
    return id3_kernels.d3_score(param, grad, eps=eps, exp=exp)


def select(params=(V,), grads=(V,), active=None, k=1, eps=1.0, exp=2.0):
    return id3_kernels.select_topk(list(params), list(grads), active, k, eps=eps, exp=exp)


def by_score(scores=(V,), active=None, k=1):
    return id3_kernels.select_topk_by_score(list(scores), active, k)


def adamw(params=(V,), grads=(V,), entries=E, m=V, v=V, master=None, step=1, **options):
    id3_kernels.adamw_(list(params), list(grads), entries, m, v, master, step=step, **(NUMBERS | options))


def compact(values=V, params=(V,), entries=E):
    id3_kernels.adamw_compact_(list(params), values, entries, V, V, None, step=1, **NUMBERS)


SCORES = {
    "shape": (lambda: score(grad=V[:3]), "grad: expected shape (4,), got (3,)"),
    "scalar shape": (lambda: score(grad=V[0]), "grad: expected shape (4,), got ()"),
    "integer": (lambda: score(INT), "param: expected float32, bfloat16, float16 or float64, got torch.int32"),
    "complex": (
        lambda: score(V.to(torch.complex64)),
        "param: expected float32, bfloat16, float16 or float64, got torch.complex64",
    ),
    "mixed": (
        lambda: score(grad=V.to(BF16)),
        "grad: expected torch.float32 as its parameter, got torch.bfloat16",
    ),
    "low mixed": (
        lambda: score(V.to(F16), V.to(BF16)),
        "grad: expected torch.float16 as its parameter, got torch.bfloat16",
    ),
    "double grad": (
        lambda: score(V, D64),
        "grad: expected torch.float32 as its parameter, got torch.float64",
    ),
    "double param": (
        lambda: score(D64, V),
        "grad: expected torch.float64 as its parameter, got torch.float32",
    ),
    "sparse": (
        lambda: score(grad=V.to_sparse()),
        "grad: expected a dense tensor, got layout torch.sparse_coo",
    ),
    "subclass": (
        lambda: score(SUBCLASS),
        "param: expected a plain tensor, got Quantised",
    ),
    "no tensor": (lambda: score(grad=[1.0]), "grad: expected a tensor, got list"),
    "huge": (lambda: score(HUGE, HUGE), "param: expected fewer than 2^31 entries, got 2147483648"),
    "device": (lambda: score(grad=V.to("meta")), "grad: expected a tensor on cpu, got meta"),
    "eps zero": (lambda: score(eps=0.0), "eps: expected more than 0 with exp > 0"),
    "eps negative": (
        lambda: score(eps=-1.0, exp=0.0),
        "eps: expected a finite number of at least 0, got -1.0",
    ),
    "eps nan": (lambda: score(eps=float("nan")), "eps: expected a finite number of at least 0, got nan"),
    "eps infinite": (lambda: score(eps=float("inf")), "eps: expected a finite number of at least 0, got inf"),
    "exp nan": (lambda: score(exp=float("nan")), "exp: expected a finite number, got nan"),
    "exp infinite": (lambda: score(exp=float("inf")), "exp: expected a finite number, got inf"),
}
SELECTIONS = {
    "no params": (lambda: select((), ()), "params: expected at least one tensor, got none"),
    "number of grads": (lambda: select((V, V), (V,)), "grads: expected 2 gradients, got 1"),
    "name": (lambda: select((V, V), (V, V[:2])), "grads[1]: expected shape (4,), got (2,)"),
    "grad dtype": (
        lambda: select((V,), (D64,)),
        "grads[0]: expected torch.float32 as its parameter, got torch.float64",
    ),
    "double mixed": (
        lambda: select((V, D64), (V, D64)),
        "params[1]: expected no float64 beside torch.float32 in params[0], got torch.float64",
    ),
    "devices": (lambda: select((V, V.to("meta")), (V, V)), "params[1]: expected a tensor on cpu, got meta"),
    "subclass": (
        lambda: select((V, SUBCLASS), (V, V)),
        "params[1]: expected a plain tensor, got Quantised",
    ),
    "huge": (
        lambda: select((V, HUGE), (V, HUGE)),
        "params[1]: expected fewer than 2^31 entries, got 2147483648",
    ),
    "k negative": (lambda: select(k=-1), "k: expected an int of at least 0, got -1"),
    "k float": (lambda: select(k=1.0), "k: expected an int of at least 0, got 1.0"),
    "k bool": (lambda: select(k=True), "k: expected an int of at least 0, got True"),
    "eps": (lambda: select(eps=0.0), "eps: expected more than 0 with exp > 0"),
    "active tensors": (lambda: select(active=TWO), "active.offsets: expected 2 offsets, got 3"),
    "active range": (
        lambda: select(active=entries(0, 4)),
        "active.indices: expected 0 to 3 in tensor 0, got 0 to 4",
    ),
    "scores none": (lambda: by_score(()), "scores: expected at least one tensor, got none"),
    "scores dtype": (
        lambda: by_score((V.to(BF16),)),
        "scores[0]: expected float32 or float64, got torch.bfloat16",
    ),
    "double first": (
        lambda: select((D64, V), (D64, V)),
        "params[1]: expected float64 beside torch.float64 in params[0], got torch.float32",
    ),
    "scores mixed": (
        lambda: by_score((V, D64)),
        "scores[1]: expected no float64 beside torch.float32 in scores[0], got torch.float64",
    ),
    "scores k": (lambda: by_score(k=-2), "k: expected an int of at least 0, got -2"),
    "scores active": (
        lambda: by_score(active=entries(9)),
        "active.indices: expected 0 to 3 in tensor 0, got 9 to 9",
    ),
}
ENTRIES = {
    "gather dtypes": (
        lambda: id3_kernels.gather([V, V.to(BF16)], TWO),
        "tensors[1]: expected torch.float32 as tensors[0], got torch.bfloat16",
    ),
    "gather none": (
        lambda: id3_kernels.gather([], Entries.empty(0)),
        "tensors: expected at least one tensor, got none",
    ),
    "scatter values": (
        lambda: id3_kernels.scatter_([V], E, V[:1]),
        "values: expected torch.float32 of shape (2,), got torch.float32 (1,)",
    ),
    "scatter dtype": (
        lambda: id3_kernels.scatter_([V], E, D64[:2]),
        "values: expected torch.float32 of shape (2,), got torch.float64 (2,)",
    ),
    "union tensors": (lambda: id3_kernels.union(E, TWO), "b: expected 1 tensors as in a, got 2"),
    "union order": (
        lambda: id3_kernels.union(E, entries(3, 1)),
        "b.indices: expected ascending indices within a tensor",
    ),
    "union negative": (
        lambda: id3_kernels.union(entries(-4), E),
        "a.indices: expected at least 0 in tensor 0, got -4 to -4",
    ),
    "sparse range": (
        lambda: id3_kernels.to_sparse_coo(E, V, [(3,)]),
        "entries.indices: expected 0 to 2 in tensor 0, got 0 to 3",
    ),
    "sparse values": (
        lambda: id3_kernels.to_sparse_coo(E, V[:1], [(4,)]),
        "values: expected torch.float32 of shape (2,)",
    ),
    "from dense": (
        lambda: id3_kernels.from_sparse_coo([V]),
        "tensors[0]: expected sparse COO without dense dimensions, got torch.strided",
    ),
    "from hybrid": (
        lambda: id3_kernels.from_sparse_coo([torch.ones(2, 2).to_sparse(1)]),
        "tensors[0]: expected sparse COO without dense dimensions, got torch.sparse_coo with 1 dense",
    ),
    "from mixed": (
        lambda: id3_kernels.from_sparse_coo([V.to_sparse(), D64.to_sparse()]),
        "tensors[1]: expected torch.float32 as tensors[0], got torch.float64",
    ),
    "from none": (lambda: id3_kernels.from_sparse_coo([]), "tensors: expected at least one tensor, got none"),
}
UPDATES = {
    "moment dtype": (
        lambda: adamw(m=D64),
        "exp_avg: expected torch.float32 of shape (2,), got torch.float64 (4,)",
    ),
    "moment length": (
        lambda: adamw(v=V[:1]),
        "exp_avg_sq: expected torch.float32 of shape (2,), got torch.float32 (1,)",
    ),
    "moment missing": (lambda: adamw(m=None), "exp_avg: expected torch.float32 of shape (2,), got NoneType"),
    "moment strides": (
        lambda: adamw(m=torch.ones(4, 2)[:, 0]),
        "exp_avg: expected a contiguous tensor, got strides (2,)",
    ),
    "master dtype": (
        lambda: adamw((V.to(BF16),), master=V.to(BF16)),
        "master: expected torch.float32 of shape (2,), got torch.bfloat16 (4,)",
    ),
    "age dtype": (
        lambda: adamw(age=torch.zeros(2, dtype=torch.int64)),
        "age: expected torch.int32 of shape (2,), got torch.int64 (2,)",
    ),
    "age length": (
        lambda: adamw(age=INT[:1]),
        "age: expected torch.int32 of shape (2,), got torch.int32 (1,)",
    ),
    "steps": (
        lambda: adamw(step=torch.tensor([1.0])),
        "step: expected torch.int64 of shape (1,), got torch.float32 (1,)",
    ),
    "scale": (lambda: adamw(grad_scale=V), "grad_scale: expected one element on cpu, got (4,) on cpu"),
    "found_inf": (lambda: adamw(found_inf=V[:0]), "found_inf: expected one element on cpu, got (0,) on cpu"),
    "clip": (
        lambda: adamw(clip=torch.ones((), device="meta")),
        "clip: expected one element on cpu, got () on meta",
    ),
    "lr": (lambda: adamw(lr=V), "lr: expected one element on cpu, got (4,) on cpu"),
    "lr device": (
        lambda: adamw(lr=torch.ones(1, device="meta")),
        "lr: expected one element on cpu, got (1,) on meta",
    ),
    "grads": (lambda: adamw(grads=(V, V)), "grads: expected 1 gradients, got 2"),
    "values dtype": (
        lambda: compact(D64),
        "values: expected torch.float32 or torch.bfloat16 or torch.float16, got torch.float64",
    ),
    "values in double": (lambda: compact(V, (D64,)), "values: expected torch.float64, got torch.float32"),
    "values length": (
        lambda: compact(V[:1]),
        "values: expected torch.float32 of shape (2,), got torch.float32 (1,)",
    ),
}
ALL = {
    f"{k}: {n}": v
    for k, t in (("score", SCORES), ("select", SELECTIONS), ("entries", ENTRIES), ("update", UPDATES))
    for n, v in t.items()
}


@pytest.mark.parametrize("name", ALL)
def test_refused_in_one_line_that_names_the_argument(backend, name):
    call, message = ALL[name]
    with pytest.raises(ValueError, match=re.escape(message)) as error, id3_kernels.use_backend(backend.name):
        call()
    assert "\n" not in str(error.value)
    assert V.tolist() == D64.tolist() == [1.0] * 4, "something changed before the refusal"
