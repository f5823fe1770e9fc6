"""Which files are images that can be read, and what other files turn out to be.

A name says whether a file is looked at, its first bytes what it is. Signatures: the formats' specifications, and
https://www.garykessler.net/library/file_sigs.html for those of cameras.
"""

from __future__ import annotations

import re
from collections import Counter

import pillow_heif

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "HEIF")  # Pillow's other readers stay out of reach
SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif", ".avif", ".heic",
    ".heif", ".hif",
))  # fmt: skip
RAW_SUFFIXES = frozenset((
    ".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".iiq", ".k25", ".kdc", ".mef", ".mos", ".mrw",
    ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f",
))  # fmt: skip
NO_SUFFIX = "without a suffix"
_SUFFIX = re.compile(r"[\w~-]{1,10}")  # what follows the dot of "St. Moritz" is none
NAMED = 6  # kinds of other files that one line names

# how files of the formats that are read begin: one that does and cannot be opened is damaged
_READ = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"GIF8")
_HEIF_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
# how others begin that are found under an image's name
_OTHERS = (
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"8BPS", "Photoshop document"),
    (b"gimp xcf", "GIMP document"),
    (b"FUJIFILMCCD-RAW", "raw photograph"),
    (b"II\x55\0", "raw photograph"),
    (b"IIRO", "raw photograph"),
    (b"IIRS", "raw photograph"),
    (b"%PDF", "PDF"),
    (b"\0\0\x01\0", "icon"),
    (b"PK\x03\x04", "ZIP archive"),
    (b"\x1f\x8b", "gzip archive"),
)
_MARKUP = ((b"<svg", "SVG drawing"), (b"<!doctype html", "web page"), (b"<html", "web page"), (b"<?xml", "XML file"))
HEAD = 64  # bytes that are enough for all of them

pillow_heif.register_heif_opener(thumbnails=False)


def suffix_of(name: str) -> str:
    """Return the suffix of a file's name with its dot; empty for a name without one."""
    head, dot, tail = name.rpartition("/")[2].rpartition(".")
    return f".{tail}" if head and dot and _SUFFIX.fullmatch(tail) else ""


def is_image_name(name: str) -> bool:
    """Return whether a file of this name is looked at: those with the suffix of an image, and those without any."""
    return (suffix_of(name).lower() or ".jpg") in SUFFIXES


def begins_like_an_image(head: bytes) -> bool:
    """Return whether a file's first bytes are those of a format that is read."""
    return head.startswith(_READ) or (head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS)


def foreign_format(head: bytes) -> str:
    """Return in words what a file is that is none of the formats that are read, from its first bytes."""
    for signature, name in _OTHERS:
        if head.startswith(signature):
            return name
    if head[4:8] == b"ftyp":
        return "raw photograph" if head[8:11] == b"crx" else "video"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for signature, name in _MARKUP:
        if text.startswith(signature):
            return name
    return "no format that is known here"


def other_files(names: Counter[str], raw_alone: int) -> str:
    """Return one line about files that were not looked at, from their number by suffix; empty without any.

    ``raw_alone`` is the number of raw photographs without a picture of the same name beside them.
    """
    if not names:
        return ""
    kinds = [f"{count} {suffix}" for suffix, count in sorted(names.items(), key=lambda kind: (-kind[1], kind[0]))]
    if len(kinds) > NAMED:
        kinds[NAMED:] = [f"{len(kinds) - NAMED} more kinds"]
    total = names.total()
    line = f"{total} other {'file' if total == 1 else 'files'} ignored: {', '.join(kinds)}"
    if raw_alone:
        have, them = ("photograph has", "it") if raw_alone == 1 else ("photographs have", "them")
        line += f"; {raw_alone} raw {have} no picture of the same name beside {them}: export {them} as JPEG or TIFF"
    return line
