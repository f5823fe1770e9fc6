"""What a model folder or hub name is: the part of an encoder's fingerprint that says which weights were used."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging as transformers_logging

from prep.errors import ConfigError
from prep.files import sha256_file


def is_local(model: str | Path) -> bool:
    """Whether ``model`` is a folder on this machine (anything else is taken for a name on the Hugging Face hub)."""
    return Path(model).is_dir()


def model_identity(model: str | Path, revision: str | None) -> dict[str, str]:
    """Name the weights of ``model`` without any path: a content hash for a folder, name and revision for the hub.

    A hub revision should be a commit hash in production; without one it is recorded as ``main``, which can move.
    """
    if is_local(model):
        return {"content": folder_hash(Path(model))}
    return {"model": str(model), "revision": revision or "main"}


def folder_hash(folder: Path) -> str:
    """SHA-256 over the sorted (name, content hash) pairs of every visible file in ``folder``."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    lines = [f"{path.name} {sha256_file(path)}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars of transformers inside the block: progress is printed by us, in one form."""
    was_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            transformers_logging.enable_progress_bar()


def cannot_load(what: str, model: str | Path, error: Exception) -> ConfigError:
    """The error for a model that does not load, with what a user can do about it."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ConfigError(
        f"cannot load the {what} {str(model)!r}: {reason}. Give a folder made by save_pretrained, or a hub name that "
        "this machine may download (a gated one needs its licence accepted on huggingface.co and `hf auth login`)"
    )
