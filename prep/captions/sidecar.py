"""Captions that came with the images; those of a model are made in ``prep/passes/caption_stage.py``.

In this order, of which ``captions.from`` may take a part: "txt" and "caption" (NAME.txt and NAME.caption beside the
image), "metadata" (metadata.jsonl and metadata.csv), "json" (NAME.json, and kohya's table), "xmp", "iptc" and "exif" (a
description inside the image). The first that an image has is its caption, also where it turns out to be unusable.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from nanodit.files import canonical_json, sha256_bytes
from prep.captions.mirror import flip_caption
from prep.captions.sentences import first_sentence
from prep.captions.tables import KOHYA, METADATA, BadTable, object_caption, table_caption
from prep.images.descriptions import KINDS, is_visible
from prep.images.sources import BadImage, Source, leads_out, read_descriptions

SUFFIXES = {"txt": ".txt", "caption": ".caption", "json": ".json"}  # of files beside the image
ORIGINS = ("txt", "caption", "metadata", "json", *KINDS)  # in the order in which they are looked for
WHERE = {"metadata": " or ".join(METADATA), "json": f"NAME.json or {KOHYA[-1]}"}
MISSING = "caption_missing"
UNREADABLE = "caption_unreadable"  # that may pass: a caption that was committed stays
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)  # there is none under this name
SOURCE_GONE = "source_gone"  # stands in recipes where a sample that is gone has no caption
MAX_BYTES = 1 << 20  # a caption of a megabyte is a file of something else


class BadCaption(Exception):
    """A caption that cannot be used: ``reason`` is a short code, ``detail`` a sentence for the user."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def gone_without_caption(source: str) -> BadCaption:
    """Return the problem of a sample whose image and sidecar are gone before a caption was committed."""
    return BadCaption(SOURCE_GONE, f"{source} is gone, and its caption was not committed before")


@dataclass(frozen=True)
class ShortCaption:
    """A short caption of a model, or "" where it wrote none; ``provenance`` is the entry ``short`` of the ``.json``."""

    text: str
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Caption:
    """A caption and where it came from (the content of the text layer's ``.json``)."""

    text: str
    provenance: dict[str, Any]
    short: ShortCaption | None = None

    @property
    def fingerprint(self) -> str:
        """What recipes call it: the hash of its NAME.txt, or where else it is from and its hash."""
        origin = self.provenance.get("from")
        return f"{origin}:{self.provenance['sha256']}" if origin else self.provenance["sha256"]


def text_sample(caption: Caption, recipe: Mapping[str, Any]) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Return members and columns of a caption in the text layer; ``recipe`` says whether others are stored too.

    Those are the flipped caption, which is empty, and null in the index, where the caption cannot be flipped safely,
    and the short one, which is the first sentence of a caption that has no other.
    """
    provenance = dict(caption.provenance)
    columns: dict[str, Any] = {"caption": caption.text}
    if "flip" in recipe:
        columns["caption_flip"] = flip_caption(caption.text)
    if "short" in recipe:
        short = caption.short or ShortCaption("", {"from": "sentence"})
        provenance["short"] = short.provenance
        columns["caption_short"] = short.text or first_sentence(caption.text)
        if "flip" in recipe:
            columns["caption_short_flip"] = flip_caption(columns["caption_short"])
    members = {f"{name.removeprefix('caption_')}.txt": (text or "").encode() for name, text in columns.items()}
    members = {"txt": members.pop("caption.txt"), "json": canonical_json(provenance).encode(), **members}
    return members, columns


def kept_caption(text: str, fingerprint: str) -> Caption:
    """Return the caption that has a text and a :attr:`Caption.fingerprint`."""
    origin, _, digest = fingerprint.rpartition(":")
    return Caption(text, {"backend": "sidecar", "sha256": digest} | ({"from": origin} if origin else {}))


def usual_name(source: str, suffix: str = SUFFIXES["txt"]) -> str:
    """Return what a source's sidecar is called as a rule, with a suffix in small letters."""
    stem, _, own = source.rpartition(".")
    if stem and own and stem[-1] not in "/." and "/" not in own:
        return f"{stem}{suffix}"
    return str(PurePosixPath(source).with_suffix(suffix))


