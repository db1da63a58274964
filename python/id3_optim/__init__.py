"""Selective fine-tuning by step-by-step unmasking (ID3), at the cost of one read of weights and gradients."""

from .delta import Delta, DeltaError, load_delta, save_delta
from .grad_scaler import GradScaler
from .heuristics import D3, Bias, Fisher, Magnitude, Random, fisher_scores
from .optimizer import ID3AdamW

__all__ = [
    "D3",
    "Bias",
    "Delta",
    "DeltaError",
    "Fisher",
    "GradScaler",
    "ID3AdamW",
    "Magnitude",
    "Random",
    "fisher_scores",
    "load_delta",
    "save_delta",
]
