"""The plain model and the ID3AdamW inside the wrappers of trainers and of torch."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


def plain_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by their names in the plain model, without `module.` and `_orig_mod.`.

    A tied parameter is there under each of its names. Raises ValueError if two parameters have one plain
    name.
    """
    while (inner := _wrapped(model)) is not None:
        model = inner
    found: dict[str, nn.Parameter] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        plain = plain_name(name)
        if found.setdefault(plain, param) is not param:
            raise ValueError(f"{plain}: expected one parameter of this name in the model, got two")
    return found


def plain_name(name: str) -> str:
    """The name without `_orig_mod`, which torch.compile puts before the modules that it compiled."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def check_holds(names: dict[int, str], params: Iterable[Tensor]) -> None:
    """Raises ValueError if a trained parameter has no name in the model. names: from `plain_names`."""
    for param in params:
        if id(param) not in names:
            shape = tuple(param.shape)
            raise ValueError(f"model: expected every trained parameter in it, got none for {shape}")


def _wrapped(model: nn.Module) -> nn.Module | None:
    """The module inside a wrapper, None where there is no wrapper.

    Looked up among the module's children, since a PeftModel forwards unknown attributes to its base model.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return model.module
    inside = ("_orig_mod", "_forward_module")  # torch.compile's, Lightning Fabric's
    return next((model._modules[name] for name in inside if name in model._modules), None)


def plain_names(model: nn.Module) -> dict[int, str]:
    """id of a parameter → its name in the plain model, the first name of a tied parameter."""
    names: dict[int, str] = {}
    for name, param in plain_parameters(model).items():
        names.setdefault(id(param), name)
    return names


def unwrapped(optimizer: Any) -> Any:
    """The ID3AdamW inside Accelerate's or another wrapper that keeps it as `optimizer`.

    Raises TypeError for any other optimizer.
    """
    inner = optimizer
    while not hasattr(inner, "touched"):
        if not hasattr(inner, "optimizer"):
            raise TypeError(f"optimizer: expected an ID3AdamW, got {type(inner).__name__}")
        inner = inner.optimizer
    return inner
