"""The names of the methods: a heuristic and a strategy for each, the pools, and what they train in words."""

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
