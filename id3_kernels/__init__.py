"""Kernels for selective fine-tuning: tensors in, tensors out."""

from .backend import available_backends, use_backend
from .entries import Entries
from .ops import (
    adamw_,
    adamw_compact_,
    d3_score,
    gather,
    sampled_embedding_grad_,
    sampled_weight_grad_,
    scatter_,
    select_topk,
    select_topk_by_score,
    union,
)
from .sparse_coo import from_sparse_coo, to_sparse_coo

__all__ = [
    "Entries",
    "adamw_",
    "adamw_compact_",
    "available_backends",
    "d3_score",
    "from_sparse_coo",
    "gather",
    "sampled_embedding_grad_",
    "sampled_weight_grad_",
    "scatter_",
    "select_topk",
    "select_topk_by_score",
    "to_sparse_coo",
    "union",
    "use_backend",
]
