"""Sparse deltas: the entries that training changed, saved to a file and put on a model."""

from .delta import Delta, Undo, load_delta, save_delta
from .file import Change, DeltaError

__all__ = ["Change", "Delta", "DeltaError", "Undo", "load_delta", "save_delta"]
