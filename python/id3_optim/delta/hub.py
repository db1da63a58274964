"""Where a delta lies: a file here, or a file in a repository of the Hugging Face hub.

huggingface_hub loads, with its own cache, login and errors; it is an optional package (extra `hub`).
"""

import os
import re
from pathlib import Path
from typing import Any

from ..extras import require

FILE = "delta.safetensors"
_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_name(path: str | os.PathLike) -> bool:
    """Whether text is the name of a repository, `user/repo`, and not a path of this machine.

    Paths are: path objects, text that ends in `.safetensors`, what exists, and what would lie in a folder
    that exists.
    """
    if not isinstance(path, str) or not _NAME.fullmatch(path) or path.endswith(".safetensors"):
        return False
    return path[0] not in ".~" and not os.path.exists(path) and not os.path.exists(os.path.dirname(path))


def local_file(path: str | os.PathLike, revision: str | None = None, **download: Any) -> Path:
    """The path itself, or that of the cached `delta.safetensors` of a repository.

    revision: a branch, a tag or a commit; None: the main branch. download: further arguments of
    `huggingface_hub.hf_hub_download`, such as `token`, `filename` or `local_files_only`.
    Raises ValueError for these arguments beside a path, and what `hf_hub_download` raises (OSError without a
    network).
    """
    given = download | ({} if revision is None else {"revision": revision})
    if not is_hub_name(path):
        if given:
            raise ValueError(f"{min(given)}: does not apply to a file of this machine: {os.fspath(path)}")
        return Path(path)
    require("huggingface_hub", extra="hub")
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(path, **({"filename": FILE} | given)))
