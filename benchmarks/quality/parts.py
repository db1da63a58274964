"""The grids of the evidence: which methods, budgets, learning rates and seeds, each an `id3-optim compare`.

Every method of a part has as many learning rates, doubling, around the place where it works; the report names
the methods whose best one is the first or the last.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.quality.tasks import TASKS

MAIN_BUDGET = "0.17%"
# Seven learning rates for each kind of method.
_RATES = {
    "full": "5e-6:3.2e-4",
    "whole": "4e-4:2.56e-2",  # new weights: heads, LoRA, adapters
    "sparse": "5e-4:3.2e-2",
    "random": "1e-3:6.4e-2",
}
# A small model that was trained with a large rate: with those above the best one lay at the edge.
_CAUSAL_RATES = _RATES | {"full": "4e-4:2.56e-2", "whole": "4e-3:2.56e-1", "random": "4e-3:2.56e-1"}
# One for each kind, which no task has tuned: the defaults of the docs, or of the method's own papers.
_DEFAULTS = {"full": "2e-5", "whole": "1e-3", "sparse": "2e-3", "random": "1e-2"}
_KINDS = {"full": "full", "head": "random", "lora": "whole", "adalora": "whole", "adapter": "whole"}
_KINDS |= {"random": "random", "shira": "random"}

RECIPE = "random:leave_out=embeddings"  # what id3_optim.recipe chooses
MAIN = ("id3", "full", "head", RECIPE, "random", "fish", "pafi", "bitfit", "static-d3", "repeat-d3", "lora")
RIVALS = (
    "id3",
    "adalora",
    "shira",
    "diff",
    "gradient",
    "gradient-dynamic",
    "snip",
    "snip-dynamic",
    "weights",
)
ON_A_POOL = (
    "id3",
    "id3+lora",
    "static-d3+lora",
    "random+lora",
    "id3+adapter",
    "random+adapter",
    "sparse-adapter",
)
_SCHEDULES = ("front-loaded:0.05", "front-loaded:0.1", "front-loaded:0.2", "front-loaded:0.5", "one-shot")
WHY = (
    "id3",
    "id3:bias_correction=entry",
    *(f"id3:schedule={schedule}" for schedule in _SCHEDULES),
    *(f"id3:select_every={every}" for every in (4, 16, 64)),
    "id3:leave_out=embeddings",
    "id3:tensor_cap=0.1",
    "id3:reuse_mask=true",
    "id3:entry_warmup=100",
    "id3:entry_warmup=100,bias_correction=entry",
    "id3:prune=100",
    "id3:heuristic=d3-relative",
    *(f"id3-sum:select_every={every}" for every in (4, 16, 64)),
    "id3-mean",
    "id3-adam",
    "id3:head_lr=0.008",
    "id3:schedule=front-loaded:0.1,head_lr=0.008",
    "id3:schedule=front-loaded:0.1,leave_out=embeddings",
    "id3:schedule=front-loaded:0.1,leave_out=embeddings,head_lr=0.008",
    "random:head_lr=0.008",
    RECIPE,
)
EPS_AND_EXP = ("id3", *(f"id3:eps={eps},exp={exp}" for eps in (0.5, 1.0) for exp in (-1.0, 0.0, 1.0)))


@dataclass(frozen=True)
class Part:
    """A grid on each of `tasks`. tuned: over seven learning rates, else a default of each kind. steps: of a
    run, instead of the task's. timed: one run at a time, for its time alone."""

    about: str
    methods: tuple[str, ...]
    tasks: tuple[str, ...]
    budgets: tuple[str, ...] = (MAIN_BUDGET,)
    seeds: int = 5
    tuned: bool = True
    steps: int | None = None
    timed: bool = False

    @property
    def causal(self) -> bool:
        """Whether a causal language model learns, which `base` makes."""
        return all(TASKS[task].kind == "causal-lm" for task in self.tasks)


_ALL = ("cola", "mrpc", "sst2", "banking77")
PARTS = {
    "main": Part("Every method tuned alike", MAIN, _ALL),
    "untuned": Part("One default learning rate for each kind of method", MAIN, _ALL, tuned=False),
    "longer": Part(
        "Twice the steps: after 1000 some methods still predict the more frequent label",
        (RECIPE, "lora", "id3", "full"),
        ("cola", "sst2"),
        seeds=3,
        steps=2000,
    ),
    "budgets": Part("Other budgets", ("id3", "fish", "lora", RECIPE), _ALL, ("0.05%", "1%")),
    "rivals": Part("Rivals at equal counts of trained entries", RIVALS, _ALL),
    "pools": Part("LoRA and adapters as pools", ON_A_POOL, ("cola", "mrpc")),
    "why": Part(
        "Where the gain comes from: mask, schedule, windows, scores, warm-up, pruning", WHY, ("sst2", "mrpc")
    ),
    "recipe": Part(
        "What SST-2 has chosen, on other tasks and not tuned",
        ("id3", RECIPE),
        ("cola", "mrpc"),
        tuned=False,
    ),
    "head": Part(
        "A rate of its own for the new head, where no rate is tuned",
        ("id3", f"id3:head_lr={_DEFAULTS['random']}", RECIPE, "lora", f"lora:head_lr={_DEFAULTS['random']}"),
        ("cola",),
        seeds=3,
        tuned=False,
    ),
    "causal": Part(
        "A causal model: the loss on GSM8K, and what it forgets",
        ("id3", "full", "random", "fish", "lora"),
        ("gsm8k",),
        ("1%",),
        seeds=3,
    ),
    "time": Part(
        "The time of a run",
        ("full", "lora", "id3", "id3:select_every=16,sparse_backward=true", f"{RECIPE},sparse_backward=true"),
        ("mrpc",),
        seeds=1,
        tuned=False,
        steps=500,
        timed=True,
    ),
    "eps-exp": Part("ε and exp", EPS_AND_EXP, ("cola", "mrpc"), seeds=3),
}


def with_rates(method: str, part: Part) -> str:
    """The method as `--methods` takes it, with its learning rates."""
    kind = _KINDS.get(method.partition(":")[0], "sparse")
    rates = (_DEFAULTS if not part.tuned else _CAUSAL_RATES if part.causal else _RATES)[kind]
    return f"{method}{',' if ':' in method else ':'}lr={rates}"
