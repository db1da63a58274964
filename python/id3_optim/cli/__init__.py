"""The command `id3-optim`."""

from .main import budget, command, main

__all__ = ["budget", "command", "main"]
