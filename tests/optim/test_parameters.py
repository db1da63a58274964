"""Parameters that change under the optimizer, have no shape yet, or train nothing."""

import inspect
import itertools

import pytest
import torch
from parameters import one_parameter

from id3_optim import ID3AdamW
from id3_optim.validation import OPTIONS_OF_A_RUN


def begun(shape=(4, 6), **options):
    """A parameter, 12 of whose entries are active, and its optimizer after a step."""
    param = torch.nn.Parameter(torch.linspace(-1, 1, 24).reshape(shape))
    optimizer = ID3AdamW([("weight", param)], budget=12, total_steps=1, **options)
    param.grad = torch.linspace(1, 2, 24).reshape(shape)
    optimizer.step()
    return param, optimizer


OTHERS = {
    "as many entries": (
        torch.zeros(6, 4),
        r"weight: expected shape \(4, 6\) as at the first step, got \(6, 4\)",
    ),
    "one dimension": (torch.zeros(24), r"weight: expected shape \(4, 6\) as at the first step, got \(24,\)"),
    "more entries": (
        torch.zeros(4, 7),
        r"weight: expected shape \(4, 6\) as at the first step, got \(4, 7\)",
    ),
    "expanded": (
        torch.zeros(1, 6).expand(4, 6),
        "weight: expected strides that give each entry its own memory",
    ),
    "overlapping": (
        torch.zeros(9).as_strided((4, 6), (1, 1)),
        "weight: expected strides that give each entry",
    ),
}


@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("with_gradient", [True, False])
@pytest.mark.parametrize("about", list(OTHERS))
def test_other_data_is_refused_at_the_step(about, with_gradient, release):
    param, optimizer = begun(release_gradients=release)
    other, message = OTHERS[about]
    param.grad, param.data = None, other.clone() if other.is_contiguous() else other
    before, state = param.detach().clone(), optimizer.state_dict()["state"][0]["exp_avg"]
    if with_gradient:
        param.grad = torch.ones(other.shape)
    elif release:  # a tensor without a gradient is neither looked at nor updated
        optimizer.step()
        assert torch.equal(param, before)
        return
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert torch.equal(param, before) and optimizer.steps_done == 1
    param.grad, param.data = None, torch.zeros(4, 6)
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], state)
    optimizer.step()


def test_other_strides_are_welcome():
    param, optimizer = begun((2, 3, 2, 2))
    twin, other = begun((2, 3, 2, 2))
    param.data = param.data.to(memory_format=torch.channels_last)
    for _ in range(2):
        optimizer.step()
        other.step()
    assert torch.equal(param, twin)


def test_memory_of_its_own_for_each_entry():
    base = torch.zeros(40)
    welcome = [base.as_strided((3, 4), (13, 3)), torch.zeros(3, 1).expand(3, 1), torch.zeros(0, 4)]
    welcome += [torch.zeros(2, 3, 4, 5).permute(order) for order in itertools.permutations(range(4))]
    welcome += [torch.zeros(8, 8)[::2, ::3], torch.zeros(1, 5).expand(1, 5), torch.zeros(()).expand(1, 1)]
    for tensor in welcome:
        ID3AdamW([torch.nn.Parameter(tensor)], budget=0, total_steps=1)
    for shape, strides in (((4, 3), (0, 1)), ((2, 2), (0, 0)), ((4, 3), (2, 1)), ((5, 2, 2), (1, 2, 10))):
        with pytest.raises(ValueError, match="expected strides that give each entry its own memory"):
            ID3AdamW([torch.nn.Parameter(base.as_strided(shape, strides))], budget=0, total_steps=1)


# --- param groups ------------------------------------------------------------------------------------------


def test_options_of_a_run_are_refused_in_a_group():
    keywords = inspect.signature(ID3AdamW).parameters.values()
    own = {k.name for k in keywords if k.kind is k.KEYWORD_ONLY} - {"maximize"}
    assert own == set(OPTIONS_OF_A_RUN)
    for name in own:
        with pytest.raises(
            ValueError, match=rf"param_groups\[0\]: {name}: expected one for all groups, .*got 3"
        ):
            ID3AdamW([{"params": [one_parameter()], name: 3}], budget=1, total_steps=1)


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ((0.9, torch.tensor(0.99)), "expected two numbers or two one-element tensors"),
        ((0.9,), r"betas: expected two numbers or two one-element tensors, got \(0\.9,\)"),
        ((torch.tensor(0.9), torch.ones(2)), r"betas\[1\]: expected one element, got \(2,\)"),
        (("a", 0.9), r"betas\[0\]: expected a number, got 'a'"),
    ],
)
def test_betas_of_a_group(betas, message):
    optimizer = ID3AdamW([one_parameter()], budget=1, total_steps=1)
    error = TypeError if isinstance(betas[0], str) else ValueError
    with pytest.raises(error, match=rf"param_groups\[1\]: .*{message}"):
        optimizer.add_param_group({"params": [one_parameter()], "betas": betas})
    assert len(optimizer.param_groups) == 1


