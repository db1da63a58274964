"""Optional packages: asked for where they are used, by the name of the extra that brings them."""

import importlib.util


def require(*packages: str, extra: str) -> None:
    """Raises ImportError, with what to install, for the first package that is missing. Imports none."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"this needs the package {package}: pip install 'id3-optim[{extra}]'")
