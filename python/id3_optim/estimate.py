"""Peak memory of a training step, predicted from a model's configuration without weights or arithmetic.

A forward and backward pass runs on tensors without memory, and the bytes that would be alive are counted.
Not counted: workspace inside a kernel, and memory that an allocator holds in reserve.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import schedules
from .backward.handle import sparse_backward
from .heuristics import D3
from .state.active_set import Touched
from .state.layout import Layout
from .step.products import BLOCK_ENTRIES, Parts, Product, Rows
from .wrappers import unwrapped

BEST_BYTES = 16  # of a candidate: score, place, gradient


class LiveBytes(TorchDispatchMode):
    """Within the block: `peak`, the most bytes alive at once in tensors that torch's operations made.

    before: tensors that are not counted, and neither are views of them.
    """

    def __init__(self, before: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {StorageWeakRef(t.untyped_storage()) for t in before}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self._count(t.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = StorageWeakRef(storage), storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        weakref.finalize(storage, self._gone, key, size).atexit = False
        self.now += size
        self.peak = max(self.peak, self.now)

    def _gone(self, key: StorageWeakRef, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class Dropped:
    """Takes and drops gradients in place of an optimizer that releases them, in a step that selects.

    largest: the bytes of the largest gradient, or block of one, that it was given.
    """

    heuristic, hooked = D3(), True

    def __init__(self, params: list[torch.nn.Parameter]) -> None:
        self.largest = 0
        self.param_groups = [{"params": params, "dense": False}]
        self._handles = [p.register_post_accumulate_grad_hook(self._drop) for p in params]

    def release_gradients(self, select_from: str) -> Dropped:
        return self

    def touched(self) -> Iterator[Touched]:
        """No entry is ever active."""
        return iter(())

    def selects(self, has_gradient: bool = False) -> bool:
        return True

    def uses(self, param: torch.Tensor) -> bool:
        return True

    def alone_at(self, param: torch.Tensor) -> bool:
        return True

    def suffices(self, param: torch.Tensor, parts: Parts) -> bool:
        return parts.complete

    def take_parts(self, param: torch.Tensor, parts: Parts) -> None:
        """Makes the largest block of the gradient that `parts` makes, which for tensors without memory needs
        no ids of an embedding: as if all tokens were in one block."""
        if isinstance(parts, Product):
            block = next(iter(parts.blocks(param)))[1]
        else:
            rows = param[: max(1, BLOCK_ENTRIES // param.shape[1])]
            block = Rows(parts.ids % len(rows), parts.grads.clone()).whole(rows)
        self.largest = max(self.largest, block.nbytes)

    def _drop(self, param: torch.Tensor) -> None:
        if param.grad is not None:  # a layer that gives its gradient in parts calls the hook all the same
            self.largest = max(self.largest, param.grad.nbytes)
            param.grad = None

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


class PassBytes(NamedTuple):
    """The most bytes alive beside the model in a forward pass, in a forward and backward pass (`whole`), and
    in gradients at once."""

    forward: int
    whole: int
    gradients: int


def pass_bytes(model: torch.nn.Module, loss_of, way: str) -> PassBytes:
    """Measures a pass. Sets every `.grad` to None.

    way: "released" frees each gradient as the backward pass makes it, "sparse" also makes the weight
    gradients of `sparse_backward` in blocks; all gradients stay with any other.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    dropped = Dropped(trained if way in ("released", "sparse") else [])
    layers = sparse_backward(model, dropped) if way == "sparse" else None
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        loss = loss_of(model)
        forward = live.peak
        loss.backward()
    if layers is not None:
        layers.remove()
    dropped.remove()
    model.zero_grad()
    return PassBytes(forward, live.peak, dropped.largest or sum(p.nbytes for p in trained))


def entry_bytes(dtype: torch.dtype, release: bool, entry_ages: bool = False) -> int:
    """Bytes of optimizer state per active entry, the accumulated gradient included.

    entry_ages: the step at which each entry joined is kept, as for bias_correction="entry", entry_warmup and
        prune.
    """
    layout = Layout(True, entry_ages, False, None, release)
    return sum(column.itemsize for column in layout.arrays(dtype).values())


