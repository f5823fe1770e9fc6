"""Descriptions that are stored inside an image: XMP, IPTC and EXIF; read from the header, without decoding.

XMP: dc:description of https://developer.adobe.com/xmp/docs (part 1, 8.4), IPTC: caption/abstract, dataset 2:120 of
https://iptc.org/std/IIM/4.2, EXIF: ImageDescription, tag 270. What cameras and programs write into every file is none.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from xml.parsers import expat

from PIL import ExifTags, Image, IptcImagePlugin

from nanodit.files import sha256_bytes

KINDS = ("xmp", "iptc", "exif")
MAX_BYTES = 1 << 20  # of a packet; a description of more is none
DESCRIPTION, LI = "http://purl.org/dc/elements/1.1/ description", "http://www.w3.org/1999/02/22-rdf-syntax-ns# li"
LANGUAGE = "http://www.w3.org/XML/1998/namespace lang"
BLANK = "\u115f\u1160\u2800\u3164\uffa0"  # letters and a symbol without ink: fillers of Hangul, an empty Braille cell
# what cameras and programs write as the description of every picture
DEFAULTS = re.compile(
    r"(?:olympus|sony|samsung|kodak|minolta|nikon|konica|pentax|ricoh|casio|lg)?\s*(?:digital camera|dsc|dcim\S*)\W*"
    r"|\S*dcim\S*|default|untitled|image|photo|picture|screenshot|my (?:image|photo)|created with \w+(?: \S+)?"
    r"|(?:img|dsc|dscn|dscf|pict|mvc|p|dji|gopr|hpim|cimg)[_-]?\d+(?:\.\w{3,4})?"
    r"|imagej=.*|\{.*\}|\W*|\d+",
    re.IGNORECASE | re.DOTALL,
)


def descriptions(image: Image.Image) -> dict[str, str]:
    """Return what an opened image says of itself, in one line each, by kind in the order of ``KINDS``."""
    found = {}
    for kind, read in (("xmp", _xmp), ("iptc", _iptc), ("exif", _exif)):
        try:
            text = next((text for text in read(image) if text), "")
        except MemoryError:
            raise
        except Exception:  # damaged metadata are common and say nothing; the pixels are still good
            continue
        text = " ".join(text.split())
        if is_visible(text) and len(text) <= MAX_BYTES and "\0" not in text and not DEFAULTS.fullmatch(text):
            found[kind] = text
    return found


def digests(image: Image.Image) -> str:
    """Return the hashes of :func:`descriptions`, as "xmp:SHA-256 exif:SHA-256"; "" where there are none."""
    return " ".join(f"{kind}:{sha256_bytes(text.encode())}" for kind, text in descriptions(image).items())


def is_visible(text: str) -> bool:
    """Tell whether a text has more than spaces, controls and format characters such as U+200B."""
    return any(unicodedata.category(letter)[0] not in "CZ" and letter not in BLANK for letter in text)


def _xmp(image: Image.Image) -> Iterator[str]:
    packet = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or b""
    packet = packet.encode() if isinstance(packet, str) else packet
    if isinstance(packet, bytes) and 0 < len(packet) <= MAX_BYTES:
        yield xmp_description(packet.rstrip(b"\0"))


def xmp_description(packet: bytes) -> str:
    """Return dc:description of an XMP packet, in the default language or else in the first one; "" where it has none.

    Raises expat.ExpatError for what is no XML or declares entities: those can unfold to gigabytes.
    """
    parser = expat.ParserCreate(namespace_separator=" ")
    inside, languages, texts = [], [], []

    def refuse(*_: object) -> None:
        raise expat.ExpatError("entities are not read")

    def start(name: str, attributes: dict[str, str]) -> None:
        inside.append(name)
        if DESCRIPTION in attributes:  # short for an element
            languages.append("x-default")
            texts.append([attributes[DESCRIPTION]])
        if name == DESCRIPTION or (name == LI and DESCRIPTION in inside):
            languages.append(attributes.get(LANGUAGE, ""))
            texts.append([])

    def end(_: str) -> None:
        inside.pop()

    def letters(text: str) -> None:
        if inside and DESCRIPTION in inside:
            texts[-1].append(text)

    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, letters
    parser.Parse(packet, True)
    found = [
        (language != "x-default", place) for place, language in enumerate(languages) if "".join(texts[place]).strip()
    ]
    return "".join(texts[min(found)[1]]) if found else ""


def _iptc(image: Image.Image) -> Iterator[str]:
    records = IptcImagePlugin.getiptcinfo(image) or {}
    value = records.get((2, 120))
    data = value[0] if isinstance(value, list) else value
    if isinstance(data, bytes):
        yield _decoded(data)


def _exif(image: Image.Image) -> Iterator[str]:
    # Image.getexif, because PngImageFile's own decodes the picture to find a chunk that may come after the pixels
    value = Image.Image.getexif(image).get(ExifTags.Base.ImageDescription)
    if isinstance(value, str):
        yield _decoded(value.encode("latin-1", "replace")).rstrip("\0")  # Pillow reads UTF-8 as Latin-1


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")
