"""Selective fine-tuning by step-by-step unmasking (ID3), at the cost of one read of weights and gradients."""

from .delta import Delta, DeltaError, load_delta, save_delta
from .delta_diff import diff
from .delta_merge import merge
from .heuristics import D3, Bias, Fisher, Magnitude, Random, fisher_scores
from .optimizer import ID3AdamW

__all__ = [
    "D3",
    "Bias",
    "Delta",
    "DeltaError",
    "Fisher",
    "ID3AdamW",
    "Magnitude",
    "Random",
    "diff",
    "fisher_scores",
    "load_delta",
    "merge",
    "save_delta",
]
