"""The ops of `table.py` on a GPU, through Triton; on CPU tensors with TRITON_INTERPRET=1, for tests."""

from ..reference import fingerprint, union
from .collect import collect_
from .entries import gather, join_, scatter_
from .launch import why_unavailable
from .norm import squared_norm
from .sampled import sampled_embedding_grad_, sampled_weight_grad_
from .score import d3_score
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
    "why_unavailable",
]
