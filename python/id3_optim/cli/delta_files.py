"""Where a command finds its delta: a file, a folder, or a repository on the hub."""

from pathlib import Path

from ..delta import Delta, DeltaError, load_delta
from ..delta.hub import FILE, is_hub_name, local_file
from ..extras import require
from .models import hub_options


def delta_path(path: str) -> Path:
    """The delta file at `path`, in the directory at `path`, or in the hub's repository of this name.

    Raises FileNotFoundError for a path without one, ValueError for a name that the hub does not give.
    """
    if not is_hub_name(path):
        return _local_delta(path)
    require("huggingface_hub", extra="hub")  # its absence is no answer of the hub
    try:
        return local_file(path, **hub_options(path))
    except Exception as error:  # the client's
        raise ValueError(
            f"delta: expected a file or a repository on the hub with {FILE}, got {path}: there is no such "
            "file, and the hub gave none (is it private, is there a network?)"
        ) from error


def _local_delta(path: str) -> Path:
    found = Path(path) / FILE if Path(path).is_dir() else Path(path)
    if not found.exists():
        got = f"the folder {path} without one" if Path(path).is_dir() else f"{path}, which does not exist"
        raise FileNotFoundError(f"delta: expected a file or a folder with {FILE}, got {got}")
    return found


def read_delta(path: Path) -> Delta:
    """`load_delta`, whose errors name the file."""
    try:
        return load_delta(path)
    except DeltaError as error:
        raise DeltaError(f"{path}: {error}") from error
