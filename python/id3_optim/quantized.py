"""Sparse values in float32 beside the weights of quantised linear layers, unmasked step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import id3_kernels
from id3_kernels import Entries

from .delta import Delta
from .delta.file import Change
from .delta.fingerprint import fingerprint
from .heuristics import D3
from .method import whole_number
from .schedules import Schedule, check_total_steps, resolve_budget, tabulate, uniform
from .wrappers import plain_name

Dequantize = Callable[[nn.Module], Tensor | None]


class _Candidates(NamedTuple):
    """The best entries of one layer in a backward pass, with their scores, gradients and weights."""

    layer: int
    indices: Tensor
    scores: Tensor
    gradients: Tensor
    weights: Tensor


class _Layer:
    """A quantised linear layer, and which entries of its weight have which slots of the values."""

    def __init__(self, number: int, name: str, module: nn.Module, weight: Tensor) -> None:
        self.number, self.name, self.module = number, name, module
        self.shape, self.dtype = tuple(weight.shape), weight.dtype
        self.indices = torch.empty(0, dtype=torch.int32, device=weight.device)
        self.slots = torch.empty(0, dtype=torch.int64, device=weight.device)
        self.originals = weight.new_empty(0)

    @property
    def entries(self) -> Entries:
        n = self.indices.numel()
        return Entries(torch.tensor([0, n], device=self.indices.device), self.indices)

    def sparse(self, values: Tensor) -> Tensor:
        """The sparse part of the weight, in CSR."""
        rows, columns = self.indices.long() // self.shape[1], self.indices.long() % self.shape[1]
        counts = torch.bincount(rows, minlength=self.shape[0])
        begins = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return torch.sparse_csr_tensor(
            begins, columns, values[self.slots], self.shape, check_invariants=False
        )

    def join(self, new: _Candidates, first_slot: int) -> None:
        slots = torch.arange(first_slot, first_slot + new.indices.numel(), device=self.slots.device)
        self.indices, order = torch.cat([self.indices, new.indices]).sort()
        self.slots = torch.cat([self.slots, slots])[order]
        self.originals = torch.cat([self.originals, new.weights.to(self.dtype)])[order]


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
        self._candidates: list[_Candidates] = []
        self._hooks = [layer.module.register_forward_hook(self._hook(layer)) for layer in self._layers]

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
                layer.join(new, first)
                self._gradient()[first : first + new.indices.numel()] = new.gradients
                self.n_active += new.indices.numel()
        self._candidates, self.steps_done = [], self.steps_done + 1

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
            layer.name: {"indices": layer.indices.clone(), "slots": layer.slots.clone()}
            for layer in self._layers
        }
        state = {"values": self.values.detach().clone(), "layers": layers}
        return state | {"steps_done": self.steps_done, "n_active": self.n_active}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a saved state. Raises ValueError, before anything changes, for that of another model."""
        own = {layer.name for layer in self._layers}
        if state["layers"].keys() != own or state["values"].shape != self.values.shape:
            got = f"{len(state['layers'])} layers and {tuple(state['values'].shape)} values"
            expected = f"those of the model, {len(own)}, and {tuple(self.values.shape)} values"
            raise ValueError(f"state: expected layers as {expected}, got {got}")
        for layer in self._layers:
            saved, weight = state["layers"][layer.name], self._dequantize(layer.module)
            layer.indices = saved["indices"].to(layer.indices.device)
            layer.slots = saved["slots"].to(layer.slots.device)
            layer.originals = weight.reshape(-1)[layer.indices.long()].clone()
        self.values.copy_(state["values"])
        self.steps_done, self.n_active = int(state["steps_done"]), int(state["n_active"])

    def _find(self, model: nn.Module) -> Iterator[_Layer]:
        number = 0
        for name, module in model.named_modules():
            weight = self._dequantize(module)
            if weight is not None:
                yield _Layer(number, plain_name(f"{name}.weight"), module, weight)
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

    def _hook(self, layer: _Layer):
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return _Added.apply(output, args[0], self.values, layer, self._backward)

        return hook

    def _backward(self, layer: _Layer, grad: Tensor, inputs: Tensor) -> None:
        """Adds the gradients of the layer's entries, and scores its other entries where some should join."""
        if layer.indices.numel():
            values = grad.new_zeros(layer.indices.numel())
            id3_kernels.sampled_weight_grad_(grad, inputs, layer.entries, values)
            self._gradient()[layer.slots] += values
        wanted = self._wanted()
        if wanted <= 0:
            return
        weight, whole = self._dequantize(layer.module).float(), grad.t() @ inputs
        options = {"eps": self.heuristic.eps, "exp": self.heuristic.exp}
        k = min(wanted, weight.numel() - layer.indices.numel())
        found, scores = id3_kernels.select_topk([weight], [whole], layer.entries, k, **options)
        at = found.indices.long()
        picked = whole.reshape(-1)[at], weight.reshape(-1)[at]
        self._candidates = [c for c in self._candidates if c.layer != layer.number]
        self._candidates.append(_Candidates(layer.number, found.indices, scores, *picked))

    def _best(self, wanted: int) -> list[_Candidates]:
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


class _Added(torch.autograd.Function):
    """The output of a quantised layer and the product of its input with the sparse part."""

    @staticmethod
    def forward(ctx, output, inputs, values, layer, backward):
        ctx.layer, ctx.backward_of_entries = layer, backward
        ctx.save_for_backward(inputs, values)
        if layer.indices.numel() == 0:
            return output.clone()
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        added = (layer.sparse(values.detach()) @ rows.t()).t()
        return output + added.reshape(output.shape).to(output.dtype)

    @staticmethod
    def backward(ctx, grad):
        inputs, values = ctx.saved_tensors
        layer = ctx.layer
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        given = grad.reshape(-1, grad.shape[-1]).float()
        ctx.backward_of_entries(layer, given, rows)
        through = None
        if ctx.needs_input_grad[1] and layer.indices.numel():
            transposed = layer.sparse(values.detach()).to_sparse_coo().t().to_sparse_csr()
            through = (transposed @ given.t()).t().reshape(inputs.shape).to(inputs.dtype)
        return grad, through, None, None, None


def dequantized(module: nn.Module) -> Tensor | None:
    """The weight of a quantised linear layer as a plain tensor [outputs, inputs]; None for another module.

    Knows the layers of bitsandbytes in 4 and in 8 bits, and torchao's tensors in `torch.nn.Linear`.
    """
    weight = getattr(module, "weight", None)
    if weight is None:
        return None
    kind, package = type(module).__name__, type(module).__module__.partition(".")[0]
    if package == "bitsandbytes" and kind == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    if package == "bitsandbytes" and kind == "Linear8bitLt":
        codes, scales = (
            held if held is not None else getattr(weight, name, None)
            for name, held in (("CB", module.state.CB), ("SCB", module.state.SCB))
        )
        if codes is None or scales is None:
            raise ValueError(
                f"model: expected 8-bit weights, got {weight.dtype}; move the model to its device"
            )
        return codes.float() * (scales.float()[:, None] / 127)
    if type(weight.data).__module__.startswith("torchao") and isinstance(module, nn.Linear):
        return weight.data.dequantize()
    return None
