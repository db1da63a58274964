"""The weight of a layer with a sparse backward pass: its uses, and where its gradient goes."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from ..heuristics import D3
from ..step.products import Parts
from ..step.release import Release


class Use:
    """One call of a layer that a backward pass is to follow. shared: another such call of the layer may be
    part of the same pass, so that neither has the whole gradient."""

    def __init__(self, recomputed: bool, shared: bool):
        self.recomputed, self.shared = recomputed, shared


class Weight:
    """The weight of one layer, held weakly like the optimizer: without these the layer is a plain one."""

    def __init__(self, param: Tensor, release: Release):
        self._param, self._release = weakref.ref(param), weakref.ref(release)
        self._uses: weakref.WeakSet[Use] = weakref.WeakSet()

    def of(self, param: Tensor) -> bool:
        """Whether it still is this parameter whose gradient an optimizer takes."""
        release = self._release()
        return param is self._param() and release is not None and release.hooked

    def begin_use(self) -> Use:
        """Counts a call in a forward pass. A call within a backward pass recomputes one that was counted."""
        recomputed = torch._C._current_graph_task_id() >= 0
        others = [use for use in self._uses if use.recomputed == recomputed]
        for use in others:
            use.shared = True
        use = Use(recomputed, shared=bool(others))
        self._uses.add(use)
        return use

    def end_use(self, use: Use) -> None:
        self._uses.discard(use)

    def needs_input(self) -> bool:
        """Whether the backward pass needs the layer's input, as far as the forward pass can tell."""
        release = self._release()
        return release is None or release.uses(self._param())

    def take(self, use: Use, parts: Parts) -> Tensor | None:
        """Takes the gradient. Returns it whole where it must be added to the other uses or scored as one."""
        release, param = self._release(), self._param()
        if not parts.complete and (release is None or release.uses(param)):
            name = release.name(param) if release else "a weight"
            raise RuntimeError(
                f"sparse_backward: expected the backward pass of {name} before the optimizer's step, got one "
                "after it: the forward pass did not keep the input"
            )
        if release is None or (
            release.selects(has_gradient=True) and (use.shared or not isinstance(release.heuristic, D3))
        ):
            return parts.whole(param)
        release.take_parts(param, parts)
        return None
