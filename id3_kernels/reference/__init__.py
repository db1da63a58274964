"""Every op of `table.py` in plain torch: the specification to read, the fallback, the oracle of the tests."""

from .collect import collect_
from .entries import gather, join_, scatter_, union
from .fingerprint import fingerprint
from .norm import squared_norm
from .sampled import sampled_embedding_grad_, sampled_weight_grad_
from .score import d3_score, wide_dtype
from .selection import select_topk, select_topk_by_score
from .update import adamw_, adamw_compact_

__all__ = [
    "adamw_",
    "adamw_compact_",
    "collect_",
    "d3_score",
    "fingerprint",
    "gather",
    "join_",
    "sampled_embedding_grad_",
    "sampled_weight_grad_",
    "scatter_",
    "select_topk",
    "select_topk_by_score",
    "squared_norm",
    "union",
    "wide_dtype",
]
