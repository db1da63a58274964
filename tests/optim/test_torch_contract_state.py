"""What torch tests of its own optimizers, on ID3AdamW with every entry active: states.

See `test_torch_contract.py`. Left out, as they need a GPU: states loaded from another device, which
`test_resume.py` has in other words.
"""

import copy
import io
import pickle

import pytest
import torch
from torch_contract import INFO, NAMES, begun, descend, id3, inputs, matrix_and_vector, same, twin_of

ABOUT = list(inputs(tensor_lr=True))


def without_names(state):
    groups = [{k: v for k, v in g.items() if k != "param_names"} for g in state["param_groups"]]
    return {**state, "param_groups": groups}


@pytest.mark.parametrize("names", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("about", ABOUT)
def test_a_loaded_twin_goes_on_alike(about, names):
    params, optimizer = begun(about, names[0], 10)
    others, twin = twin_of(params, names[1], about)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(10):
        descend(optimizer, params, torch.ones(5), 1)
        descend(twin, others, torch.ones(5), 1)
        assert all(map(torch.equal, params, others))
    assert same(without_names(optimizer.state_dict()), without_names(twin.state_dict()))
    for o, named in ((twin, any(names)), (optimizer, names[0])):
        assert o.state_dict()["param_groups"][0].get("param_names") == (NAMES if named else None)


def test_a_group_that_occurs_twice_is_packed_twice():
    """As in torch; the settings of the run stand in the first group alone."""
    _, optimizer = begun()
    first = optimizer.state_dict()["param_groups"][0]
    optimizer.param_groups.extend(optimizer.param_groups)
    again = optimizer.state_dict()["param_groups"]
    assert len(again) == 2 and same(again[1], {k: v for k, v in first.items() if k != "id3"})


@pytest.mark.parametrize("about", ABOUT)
@pytest.mark.parametrize("named", [False, True])
def test_through_a_file(about, named):
    _, optimizer = begun(about, named)
    state, file = optimizer.state_dict(), io.BytesIO()
    torch.save(state, file)
    for weights_only in (False, True):
        file.seek(0)
        assert same(torch.load(file, weights_only=weights_only), state)


@pytest.mark.parametrize(
    "missing", [*INFO.not_og_supported_flags, "dense", "eps", "betas", "weight_decay", "lr"]
)
def test_an_older_state_lacks_what_came_later(missing):
    params, optimizer = begun("maximize")
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        group.pop(missing, None)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["maximize"] is True and optimizer.param_groups[0]["lr"] == 1e-3
    before = params[0].detach().clone()
    descend(optimizer, params, torch.ones(5), 1)
    assert not torch.equal(params[0], before)


@pytest.mark.parametrize("dense", [False, True])
def test_a_count_of_steps_that_is_no_tensor(dense):
    params = matrix_and_vector()
    optimizer = id3([{"params": [params[0]]}, {"params": [params[1]], "dense": dense}])
    descend(optimizer, params, torch.ones(5), 3)
    others, twin = [torch.nn.Parameter(p.detach().clone()) for p in params], None
    twin = id3([{"params": [others[0]]}, {"params": [others[1]], "dense": dense}])
    state = copy.deepcopy(optimizer.state_dict())
    for own in state["state"].values():
        own["step"] = own["step"].item()
    twin.load_state_dict(state)
    for o, ps in ((optimizer, params), (twin, others)):
        descend(o, ps, torch.ones(5), 1)
    assert all(map(torch.equal, params, others))


def test_state_is_not_empty():
    for optimizer in (begun(steps=0)[1], begun()[1]):
        assert len(optimizer.state) > 0 and all(len(own) > 0 for own in optimizer.state.values())


@pytest.mark.parametrize("about", ABOUT)
def test_copies_have_all_public_attributes_and_print(about):
    _, optimizer = begun(about)
    public = {name for name in vars(optimizer) if not name.startswith("_")}
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert {name for name in vars(other) if not name.startswith("_")} == public
        assert repr(other) == repr(optimizer) and "lr: " in repr(other)
