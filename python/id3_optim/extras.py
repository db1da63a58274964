"""Optional packages: checked where they are used, and named with the extra that installs them."""

import importlib.util


def require(*packages: str, extra: str) -> None:
    """Raises ImportError with the command that installs the first missing package. Imports no package."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"this needs the package {package}: pip install 'id3-optim[{extra}]'")