class SidecarCaptions:
    """Captions of the images below a folder, from some of ``ORIGINS``, whitespace as single spaces.

    Files beside an image are UTF-8 with or without byte order mark. The case of their suffix does not matter; of
    several the one in small letters is read. A caption is text or an error, never an empty string.
    """

    def __init__(self, folder: Path, origins: Sequence[str] = ORIGINS) -> None:
        self.folder = folder
        self.origins = [origin for origin in ORIGINS if origin in origins]

    def caption(self, source: str) -> Caption:
        """Return the caption of a source. Raises BadCaption."""
        for origin in self.origins:
            if found := self.look(source, origin):
                return found
        raise self.missing(source)

    def fingerprint(self, source: str) -> str:
        """Return what the text of a source depends on: its caption's fingerprint, or the reason why it has none."""
        try:
            return self.caption(source).fingerprint
        except BadCaption as bad:
            return bad.reason

    def look(self, source: str, origin: str) -> Caption | None:
        """Return the caption of a source from one origin; None where it has none there. Raises BadCaption."""
        if origin in KINDS:
            try:
                text = read_descriptions(self.folder, source).get(origin)
            except BadImage:  # which is refused for itself
                return None
            return self._made(text, origin) if text else None
        name = self.path(source, origin) if origin in SUFFIXES else ""
        if name and os.path.lexists(self.folder / name) and (found := self.read(name)):
            return found
        return self.look_in_tables(source, origin) if origin in ("metadata", "json") else None

    def look_in_tables(self, source: str, origin: str) -> Caption | None:
        """Return the caption that a table of many images has for a source, or None. Raises BadCaption."""
        try:
            found = table_caption(self.folder, source, origin)
        except BadTable as bad:
            passing = isinstance(bad.__cause__, OSError)
            raise BadCaption(UNREADABLE if passing else "caption_damaged", str(bad)) from bad
        return self._made(_checked(found[0], found[1]), origin) if found else None

    def missing(self, source: str) -> BadCaption:
        """Return the problem of a source without a caption, which says where it was looked for."""
        places = [usual_name(source, SUFFIXES[origin]) for origin in self.origins if origin in SUFFIXES]
        places += [WHERE["metadata"]] if "metadata" in self.origins else []
        inside = [origin.upper() for origin in self.origins if origin in KINDS]
        places += [f"{'/'.join(inside)} in {source}"] if inside else []
        return BadCaption(MISSING, f"{source} has no caption (looked for {', '.join(places)})")

    def path(self, source: str, origin: str = "txt") -> str:
        """Return the name of a source's sidecar, below the folder; the usual name where there is none."""
        usual = usual_name(source, SUFFIXES[origin])
        if os.path.lexists(self.folder / usual):
            return usual
        parent, _, name = usual.rpartition("/")
        try:
            listed = _listing(self.folder / parent, os.stat(self.folder / parent).st_mtime_ns)
        except OSError:
            return usual
        stem = name.removesuffix(SUFFIXES[origin])
        others = (other for other in listed.get(name.lower(), ()) if other.startswith(stem))
        return "/".join(filter(None, (parent, next(others, name))))

    def paths(self, source: str) -> list[str]:
        """Return the names of all files beside a source that its caption may be read from."""
        return [self.path(source, origin) for origin in self.origins if origin in SUFFIXES]

    def read(self, name: str) -> Caption | None:
        """Return the caption in a file beside an image; None for a JSON object without one. Raises BadCaption."""
        data = self._read(name)
        if len(data) > MAX_BYTES:
            raise BadCaption("caption_too_long", f"{name} is larger than {MAX_BYTES} bytes")
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadCaption("caption_not_utf8", f"{name}: {error.reason} at byte {error.start}") from error
        suffix = PurePosixPath(name).suffix.lower()
        if suffix == SUFFIXES["json"]:
            try:
                text = object_caption(json.loads(text))
            except (ValueError, RecursionError) as error:
                raise BadCaption("caption_damaged", f"{name} is not JSON: {error}") from error
            return self._made(_checked(text, name), "json") if text else None
        text = _checked(text, name)
        provenance = {"backend": "sidecar", "sha256": sha256_bytes(data)}
        return Caption(text, provenance | ({"from": "caption"} if suffix == SUFFIXES["caption"] else {}))

    def _made(self, text: str, origin: str) -> Caption:
        """Return a caption that is not a file of its own: the hash is that of the text."""
        return Caption(text, {"backend": "sidecar", "from": origin, "sha256": sha256_bytes(text.encode())})

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


