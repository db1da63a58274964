"""Sparse values in float32 beside the weights of quantised linear layers, unmasked step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import id3_kernels

from ..delta import Delta
from ..delta.file import Change
from ..delta.fingerprint import fingerprint
from ..heuristics import D3
from ..method import whole_number
from ..schedules import Schedule, check_total_steps, resolve_budget, tabulate, uniform
from ..step.passes import Passes
from ..wrappers import plain_name
from .formats import dequantized
from .layer import Candidates, Hook, Layer

Dequantize = Callable[[nn.Module], Tensor | None]


class QuantizedSparse:
    """Trains sparse entries of quantised linear layers, in float32 beside the quantised weights.

    A layer's output becomes that of the quantised layer plus the product with a sparse matrix. Its entries
    are chosen as ID3 does (paper, algorithm 1), by D3 of the dequantised weight, over all quantised layers.
    Everything else of the model stays as it is. `values`, float32 [budget], holds what training adds to the
    weights: give it to any optimizer, with weight_decay=0 (decay would pull to the base). Slots without an
    entry have zero gradients. In a training loop:

        loss.backward(); sparse.join(); optimizer.step(); optimizer.zero_grad()

    Of several backward passes before a step the last one chooses, and gives the first gradient of what joins.

    model: with layers of bitsandbytes (4 and 8 bits) or torchao (int8), or of any kind that `dequantize`
    knows. budget: entries (int) or a share of the quantised weights (float). total_steps, heuristic,
    schedule, select_every: as for ID3AdamW. dequantize: the weight of a module as a plain tensor
    [outputs, inputs], None for a module that is not quantised.
    Raises ValueError for a model without quantised layers or with layers on several devices, another
    heuristic, or an argument out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        budget: int | float,
        total_steps: int,
        heuristic: D3 = D3(eps=1.0, exp=2.0),  # noqa: B008 - frozen
        schedule: Schedule = uniform,
        select_every: int = 1,
        dequantize: Dequantize | None = None,
    ) -> None:
        check_total_steps(total_steps)
        self.total_steps = total_steps
        self._dequantize, self.heuristic = dequantize or dequantized, heuristic
        self._layers = list(self._find(model))
        if not self._layers:
            raise ValueError("model: expected quantised linear layers (bitsandbytes, torchao), got none")
        devices = {str(layer.slots.device) for layer in self._layers}
        if len(devices) > 1:
            raise ValueError(f"model: expected quantised layers on one device, got {sorted(devices)}")
        if not isinstance(heuristic, D3):
            raise ValueError(f"heuristic: expected D3, got {type(heuristic).__name__}")
        n_entries = sum(layer.shape[0] * layer.shape[1] for layer in self._layers)
        self.budget = resolve_budget(budget, n_entries)
        self._select_every = whole_number("select_every", select_every, 1)
        self._targets = tabulate(schedule, total_steps, self.budget, self._select_every)
        device = self._layers[0].slots.device
        self.values = nn.Parameter(torch.zeros(self.budget, device=device))
        self.steps_done, self.n_active = 0, 0
        self._candidates: list[Candidates] = []
        self._passes = Passes()
        hooks = (Hook(layer, self.values, self._backward) for layer in self._layers)
        self._hooks = [h.module.register_forward_hook(k) for h, k in zip(self._layers, hooks, strict=True)]

    def remove(self) -> None:
        """Takes the sparse part off the model again, which then computes what the quantised layers do."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def join(self) -> None:
        """The schedule's entries of this step join, with their gradients: after backward, before the step."""
        wanted = self._wanted()
        if wanted and self._candidates:
            for new in self._best(wanted):
                layer, first = self._layers[new.layer], self.n_active
                slots = slice(first, first + new.indices.numel())
                layer.join(new, first)
                self.values[slots] = 0  # an optimizer of an earlier run of these values may have moved them
                self._gradient()[slots] = new.gradients
                self.n_active = slots.stop
        self._forget()
        self.steps_done += 1

    def delta(self) -> Delta:
        """What training changed, as a delta of the dequantised base: for a model of plain weights.

        The values are rounded to the dtype that the weights dequantise to.
        """
        changes, rows = {}, {}
        for layer in self._layers:
            if layer.indices.numel():
                trained = layer.originals.float() + self.values.detach()[layer.slots]
                parts = layer.indices, trained.to(layer.dtype), layer.originals
                indices, values, originals = (part.cpu() for part in parts)
                changes[layer.name] = Change(layer.shape, layer.dtype, indices, values, originals)
                rows[layer.name] = indices, originals
        settings = {"method": "id3", "base": "dequantized", "step": self.steps_done, "budget": self.budget}
        return Delta(changes, fingerprint(rows), settings)

    def state_dict(self) -> dict[str, Any]:
        """The additive form: what to add to the quantised weights, and how far the run is."""
        layers = {
            layer.name: {
                "indices": layer.indices.clone(),
                "slots": layer.slots.clone(),
                "shape": torch.tensor(layer.shape),
            }
            for layer in self._layers
        }
        state = {"values": self.values.detach().clone(), "layers": layers, "run": self._run()}
        return state | {"steps_done": self.steps_done, "n_active": self.n_active}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a saved state, on the quantised weights that it was trained on. Restore the optimizer's
        state with it. Raises ValueError, before anything changes, for that of another model or run."""
        self._check(state)
        held = self._held(state["layers"])
        if (saved := state["run"]["fingerprint"]) != _fingerprint(held):
            raise ValueError(
                f"state: expected the dequantised weights of the fingerprint {saved}, got other weights"
            )
        for layer in self._layers:
            layer.indices, layer.originals = held[layer.name]
            layer.slots = state["layers"][layer.name]["slots"].to(layer.slots.device)
        self.values.copy_(state["values"])
        self.steps_done, self.n_active = int(state["steps_done"]), int(state["n_active"])
        self._forget()

    def _run(self) -> dict[str, int | float]:
        """What a resumed run must share."""
        run = {"total_steps": self.total_steps, "select_every": self._select_every}
        run |= {"eps": self.heuristic.eps, "exp": self.heuristic.exp}
        rows = {layer.name: (layer.indices, layer.originals) for layer in self._layers}
        return run | {"fingerprint": _fingerprint(rows)}

    def _check(self, state: Mapping[str, Any]) -> None:
        shapes = {name: tuple(row["shape"].tolist()) for name, row in state["layers"].items()}
        own = {layer.name: layer.shape for layer in self._layers}
        if shapes != own or state["values"].shape != self.values.shape:
            got = f"{len(shapes)} layers and {tuple(state['values'].shape)} values"
            expected = f"those of the model, {len(own)}, and {tuple(self.values.shape)} values"
            raise ValueError(f"state: expected layers as {expected}, got {got}")
        for name, value in self._run().items():
            if name != "fingerprint" and state["run"][name] != value:
                raise ValueError(f"{name}: expected {state['run'][name]}, as saved, got {value}")

    def _held(self, saved: Mapping[str, Mapping[str, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
        """Layer's name -> the saved indices, and what the dequantised weight has there."""
        found = {}
        for layer in self._layers:
            indices = saved[layer.name]["indices"].to(layer.indices.device)
            found[layer.name] = indices, self._dequantize(layer.module).reshape(-1)[indices.long()].clone()
        return found

    def _find(self, model: nn.Module) -> Iterator[Layer]:
        number = 0
        for name, module in model.named_modules():
            weight = self._dequantize(module)
            if weight is not None:
                yield Layer(number, plain_name(f"{name}.weight"), module, weight)
                number += 1

    def _wanted(self) -> int:
        """How many entries should join in this step."""
        if self.steps_done % self._select_every:
            return 0
        return self._targets[min(self.steps_done, len(self._targets) - 1)] - self.n_active

    def _gradient(self) -> Tensor:
        if self.values.grad is None:
            self.values.grad = torch.zeros_like(self.values)
        return self.values.grad

    def _backward(self, layer: Layer, grad: Tensor, inputs: Tensor) -> None:
        """Adds the gradients of the layer's entries, and scores its other entries where some should join."""
        if layer.indices.numel():
            values = grad.new_zeros(layer.indices.numel())
            id3_kernels.sampled_weight_grad_(grad, inputs, layer.entries, values)
            self._gradient()[layer.slots] += values
        wanted = self._wanted()
        if wanted > 0:
            self._passes.enter(layer.number, self._begin_pass, within=1)
            self._score(layer, layer.summed(grad.t() @ inputs), wanted)
        layer.uses = max(layer.uses - 1, 0)

    def _begin_pass(self, unfinished: bool) -> None:
        for layer in self._layers:
            layer.whole = None

    def _forget(self) -> None:
        """What a step has used."""
        self._candidates = []
        self._begin_pass(False)

    def _score(self, layer: Layer, whole: Tensor, wanted: int) -> None:
        """The layer's best entries in this pass. whole: the gradient of its weight."""
        weight = self._dequantize(layer.module).float()
        options = {"eps": self.heuristic.eps, "exp": self.heuristic.exp}
        k = min(wanted, weight.numel() - layer.indices.numel())
        found, scores = id3_kernels.select_topk([weight], [whole], layer.entries, k, **options)
        at = found.indices.long()
        picked = whole.reshape(-1)[at], weight.reshape(-1)[at]
        self._candidates = [c for c in self._candidates if c.layer != layer.number]
        self._candidates.append(Candidates(layer.number, found.indices, scores, *picked))

    def _best(self, wanted: int) -> list[Candidates]:
        """The `wanted` best candidates of all layers; ties go to the first layer and index."""
        rows = sorted(self._candidates, key=lambda row: row.layer)
        scores = torch.cat([row.scores for row in rows])
        chosen = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
        chosen[scores.sort(descending=True, stable=True).indices[:wanted]] = True
        parts = chosen.split([row.scores.numel() for row in rows])
        kept = (
            row._replace(**{name: getattr(row, name)[part] for name in row._fields[1:]})
            for row, part in zip(rows, parts, strict=True)
        )
        return [row for row in kept if row.indices.numel()]


def _fingerprint(rows: Mapping[str, tuple[Tensor, Tensor]]) -> int:
    """That of a delta, as a signed number of 64 bits, which a tensor can hold."""
    found = fingerprint({name: (at.cpu(), held.cpu()) for name, (at, held) in rows.items() if at.numel()})
    return found - (found >> 63 << 64)
