"""The names of the methods: a heuristic and a strategy for each, the pools, what they train in words, and
what each needs."""

from __future__ import annotations

from functools import partial

from .heuristics import D3, Bias, Heuristic, Magnitude, Random, largest, snip
from .running import Running

# Name: heuristic and strategy. A heuristic that is a string is computed before training, from examples; one
# that has state is made anew each time.
SELECTIVE: dict[str, tuple[Heuristic | str, str]] = {
    "id3": (D3(), "increment"),
    "id3-sum": (partial(Running, "sum"), "increment"),
    "id3-mean": (partial(Running, "mean"), "increment"),
    "id3-adam": (partial(Running, "adam"), "increment"),
    "repeat-d3": (D3(), "repeat"),
    "static-d3": (D3(), "static"),
    "random": (Random(), "static"),
    "recipe": (Random(), "static"),
    "fish": ("fisher", "static"),
    "pafi": (Magnitude(), "static"),
    "bitfit": (Bias(), "static"),
    "gradient": (D3(1.0, 0.0), "static"),
    "gradient-dynamic": (D3(1.0, 0.0), "repeat"),
    "snip": (snip, "static"),
    "snip-dynamic": (snip, "repeat"),
    "weights": (largest, "static"),
    "weights-dynamic": (largest, "repeat"),
    "diff": ("diff", "static"),
}
# Name: the selective method, and the pool that it selects from. LoRA has no bias, and SNIP scores all of a
# new LoRA 0: B is 0 and A has no gradient. "id3+lora" is IncreLoRA's idea, growth by a score, by entries.
ON_A_POOL = {
    f"{name}+{pool}": (name, pool)
    for pool in ("lora", "adapter")
    for name in SELECTIVE
    if name != "recipe" and (pool != "lora" or name not in ("bitfit", "snip", "snip-dynamic"))
}
ALIASES = {"sparse-adapter": "snip+adapter"}
LORA_RANK = 8  # of the pool
WHOLE = ("full", "head", "lora", "adalora", "shira", "adapter")  # every entry of the pool is trained
DESCRIPTIONS = {
    "full": "every entry",
    "head": "the fresh parameters alone",
    "lora": "LoRA of the largest rank that fits the budget (peft)",
    "adalora": "AdaLoRA whose final ranks fit the budget (peft)",
    "shira": "random entries of each linear layer, as many as LoRA has (peft)",
    "adapter": "a bottleneck adapter in each block, all of it",
    "id3": "the best entries by |g| / (|θ| + eps)^exp, some at each step",
    "id3-sum": "ID3 by the sum of the gradients since the last selection (for select_every)",
    "id3-mean": "ID3 by a running mean of the gradients",
    "id3-adam": "ID3 by the running mean over the root of the running mean square",
    "repeat-d3": "a fresh choice by D3 at every step",
    "static-d3": "one choice by D3 at the first step",
    "random": "random entries",
    "recipe": "random entries outside the embeddings, which the evidence favours for short runs",
    "fish": "the largest mean squared gradients of 1024 examples",
    "pafi": "the smallest weights",
    "bitfit": "bias terms",
    "gradient": "the largest gradients of the first batch",
    "gradient-dynamic": "the largest gradients of every batch",
    "snip": "the largest |θ·g| of the first batch",
    "snip-dynamic": "the largest |θ·g| of every batch",
    "weights": "the largest weights",
    "weights-dynamic": "the largest weights at every step",
    "diff": "what moves farthest while all entries train on 1024 examples",
    "sparse-adapter": "SparseAdapter: snip+adapter",
}

# Learning rates to begin from, not tuned for a task; 1e-3 for a method that is not here.
RATES = {"full": 2e-5, "head": 1e-2, "random": 1e-2, "recipe": 1e-2}


def names() -> list[str]:
    """Every name that `prepare` takes: a method (`id3`), or a method and its pool (`id3+lora`)."""
    return [*WHOLE, *SELECTIVE, *ALIASES, *ON_A_POOL]


def describe(name: str) -> str:
    """What the method trains, in a few words. Raises ValueError for an unknown name."""
    check_name(name)
    if name in DESCRIPTIONS:
        return DESCRIPTIONS[name]
    method, pool = ON_A_POOL[name]
    where = {"lora": f"of LoRA with rank {LORA_RANK}", "adapter": "of bottleneck adapters"}
    return f"{DESCRIPTIONS[method]}, {where[pool]}"


def default_rate(name: str | None) -> float:
    """A learning rate to begin from, not tuned for any task; None: ID3's."""
    return RATES.get(name, 1e-3)


def trains_entries(name: str | None) -> bool:
    """Whether the method trains entries of the model's own weights, not whole tensors or an adapter; None:
    ID3."""
    return name is None or name in SELECTIVE


def needs_examples(name: str) -> bool:
    """Whether the method chooses entries before training, from `examples`."""
    check_name(name)
    method = parts_of(name)[0]
    return method in SELECTIVE and isinstance(SELECTIVE[method][0], str)


def needs_whole_gradients(name: str) -> bool:
    """Whether the method reads whole gradients in each step, so that none may be released before."""
    strategy = SELECTIVE.get(parts_of(name)[0], (None, None))[1]
    return strategy == "repeat" or needs_running(name)


def needs_running(name: str) -> bool:
    """Whether the method scores by the gradients of several steps, by a `Running` that is made anew."""
    return isinstance(SELECTIVE.get(parts_of(name)[0], (None,))[0], partial)


def splits(name: str) -> bool:
    """Whether the method works where FSDP2 splits the parameters: it adds nothing to the model, and a part's
    scores need no more than the part."""
    method, pool = parts_of(name)
    by_part = method in SELECTIVE and not (needs_examples(name) or needs_running(name))
    return not pool and (by_part or method in ("full", "head"))


def check_name(name: str) -> None:
    """Raises ValueError unless `name` is one of `names()`."""
    if name not in names():
        raise ValueError(f"method: expected one of {', '.join(names())}, got {name!r}")


def parts_of(name: str) -> tuple[str, str]:
    """The method, and the pool of a selective method: "" for the model's own entries."""
    return ON_A_POOL.get(ALIASES.get(name, name), (name, ""))
