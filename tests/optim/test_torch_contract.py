"""What torch tests of its own optimizers, on ID3AdamW with every entry active beside torch.optim.AdamW.

Here are steps: `torch_contract.py` takes the arguments from torch's `optim_db`. What does not hold is refused
by name: the tests called `refused` say why. `test_torch_contract_state.py` has states, `…_hooks.py` hooks,
`…_schedulers.py` schedulers and averages.
"""

import copy

import pytest
import torch
from torch.testing._internal.common_optimizers import OptimizerErrorEnum
from torch_contract import (
    EVERY_ENTRY,
    INFO,
    REFUSED,
    adamw,
    check_parity,
    descend,
    id3,
    inputs,
    matrix_and_vector,
    quadratic,
)

from id3_optim import ID3AdamW

ABOUT = list(inputs(tensor_lr=True))


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("about", ABOUT)
def test_a_run_is_that_of_adamw(about, dtype, contiguous):
    kwargs = inputs(tensor_lr=True)[about]
    ours, theirs = (matrix_and_vector(contiguous, dtype) for _ in range(2))
    x = torch.randn(5, dtype=dtype)
    losses = descend(id3(ours, **kwargs), ours, x)
    expected = descend(adamw(theirs, **kwargs), theirs, x)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert (losses[-1] > losses[0]) == kwargs.get("maximize", False)
    check_parity(ours, theirs, kwargs.get("lr", 1e-3))


def small_model(dtype):
    torch.manual_seed(1)
    layers = torch.nn.Linear(2, 3), torch.nn.Sigmoid(), torch.nn.Linear(3, 1), torch.nn.Sigmoid()
    model = torch.nn.Sequential(*layers).to(dtype)
    single = torch.rand((), dtype=dtype, requires_grad=True)
    single.grad = torch.full_like(single, 0.3)
    return model, single, torch.nn.Parameter(torch.empty(0, dtype=dtype))


def tolerances(dtype, lr):
    """Low precision: torch keeps moments in the parameter's dtype, ID3AdamW in float32 with a master copy;
    torch's own fused and plain AdamW differ by as much."""
    low = dtype in (torch.bfloat16, torch.float16)
    return {"rtol": 5e-3, "atol": 5e-3 / float(lr)} if low else {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("about", list(inputs()))
def test_missing_gradients_and_a_layer_frozen_for_two_steps(about, dtype):
    kwargs, runs = inputs(dtype)[about], []
    x = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]], dtype=dtype)
    for make in (id3, adamw):
        model, *others = small_model(dtype)
        optimizer, history = make([*model.parameters(), *others], **kwargs), []
        for step in range(7):
            optimizer.zero_grad()
            if step in (3, 5):
                model[2].requires_grad_(step == 5)
            if step != 2:
                model(x).sum().backward()
            optimizer.step()
            history += [p.detach().clone() for p in model.parameters()]
        runs.append([*history, *others])
    lr = kwargs.get("lr", 1e-3)
    check_parity(*runs, lr, **tolerances(dtype, lr))