# --- nothing to select from --------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0.1, 1.0, 5, 0])
@pytest.mark.parametrize("strategy", ["increment", "static", "repeat"])
def test_only_dense_groups_are_trained_as_by_adamw(model, give_gradients, budget, strategy):
    twin = torch.nn.ParameterList([p.detach().clone() for p in model.parameters()])
    groups = [{"params": list(model.parameters()), "dense": True}]
    optimizer = ID3AdamW(groups, lr=1e-2, budget=budget, strategy=strategy, total_steps=3, max_grad_norm=1e9)
    plain = torch.optim.AdamW(twin, lr=1e-2, fused=True)
    for step in range(4):
        give_gradients(step, model.parameters(), twin)
        optimizer.step()
        plain.step()
    assert all(map(torch.equal, model.parameters(), twin))
    assert (optimizer.n_active, optimizer.n_entries, optimizer.steps_done) == (0, None, 4)
    again = ID3AdamW(groups, lr=1e-2, budget=budget, strategy=strategy, total_steps=3, max_grad_norm=1e9)
    again.load_state_dict(optimizer.state_dict())
    assert (again.steps_done, again.n_entries, again.budget) == (4, None, budget)
    assert list(optimizer.touched()) == [] and optimizer.memory_report()["total"] > 0


@pytest.mark.parametrize("options", [{}, {"release_gradients": True}, {"capturable": True}])
def test_frozen_parameters_train_nothing_until_one_is_unfrozen(model, give_gradients, options):
    """As by AdamW. N and the budget are counted at the first step that has something to select from."""
    for p in model.parameters():
        p.requires_grad_(False)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = ID3AdamW(model.parameters(), budget=0.1, total_steps=4, **options)
    optimizer.step()
    optimizer.step()
    assert all(map(torch.equal, model.parameters(), before))
    assert (optimizer.n_entries, optimizer.n_active, optimizer.steps_done) == (None, 0, 2)
    optimizer.load_state_dict(optimizer.state_dict())
    model[2].requires_grad_(True)
    for step in range(2):
        give_gradients(step, model[2].parameters())
        optimizer.step()
    assert (optimizer.n_entries, optimizer.budget, optimizer.n_active) == (1037, 103, 103)


def test_more_entries_than_n_are_refused_at_the_step_that_counts_n(model, give_gradients):
    model.requires_grad_(False)
    optimizer = ID3AdamW(model.parameters(), budget=2000, total_steps=4)
    optimizer.step()
    model[2].requires_grad_(True)
    give_gradients(0, model[2].parameters())
    with pytest.raises(ValueError, match=r"budget: expected 0 to 1037 entries \(all that train\), got 2000"):
        optimizer.step()


# --- lazy modules ------------------------------------------------------------------------------------------


def lazy_model():
    return torch.nn.Sequential(torch.nn.LazyLinear(4), torch.nn.LazyLinear(2))


def test_nothing_of_a_lazy_module_is_touched_before_it_has_a_shape():
    optimizer = ID3AdamW(lazy_model().named_parameters(), budget=1, total_steps=1)
    assert [entry.indices.numel() for entry in optimizer.touched()] == [0] * 4


def give_shapes(model):
    torch.manual_seed(0)
    model(torch.ones(1, 5))


@pytest.mark.parametrize("options", [{}, {"release_gradients": True}, {"strategy": "repeat"}])
def test_lazy_modules(options):
    runs = []
    for lazy in (True, False):
        model = lazy_model()
        if not lazy:
            give_shapes(model)
        optimizer = ID3AdamW(model.named_parameters(), lr=1e-2, budget=0.5, total_steps=3, **options)
        if lazy:
            give_shapes(model)
        for step in range(4):
            torch.manual_seed(step)
            model(torch.randn(3, 5)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append((list(model.parameters()), optimizer.n_entries, optimizer.n_active))
    assert runs[0][1:] == runs[1][1:] == (34, 17)
    assert all(map(torch.equal, runs[0][0], runs[1][0]))


def test_lazy_modules_without_a_shape():
    model = lazy_model()
    optimizer = ID3AdamW(model.named_parameters(), budget=0.5, total_steps=3)
    optimizer.load_state_dict(optimizer.state_dict())  # as Accelerate does
    with pytest.raises(
        ValueError, match=r"0\.weight: expected a parameter with a shape, .*run a forward pass"
    ):
        optimizer.step()
    trained = lazy_model()
    trained(torch.ones(1, 5)).sum().backward()
    other = ID3AdamW(trained.named_parameters(), budget=0.5, total_steps=3)
    other.step()
    with pytest.raises(ValueError, match=r"state\[0\]: expected a parameter with a shape, got Uninitialized"):
        optimizer.load_state_dict(other.state_dict())
    give_shapes(model)
    optimizer.load_state_dict(other.state_dict())
    assert optimizer.n_active == other.n_active == 5


def test_a_lazy_head_among_dense_parameters_may_wait():
    body, head = torch.nn.Linear(3, 3), torch.nn.LazyLinear(2)
    groups = [{"params": body.parameters()}, {"params": head.parameters(), "dense": True}]
    optimizer = ID3AdamW(groups, budget=0.5, total_steps=3)
    body(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    head(body(torch.ones(1, 3))).sum().backward()
    optimizer.step()
    assert optimizer.state[head.weight]["step"] == 1 and optimizer.n_entries == 12
    with pytest.raises(ValueError, match="parameter 4: expected a parameter with a shape"):
        optimizer.add_param_group({"params": torch.nn.LazyLinear(2).parameters()})
    assert len(optimizer.param_groups) == 2 and optimizer.n_entries == 12
