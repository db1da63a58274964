"""The table as torch sees it: schemas, fakes, mutation, compilation."""

import inspect
import re

import oracle
import pytest
import torch

import id3_kernels
from id3_kernels import Entries
from id3_kernels.table import OPS

ONE = torch.ones(())


def two_tensors():
    """A float32 matrix that is not contiguous and a vector, with gradients that have no equal scores."""
    params = [torch.linspace(-1, 1, 30).reshape(6, 5).t(), torch.linspace(2, 3, 9)]
    return params, [torch.linspace(1, 7, 30).reshape(5, 6), torch.linspace(-3, -2, 9)]


def held() -> Entries:
    return Entries.from_lists([[0, 7, 29], [1, 8]])


def adamw_arguments(gradient):
    params, _ = two_tensors()
    moments = [torch.full((5,), 0.1), torch.full((5,), 0.2)]
    step, age = torch.tensor([3, 4]), torch.zeros(5, dtype=torch.int32)
    numbers = (1e-3, 0.9, 0.999, 1e-8, 0.01, False)
    return (
        params,
        gradient,
        *held(),
        *moments,
        None,
        age,
        step,
        *numbers,
        ONE * 2,
        ONE * 0,
        ONE * 0.5,
        ONE * 3e-3,
    )


def collect_arguments():
    """The second tensor of two, of which one of three best entries is held already, with a lower score."""
    param, grad = (tensors[0] for tensors in two_tensors())
    entries = torch.tensor([1, 3]), torch.tensor([2, 0, 3], dtype=torch.int32), torch.ones(3)
    best = torch.tensor([9.0, 0.5, 0.0]), torch.tensor([7, (1 << 32) + 29, -1]), torch.tensor([4.0, 5.0, 0.0])
    return (param, grad, None, *entries, True, 1, *best, torch.zeros(0, dtype=torch.int64), torch.tensor([3]))


def sampled_arguments():
    """Four tokens of a weight [6, 5], of which the first factor is not contiguous, and its active set."""
    left, right = torch.linspace(-1, 1, 24).reshape(6, 4).t(), torch.linspace(2, 3, 20).reshape(4, 5)
    return left, right, torch.tensor([0, 3]), torch.tensor([0, 25, 29], dtype=torch.int32)


# Per op: arguments that use each input, with results that fill their capacity (behind it anything may stand).
SAMPLES = {
    "d3_score": lambda: (two_tensors()[0][0], two_tensors()[1][0], 1.0, 2.0),
    "select_topk": lambda: (*two_tensors(), *held(), torch.tensor([4]), 4, 1.0, 2.0),
    "select_topk_by_score": lambda: ([two_tensors()[1][0], None], *held(), torch.tensor([4]), 4),
    "collect_": lambda: (*collect_arguments(), True, 1.0, 2.0),
    "union": lambda: (*held(), *Entries.from_lists([[1], [0, 2]])),
    "join_": lambda: (
        [torch.cat([held().indices, torch.zeros(3, dtype=torch.int32)]), *torch.arange(16.0).view(2, 8)],
        held().offsets,
        *Entries.from_lists([[1], [0, 2]]),
        [torch.tensor([5.0, 6.0, 7.0]), None],
    ),
    "fingerprint": lambda: ([torch.arange(5.0)], torch.tensor([3, 4]), *held()),
    "gather": lambda: (two_tensors()[0], *held()),
    "scatter_": lambda: (two_tensors()[0], *held(), torch.arange(5.0)),
    "sampled_weight_grad_": lambda: (*sampled_arguments(), torch.ones(3), True),
    "sampled_embedding_grad_": lambda: (
        sampled_arguments()[1],
        torch.tensor([5, 0, 5, -1]),
        *sampled_arguments()[2:],
        torch.ones(3),
        True,
    ),
    "squared_norm": lambda: ([two_tensors()[1][0], None], *held()),
    "adamw_": lambda: adamw_arguments([two_tensors()[1][0], None]),
    "adamw_compact_": lambda: adamw_arguments(torch.linspace(-1, 1, 5)),
}
MUTATING = {"collect_", "join_", "scatter_", "adamw_", "adamw_compact_"}
MUTATING |= {"sampled_weight_grad_", "sampled_embedding_grad_"}


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests():
    """Dynamo counts recompilations of a function over the whole process, and gives up at eight."""
    torch.compiler.reset()


def flat(values) -> list[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        return [values]
    return [t for v in values for t in flat(v)] if isinstance(values, list | tuple) else []


def test_table_is_complete():
    """A new op fails here until it has a fake, a reference, a C++ and a Triton kernel, and a sample."""
    from id3_kernels import reference, triton

    assert set(SAMPLES) == set(OPS)
    for name in OPS:
        assert callable(getattr(reference, name)), name
        assert callable(getattr(triton, name)), name
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"id3::{name}", "CPU"), name
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"id3::{name}", "CUDA"), name
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"id3::{name}", "CompositeExplicitAutograd"), (
            name
        )


@pytest.mark.parametrize("name", OPS)
def test_mutation_is_in_the_name_and_the_schema(name):
    op = getattr(torch.ops.id3, name).default
    assert op._schema.is_mutable == name.endswith("_") == (name in MUTATING)


@pytest.mark.parametrize("name", OPS)
def test_contract_names_every_argument_and_what_is_mutated(name):
    contract, arguments = OPS[name].contract, getattr(torch.ops.id3, name).default._schema.arguments
    assert contract.count("Mutates") == 1
    assert "\n\n" not in contract
    text, mutated = contract.split("Mutates")
    written = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    for argument in arguments:
        assert re.search(rf"\b{argument.name}\b", text), argument.name
        assert bool(re.search(rf"\b{argument.name}\b", mutated)) == (argument.name in written)
    assert written or mutated == " nothing."


