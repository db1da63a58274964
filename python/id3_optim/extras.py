"""Checks for optional packages, each with the extra of id3-optim that installs it."""

import importlib.util


def require(*packages: str, extra: str) -> None:
    """Raises ImportError, with what to install, for the first package that is missing. Imports none."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"{package}: expected this package, got none; pip install 'id3-optim[{extra}]'")
