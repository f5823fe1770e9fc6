"""Image files without the metadata that nothing here reads: texts, XMP packets, comments and previews of any size.

Pillow keeps all metadata of a file in memory. It refuses a PNG with more than a megabyte of compressed text or colour
profile, which programs that store their node graph write, and takes a minute to join a large EXIF block of a JPEG. What
decides about pixels is kept: their data, palette, transparency, colour profile, and EXIF and XMP for the orientation.
A header check keeps IPTC too, which may hold a description.

Formats: PNG (third edition, sections 5 and 11), JPEG (ITU-T T.81 annex B; JFIF, Adobe, Exif 2.32, ICC.1 annex B.4),
WebP (RFC 9649), TIFF (revision 6.0, section 2; BigTIFF), whose large tags are made empty where they stand.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from typing import BinaryIO

MAX_METADATA = 1 << 20  # bytes of EXIF, and of a text that may hold the orientation
MAX_PROFILE = 255 * 65519  # bytes of a colour profile: what a JPEG can carry. A larger one counts as unreadable
ICC_SEGMENTS = 255
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"acTL", b"fcTL", b"IEND")
PNG_PIXELS = (b"IDAT", b"fdAT")
PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt")
ORIENTED = (b"Raw profile type exif", b"XML:com.adobe.xmp")  # keywords of texts that may say how a picture is turned
XMP = b"http://ns.adobe.com/xap/1.0/\0"
SOS, APP0, APP1, APP2, APP13, APP14, APP15, COM = 0xDA, 0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xEF, 0xFE
WEBP_PIXELS = (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF")
WEBP_FLAGS = {b"ICCP": 0x20, b"EXIF": 0x08, b"XMP ": 0x04}  # of VP8X: which of them there are

TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
TIFF_PIXELS = (273, 279, 324, 325, 347)  # places and lengths of strips and tiles, and the tables of a JPEG inside
TIFF_PROFILE = 34675
TIFF_TYPES = {2: 1, 3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}  # bytes; others 1

Pieces = tuple[list[bytes], bytes | None]


class Unusual(ValueError):
    """The structure of a file is not what its format says; its reader decides what that means."""


def without_metadata(file: BinaryIO, pixels: bool = True) -> tuple[BinaryIO, bytes | None]:
    """Return the image in ``file`` without what nobody reads, and a PNG's colour profile, which is left out too.

    Without ``pixels`` only what a header check needs. Other formats, and files whose structure is unusual, are returned
    as they are. Raises OSError for a file that cannot be read.
    """
    head = file.read(12)
    read: Callable[[BinaryIO, bool], Pieces] | None = None
    if head.startswith(PNG_SIGNATURE):
        read = _png
    elif head.startswith(b"\xff\xd8\xff"):
        read = _jpeg
    elif head.startswith(b"RIFF") and head[8:] == b"WEBP":
        read = _webp
    file.seek(0)
    try:
        if read:
            pieces, profile = read(file, pixels)
            return io.BytesIO(b"".join(pieces)), profile
        if head.startswith(TIFF_MAGIC) and (patches := _large_tags(file, pixels)):
            file.seek(0)
            patched = Patched(file, patches)
            return io.BytesIO(patched.read()) if pixels else patched, None
    except Unusual:
        pass
    file.seek(0)
    return file, None


class Patched(io.RawIOBase, BinaryIO):
    """A file in which some bytes are others: ``patches`` maps places to them."""

    def __init__(self, file: BinaryIO, patches: dict[int, bytes]) -> None:
        self.file, self.patches = file, patches

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move in the file below."""
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        """Return the place in the file below."""
        return self.file.tell()

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Read as the file below does, with the patches."""
        start = self.file.tell()
        data = bytearray(self.file.read(size))
        for place, patch in self.patches.items():
            for at, value in enumerate(patch, place - start):
                if 0 <= at < len(data):
                    data[at] = value
        return bytes(data)


def _large_tags(file: BinaryIO, pixels: bool) -> dict[int, bytes]:
    """Return patches that give the large tags of a TIFF's first directory no values; the others are of more pages."""
    head = _take(file, 16)
    order, big = "<" if head[:1] == b"I" else ">", head[2:3] == b"+" or head[3:4] == b"+"
    word, place, entry = ("Q", head[8:16], "HHQ") if big else ("L", head[4:8], "HHL")
    file.seek(struct.unpack(order + word, place)[0])
    number = struct.unpack(order + ("Q" if big else "H"), _take(file, 8 if big else 2))[0]
    start, length = file.tell(), 20 if big else 12
    entries = _take(file, number * length)
    patches = {}
    for at in range(0, len(entries), length):
        tag, kind, count = struct.unpack_from(order + entry, entries, at)
        most = MAX_PROFILE if tag == TIFF_PROFILE and pixels else MAX_METADATA
        if tag not in TIFF_PIXELS and count * TIFF_TYPES.get(kind, 1) > most:
            patches[start + at + 4] = bytes(8 if big else 4)
    return patches


def webp_size(head: bytes) -> tuple[int, int] | None:
    """Return the size of a WebP from its first 30 bytes; None for anything else.

    Its reader makes room for the picture when it opens the file.
    """
    if len(head) < 30 or not head.startswith(b"RIFF") or head[8:12] != b"WEBP":
        return None
    if head[12:16] == b"VP8X":
        return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
    if head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", head, 26)
    return (width & 0x3FFF, height & 0x3FFF) if head[12:16] == b"VP8 " else None


