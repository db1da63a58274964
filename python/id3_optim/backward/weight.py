"""The weight of a layer with a sparse backward pass: its uses, and where its gradient goes."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from ..heuristics import D3
from ..step.needed import Needed
from ..step.products import Parts
from ..step.release import Release

_WEIGHT = 1  # the place of the weight among a Function's inputs


class Use:
    """One call of a layer that a backward pass is to follow. node: of autograd's graph. shared: another such
    call of the layer is part of the same pass, so that neither has the whole gradient."""

    def __init__(self, node: Any, recomputed: bool):
        self._node, self.recomputed, self.shared = weakref.ref(node), recomputed, False

    def runs(self) -> bool:
        """Whether the running pass reaches the call."""
        node = self._node()
        return node is not None and torch._C._will_engine_execute_node(node)


class Readers:
    """Finds layers that read the same input: it is kept whole anyway, for whichever needs most of it."""

    def __init__(self) -> None:
        self._input: weakref.ref[Tensor] | None = None
        self._last: Weight | None = None

    def note(self, weight: Weight, input: Tensor) -> None:
        if self._input is not None and self._input() is input:
            self._last.shares_input = weight.shares_input = True
        self._input, self._last = weakref.ref(input), weight


class Weight:
    """The weight of one layer, held weakly like the optimizer: without these the layer is a plain one."""

    def __init__(self, param: Tensor, release: Release, readers: Readers):
        self._param, self._release, self._readers = weakref.ref(param), weakref.ref(release), readers
        self.shares_input = False  # another layer reads it too
        self._uses: weakref.WeakSet[Use] = weakref.WeakSet()
        self._shared_in: tuple[int, bool] | None = None  # the last pass that was found to have several uses

    @property
    def release(self) -> Release | None:
        """The hooks of the optimizer that takes the gradient; None when it is gone."""
        return self._release()

    def of(self, param: Tensor) -> bool:
        """Whether it still is this parameter whose gradient an optimizer takes."""
        release = self._release()
        return param is self._param() and release is not None and release.hooked

    # --- forward -------------------------------------------------------------------------------------

    def begin_use(self, ctx: Any) -> Use:
        """Counts a call in a forward pass. A call within a backward pass recomputes one that was counted."""
        use = Use(ctx, recomputed=torch._C._current_graph_task_id() >= 0)
        self._uses.add(use)
        return use

    def keep(self, x: Tensor, held: Tensor | None, transposed: bool) -> tuple[Needed | None, Tensor | None]:
        """What the backward pass needs of the layer's input x [..., features], as far as the forward pass can
        tell: all of it, the features that are needed, or nothing; as [tokens, features].

        held: x as the layer was given it, which other operations may hold; None for a copy. Steps that select
        keep all of x, and find out which layers share an input, so that a pass that is computed again for a
        checkpoint keeps what it kept before.
        """
        release, param = self._release(), self._param()
        tokens = x.reshape(-1, x.shape[-1])
        if release is None or _is_watched(param, release):
            return None, tokens
        if release.selects():
            if held is not None:
                self._readers.note(self, held)
            return None, tokens
        if not release.uses(param):
            return None, None
        # A view's base lives as long as what has made it, attention for one, needs it: a copy saves nothing.
        if held is not None and (self.shares_input or held._base is not None):
            return None, tokens
        needed = release.needed(param, 0 if transposed else 1)
        return needed, tokens if needed is None else tokens.index_select(1, needed.features)

    # --- backward ------------------------------------------------------------------------------------

    def take(self, ctx: Any, parts: Parts) -> Tensor | None:
        """Takes the gradient in the backward pass of the Function whose context is ctx. Returns it whole
        where it is the result, and where it must be added to that of other uses or be scored as one."""
        release, param = self._release(), self._param()
        if not ctx.needs_input_grad[_WEIGHT] or param is None or not param.requires_grad:
            return None  # frozen, or replaced and gone, since the forward pass
        reached = _reached(ctx)
        if reached is False:
            return None
        requested = reached is None or release is None or _is_watched(param, release)
        whole = requested or self._scored_whole(ctx.use)
        self._check_kept(param, parts, requested, whole)
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            self._uses.discard(ctx.use)
        if whole:
            return parts.whole(param)
        release.take_parts(param, parts)
        return None

    def _scored_whole(self, use: Use) -> bool:
        release = self._release()
        if not release.selects(has_gradient=True):
            return False
        return self._shared(use) or not isinstance(release.heuristic, D3)

    def _shared(self, use: Use) -> bool:
        running = torch._C._current_graph_task_id(), use.recomputed
        if running == self._shared_in:  # a recurrent layer has very many
            use.shared = True
            return True
        alike = (other for other in self._uses if other is not use and other.recomputed == use.recomputed)
        for other in [other for other in alike if other.runs()]:
            other.shared = use.shared = True
            self._shared_in = running
        return use.shared

    def _check_kept(self, param: Tensor, parts: Parts, requested: bool, whole: bool) -> None:
        """Raises RuntimeError where the forward pass did not keep what the backward pass needs."""
        release = self._release()
        if parts.complete if whole else release.suffices(param, parts):
            return
        name = release.name(param) if release else "a weight"
        if requested:
            raise RuntimeError(
                f"sparse_backward: expected no use of the whole gradient of {name} (autograd.grad, a hook, a "
                "gradient that is there already) in a step without selection, got one: compute it in a step "
                "that selects, or after remove()"
            )
        raise RuntimeError(
            f"sparse_backward: expected the backward pass of {name} before the optimizer's step, got one "
            "that needs more than the forward pass kept"
        )


def _reached(ctx: Any) -> bool | None:
    """Whether the running pass brings a gradient to the weight; None where this gradient is the result
    (`torch.autograd.grad(loss, weight)`)."""
    node = ctx.next_functions[_WEIGHT][0]
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # torch's answer for a leaf that autograd.grad captures
        return None


def _is_watched(param: Tensor, release: Release) -> bool:
    """Whether something else looks at the gradient: a hook on the weight, or one that is there already."""
    return param.grad is not None or bool(param._backward_hooks) or not release.alone_at(param)
