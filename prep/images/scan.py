"""The files of a source folder: which of them are images, which are refused, and which are left alone."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanodit.console import Progress
from nanodit.errors import ResourceError
from prep.images.formats import NO_SUFFIX, RAW_SUFFIXES, is_image_name, other_files, suffix_of
from prep.images.sources import NOT_AN_IMAGE, UNREADABLE, BadImage, Source, leads_out, read_header

# how names of files end that captions are read from
CAPTION_FILES = (".txt", ".caption", ".json", "metadata.jsonl", "metadata.csv")
TRUTH_NAME = "truth.parquet"
FIGURES_FILES = (TRUTH_NAME, "figures.json")  # what `prep figures` writes beside the images
DUPLICATE = "duplicate"  # the reason for the second of two equal files
LINKED_FOLDER = "linked_folder"
UNREADABLE_FOLDER = "unreadable_folder"  # what is below it may be there, and nothing of it is known
HIDDEN = "hidden"  # the reason for files of the system's: names with a dot, and what Windows hides
SYSTEM_FILES = ("thumbs.db", "desktop.ini")

THREADS = 8  # that look at files: hashing releases the GIL, and storage likes company
COUNTED = 1000  # files between two updates of a progress line

# What reads a file: plain values, or the exception that says why there are none
Read = Callable[[str], dict[str, Any] | Exception]
# Names of files and what reads them -> what is known of each, in order; None for one that is not there
LookAll = Callable[[Sequence[str], Read], Iterable[dict[str, Any] | Exception | None]]


@dataclass(frozen=True, slots=True)
class Reject:
    """A row of the rejects table."""

    source: str
    stage: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Scan:
    """The content of a source folder, each list sorted by name; ``sources`` has distinct keys.

    ``others`` is a line about the files that are no images by their names; empty without any.
    """

    sources: list[Source]
    rejects: list[Reject]
    others: str = ""


@dataclass(frozen=True)
class Files:
    """The files below a folder, by POSIX names, sorted: those that may be images, refused ones, and all others."""

    names: list[str]
    rejects: list[Reject]
    others: list[str]


def find_files(folder: Path, known: Collection[str] = ()) -> Files:
    """List what is below ``folder``; those of the names ``known`` may be images, whatever their suffix.

    Caption sidecars, hidden ones too, and the figures' tables are no sources and are left out. Links to folders are not
    followed and hidden folders not entered; both are reported, so that nothing disappears silently, and so are folders
    that cannot be listed. Raises ResourceError where that is ``folder`` itself.
    """
    root = folder.resolve()
    names: list[str] = []
    others: list[str] = []
    rejects: list[Reject] = []

    def refuse(name: str, bad: BadImage) -> None:
        # a name that is not UTF-8 cannot be stored in Parquet; it is refused under a printable one
        printable = os.fsencode(name).decode("utf-8", "backslashreplace")
        rejects.append(Reject(printable, "source", bad.reason, bad.detail))

    waiting = [""]
    while waiting:
        parent = waiting.pop()
        for entry in _entries(root, parent, refuse):
            name = f"{parent}{entry.name}"
            if _is_folder(entry):
                if entry.is_symlink():
                    refuse(name, BadImage(LINKED_FOLDER, "links to folders are not followed"))
                elif entry.name.startswith("."):
                    refuse(name, BadImage(HIDDEN, "hidden folders are not read"))
                else:
                    waiting.append(f"{name}/")
            elif entry.name in FIGURES_FILES or entry.name.lower().endswith(CAPTION_FILES):
                continue
            elif not (is_image_name(entry.name) or name in known or _is_hidden(entry)):
                others.append(name)
            elif problem := _problem(entry, name, root):
                refuse(name, problem)
            else:
                names.append(name)
    return Files(sorted(names), sorted(rejects, key=lambda reject: reject.source), others)


def _entries(root: Path, parent: str, refuse: Callable[[str, BadImage], None]) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(root / parent) as entries:
            yield from entries
    except (FileNotFoundError, NotADirectoryError):  # gone since the folder above was listed
        return
    except OSError as error:  # also after a part of it was listed
        if not parent:
            raise ResourceError(
                f"source {root} cannot be listed: {error.strerror}. Check the disk, the network and the permissions; "
                "run again"
            ) from error
        detail = f"{error.strerror}: what is below this folder is not known, and what was prepared from it stays"
        refuse(parent.removesuffix("/"), BadImage(UNREADABLE_FOLDER, detail))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _is_hidden(entry: os.DirEntry[str]) -> bool:
    return entry.name.startswith(".") or entry.name.lower() in SYSTEM_FILES


def _problem(entry: os.DirEntry[str], name: str, root: Path) -> BadImage | None:
    if _is_hidden(entry):
        return BadImage(HIDDEN, "hidden files are not read (names that begin with a dot, and those of Windows)")
    if not name.isascii() and os.fsencode(name).decode("utf-8", "backslashreplace") != name:
        return BadImage("name_not_utf8", "the file name is not valid UTF-8")
    try:
        if entry.is_symlink() and leads_out(root / name, root):
            return BadImage("outside_source", "the link leads out of the source folder")
        if not (entry.is_file(follow_symlinks=False) or (root / name).is_file()):
            return BadImage(UNREADABLE, "not a regular file, or a link that leads nowhere")
    except OSError as error:  # a link into a folder that may not be entered, or a disk that does not say what this is
        return BadImage(UNREADABLE, error.strerror or str(error))
    return None


def scan(
    folder: Path,
    max_pixels: int,
    look_all: LookAll | None = None,
    captioned: Callable[[str], bool] = lambda name: False,
    known: Collection[str] = (),
) -> Scan:
    """Find, hash and check every file below ``folder``; of equal files the first name is kept that has a caption.

    Where none has one it is the first name. ``captioned`` tells of a name whether it has one, and is asked of equal
    files alone. ``look_all`` answers for files that have not changed (``ScanCache.look_all``); without it every file is
    read. ``known`` as of :func:`find_files`.
    """

    def read(name: str) -> dict[str, Any] | Exception:
        return describe_file(folder, name, max_pixels)

    files = find_files(folder, known)
    names, rejects, others = files.names, files.rejects, list(files.others)
    kept: dict[str, Source] = {}
    copies: list[tuple[str, str]] = []  # name and key
    with Progress("scan", None, "files") as progress:
        for count, (name, found) in enumerate(zip(names, (look_all or read_all)(names, read))):
            facts = read(name) if found is None else found
            if isinstance(facts, BadImage):
                rejects.append(Reject(name, "source", facts.reason, facts.detail))
            elif facts.get("reason") == NOT_AN_IMAGE and not suffix_of(name):
                others.append(name)
            elif "reason" in facts:
                rejects.append(Reject(name, "source", **facts))
            elif (first := kept.get(facts["key"])) and (captioned(first.name) or not captioned(name)):
                copies.append((name, facts["key"]))
            else:
                copies += [(first.name, first.key)] if first else []
                kept[facts["key"]] = Source(name, **facts)
            if count % COUNTED == 0:
                progress.update(count)
        progress.update(len(kept) + len(copies) + len(rejects))
    rejects += [Reject(name, "source", DUPLICATE, f"same bytes as {kept[key].name}") for name, key in copies]
    return Scan(
        sorted(kept.values(), key=lambda source: source.name),
        sorted(rejects, key=lambda reject: reject.source),
        _about(others, names),
    )


def _about(others: Sequence[str], names: Sequence[str]) -> str:
    """Return the line about files that are no images."""
    suffixes = [suffix_of(name) for name in others]
    raw = {name.removesuffix(end) for name, end in zip(others, suffixes) if end.lower() in RAW_SUFFIXES}
    raw -= {name.removesuffix(suffix_of(name)) for name in names} if raw else set()
    return other_files(Counter(end or NO_SUFFIX for end in suffixes), len(raw))


def read_all(names: Sequence[str], read: Read) -> Iterator[dict[str, Any] | Exception]:
    """Yield what ``read`` says of each file; several are read at a time."""
    with ThreadPoolExecutor(max_workers=THREADS) as pool:
        for start in range(0, len(names), COUNTED):  # a waiting task takes a kilobyte
            yield from pool.map(read, names[start : start + COUNTED])


def describe_file(folder: Path, name: str, max_pixels: int) -> dict[str, Any] | BadImage:
    """Return the fields of the file's :class:`Source`, or ``reason`` and ``detail`` of its refusal; plain values.

    What may pass, as a disk that cannot be read just now, is returned as the BadImage, which is not to be remembered.
    """
    try:
        source = read_header(folder, name, max_pixels)
    except BadImage as bad:
        if bad.reason == UNREADABLE:  # that may pass, and leaves no trace in the times of the file
            return bad
        return {"reason": bad.reason, "detail": bad.detail}
    fields = ("key", "size_bytes", "width", "height", *(["described"] if source.described else []))
    return {field: getattr(source, field) for field in fields}
