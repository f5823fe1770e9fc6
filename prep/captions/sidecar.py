"""Captions from a ``.txt`` sidecar beside each image; those of a model are made in ``prep/passes/captions.py``."""

from __future__ import annotations

import errno
import os
import stat
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any

from nanodit.files import canonical_json, sha256_bytes
from prep.captions.mirror import flip_caption
from prep.images.sources import SIDECAR_SUFFIX, leads_out

BLANK = "\u115f\u1160\u2800\u3164\uffa0"  # letters and a symbol without ink: fillers of Hangul, an empty Braille cell
MISSING = "caption_missing"
UNREADABLE = "caption_unreadable"  # that may pass: a caption that was committed stays
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)  # there is none under this name
SOURCE_GONE = "source_gone"  # stands in recipes where a sample that is gone has no caption
MAX_BYTES = 1 << 20  # a caption of a megabyte is a file of something else
# .txt first, then .txT to .TXT: the scan takes them all for sidecars
SUFFIXES = ["." + "".join(letters) for letters in product(*zip(SIDECAR_SUFFIX[1:], SIDECAR_SUFFIX[1:].upper()))]


class BadCaption(Exception):
    """A caption that cannot be used: ``reason`` is a short code, ``detail`` a sentence for the user."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def gone_without_caption(source: str) -> BadCaption:
    """Return the problem of a sample whose image and sidecar are gone before a caption was committed."""
    return BadCaption(SOURCE_GONE, f"{source} is gone, and its caption was not committed before")


@dataclass(frozen=True)
class Caption:
    """A caption and where it came from (the content of the text layer's ``.json``)."""

    text: str
    provenance: dict[str, Any]


def text_sample(caption: Caption, recipe: Mapping[str, Any]) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Return members and columns of a caption in the text layer; ``recipe`` says whether the flipped one is stored too.

    The flipped caption is empty, and null in the index, where the caption cannot be flipped safely.
    """
    members = {"txt": caption.text.encode(), "json": canonical_json(caption.provenance).encode()}
    columns = {"caption": caption.text}
    if "flip" not in recipe:
        return members, columns
    flipped = flip_caption(caption.text)
    return members | {"flip.txt": (flipped or "").encode()}, columns | {"caption_flip": flipped}


def usual_name(source: str) -> str:
    """Return what a source's sidecar is called as a rule, with a suffix in small letters."""
    stem, _, suffix = source.rpartition(".")
    if stem and suffix and stem[-1] not in "/." and "/" not in suffix:
        return f"{stem}{SIDECAR_SUFFIX}"
    return str(PurePosixPath(source).with_suffix(SIDECAR_SUFFIX))


class SidecarCaptions:
    """Captions in ``NAME.txt`` beside ``NAME.png``: UTF-8 with or without byte order mark, whitespace as single spaces.

    The case of the suffix does not matter; of several files ``.txt`` is read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, source: str) -> str:
        """Return the name of a source's sidecar, below the folder; the usual name where there is none."""
        names = (str(PurePosixPath(source).with_suffix(suffix)) for suffix in SUFFIXES)
        return next((name for name in names if os.path.lexists(self.folder / name)), usual_name(source))

    def caption(self, source: str) -> Caption:
        """Return the caption of a source. Raises BadCaption: a caption is text or an error, never an empty string."""
        return self.read(self.path(source))

    def read(self, name: str) -> Caption:
        """Return the caption in a sidecar; errors as :meth:`caption`."""
        data = self._read(name)
        if len(data) > MAX_BYTES:
            raise BadCaption("caption_too_long", f"{name} is larger than {MAX_BYTES} bytes")
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadCaption("caption_not_utf8", f"{name}: {error.reason} at byte {error.start}") from error
        if "\0" in text:
            raise BadCaption("caption_nul", f"{name} holds a NUL character; is it UTF-16?")
        text = " ".join(text.split())
        if not any(map(_is_visible, text)):
            raise BadCaption("caption_empty", f"{name} has no text{' but invisible characters' if text else ''}")
        return Caption(text, {"backend": "sidecar", "sha256": sha256_bytes(data)})

    def _read(self, name: str) -> bytes:
        path = self.folder / name
        # the text is published: a link must not bring in a file that nobody put into the folder
        if leads_out(path, self.folder):
            raise BadCaption("outside_source", f"{name}: the link leads out of the source folder")
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise BadCaption(UNREADABLE, f"{name}: not a regular file")
            with open(path, "rb") as file:
                return file.read(MAX_BYTES + 1)
        except OSError as error:
            reason = MISSING if error.errno in ABSENT else UNREADABLE
            raise BadCaption(reason, f"{name}: {error.strerror}") from error

    def fingerprint(self, source: str) -> str:
        """Return what the text of a source depends on: the hash of its sidecar, or the reason why it has none."""
        try:
            return self.caption(source).provenance["sha256"]
        except BadCaption as bad:
            return bad.reason


def _is_visible(letter: str) -> bool:
    """Whether a character is more than a space, a control or a format character, such as U+200B, or unassigned."""
    return unicodedata.category(letter)[0] not in "CZ" and letter not in BLANK
