"""The model as it was before training, out of the trained one: a reference for preference tuning and RL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .distributed.part import reshard
from .state.originals import originals_in
from .wrappers import check_trained, plain_names, unwrapped


def dense_copies(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Copies of the parameters of dense groups, by name: call before training, for `original_weights`."""
    names = plain_names(model)
    return {names[id(p)]: p.detach().clone() for p in _dense(unwrapped(optimizer)) if id(p) in names}


@contextmanager
def original_weights(
    model: nn.Module, optimizer: Any, dense: Mapping[str, Tensor] | None = None
) -> Iterator[nn.Module]:
    """`with original_weights(model, optimizer):` is the model before training, inside the block.

    Mutates the parameters at the active entries, in O(entries), and puts the trained values back after the
    block, bit for bit and after an error too. Does not synchronise with a GPU. What was computed before the
    block can be differentiated after it; inside the block, compute without gradients. In one process, under
    DistributedDataParallel, and for DTensors, where every rank enters and leaves the block.
    dense: the values of the dense groups before training, as `dense_copies` gave them; {}: these groups keep
    their trained values in the block.
    Raises ValueError for an optimizer with keep_originals=False or dense groups without `dense`, and
    RuntimeError for a step of the optimizer inside the block.
    """
    optimizer, names = unwrapped(optimizer), plain_names(model)
    check_trained(names, optimizer)
    if not optimizer.method.keep_originals:
        raise ValueError("optimizer: expected keep_originals=True, got keep_originals=False")
    params = _dense(optimizer)
    if params and dense is None:
        raise ValueError(f"dense: expected copies of {len(params)} parameters of dense groups, got None; "
                         "dense_copies(model, optimizer) makes them before training")  # fmt: skip
    present = {names[id(p)]: p.data for p in params if id(p) in names}
    _check_dense(dense or {}, present)
    hook = optimizer.register_step_pre_hook(_refuse_step)
    try:
        with originals_in(optimizer.active_set), _copies_in(present, dense or {}):
            yield model
    finally:
        hook.remove()
        reshard(model)  # FSDP2 keeps the whole parameters of some modules, which hold the originals now


class ReferenceModel(nn.Module):
    """The model before training as a module of its own, without weights of its own.

    A call runs `model` with its original weights (`original_weights`), in evaluation mode and without
    gradients. Attributes are those of `model`, `state_dict` gives the original weights, and there are no
    parameters: what would train or average the reference finds none. Give it to TRL as `ref_model`.

    model, optimizer: the model and the ID3AdamW that trains it, or a wrapper that holds one. dense: as for
    `original_weights`. Raises ValueError, at the first call, as `original_weights` does.
    """

    def __init__(self, model: nn.Module, optimizer: Any, dense: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self._source = model, optimizer, dense  # in a tuple the model is no child, which has parameters

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Here and not in `forward`, which TRL replaces by one that calls the modules inside.
        with original_weights(*self._source) as model, _evaluating(model), torch.no_grad():
            return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass, with the weights that it holds: call the module in its place."""
        return self._source[0](*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The original weights: a copy."""
        with original_weights(*self._source) as model:
            state = model.state_dict(*args, **kwargs)
            return {name: v.clone() if isinstance(v, Tensor) else v for name, v in state.items()}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_source":
                raise
            return getattr(self._source[0], name)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards each module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _copies_in(present: Mapping[str, Tensor], copies: Mapping[str, Tensor]) -> Iterator[None]:
    trained = {name: present[name].clone() for name in copies}
    try:
        for name, values in copies.items():
            present[name].copy_(values)
        yield
    finally:
        for name, values in trained.items():
            present[name].copy_(values)


def _dense(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups if group.get("dense") for p in group["params"]]


def _check_dense(dense: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> None:
    for name, values in dense.items():
        if name not in present or present[name].shape != values.shape:
            got = f"{name} of shape {tuple(values.shape)}"
            raise ValueError(f"dense: expected parameters of the dense groups, got {got}")


def _refuse_step(*_: Any) -> None:
    raise RuntimeError("step: does not apply inside original_weights: it would train the original weights")