def estimate(
    model: torch.nn.Module,
    loss_of,
    budget: int | float,
    steps: int = 1000,
    static: bool = False,
    select_every: int = 1,
    entry_ages: bool = False,
) -> dict[str, dict[str, int]]:
    """Predicted bytes by kind, `peak` last, of a step that selects, for `sparse` backward passes, `released`
    gradients, `dense` ones and torch's `adamw`.

    model: as `model_from` makes it; a model with memory computes the passes. loss_of(model) gives the loss.
    budget, steps, static, select_every: as ID3AdamW's, with the uniform schedule. entry_ages: as for
    `entry_bytes`. `gradients`: of the largest tensor where they are released, of the largest block or tensor
    where they are sparse, else of all. `forward`: the most bytes alive in a forward pass. `pass`: in a
    forward and backward pass, gradients included. The peak is weights, pass, optimizer state and candidates
    together.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    entries = schedules.resolve_budget(budget, sum(p.numel() for p in trained))
    at_once = entries if static else min(entries, -(-entries * select_every // steps))
    dtype, all_gradients = trained[0].dtype, sum(p.nbytes for p in trained)
    own = {
        "sparse": (entries * entry_bytes(dtype, True, entry_ages), BEST_BYTES * at_once),
        "released": (entries * entry_bytes(dtype, True, entry_ages), BEST_BYTES * at_once),
        "dense": (entries * entry_bytes(dtype, False, entry_ages), 0),
        "adamw": (2 * all_gradients, 0),
    }
    report = {}
    for name, (state, candidates) in own.items():
        held = pass_bytes(model, loss_of, name)
        kinds = {
            "weights": sum(p.nbytes for p in model.parameters()),
            "gradients": held.gradients,
            "forward": held.forward,
            "pass": held.whole,
            "optimizer_state": state,
            "candidates": candidates,
        }
        report[name] = kinds | {"peak": kinds["weights"] + held.whole + state + candidates}
    return report


def model_from(
    source: str | Path | transformers.PreTrainedConfig, dtype: torch.dtype, checkpointing: bool
) -> torch.nn.Module:
    """The model of a configuration (a directory, a config.json or a hub name), within a FakeTensorMode."""
    loaded = isinstance(source, transformers.PreTrainedConfig)
    config = source if loaded else transformers.AutoConfig.from_pretrained(source)
    architecture = (config.architectures or [""])[0]
    kinds = ("CausalLM", "SequenceClassification")
    kind = next((kind for kind in kinds if architecture.endswith(f"For{kind}")), None)
    auto = getattr(transformers, f"AutoModelFor{kind}") if kind else transformers.AutoModel
    model = auto.from_config(config, dtype=dtype)
    if checkpointing:
        options = {"use_reentrant": False, "preserve_rng_state": False}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return model.train()


def estimate_from_config(
    source: str | Path | transformers.PreTrainedConfig,
    budget: int | float,
    batch: int,
    length: int,
    steps: int = 1000,
    static: bool = False,
    bf16: bool = False,
    checkpointing: bool = False,
    select_every: int = 1,
    entry_ages: bool = False,
) -> dict[str, dict[str, int]]:
    """`estimate` for a batch of `batch` texts of `length` tokens.

    Raises ValueError for texts that are longer than the model has positions.
    """
    schedules.check_budget(budget)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model_from(source, torch.bfloat16 if bf16 else torch.float32, checkpointing)
        most = getattr(model.config, "max_position_embeddings", None) or length
        if length > most:
            raise ValueError(f"length: expected at most {most} (max_position_embeddings), got {length}")
        ids = torch.zeros(batch, length, dtype=torch.int64)

        def loss_of(model):
            if type(model).__name__.endswith("ForCausalLM"):
                return model(input_ids=ids, labels=ids, use_cache=False).loss
            return model(input_ids=ids)[0].float().square().mean()

        return estimate(model, loss_of, budget, steps, static, select_every, entry_ages)


class MemoryWatch(transformers.TrainerCallback):
    """Measures the most bytes that a run holds: weights, optimizer state, candidates, and the peak.

    The peak is the growth of the process, on a GPU the bytes that torch allocated there.
    """

    def __init__(self) -> None:
        self._start = _process_peak()
        self.measured: dict[str, int] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        held = unwrapped(optimizer).memory_report()
        candidates = held.pop("candidates", 0)
        now = {
            "weights": sum(p.nbytes for p in model.parameters()),
            "optimizer_state": held["total"] - candidates,
            "candidates": candidates,
        }
        self.measured = {kind: max(size, self.measured.get(kind, 0)) for kind, size in now.items()}

    def on_train_end(self, args, state, control, **kwargs):
        self.measured["peak"] = _process_peak() - self._start


def _process_peak() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_table(report: dict[str, dict[str, int]]) -> str:
    """The report as text, a column for each of its dicts, in MiB."""
    kinds = list(next(iter(report.values())))
    lines = ["".join([f"{'MiB':<18}", *(f"{name:>12}" for name in report)])]
    for kind in kinds:
        cells = [f"{sizes[kind] / 2**20:,.1f}" if kind in sizes else "–" for sizes in report.values()]
        lines.append("".join([f"{kind.replace('_', ' '):<18}", *(f"{cell:>12}" for cell in cells)]))
    return "\n".join(lines)
