"""Models on the Hugging Face hub: which commit and which bytes they are, and how they come to this machine.

Files go through ``huggingface_hub`` and its cache, so mirrors (``HF_ENDPOINT``), tokens and offline work as its users
know them. Only ``safetensors`` weights are taken: the other formats of a repository are pickles or not for torch.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from nanodit.errors import ConfigError
from nanodit.files import sha256_bytes, sha256_file

COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_FILE = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?:[\w./-]+")  # OWNER/NAME@REVISION:FILE
CONFIG, WEIGHTS, WEIGHTS_INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# what the tokenizers of our text encoders may consist of
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "spiece.model")
UNGATED = "configs/prep/production-ungated.yaml"


@dataclass(frozen=True)
class Reference:
    """A model as a config names it: ``MODEL``, ``MODEL@REVISION``, and ``:FILE`` behind it for one file alone."""

    model: str
    revision: str | None = None
    file: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what :meth:`__str__` writes."""
        place, _, file = text.partition(":")
        model, _, revision = place.partition("@")
        return cls(model, revision or None, file or None)

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.model}{revision}{f':{self.file}' if self.file else ''}"


@dataclass(frozen=True)
class Pin:
    """What a reference stands for: ``revision`` is a commit, ``files`` maps every file needed to its SHA-256."""

    revision: str
    files: dict[str, str]


def is_hub_file(text: Path | str) -> bool:
    """Whether ``text`` names one file of a model on the hub (``MODEL:FILE``), and not a file on this machine."""
    return HUB_FILE.fullmatch(str(text)) is not None and not Path(text).is_file()


def digest(files: Mapping[str, str]) -> str:
    """One SHA-256 for a model's files, given as name -> SHA-256."""
    return sha256_bytes("".join(f"{name} {files[name]}\n" for name in sorted(files)).encode())


def resolve(reference: Reference) -> Pin:
    """Find the commit behind a reference, download its files and hash them; without a network, from the cache.

    Raises :class:`ConfigError` for a model that cannot be had, with what to do about it.
    """
    name = reference.file or CONFIG
    first = download_file(reference, name)
    commit = first.parents[name.count("/")].name  # the cache keeps files as snapshots/COMMIT/NAME
    if not COMMIT.fullmatch(commit):
        raise ConfigError(f"{reference}: the hub's cache has no commit for {first}. Update huggingface_hub")
    if reference.file:
        return Pin(commit, {reference.file: sha256_file(first)})
    # every other file from the same commit, even if the branch moves meanwhile
    pinned = Reference(reference.model, commit)
    files = {CONFIG: first}
    for name in (WEIGHTS, WEIGHTS_INDEX, *TOKENIZER):
        if (path := download_file(pinned, name, optional=True)) is not None:
            files[name] = path
    if WEIGHTS not in files:
        if WEIGHTS_INDEX not in files:
            raise ConfigError(
                f"{reference} has no {WEIGHTS} at commit {commit}. Load it with transformers, write it with "
                "save_pretrained and give the folder"
            )
        for name in sorted(set(json.loads(files[WEIGHTS_INDEX].read_text())["weight_map"].values())):
            files[name] = download_file(pinned, name)
    return Pin(commit, {name: sha256_file(path) for name, path in sorted(files.items())})


def download(model: str, pin: Pin) -> Path:
    """Return the folder with the pinned files of ``model``, each downloaded unless the cache has it, and checked.

    Raises :class:`ConfigError` when a file cannot be had, or is not the one that was pinned.
    """
    reference, folder = Reference(model, pin.revision), Path()
    for name, sha256 in pin.files.items():
        path = download_file(reference, name)
        check_bytes(path, sha256, str(Reference(model, pin.revision, name)))
        folder = path.parent
    return folder


