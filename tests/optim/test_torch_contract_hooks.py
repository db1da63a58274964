"""torch's hooks around steps, state_dict and load_state_dict, on ID3AdamW; see `test_torch_contract.py`.

torch itself makes generators of strings that it finds in a parameter's state, so hooks here add numbers.
"""

import copy

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch_contract import NAMES, begun, descend, id3, matrix_and_vector, same, twin_of


def test_step_hooks_run_in_order_and_can_be_removed():
    seen = []

    def note(what):
        return lambda optimizer, args, kwargs: seen.append(what)

    optimizer = id3([torch.tensor([1.0, 1.0])])
    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
    ]
    try:
        optimizer.step()
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    optimizer.step()
    assert seen == ["global pre", "pre", "post", "global post"] * 2


def test_a_step_pre_hook_may_change_the_arguments():
    optimizer = id3([torch.nn.Parameter(torch.ones(2))])
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o,), {"closure": lambda: 5.0}))
    assert optimizer.step() == 5.0


def test_hooks_around_state_dict():
    """A pre-hook's addition to `state` is saved and stays; a post-hook sees the settings and may return
    another dict."""
    params, optimizer = begun()
    seen = []

    def add(o):
        o.state["run"] = 7
        o.state[params[0]]["ema"] = torch.ones(2)
        seen.append(o.state[params[0]]["indices"].numel())

    def copied(o, state):
        seen.append(state["param_groups"][0]["id3"]["step"])
        return {**state, "from": "hook"}

    optimizer.register_state_dict_pre_hook(add)
    optimizer.register_state_dict_post_hook(copied)
    state = optimizer.state_dict()
    assert seen == [50, 3] and state["from"] == "hook" and state["state"]["run"] == 7
    assert set(optimizer.state[params[0]]) == {"ema"} and params[1] not in optimizer.state
    others, twin = twin_of(params)
    twin.load_state_dict(state)
    assert twin.state["run"] == 7 and torch.equal(twin.state[others[0]]["ema"], torch.ones(2))
    descend(twin, others, torch.ones(5), 1)
    again = twin.state_dict()["state"]
    assert again["run"] == 7 and torch.equal(again[0]["ema"], torch.ones(2)) and "ema" not in again[1]
    assert twin.memory_report()["total"] == optimizer.memory_report()["total"]


def test_names_of_id3s_own_state_are_refused_to_hooks():
    params, optimizer = begun()
    optimizer.state[params[0]]["exp_avg"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"state: expected another name for what is added .*, got 'exp_avg'"):
        optimizer.state_dict()
    del optimizer.state[params[0]]["exp_avg"]
    assert optimizer.state_dict()["state"][0]["exp_avg"].numel() == 50


def test_hooks_before_loading_may_change_or_replace_the_state():
    def change(o, state):
        state["param_groups"][0]["lr"] = 0.002

    def replace(o, state):
        other = copy.deepcopy(state)
        other["param_groups"][0]["lr"] = 0.003
        other["state"][0]["exp_avg"].zero_()
        return other

    params, optimizer = begun()
    state = optimizer.state_dict()
    _, twin = twin_of(params)
    twin.register_load_state_dict_pre_hook(change)
    twin.load_state_dict(copy.deepcopy(state))
    assert twin.param_groups[0]["lr"] == 0.002
    assert twin.state_dict()["state"][0]["exp_avg"].abs().sum() > 0
    twin.register_load_state_dict_pre_hook(replace, prepend=True)
    twin.load_state_dict(copy.deepcopy(state))
    assert twin.param_groups[0]["lr"] == 0.002  # `change` came second
    assert twin.state_dict()["state"][0]["exp_avg"].abs().sum() == 0


