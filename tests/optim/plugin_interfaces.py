"""What other trainers call, for machines that lack them: the interface alone, written anew from their sources.

| package | what is called | repository, file and commit |
|---|---|---|
| axolotl | `BasePlugin.post_trainer_create`, `OptimizerMixin.create_optimizer` | axolotl-ai-cloud/axolotl, `src/axolotl/train.py`, `integrations/base.py`, `core/trainers/mixins/optimizer.py`, 067b021 |
| LLaMA-Factory | `OptimizerPlugin(name)(model, optim_config)` | hiyouga/LLaMA-Factory, `src/llamafactory/v1/core/base_trainer.py`, `v1/utils/plugin.py`, ff6d4d1 |
| torchtitan | `OptimizersContainer` | pytorch/torchtitan, `torchtitan/components/optimizer/optimizer.py`, b5bcd76 |
| verl | `build_optimizer` | verl-project/verl, `verl/workers/config/optimizer.py`, 1dda039 |
| NeMo AutoModel | `OptimizerFromFactoryConfig.build` | NVIDIA-NeMo/Automodel, `nemo_automodel/components/optim/optimizer.py`, 36044ad |
| torchtune | `config.instantiate(cfg.optimizer, …)` | pytorch/torchtune, `recipes/full_finetune_single_device.py`, bd2a0fc |
"""  # noqa: E501 - a table

import importlib
import importlib.util
import re
import sys
import types
from dataclasses import dataclass, field

import pytest
import torch


def install(monkeypatch, package: str) -> None:
    """Makes the stand-in for a package importable until the test ends."""
    for name, contents in MODULES[package].items():
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            parent = ".".join(parts[:i])
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        vars(sys.modules[name]).update(contents)


def load(monkeypatch, module: str):
    """A module of `id3_optim.integrations`, imported anew, and forgotten when the test ends."""
    name = f"id3_optim.integrations.{module}"
    monkeypatch.setitem(sys.modules, name, None)
    del sys.modules[name]
    return importlib.import_module(name)


@pytest.fixture(params=["stand-in", "installed"])
def plugin(request, monkeypatch):
    """A function that makes a package importable, and loads our module for it."""

    def prepare(name, ours=None):
        if request.param == "stand-in":
            install(monkeypatch, name)
        elif importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: make test-plugins")
        return load(monkeypatch, ours or name)

    return prepare


# --- axolotl -----------------------------------------------------------------------------------------


class AxolotlPlugin:
    """Plugins override what they need."""


# --- LLaMA-Factory -----------------------------------------------------------------------------------


class OptimizerPlugin:
    """A name, which leads to the function that was registered under it."""

    registry: dict = {}  # noqa: RUF012 - one for the process, as there

    def __init__(self, name):
        self.name = name

    def register(self):
        def keep(function):
            self.registry[self.name] = function
            return function

        return keep

    def __call__(self, *args):
        return self.registry[self.name](*args)


# --- torchtitan --------------------------------------------------------------------------------------


@dataclass
class ParamGroupConfig:
    pattern: str
    optimizer_name: str
    optimizer_kwargs: dict = field(default_factory=dict)


class OptimizersContainer(torch.optim.Optimizer):
    """Param groups by patterns of names; one optimizer for all groups of a name."""

    @dataclass(kw_only=True, slots=True)
    class Config:
        param_groups: list = field(default_factory=list)
        implementation: str = "fused"
        optimizer_factory_kwargs_by_name: dict = field(default_factory=dict)

    @staticmethod
    def _resolve_optimizer_factory(name):
        return {"AdamW": torch.optim.AdamW}[name]

    def __init__(self, config, *, model_parts):
        self.optimizers, self.model_parts, taken = [], model_parts, {}
        for part in model_parts:
            groups = {}
            for wanted in config.param_groups:
                named = [
                    (name, p)
                    for name, p in part.named_parameters()
                    if id(p) not in taken and re.search(wanted.pattern, name)
                ]
                taken |= {id(p): p for _, p in named}
                names, params = [name for name, _ in named], [p for _, p in named]
                choice = {"fused": config.implementation == "fused", "foreach": False}
                group = {"params": params, "param_names": names, **choice, **wanted.optimizer_kwargs}
                groups.setdefault(wanted.optimizer_name, []).append(group)
            for name, own in groups.items():
                options = config.optimizer_factory_kwargs_by_name.get(name, {})
                self.optimizers.append(self._resolve_optimizer_factory(name)(own, **options))
        super().__init__(list(taken.values()), {})

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none=True):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)


# --- trainers that take a dotted path ----------------------------------------------------------------


def verl(params, path, options):
    """betas goes in for every optimizer with `adam` in its name; the rest by `override_optimizer_config`."""
    module, _, name = path.rpartition(".")
    options = dict(options)
    known = {key: options.pop(key) for key in ("lr", "weight_decay") if key in options}
    known |= {"betas": [0.9, 0.999]} if "adam" in name.lower() else {}
    return getattr(importlib.import_module(module), name)(params, **(known | options))


def automodel(params, path, options):
    """A list of parameters by keyword; `foreach=False` under tensor parallelism."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)(params=list(params), **options, foreach=False)


def torchtune(params, path, options):
    """Parameters by position until release 0.6.1, by keyword on the main branch."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)(params=params, **options)


MODULES = {
    "axolotl": {"axolotl.integrations.base": {"BasePlugin": AxolotlPlugin}},
    "llamafactory": {
        "llamafactory.v1.plugins.trainer_plugins.optimizers.optimizer": {"OptimizerPlugin": OptimizerPlugin}
    },
    "torchtitan": {
        "torchtitan.components.optimizer": {
            "OptimizersContainer": OptimizersContainer,
            "ParamGroupConfig": ParamGroupConfig,
        }
    },
}
BY_PATH = {"verl": verl, "automodel": automodel, "torchtune": torchtune}
