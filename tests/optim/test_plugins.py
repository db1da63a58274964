"""ID3AdamW in trainers of other packages: against stand-ins for them always, against a package where it is
installed. `make test-plugins` installs each in a fresh environment."""

import copy
import importlib

import plugin_interfaces
import pytest
import torch
import torch.distributed.checkpoint as dcp

from id3_optim import ID3AdamW


def small_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 4))


def train(model, optimizer, first, last):
    for i in range(first, last):
        x = torch.randn(8, 20, generator=torch.Generator().manual_seed(i))
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


# --- trainers that take a dotted path ----------------------------------------------------------------

OPTIONS = {"lr": 1e-2, "weight_decay": 0.0, "budget": 50, "total_steps": 5, "max_grad_norm": 1.0}


def by_verl(model):
    config = pytest.importorskip("verl.workers.config.optimizer", reason="make test-plugins")
    known = {name: OPTIONS[name] for name in ("lr", "weight_decay")}
    more = {name: value for name, value in OPTIONS.items() if name not in known}
    options = {"optimizer_impl": "id3_optim", "optimizer": "ID3AdamW", "override_optimizer_config": more}
    return config.build_optimizer(model.parameters(), config.FSDPOptimizerConfig(**known, **options))


def by_automodel(model):
    optim = pytest.importorskip("nemo_automodel.components.optim.optimizer", reason="make test-plugins")
    [optimizer] = optim.build_optimizer(model, ("id3_optim.ID3AdamW", OPTIONS))
    return optimizer


def by_torchtune(model):
    config = pytest.importorskip("torchtune.config", reason="make test-plugins")
    written = {"_component_": "id3_optim.ID3AdamW", **OPTIONS}
    return config.instantiate(
        importlib.import_module("omegaconf").OmegaConf.create(written), model.parameters()
    )


INSTALLED = {"verl": by_verl, "automodel": by_automodel, "torchtune": by_torchtune}


@pytest.mark.parametrize("name", INSTALLED)
@pytest.mark.parametrize("kind", ["stand-in", "installed"])
def test_a_dotted_path(name, kind):
    """No file of ours: the class takes what each trainer passes, and trains as one made by hand."""
    model, twin = small_model(), small_model()
    if kind == "stand-in":
        build = plugin_interfaces.BY_PATH[name]
        optimizer = build(model.parameters(), "id3_optim.ID3AdamW", OPTIONS)
    else:
        optimizer = INSTALLED[name](model)
    assert type(optimizer) is ID3AdamW
    train(model, optimizer, 0, 5)
    train(twin, ID3AdamW(twin.parameters(), **OPTIONS), 0, 5)
    assert optimizer.n_active == 50 and all(map(torch.equal, model.parameters(), twin.parameters()))


# --- LLaMA-Factory -----------------------------------------------------------------------------------


def test_llamafactory(plugin):
    ours = plugin("llamafactory")
    model, twin = small_model(), small_model()
    for frozen in (model[0].bias, twin[0].bias):
        frozen.requires_grad_(False)
    optimizer = ours.OptimizerPlugin("id3")(model, {"name": "id3", **OPTIONS})
    train(model, optimizer, 0, 5)
    train(twin, ID3AdamW([p for p in twin.parameters() if p.requires_grad], **OPTIONS), 0, 5)
    assert optimizer.n_active == 50 and all(map(torch.equal, model.parameters(), twin.parameters()))


def test_llamafactory_trains_fresh_parameters_whole(plugin):
    ours = plugin("llamafactory")
    fresh = ["2.weight", "2.bias"]
    optimizer = ours.OptimizerPlugin("id3")(small_model(), {"name": "id3", "fresh": fresh, **OPTIONS})
    assert [group["dense"] for group in optimizer.param_groups] == [False, True]


@pytest.mark.parametrize("missing", ["budget", "total_steps"])
def test_llamafactory_without_a_number(plugin, missing):
    ours = plugin("llamafactory")
    options = {"name": "id3", **OPTIONS}
    del options[missing]
    with pytest.raises(ValueError, match=f"optim_config: expected {missing} in it, got \\['"):
        ours.OptimizerPlugin("id3")(small_model(), options)


# --- torchtitan --------------------------------------------------------------------------------------


def container(ours, *models, head="ID3AdamW", **options):
    from torchtitan.components.optimizer import ParamGroupConfig

    dense = {"dense": True} if head == "ID3AdamW" else {}
    groups = [
        ParamGroupConfig(pattern="^2", optimizer_name=head, optimizer_kwargs={"lr": 1e-2, **dense}),
        ParamGroupConfig(pattern=".*", optimizer_name="ID3AdamW", optimizer_kwargs={"lr": 1e-2}),
    ]
    shared = {"ID3AdamW": {"budget": 50, "total_steps": 10, **options}}
    config = ours.ID3OptimizersContainer.Config(
        param_groups=groups, optimizer_factory_kwargs_by_name=shared, implementation="for-loop"
    )
    return ours.ID3OptimizersContainer(config, model_parts=list(models))


@pytest.mark.parametrize("head", ["ID3AdamW", "AdamW"])
def test_torchtitan_goes_on_from_a_checkpoint(plugin, tmp_path, head):
    """The same bits, by torch.distributed.checkpoint, which torchtitan saves with."""
    ours = plugin("torchtitan")
    model, twin = small_model(), small_model()
    optimizers = container(ours, model, head=head)
    assert optimizers.state_dict()  # before the first step: takes none
    train(model, optimizers, 0, 5)
    dcp.save({"model": model, "optimizer": optimizers}, checkpoint_id=tmp_path / "saved")
    resumed = container(ours, twin, head=head)
    dcp.load({"model": twin, "optimizer": resumed}, checkpoint_id=tmp_path / "saved")
    ids = [next(o for o in each.optimizers if isinstance(o, ID3AdamW)) for each in (optimizers, resumed)]
    assert ids[1].steps_done == 5 and ids[1].n_active == ids[0].n_active == 25
    train(model, optimizers, 5, 10)
    train(twin, resumed, 5, 10)
    assert ids[0].n_active == 50 and all(map(torch.equal, model.parameters(), twin.parameters()))


def test_torchtitan_with_its_own_choice_of_implementation(plugin):
    """`fused`, its default, is about torch's optimizers."""
    ours = plugin("torchtitan")
    from torchtitan.components.optimizer import ParamGroupConfig

    group = ParamGroupConfig(pattern=".*", optimizer_name="ID3AdamW", optimizer_kwargs={"lr": 1e-2})
    options = {"ID3AdamW": {"budget": 50, "total_steps": 5}}
    config = ours.ID3OptimizersContainer.Config(
        param_groups=[group], optimizer_factory_kwargs_by_name=options
    )
    model = small_model()
    optimizers = ours.ID3OptimizersContainer(config, model_parts=[model])
    train(model, optimizers, 0, 5)
    assert optimizers.optimizers[0].n_active == 50


def test_torchtitan_refuses_what_does_not_fit(plugin):
    ours = plugin("torchtitan")
    with pytest.raises(ValueError, match=r"model_parts: expected one, .*, got 2; train without pipeline"):
        container(ours, small_model(), small_model())
    optimizers = container(ours, small_model())
    with pytest.raises(ValueError, match="optimizer: expected a checkpoint of ID3OptimizersContainer"):
        optimizers.load_state_dict({"state.0.weight.exp_avg": torch.zeros(1)})
    two = container(ours, small_model(), head="AdamW")
    with pytest.raises(ValueError, match="optimizer: expected states of 1 optimizers, got 2"):
        optimizers.load_state_dict(copy.deepcopy(two.state_dict()))