@pytest.mark.parametrize("name", OPS)
def test_opcheck(cpu, name):
    torch.library.opcheck(getattr(torch.ops.id3, name).default, SAMPLES[name]())


@pytest.fixture
def active_set_of_two_runs(monkeypatch):
    """The entries that the samples share, as rows of a wider tensor."""
    wide = torch.tensor([[9, 0, 2, 3, 9], [9, 3, 4, 5, 9]])
    two = Entries(wide[:, 1:4], torch.tensor([0, 29, 8, 7, 1], dtype=torch.int32))
    monkeypatch.setitem(globals(), "held", lambda: two)
    one_tensor, rest = collect_arguments()[:3], collect_arguments()[4:]
    collect = (*one_tensor, torch.tensor([[1, 2], [2, 3]]), *rest, True, 1.0, 2.0)
    monkeypatch.setitem(SAMPLES, "collect_", lambda: collect)


OF_ACTIVE_SETS = [
    "select_topk", "select_topk_by_score", "collect_", "squared_norm", "adamw_", "adamw_compact_"
]  # fmt: skip


@pytest.mark.parametrize("name", OF_ACTIVE_SETS)
def test_opcheck_of_two_runs(cpu, name, active_set_of_two_runs):
    torch.library.opcheck(getattr(torch.ops.id3, name).default, SAMPLES[name]())


@pytest.mark.parametrize("name", [name for name in OPS if name != "collect_"])
def test_backend_agrees_with_the_reference(backend, name):
    """Results and mutated arguments of the sample, bit for bit; collect_ is free in the order it keeps."""
    from id3_kernels import reference

    want_arguments, arguments = SAMPLES[name](), SAMPLES[name]()
    want = getattr(reference, name)(*want_arguments)
    arguments = backend.here(list(arguments))
    got = getattr(backend.table, name)(*arguments)
    for a, b in zip(flat([got, *arguments]), flat([want, *want_arguments]), strict=True):
        oracle.check_bits(a, b, name)


@pytest.mark.parametrize("name", OPS)
def test_compiles_into_one_graph(cpu, name):
    op = getattr(torch.ops.id3, name)
    compiled = torch.compile(lambda *args: op(*args), fullgraph=True, backend="aot_eager")
    eager_arguments, arguments = SAMPLES[name](), SAMPLES[name]()
    want, got = op(*eager_arguments), compiled(*arguments)
    for a, b in zip(flat([got, *arguments]), flat([want, *eager_arguments]), strict=True):
        oracle.check_bits(a, b, name)


def every_public_function(params, grads, active, state):
    """A step in the terms of another trainer, and the rest of the public functions."""
    score = id3_kernels.d3_score(params[0], grads[0], eps=1.0, exp=1.0)
    new, _ = id3_kernels.select_topk(params, grads, active, 3, eps=1.0, exp=2.0)
    best, _ = id3_kernels.select_topk_by_score([score, None], None, 2)
    entries, at_old, at_new = id3_kernels.union(active, new)
    m, v = (torch.zeros(entries.indices.numel()).index_copy(0, at_old, s) for s in state)
    numbers = {"step": 1, "lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
    id3_kernels.adamw_(params, grads, entries, m, v, None, **numbers)
    values = id3_kernels.gather(grads, entries)
    id3_kernels.adamw_compact_(params, values, entries, m, v, None, **numbers)
    id3_kernels.scatter_(grads, best, torch.zeros(2))
    one = Entries(entries.offsets[:2], entries.indices)
    id3_kernels.sampled_weight_grad_(grads[0][:, :5].float(), grads[0].float(), one, values)
    id3_kernels.sampled_embedding_grad_(grads[0].float(), torch.tensor([2, 0, 2, 1, -1]), one, values)
    sparse = id3_kernels.to_sparse_coo(entries, values, [p.shape for p in params])
    again, same = id3_kernels.from_sparse_coo(sparse)
    return [score, *new, *best, *entries, at_new, m, v, values, *again, same, *params, *grads]


def test_every_public_function_is_in_the_example():
    used = inspect.getsource(every_public_function)
    not_kernels = {"Entries", "available_backends", "use_backend"}
    assert {n for n in id3_kernels.__all__ if f"id3_kernels.{n}(" not in used} == not_kernels


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning")
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_public_functions_under_compile(cpu, compiler):
    """Their exact sizes break the graph, as int(tensor) does; the results are the same."""

    def arguments():
        return *two_tensors(), held(), [torch.full((5,), 0.1), torch.full((5,), 0.2)]

    want = every_public_function(*arguments())
    got = torch.compile(every_public_function, backend=compiler)(*arguments())
    for a, b in zip(got, want, strict=True):
        oracle.check_bits(a, b)


def test_public_score_compiles_into_one_graph(cpu):
    def mean_score(param, grad):
        return id3_kernels.d3_score(param * 2, grad, eps=1.0, exp=0.5).mean()

    params, grads = two_tensors()
    compiled = torch.compile(mean_score, fullgraph=True, backend="aot_eager")
    oracle.check_bits(compiled(params[1], grads[1]), mean_score(params[1], grads[1]))


def test_meta_tensors_give_shapes():
    param = torch.empty(3, 4, device="meta", dtype=torch.bfloat16)
    score = torch.ops.id3.d3_score(param, param, 1.0, 2.0)
    assert (score.shape, score.dtype, score.device.type) == ((3, 4), torch.float32, "meta")
