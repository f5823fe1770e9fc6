"""What a model folder or hub name is: where its files are, and what a fingerprint says of its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nanodit.errors import ConfigError
from nanodit.files import sha256_file
from prep.encoders.hub import CONFIG, Pin, Reference, digest, download, download_file, resolve

if TYPE_CHECKING:  # torch and transformers take seconds to import, and identities need neither
    import torch

Source = tuple[str | Path, str | None, Mapping[str, str] | None]  # model, revision, SHA-256 of its files


def is_local(model: str | Path) -> bool:
    """Whether ``model`` is a folder on this machine (anything else is taken for a name on the Hugging Face hub)."""
    return Path(model).is_dir()


def model_identity(model: str | Path, revision: str | None, sha256: Mapping[str, str] | None = None) -> dict[str, str]:
    """Name the weights of ``model`` without any path.

    A content hash for a folder; for the hub its name, commit and one SHA-256 over those of its files. Before a hub
    model is recorded (``prep/encoders/pins.py``) there is no hash, and the revision may be a branch.
    """
    if is_local(model):
        return {"content": folder_hash(Path(model))}
    identity = {"model": str(model), "revision": revision or "main"}
    return identity | ({"sha256": digest(sha256)} if sha256 else {})


def open_model(
    model: str | Path, revision: str | None = None, sha256: Mapping[str, str] | None = None
) -> tuple[Path, Source]:
    """Return the folder with the files of ``model``, and what they really are: commit and hashes of a hub model.

    Downloaded unless the cache has it. With ``sha256`` the files must be those, else they are taken as they are found.
    Raises :class:`ConfigError` for a model that cannot be had or has other bytes.
    """
    if is_local(model):
        return Path(model), (model, None, None)
    if revision and sha256:
        return download(str(model), Pin(revision, dict(sha256))), (model, revision, sha256)
    pin = resolve(Reference(str(model), revision))
    folder = download_file(Reference(str(model), pin.revision), CONFIG).parent
    return folder, (model, pin.revision, pin.files)


def architecture(model: str | Path, revision: str | None = None) -> str:
    """Return the ``model_type`` in the config of ``model``, "dinov2" for example. Raises as :func:`open_model`."""
    path = Path(model) / CONFIG if is_local(model) else download_file(Reference(str(model), revision), CONFIG)
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["model_type"])
    except (OSError, ValueError, KeyError) as error:
        raise cannot_load("model", model, error) from error


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU that computes in it (compute capability 8 and up), else float32.

    Never float16: T5 overflows in it, and large vision transformers come close.
    """
    import torch

    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if fast else torch.float32


def folder_hash(folder: Path) -> str:
    """SHA-256 over the sorted (name, content hash) pairs of every visible file in ``folder``."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    lines = [f"{path.name} {sha256_file(path)}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars of transformers inside the block: progress is printed by us, in one form."""
    from transformers.utils import logging as transformers_logging

    was_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            transformers_logging.enable_progress_bar()


def cannot_load(what: str, model: str | Path, error: Exception) -> ConfigError:
    """Return the error for files that are there and do not load, with what a user can do about it."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ConfigError(
        f"cannot load the {what} {str(model)!r}: {reason}. Give a folder made by save_pretrained, or the name of such "
        "a model on the Hugging Face hub"
    )
