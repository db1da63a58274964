"""The command `id3-optim`."""

from .main import budget, main

__all__ = ["budget", "main"]