def test_checks_see_what_the_hooks_before_loading_made():
    params, optimizer = begun()
    _, twin = twin_of(params)
    wrong = copy.deepcopy(optimizer.state_dict())
    wrong["param_groups"][0]["id3"]["strategy"] = "increment"

    def mend(o, state):
        state["param_groups"][0]["id3"]["strategy"] = "static"

    with pytest.raises(ValueError, match="strategy: expected static as in the optimizer, got increment"):
        twin.load_state_dict(wrong)
    handle = twin.register_load_state_dict_pre_hook(mend)
    twin.load_state_dict(copy.deepcopy(wrong))
    handle.remove()

    def spoil(o, state):
        state["state"][0]["indices"] = state["state"][0]["indices"].flip(0)

    twin.register_load_state_dict_pre_hook(spoil)
    before = copy.deepcopy(twin.state_dict())
    with pytest.raises(ValueError, match=r"state\[0\]: indices: expected ascending"):
        twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert same(twin.state_dict(), before)


def test_hooks_after_loading_see_the_whole_state_and_may_add_to_it():
    params, optimizer = begun()
    others, twin = twin_of(params)
    seen = []

    def look(o):
        seen.append((o.n_active, o.steps_done, o.state_dict()["state"][1]["indices"].numel()))
        o.state["loaded"] = True
        o.state[others[1]]["note"] = 3

    twin.register_load_state_dict_post_hook(look)
    twin.load_state_dict(optimizer.state_dict())
    assert seen == [(60, 3, 10)]
    descend(twin, others, torch.ones(5), 2)
    state = twin.state_dict()["state"]
    assert state["loaded"] is True and state[1]["note"] == 3
    twin.load_state_dict(twin.state_dict())
    assert twin.steps_done == 5 and twin.state["loaded"] is True and twin.state[others[1]] == {"note": 3}


def test_hooks_may_add_to_a_dense_parameter_before_its_first_gradient():
    param, head = matrix_and_vector()
    optimizer = id3([{"params": [param]}, {"params": [head], "dense": True}])
    optimizer.state[head]["note"] = 3
    descend(optimizer, (param, head), torch.ones(5), 2)
    assert optimizer.state[head]["step"] == 2 and optimizer.state[head]["note"] == 3
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state[head]["note"] == 3


def by_names(lookup):
    """A hook as in torch's page on loading by name: each parameter takes the state of one that was saved."""

    def adapt(optimizer, state):
        saved, adapted = state["param_groups"][0], copy.deepcopy(optimizer.state_dict())
        group = adapted["param_groups"][0]
        group.update({k: v for k, v in saved.items() if k not in ("params", "param_names")})
        ids = dict(zip(saved["param_names"], saved["params"], strict=True))
        for own, name in zip(group["params"], group["param_names"], strict=True):
            if name in lookup:
                adapted["state"][own] = copy.deepcopy(state["state"][ids[lookup[name]]])
        return adapted

    return adapt


@pytest.mark.parametrize("strict", [True, False])
def test_loading_by_name_into_other_layers(strict):
    """Two experts take the state of one layer; without `strict` a layer may begin without a state."""
    params, optimizer = begun(named=True)
    layers = ["a", "b"] if strict else ["a", "b", "new"]
    experts = {f"{layer}.{n}": torch.nn.Parameter(p.detach().clone())
               for layer in layers for n, p in zip(NAMES, params, strict=True)}  # fmt: skip
    twin = id3(list(experts.items()))
    lookup = {f"{layer}.{name}": name for layer in "ab" for name in NAMES}
    twin.register_load_state_dict_pre_hook(by_names(lookup))
    twin.load_state_dict(optimizer.state_dict(), strict=strict)
    assert twin.param_groups[0]["param_names"] == list(experts) and twin.n_active == 2 * optimizer.n_active
    descend(optimizer, params, torch.ones(5), 1)
    for layer in layers[:2]:
        descend(twin, [experts[f"{layer}.{n}"] for n in NAMES], torch.ones(5), 1)
    assert torch.equal(experts["a.weight"], params[0]) and torch.equal(experts["b.bias"], params[1])


def test_a_parameter_without_a_state_is_refused():
    params, optimizer = begun()
    state = copy.deepcopy(optimizer.state_dict())
    del state["state"][1]
    others, twin = twin_of(params)
    with pytest.raises(
        ValueError, match=r"state\[1\]: expected the state of this parameter, got none; with st"
    ):
        twin.load_state_dict(state)
    twin.load_state_dict(state, strict=False)
    assert twin.n_active == 50
    descend(twin, others, torch.ones(5), 1)
    assert twin.n_active == 60
