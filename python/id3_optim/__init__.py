"""Selective fine-tuning by step-by-step unmasking (ID3), at the cost of one read of weights and gradients."""

from .backward.handle import sparse_backward
from .delta import Delta, DeltaError, load_delta, save_delta
from .delta.bank import DeltaBank
from .delta.chain import WeightStream
from .delta.diff import diff
from .delta.merge import merge
from .delta.publish import push_delta_to_hub
from .delta.receiver import ResendNeeded, WeightReceiver
from .delta.series import DeltaSeries
from .delta.stream import WeightPatch, weight_patches
from .delta.toolkit import load_toolkit_summary
from .delta.update import WeightUpdate, load_update
from .fisher import fisher_scores
from .heuristics import D3, Bias, Fisher, Magnitude, Random
from .method import Prune
from .methods import recipe
from .optimizer import ID3AdamW
from .originals import ReferenceModel, dense_copies, original_weights
from .step.grad_scaler import GradScaler

__all__ = [
    "D3",
    "Bias",
    "Delta",
    "DeltaBank",
    "DeltaError",
    "DeltaSeries",
    "Fisher",
    "GradScaler",
    "ID3AdamW",
    "Magnitude",
    "Prune",
    "Random",
    "ReferenceModel",
    "ResendNeeded",
    "WeightPatch",
    "WeightReceiver",
    "WeightStream",
    "WeightUpdate",
    "dense_copies",
    "diff",
    "fisher_scores",
    "load_delta",
    "load_toolkit_summary",
    "load_update",
    "merge",
    "original_weights",
    "push_delta_to_hub",
    "recipe",
    "save_delta",
    "sparse_backward",
    "weight_patches",
]