def check_bytes(path: Path, sha256: str, what: str) -> None:
    """Raise :class:`ConfigError` unless the file at ``path`` has the SHA-256 that was recorded for ``what``."""
    found = sha256_file(path)
    if found != sha256:
        raise ConfigError(
            f"{what}: {path} has SHA-256 {found}, but {sha256} was recorded at the first download. Delete that file "
            "and run again to download it anew. If other weights are wanted, take the model out of the dataset's "
            "models.json: what was made with the recorded ones is then computed again"
        )


def download_file(reference: Reference, name: str, optional: bool = False) -> Path | None:
    """One file of a model, from the cache or the hub. An ``optional`` one that the model does not have gives None.

    Raises :class:`ConfigError`, which says what to do for gated models, wrong names and machines without network.
    """
    from huggingface_hub import _CACHED_NO_EXIST, constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError, RemoteEntryNotFoundError

    if COMMIT.fullmatch(reference.revision or ""):  # whose files never change: what the cache knows of it is all
        with suppress(HFValidationError):  # which is explained below
            known = try_to_load_from_cache(reference.model, name, revision=reference.revision)
            if isinstance(known, str):
                return Path(known)
            if known is _CACHED_NO_EXIST and optional:
                return None
    try:
        with quiet_downloads():
            return Path(hf_hub_download(reference.model, name, revision=reference.revision))
    except RemoteEntryNotFoundError as error:
        if optional:
            return None
        raise explain(reference, name, error) from error
    except LocalEntryNotFoundError as error:
        # on a machine that is offline on purpose the cache is all there is; a flaky network hides no file
        if optional and constants.HF_HUB_OFFLINE:
            return None
        raise explain(reference, name, error) from error
    except (OSError, ValueError, ImportError, HTTPError) as error:  # ImportError: of a proxy that needs more
        raise explain(reference, name, error) from error


def explain(reference: Reference, name: str, error: Exception) -> ConfigError:
    """Return the error for a file that the hub does not give, with what a user can do about it."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    model = reference.model
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError):
        advice = (
            f"it is gated. Accept its licence at https://huggingface.co/{model}, then run `hf auth login` (or set "
            f"HF_TOKEN) on every machine. Without access: --config {UNGATED}"
        )
    elif isinstance(error, HFValidationError):
        advice = "neither a folder on this machine nor a name on the Hugging Face hub. Give one of the two"
    elif isinstance(error, RepositoryNotFoundError):
        advice = (
            f"no such folder here, and no model at https://huggingface.co/{model} that this machine may see. Check "
            "the name; a private or gated one needs its licence accepted there and `hf auth login`"
        )
    elif isinstance(error, RevisionNotFoundError):
        advice = f"the hub has no revision {reference.revision} of it. Give a commit, tag or branch that exists"
    elif isinstance(error, RemoteEntryNotFoundError):
        advice = f"it has no file {name}. Give a model with it, or a folder made by save_pretrained"
    elif status in (401, 403):
        advice = f"the hub refuses this machine ({status}). Run `hf auth login` with a token that may read it"
    elif isinstance(error, LocalEntryNotFoundError):
        advice = (
            f"{name} is not in the local cache, and the hub cannot be reached. Connect this machine, copy the cache "
            "(~/.cache/huggingface or HF_HOME) from one that has it, or give a folder made by save_pretrained"
        )
    else:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        advice = f"{name} could not be downloaded: {lines[0]}. Check the network and run again"
    return ConfigError(f"cannot load {reference}: {advice}")


@contextmanager
def quiet_downloads() -> Iterator[None]:
    """No progress bars of huggingface_hub inside the block, nor a line for each time that it tries again.

    Progress is printed by us, in one form, and what is to be done comes with the error.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    was_off, requests = are_progress_bars_disabled(), logging.getLogger("huggingface_hub.utils._http")
    level = requests.level
    disable_progress_bars()
    requests.setLevel(logging.ERROR)
    try:
        yield
    finally:
        requests.setLevel(level)
        if not was_off:
            enable_progress_bars()