def look_all_captions(
    captions: SidecarCaptions,
    sources: Sequence[Source],
    look_all: Callable[[Sequence[str], Callable[[str], Any]], Iterable[Any]],
) -> list[str | BadCaption]:
    """Return the fingerprint of the caption of each source, or what is wrong with it.

    ``look_all`` reads files beside images that have changed (``ScanCache.look_all``). What is inside an image was read
    when it was hashed, so it is not opened again.
    """
    found: list[str | BadCaption | None] = [None] * len(sources)

    def read(name: str) -> dict[str, Any] | BadCaption | None:
        if not os.path.lexists(captions.folder / name):
            return None
        try:
            caption = captions.read(name)
            return {"fingerprint": caption.fingerprint if caption else None}
        except BadCaption as bad:
            return bad

    def beside(open_: list[int], names: list[str]) -> None:
        for position, name, answer in zip(open_, names, look_all(names, read)):
            if answer is None and os.path.lexists(captions.folder / name):  # a link that leads nowhere, say
                answer = read(name)
            found[position] = answer.get("fingerprint") if isinstance(answer, dict) else answer

    for origin in captions.origins:
        open_ = [position for position, caption in enumerate(found) if caption is None]
        if origin in SUFFIXES:
            beside(open_, [usual_name(sources[position].name, SUFFIXES[origin]) for position in open_])
            open_ = [position for position in open_ if found[position] is None]
            others = [(position, captions.path(sources[position].name, origin)) for position in open_]
            others = [
                (position, name)
                for position, name in others
                if name != usual_name(sources[position].name, SUFFIXES[origin])
            ]
            beside([position for position, _ in others], [name for _, name in others])
            open_ = [position for position in open_ if found[position] is None]
        for position in open_:
            source = sources[position]
            try:
                if origin in KINDS:
                    known = (entry for entry in source.described.split() if entry.startswith(f"{origin}:"))
                    found[position] = next(known, None)
                elif origin in WHERE and (caption := captions.look_in_tables(source.name, origin)):
                    found[position] = caption.fingerprint
            except BadCaption as bad:
                found[position] = bad
    return [captions.missing(source.name) if caption is None else caption for source, caption in zip(sources, found)]


@lru_cache(maxsize=8)
def _listing(folder: Path, _: int) -> dict[str, list[str]]:
    """Return the names in a folder that may be sidecars, by their small letters; ``.txt`` first, then ``.txT``."""
    names: dict[str, list[str]] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.lower().endswith(tuple(SUFFIXES.values())):
                names.setdefault(entry.name.lower(), []).append(entry.name)
    return {name: sorted(same, reverse=True) for name, same in names.items()}


def _checked(text: str, name: str) -> str:
    """Return a caption in one line. Raises BadCaption for what is none."""
    if "\0" in text:
        raise BadCaption("caption_nul", f"{name} holds a NUL character; is it UTF-16?")
    if len(text) > MAX_BYTES:
        raise BadCaption("caption_too_long", f"{name} has a caption of more than {MAX_BYTES} letters")
    text = " ".join(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").split())
    if not is_visible(text):
        raise BadCaption("caption_empty", f"{name} has no text{' but invisible characters' if text else ''}")
    return text
