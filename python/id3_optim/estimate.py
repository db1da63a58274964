"""Peak memory of a training step, predicted from a model's configuration without weights or arithmetic.

A forward and backward pass runs on tensors without memory, and the bytes that would be alive are counted.
Not counted: workspace inside a kernel, and memory that an allocator holds in reserve.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import schedules
from .state.layout import Layout
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


def pass_bytes(model: torch.nn.Module, loss_of, release: bool) -> tuple[int, int]:
    """The most bytes alive beside the model in a forward pass, and in a forward and backward pass.

    release: each gradient is freed as the backward pass makes it. Sets every `.grad` to None.
    """
    handles = []
    for p in model.parameters():
        p.grad = None
        if release and p.requires_grad:
            handles.append(p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)))
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        loss = loss_of(model)
        forward = live.peak
        loss.backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return forward, live.peak


def entry_bytes(dtype: torch.dtype, release: bool, entry_ages: bool = False) -> int:
    """Bytes of optimizer state per active entry, the accumulated gradient included.

    entry_ages: the step at which each entry joined is kept, as for bias_correction="entry".
    """
    layout = Layout(True, entry_ages, False, None, release)
    return sum(column.itemsize for column in layout.arrays(dtype).values())


def estimate(
    model: torch.nn.Module, loss_of, budget: int | float, steps: int = 1000, static: bool = False
) -> dict[str, dict[str, int]]:
    """Predicted bytes by kind, `peak` last, for `released` gradients, `dense` ones and torch's `adamw`.

    model: as `model_from` makes it; a model with memory computes the passes. loss_of(model) gives the loss.
    budget, steps, static: as ID3AdamW's, with the uniform schedule. `gradients`: of the largest tensor where
    they are released, else of all. `forward`: the most bytes alive in a forward pass. `pass`: in a forward
    and backward pass, gradients included. The peak is weights, pass, optimizer state and candidates together.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    n_entries, all_gradients = sum(p.numel() for p in trained), sum(p.nbytes for p in trained)
    entries = schedules.resolve_budget(budget, n_entries)
    at_once = entries if static else -(-entries // steps)
    dtype = trained[0].dtype
    own = {
        "released": (entries * entry_bytes(dtype, True), BEST_BYTES * at_once),
        "dense": (entries * entry_bytes(dtype, False), 0),
        "adamw": (2 * all_gradients, 0),
    }
    report = {}
    for name, (state, candidates) in own.items():
        forward, whole = pass_bytes(model, loss_of, release=name == "released")
        kinds = {
            "weights": sum(p.nbytes for p in model.parameters()),
            "gradients": max(p.nbytes for p in trained) if name == "released" else all_gradients,
            "forward": forward,
            "pass": whole,
            "optimizer_state": state,
            "candidates": candidates,
        }
        report[name] = kinds | {"peak": kinds["weights"] + whole + state + candidates}
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

        return estimate(model, loss_of, budget, steps, static)


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
