"""Which options of ID3AdamW do not go together, or not with a device or with several processes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from . import pieces
from .distributed.part import is_split
from .heuristics import D3, Bias, Fisher, Magnitude, Random
from .method import Method
from .param_groups import named_parameters
from .ranks import check_builder, world_size
from .relative import Relative
from .running import Running
from .state.layout import Layout

SELECT_FROM = ("last", "max")


def check_options(method: Method, release_gradients: bool, select_from: str, capturable: bool) -> None:
    """Refuses ZeroRedundancyOptimizer, and options of ID3AdamW that cannot work together."""
    check_builder()
    _check_release(release_gradients, select_from, method)
    _check_capturable(capturable, method, release_gradients)
    if method.prune is not None:
        _check_prune(method)


def _check_release(release_gradients: bool, select_from: str, method: Method) -> None:
    if select_from not in SELECT_FROM:
        raise ValueError(f"select_from: expected one of {', '.join(SELECT_FROM)}, got {select_from!r}")
    if not release_gradients:
        if select_from != "last":
            raise ValueError(f"select_from: {select_from!r} needs release_gradients=True")
        return
    if method.strategy == "repeat":
        raise ValueError(
            "release_gradients: does not apply to strategy 'repeat': entries that come back would need "
            "gradients that are gone"
        )
    if isinstance(method.heuristic, Running):
        raise ValueError(
            "release_gradients: does not apply to the heuristic Running: it reads whole gradients before "
            "each step"
        )
    for name in ("tensor_cap", "prune"):
        if getattr(method, name) is not None:
            raise ValueError(
                f"{name}: does not apply to release_gradients: candidates are collected while entries may "
                "still leave or fill a tensor's share"
            )


def _check_capturable(capturable: bool, method: Method, release_gradients: bool) -> None:
    if capturable and method.strategy == "repeat":
        raise ValueError(
            "capturable: does not apply to strategy 'repeat': the host has to know how many entries stay"
        )
    if capturable and method.prune is not None:
        raise ValueError("capturable: does not apply to prune: the host has to know how many entries leave")
    if capturable and isinstance(method.heuristic, Running) and method.heuristic.kind != "mean":
        raise ValueError(
            f"capturable: does not apply to Running({method.heuristic.kind!r}): the host counts its steps; "
            "'mean' has no count"
        )
    if capturable and release_gradients:
        raise ValueError("capturable: does not apply to release_gradients: no graph replays its hooks")


def _check_prune(method: Method) -> None:
    if method.strategy == "repeat":
        raise ValueError("prune: does not apply to strategy 'repeat': each of its choices is a new one")
    if not method.keep_originals:
        raise ValueError("prune: needs keep_originals=True, the values that entries get back")
    if method.prune.every % method.select_every:
        raise ValueError(
            f"prune: expected every to be a multiple of select_every, {method.select_every}, so that places "
            f"are filled at once, got {method.prune.every}"
        )


def check_ranks(method: Method, alone: bool) -> None:
    """Refuses, where ranks hold parts of the parameters, what looks at a whole tensor or at all entries."""
    for name in ("tensor_cap", "prune"):
        if not alone and getattr(method, name) is not None:
            raise ValueError(f"{name}: does not apply to DTensor parameters: no rank sees all their entries")
    if not alone and isinstance(method.heuristic, Relative | Running):
        kind = type(method.heuristic).__name__
        raise ValueError(f"heuristic: does not apply to DTensor parameters: {kind} needs whole tensors")


def check_large(method: Method, groups: list[dict[str, Any]]) -> None:
    """Refuses, where a parameter has pieces, what looks at whole tensors, and DTensors beside it."""
    named = list(named_parameters([group for group in groups if not group["dense"]]))
    large = (name for name, p in named if pieces.index_dtype(p) == torch.int64 and not is_split(p))
    if (name := next(large, None)) is None:
        return
    if method.tensor_cap is not None:
        raise ValueError(f"tensor_cap: does not apply to {name}: it has more entries than int32 counts")
    if not isinstance(method.heuristic, D3 | Magnitude | Fisher | Random | Bias):
        raise ValueError(
            f"heuristic: does not apply to {name}: it has more entries than int32 counts, and a function "
            "scores whole tensors"
        )
    if any(is_split(p) for _, p in named):
        raise ValueError(f"{name}: expected at most 2^31 - 1 entries beside DTensor parameters, got more")


def check_devices(layout: Layout, tensors: Iterable[torch.Tensor], dense: bool = False) -> None:
    """Refuses, where the step is to be captured, tensors that no graph can hold. dense: torch trains them."""
    if not layout.capturable:
        return
    tensors = list(tensors)
    if any(map(is_split, tensors)):
        raise ValueError(
            "capturable: does not apply to DTensor parameters: the host has to know how many entries each "
            "rank gets"
        )
    devices = sorted({str(t.device) for t in tensors})
    if len(devices) > 1:
        raise ValueError(f"capturable: expected all parameters on one device, got {', '.join(devices)}")
    on_gpu = any(t.device.type != "cpu" for t in tensors)
    if on_gpu and layout.backend == "reference":
        raise ValueError("capturable: expected a backend with GPU kernels, got 'reference'")
    if on_gpu and not dense and any(t.dtype == torch.float64 for t in tensors):
        raise ValueError(
            "capturable: expected float32, bfloat16 or float16 parameters, got float64, which GPUs leave to "
            "the reference kernels"
        )


def check_capture(capturable: bool, begun: bool) -> None:
    """To be called under a CUDA graph capture: raises RuntimeError for one that could not be replayed."""
    if not capturable:
        raise RuntimeError("step: expected capturable=True under CUDA graph capture, got False")
    if not begun:
        raise RuntimeError(
            "step: expected a step before the CUDA graph capture (it makes the state), got none"
        )


def check_reduced(params: Iterable[torch.Tensor]) -> None:
    """Refuses hooks on gradients that are not yet those of all processes: a DTensor's are."""
    if world_size() > 1 and not all(map(is_split, params)):
        raise ValueError(
            "release_gradients: expected one process, or parameters of FSDP2, got "
            f"{world_size()} processes: a hook sees the gradients of its own process alone; give ID3AdamW a "
            "process_group and the plain model, without DistributedDataParallel, or use fully_shard"
        )