def _take(file: BinaryIO, count: int) -> bytes:
    if count > MAX_METADATA:  # `read` makes room for all of it before it looks
        place, end = file.tell(), file.seek(0, os.SEEK_END)
        file.seek(place)
        count = count if count <= end - place else end - place + 1
    data = file.read(count)
    if len(data) < count:
        raise Unusual("ends early")
    return data


def _png(file: BinaryIO, pixels: bool) -> Pieces:
    pieces, begin, profile = [_take(file, len(PNG_SIGNATURE))], 0, None
    exif, texts = b"", {}
    while True:
        head = _take(file, 8)
        length, kind = struct.unpack(">I4s", head)
        if not kind.isalpha():
            raise Unusual(f"chunk {kind!r}")
        if kind in PNG_PIXELS:
            begin = begin or len(pieces)
            if pixels:
                pieces.append(head + _take(file, length + 4))
                continue
        elif length > (MAX_PROFILE if kind == b"iCCP" else MAX_METADATA):
            pass
        elif kind in PNG_KEPT:
            pieces.append(head + _take(file, length + 4))
            if kind == b"IEND":
                break
            continue
        elif kind == b"eXIf" and not exif:  # which may come after the pixels
            exif = _png_chunk(kind, _take(file, length))
            length = 0
        elif kind == b"iCCP" and pixels:
            profile = _inflate(_take(file, length).partition(b"\0")[2][1:], MAX_PROFILE) or profile
            length = 0
        elif kind in PNG_TEXT and not begin:
            data = _take(file, length)
            length = 0
            if (word := data.partition(b"\0")[0]) in ORIENTED and word not in texts and _is_short(kind, data):
                texts[word] = _png_chunk(kind, data)
        file.seek(length + 4, os.SEEK_CUR)
    if not begin:
        raise Unusual("no pixels")
    pieces[begin:begin] = [exif, *texts.values(), *([] if pixels else [_png_chunk(b"IDAT", b"")])]
    return pieces, profile


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _is_short(kind: bytes, data: bytes) -> bool:
    rest = data.partition(b"\0")[2]
    if kind == b"iTXt":
        packed, rest = rest[:1] == b"\1", rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    else:
        packed, rest = kind == b"zTXt", rest[1:] if kind == b"zTXt" else rest
    return not packed or _inflate(rest, MAX_METADATA) is not None


def _inflate(data: bytes, limit: int) -> bytes | None:
    """Return what was compressed; None for more than ``limit`` bytes, and for what is damaged."""
    stream = zlib.decompressobj()
    try:
        found = stream.decompress(data, limit)
    except zlib.error:
        return None
    return None if stream.unconsumed_tail else found


def _jpeg(file: BinaryIO, pixels: bool) -> Pieces:
    pieces, room, profiles = [_take(file, 2)], MAX_METADATA, 0
    while True:
        fill, marker, length = struct.unpack(">BBH", _take(file, 4))
        if fill != 0xFF or not 0xC0 <= marker <= COM or 0xD0 <= marker <= 0xD9 or length < 2:
            raise Unusual(f"marker {marker:x}")
        body = _take(file, length - 2)
        wanted = not (APP0 <= marker <= APP15 or marker == COM)
        told = body.startswith((b"Exif\0\0", XMP)) if marker == APP1 else marker == APP13 and not pixels  # IPTC
        if told and len(body) <= room:
            room -= len(body)
            wanted = True
        elif marker == APP2 and body.startswith(b"ICC_PROFILE\0") and pixels and profiles < ICC_SEGMENTS:
            profiles += 1
            wanted = True
        elif (marker, body[:5]) in ((APP0, b"JFIF\0"), (APP14, b"Adobe")):  # which decide about the colours
            wanted = len(body) < 1 << 10
        if wanted:
            pieces.append(struct.pack(">BBH", fill, marker, length) + body)
        if marker == SOS:
            return [*pieces, file.read() if pixels else b""], None


def _webp(file: BinaryIO, pixels: bool) -> Pieces:
    end = 8 + struct.unpack("<4sI4s", _take(file, 12))[1]
    pieces, extended, absent = [b""], 0, set(WEBP_FLAGS)
    while file.tell() + 8 <= end:
        kind, length = struct.unpack("<4sI", head := _take(file, 8))
        if kind == b"VP8X" and length < 10:
            raise Unusual("a short header")
        most = {b"ICCP": MAX_PROFILE if pixels else 0}.get(kind, MAX_METADATA)
        if kind not in WEBP_PIXELS and (kind not in WEBP_FLAGS or length > most):
            file.seek(length + length % 2, os.SEEK_CUR)
            continue
        absent.discard(kind)
        extended = len(pieces) if kind == b"VP8X" else extended
        pieces.append(head + _take(file, length) + file.read(length % 2))
    if extended:
        head, flags, rest = pieces[extended][:8], pieces[extended][8], pieces[extended][9:]
        flags &= ~sum(WEBP_FLAGS[kind] for kind in absent)
        pieces[extended] = head + bytes([flags]) + rest
    pieces[0] = struct.pack("<4sI4s", b"RIFF", 4 + sum(map(len, pieces)), b"WEBP")
    return pieces, None
