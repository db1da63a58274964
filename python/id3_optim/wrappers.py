"""The plain model and the ID3AdamW inside the wrappers of trainers."""

from collections.abc import Container, Iterable
from typing import Any

from torch import Tensor, nn

from .distributed.part import reshard
from .ranks import check_module


def plain_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by their names in the plain model (without `module.` and `_orig_mod.`).

    A tied parameter is there under each of its names.
    Raises ValueError if two parameters have one plain name, or if FullyShardedDataParallel wraps a module.
    """
    model = unwrapped_model(model)
    reshard(model)
    found: dict[str, nn.Parameter] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        check_module(name)
        plain = plain_name(name)
        if found.setdefault(plain, param) is not param:
            raise ValueError(f"{plain}: expected one parameter of this name in the model, got two")
    return found


def unwrapped_model(model: nn.Module) -> nn.Module:
    """The plain model inside wrappers such as torch.compile's."""
    while (inner := _wrapped(model)) is not None:
        model = inner
    return model


def plain_name(name: str) -> str:
    """The name without the parts `_orig_mod`, which torch.compile adds."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def check_holds(known: Container[int], params: Iterable[Tensor]) -> None:
    """Raises ValueError if a trained parameter is not in the model. known: ids of its parameters."""
    for param in params:
        if id(param) not in known:
            shape = tuple(param.shape)
            raise ValueError(f"model: expected every trained parameter in it, got none for {shape}")


def check_trained(names: dict[int, str], optimizer: Any) -> None:
    """Raises ValueError if the model (`plain_names`) has no parameter of the optimizer's."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if not any(id(p) in names for p in params):
        raise ValueError(
            f"model: expected the one that the optimizer trains, got one with none of its {len(params)} "
            "parameters; a wrapper such as FSDP replaces them: build the optimizer after it"
        )


def _wrapped(model: nn.Module) -> nn.Module | None:
    """The module inside a wrapper, None where there is no wrapper.

    Looks at the module's children and not at its attributes: a PeftModel forwards unknown attributes.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return model.module
    inside = ("_orig_mod", "_forward_module")  # torch.compile's, Lightning Fabric's
    children = dict(model.named_children())
    return next((children[name] for name in inside if name in children), None)


def plain_names(model: nn.Module) -> dict[int, str]:
    """id of a parameter → its name in the plain model, the first name where it is tied."""
    names: dict[int, str] = {}
    for name, param in plain_parameters(model).items():
        names.setdefault(id(param), name)
    return names


def unwrapped(optimizer: Any) -> Any:
    """The ID3AdamW itself, or inside wrappers such as Accelerate's that hold it as `optimizer`.

    Raises TypeError for another optimizer.
    """
    inner = optimizer
    while not hasattr(inner, "touched"):
        if not hasattr(inner, "optimizer"):
            raise TypeError(f"optimizer: expected an ID3AdamW, got {type(inner).__name__}")
        inner = inner.optimizer
    return inner
