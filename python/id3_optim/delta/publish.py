"""A delta as a repository of the Hugging Face hub: the file, a card that describes it, and a picture."""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..analysis import delta_allocation
from ..extras import require
from ..plots import save_allocation
from .delta import Delta, load_delta
from .facts import TWO_LABELS
from .hub import FILE

_PICTURE, _CARD = "allocation.png", "README.md"
_OTHER_PLACES = ("merged", "config")  # of settings: neither is a number of the method


def push_delta_to_hub(
    delta: Delta | str | os.PathLike,
    repo_id: str,
    base: str | None = None,
    base_revision: str | None = None,
    metrics: Mapping[str, float] | None = None,
    metadata: Mapping[str, Any] | None = None,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a sparse delta",
) -> str:
    """Uploads a delta, its card and, where matplotlib is installed, a picture in one commit; returns its URL.

    `load_delta(repo_id)` reads it. The repository is made where there is none; its `README.md` is replaced.

    delta: a Delta, or the path of its file, which is uploaded as it is. repo_id: `user/repo`. base: the model
    on the hub that the delta changes, for the card. base_revision: its commit. metrics: name → value, for the
    card. metadata: further fields of the card, such as `license`, `datasets` or `language`.
    private: whether a new repository is private. token: None for the saved login. revision: the branch.
    Raises ValueError for a base that is a folder of this machine, DeltaError for a damaged file, ImportError
    without huggingface_hub, and what huggingface_hub raises.
    """
    require("huggingface_hub", extra="hub")
    from huggingface_hub import CommitOperationAdd, HfApi

    if base is not None and os.path.exists(base):
        raise ValueError(f"base: expected the name of a model on the hub, got the folder {base}")
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / name for name in (FILE, _PICTURE, _CARD)}
        if isinstance(delta, Delta):
            delta.save(files[FILE])
        else:
            files[FILE], delta = Path(delta), load_delta(delta)
        if not _draw(delta, files[_PICTURE], repo_id):
            del files[_PICTURE]
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        card = delta_card(delta, repo_id, base, base_revision, metrics, metadata, _PICTURE in files)
        files[_CARD].write_text(card, encoding="utf-8")
        added = [CommitOperationAdd(name, path) for name, path in files.items()]
        done = api.create_commit(repo_id, added, commit_message=commit_message, revision=revision)
    return done.commit_url


def _draw(delta: Delta, path: Path, title: str) -> bool:
    allocated = delta_allocation(delta)
    drawn = bool(allocated.roles) and importlib.util.find_spec("matplotlib") is not None
    if drawn:
        save_allocation(path, allocated, title)
    return drawn


def delta_card(
    delta: Delta,
    repo_id: str,
    base: str | None = None,
    base_revision: str | None = None,
    metrics: Mapping[str, float] | None = None,
    metadata: Mapping[str, Any] | None = None,
    picture: bool = False,
) -> str:
    """The text of the card: metadata in YAML, how to use the delta, its method and budget, base and metrics.

    Arguments as for `push_delta_to_hub`; picture: show `allocation.png`.
    """
    from huggingface_hub import ModelCardData

    fields = {"library_name": "id3-optim", "tags": ["id3", "sparse-delta"]}
    if base is not None:
        fields |= {"base_model": base, "base_model_relation": "adapter"}
    fields |= metadata or {}
    parts = [f"# {repo_id.rpartition('/')[2]}", _summary(delta, base, base_revision)]
    parts += ["## Use", _use(delta, repo_id, base, base_revision)]
    parts += ["## Method", _table("setting", _method(delta))]
    if metrics:
        parts += ["## Metrics", _table("metric", metrics)]
    if picture:
        parts += ["## Where the changed entries lie", f"![changed entries by layer and role]({_PICTURE})"]
    return f"---\n{ModelCardData(**fields).to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def _summary(delta: Delta, base: str | None, base_revision: str | None) -> str:
    facts, whole = delta.inspect(), delta.settings.get("n_entries")
    share = f" of {whole:,} ({facts['entries'] / whole:.2%})" if whole else ""
    named = "a base that is not named" if base is None else f"`{base}`"
    at = "" if base_revision is None else f" at `{base_revision}`"
    dense = f" and {facts['dense_entries']:,} in parameters stored whole" if facts["dense_entries"] else ""
    mark = facts["fingerprint"] or "none, so the base is not checked"
    return (
        f"A sparse delta: the values of {facts['entries']:,} entries{share}{dense} that fine-tuning changed "
        f"in {named}{at}. Fingerprint of the base: {mark}."
    )


def _use(delta: Delta, repo_id: str, base: str | None, base_revision: str | None) -> str:
    config = delta.settings.get("config")
    named = config.get("architectures") if isinstance(config, dict) else None
    auto, source = (named or ["AutoModel"])[0], "BASE" if base is None else base
    at = "" if base_revision is None else f', revision="{base_revision}"'
    labels = config.get("id2label", TWO_LABELS) if isinstance(config, dict) else TWO_LABELS
    at += "" if labels == TWO_LABELS else f", id2label={ {int(i): label for i, label in labels.items()} }"
    return (
        f"```python\nfrom id3_optim import load_delta\nfrom transformers import {auto}\n\n"
        f'model = {auto}.from_pretrained("{source}"{at})\nload_delta("{repo_id}").apply(model)\n```'
    )


def _method(delta: Delta) -> dict[str, Any]:
    return {name: value for name, value in delta.settings.items() if name not in _OTHER_PLACES}


def _table(title: str, rows: Mapping[str, Any]) -> str:
    shown = [f"| {name} | {json.dumps(value).replace('|', chr(92) + '|')} |" for name, value in rows.items()]
    return "\n".join([f"| {title} | value |", "|---|---|", *shown])