def test_parameters_of_four_dtypes_in_one_optimizer():
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    torch.manual_seed(0)
    start, grads = torch.rand(2, 3), torch.rand(7, 2, 3)
    runs = []
    for make in (id3, adamw):
        params = [torch.nn.Parameter(start.to(d, copy=True)) for d in dtypes]
        optimizer = make(params, lr=1e-2, eps=0.1)  # torch's own eps for float16
        for g in grads:
            for p in params:
                p.grad = g.to(p.dtype)
            optimizer.step()
        runs.append(params)
    for p, q in zip(*runs, strict=True):
        check_parity([p], [q], 1e-2, **tolerances(p.dtype, 1e-2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_another_default_dtype_changes_nothing(dtype):
    x, runs = torch.ones(5), []
    for default in (torch.float32, dtype):
        torch.set_default_dtype(default)
        try:
            params = matrix_and_vector(dtype=torch.float32)
            optimizer = id3(params)
            descend(optimizer, params, x, 7)
        finally:
            torch.set_default_dtype(torch.float32)
        runs.append((params, optimizer.state_dict()["state"]))
    assert all(map(torch.equal, runs[0][0], runs[1][0]))
    assert [s["exp_avg"].dtype for s in runs[1][1].values()] == [torch.float32] * 2


@pytest.mark.parametrize("about", list(inputs()))
def test_a_groups_numbers_win_over_the_defaults(about):
    """lr and weight decay of a group; a default lr of almost 0 leaves the group without its own as it was."""
    kwargs = {"lr": 1e-3} | inputs()[about]
    runs, irrelevant = [], torch.nn.Parameter(torch.ones(2))
    for make in (id3, adamw):
        weight, bias = matrix_and_vector()
        groups = [
            {"params": [weight], **kwargs},
            {"params": [bias], **kwargs | {"weight_decay": 0.0}},
            {"params": [irrelevant]},
        ]
        irrelevant.grad = torch.rand(2)
        optimizer = make(groups, lr=1e-28)
        for _ in range(20):
            optimizer.zero_grad()
            irrelevant.grad = torch.ones(2)
            quadratic(weight, bias, torch.ones(5)).backward()
            optimizer.step()
        runs.append([weight, bias])
    check_parity(*runs, kwargs["lr"])
    assert torch.equal(irrelevant, torch.ones(2))


@pytest.mark.parametrize("about", ABOUT)
def test_without_gradients_a_step_does_nothing(about):
    frozen = [torch.randn(2, 3) for _ in range(2)]
    before = copy.deepcopy(frozen)
    optimizer = id3(frozen, **inputs(tensor_lr=True)[about])
    assert optimizer.step(lambda: torch.tensor([1.0])).item() == 1.0
    assert all(map(torch.equal, frozen, before))


def test_zero_gradients_move_nothing():
    param = torch.nn.Parameter(torch.randn(5, 1))
    before = param.detach().clone()
    optimizer = id3([param], lr=1e-5)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert torch.equal(param, before)


@pytest.mark.parametrize("scaled", [True, False])
def test_an_overflow_stops_the_step(scaled):
    params = [torch.nn.Parameter(torch.ones(1)) for _ in range(5)]
    optimizer = id3(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.grad_scale = torch.ones(1) if scaled else None
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(p.item() == 1.0 for p in params) and optimizer.steps_done == 0
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    assert all(p.item() < 1.0 for p in params) and optimizer.steps_done == 1


ERRORS = {e.optimizer_error_input.desc: e for e in INFO.optim_error_inputs_func("cpu", torch.float32)}
OWN_WORDS = {  # ID3AdamW's message where it differs from torch's
    "Tensor lr must be 1-element": r"param_groups\[0\]: lr: expected one element, got \(2,\)",
    "beta1 should be between 0 and 1": r"betas\[0\]: expected 0 to below 1, got 1.0",
    "weight_decay should > 0": "weight_decay: expected at least 0, got -1",
    "lr as Tensor doesn't work with foreach & not capturable": "foreach: does not apply to ID3AdamW",
    "betas must be either both floats or both Tensors": "betas: expected two numbers or two one-element",
    r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True": "foreach: does not",
}


@pytest.mark.parametrize("about", list(ERRORS))
def test_torchs_errors_are_errors_here(about):
    case = ERRORS[about]
    assert case.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
    given = case.optimizer_error_input
    params = [torch.nn.Parameter(torch.ones(1))] if given.params is None else given.params
    if issubclass(case.error_type, Warning):
        with pytest.warns(case.error_type, match=case.error_regex):
            id3(params, **given.kwargs)
    else:
        with pytest.raises(case.error_type, match=OWN_WORDS.get(about, case.error_regex)):
            id3(params, **given.kwargs)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("option", sorted(REFUSED))
def test_refused_options_of_adamw(option, inside):
    """No maximum over moments that start at different steps; one fused call; no graph of the step."""
    assert option == "amsgrad" or option in INFO.supported_impls
    params = matrix_and_vector()
    groups = [{"params": [params[0]]}, {"params": [params[1]]} | ({option: True} if inside else {})]
    where = r"param_groups\[1\]: " if inside else "^"
    with pytest.raises(ValueError, match=f"{where}{option}: does not apply to ID3AdamW: "):
        id3(groups, **({} if inside else {option: True}))
    groups[1].update({option: False} if inside else {})
    id3(groups, **({} if inside else {option: None}))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_refused_complex_parameters(dtype):
    """Scores and the order of entries are those of real numbers: give `torch.view_as_real(param)`."""
    param = torch.randn(2, 3, dtype=dtype, requires_grad=True)
    with pytest.raises(
        ValueError, match=r"expected float32, bfloat16, float16 or float64, got torch.complex"
    ):
        id3([param])
    id3([torch.view_as_real(param.detach()).requires_grad_()])


def test_refused_sparse_gradients():
    """As by AdamW itself."""
    param = torch.nn.Parameter(torch.ones(2))
    param.grad = torch.sparse_coo_tensor([[0, 0]], [0.5, 1.5], (2,), check_invariants=True)
    with pytest.raises(ValueError, match="gradient of parameter 0: expected a dense tensor"):
        id3([param]).step()


@pytest.mark.parametrize("shape", [(2**32,), (2, 2**31)])
def test_tensors_of_2_31_entries_are_taken_by_their_rows(shape):
    """An index is an int32, that of a row's entries; AdamW takes any."""
    param = torch.nn.Parameter(torch.empty(shape, device="meta", dtype=torch.float16))
    if len(shape) == 1:
        assert id3([param]).param_groups[0]["params"] == [param]
        return
    with pytest.raises(ValueError, match=r"expected rows of at most 2147483647 entries, got 2147483648"):
        id3([param])


@pytest.mark.parametrize("make", [id3, adamw])
def test_parameters_on_meta_step_without_effect(make):
    """As AdamW's plain loop does (its fused form refuses): `to_empty` makes other parameters."""
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
        for p in model.parameters():
            p.grad = torch.rand_like(p)
    optimizer = make(model.parameters())
    optimizer.step()
    model.to_empty(device="cpu")
    for p in model.parameters():
        torch.nn.init.ones_(p)
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all((p == 1).all() for p in model.parameters())
    make(model.parameters()).step()
    assert all((p < 1).all() for p in model.parameters())


def test_refused_tensors_that_require_no_gradient_but_have_one():
    """N counts what requires gradients. AdamW would train them; with N = 0 nothing would move, silently."""
    param = torch.ones(2)
    param.grad = torch.ones(2)
    with pytest.raises(ValueError, match="parameter 0: expected requires_grad=True with a gradient"):
        id3([param]).step()


def test_a_lazy_layer_is_counted_at_the_first_step():
    torch.manual_seed(0)
    lazy = torch.nn.Sequential(torch.nn.LazyLinear(4), torch.nn.LazyLinear(2))
    optimizer = ID3AdamW(lazy.named_parameters(), **EVERY_ENTRY)
    with pytest.raises(ValueError, match=r"0\.weight: expected a parameter with a shape"):
        optimizer.step()
    x = torch.randn(3, 5)
    lazy(x)
    plain = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 2))
    plain.load_state_dict(lazy.state_dict())
    other = adamw(plain.parameters())
    for _ in range(3):
        for model, o in ((lazy, optimizer), (plain, other)):
            o.zero_grad()
            model(x).square().sum().backward()
            o.step()
    assert optimizer.n_entries == 34
    check_parity(lazy.parameters(), plain.parameters())
