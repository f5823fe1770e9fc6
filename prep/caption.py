"""Captions: where the text of an image comes from. Today that is a ``.txt`` sidecar beside the image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from prep.config import Config
from prep.files import sha256_bytes
from prep.sources import SIDECAR_SUFFIX

CODE_VERSION = 1
MAX_BYTES = 1 << 20  # a caption of a megabyte is a file of something else


class CaptionConfig(Config):
    """Where captions come from, and what happens to an image without one."""

    backend: Literal["sidecar"] = "sidecar"
    on_missing: Literal["error", "reject"] = "error"


class BadCaption(Exception):
    """A caption that cannot be used: ``reason`` is a short code, ``detail`` a sentence for the user."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Caption:
    """A caption and where it came from (the content of the text layer's ``.json``)."""

    text: str
    provenance: dict[str, Any]


class SidecarCaptions:
    """Reads ``NAME.txt`` beside ``NAME.png``: UTF-8 with or without byte order mark; any whitespace is one space."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, source: str) -> str:
        """Name of the sidecar of a source, below the folder."""
        return str(PurePosixPath(source).with_suffix(SIDECAR_SUFFIX))

    def caption(self, source: str) -> Caption:
        """The caption of a source. Raises BadCaption: a caption is text or an error, never an empty string."""
        try:
            with open(self.folder / self.path(source), "rb") as file:
                data = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise BadCaption("caption_missing", f"{self.path(source)}: {error.strerror}") from error
        if len(data) > MAX_BYTES:
            raise BadCaption("caption_too_long", f"{self.path(source)} is larger than {MAX_BYTES} bytes")
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadCaption(
                "caption_not_utf8", f"{self.path(source)}: {error.reason} at byte {error.start}"
            ) from error
        if "\0" in text:
            raise BadCaption("caption_nul", f"{self.path(source)} holds a NUL character; is it UTF-16?")
        text = " ".join(text.split())
        if not text:
            raise BadCaption("caption_empty", f"{self.path(source)} has no text")
        return Caption(text, {"backend": "sidecar", "sha256": sha256_bytes(data)})

    def fingerprint(self, source: str) -> str:
        """What the text of a source depends on: the hash of its sidecar, or the reason why it has none."""
        try:
            return self.caption(source).provenance["sha256"]
        except BadCaption as bad:
            return bad.reason
