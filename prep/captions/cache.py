"""A cache of the answers of caption servers, one file per image and recipe: they are the costliest output of ``prep``.

``captions/KK/KEY-HASH.json`` below the dataset, where KEY is the image's key, KK its first two digits and HASH the
SHA-256 of everything the answers depend on: key, prompt, model, digest and options; of short captions also their prompt
and the long caption, which they follow in one conversation (:func:`short_cache`). A file holds the list of answers so
far, good or bad; whether one of them is a caption is decided when it is read (``prep/captions/quality.py``). That
servers gave none is no answer: they may give one the next time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nanodit.faults import fault
from nanodit.files import canonical_json, sha256_bytes
from nanodit.storage import Storage, open_storage
from prep.captions.quality import UNANSWERED, Answer
from prep.dataset.layout import Unit, read_part

FOLDER = "captions"
CACHED_BY = ("backend", "model", "digest", "prompt", "options")  # of a text unit's recipe, what answers depend on


class CaptionCache:
    """The answers made for one recipe (see ``prep.passes.captions.caption_recipe``)."""

    def __init__(self, root: Path | str | Storage, recipe: Mapping[str, Any]) -> None:
        self.storage, self.recipe = open_storage(root), dict(recipe)

    def name(self, key: str) -> str:
        """Return the name of an image's file, below the dataset."""
        digest = sha256_bytes(canonical_json({"key": key, **self.recipe}).encode())
        return f"{_prefix(key)}{digest}.json"

    def read(self, key: str) -> list[Answer]:
        """Return the answers about an image so far; none where the file is missing or damaged."""
        try:
            entry = json.loads(self.storage.read(self.name(key)))
            return _given(Answer(**answer) for answer in entry["answers"])
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return []

    def write(self, key: str, answers: Sequence[Answer]) -> None:
        """Keep the answers about an image, durably, but those that servers did not give."""
        fault("captions.before_cache")
        entry = {"key": key, **self.recipe, "answers": [asdict(answer) for answer in _given(answers)]}
        self.storage.write(self.name(key), canonical_json(entry))
        fault("captions.after_cache")


def short_cache(cache: CaptionCache, short_prompt: str, caption: str) -> CaptionCache:
    """Return the answers about short captions that follow a long one; ``short_prompt`` is the hash of their prompt."""
    return CaptionCache(
        cache.storage, cache.recipe | {"short_prompt": short_prompt, "caption": sha256_bytes(caption.encode())}
    )


def forget_captions(root: Path | str | Storage, keys: Iterable[str]) -> int:
    """Delete what servers answered about some images, whatever the recipe, and return the number of files."""
    storage = open_storage(root)
    names = [name for key in keys for name in storage.names(_prefix(key))]
    for name in names:
        storage.delete(name)
    return len(names)


def forget_rejects(root: Path | str | Storage, units: Iterable[Unit]) -> int:
    """Delete what servers answered about the images that some text units rejected, and return the number of files.

    For ``--retry-rejects``, before the parts of these units go: computing them again then asks about those images.
    """
    parts = (read_part(root, unit) for unit in units if unit.layer == "text")
    return forget_captions(root, [reject.key for part in parts if part for reject in part.rejects])


def _given(answers: Iterable[Answer]) -> list[Answer]:
    return [answer for answer in answers if answer.end not in UNANSWERED]


def _prefix(key: str) -> str:
    return f"{FOLDER}/{key[:2]}/{key}-"
