"""Source images: hashing them, checking their headers, and decoding them to canonical pixels.

Canonical pixels are 8-bit sRGB, upright, without alpha: EXIF orientation applied, an embedded ICC profile converted to
sRGB, transparency composited over white, 16-bit grey scaled (not cut) to 8 bits, CMYK and palettes converted. What
cannot be used raises :class:`BadImage` with a reason code and becomes a row of the rejects table, never a crash.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from prep.dataset.buckets import REDUCED, Bucket, reduction
from prep.images.descriptions import descriptions, digests
from prep.images.formats import (
    FORMATS,
    HEAD,
    begins_like_an_image,
    foreign_format,
)
from prep.images.jpeg_damage import find_damage
from prep.images.metadata import MAX_PROFILE, webp_size, without_metadata

NO_MEMORY = "out of memory"  # in what Pillow raises, an OSError, when a decoder written in C gets none
KEY_DIGITS = 32
ANY_SIZE = 1 << 62  # pixels, where nothing is decoded
NOT_AN_IMAGE = "not_an_image"  # the reason for a file of another format
UNREADABLE = "unreadable"  # the reason for what may be read at another time
# EXIF orientation -> the operation that makes the picture upright (EXIF 2.32, section 4.6.4 A, tag 274)
TRANSPOSE = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MIRRORED, UPSIDE_DOWN = (2, 3, 6, 7), (3, 4, 7, 8)  # orientations that reverse what is upright left to right, top down
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))

# Pillow's own limit is a global that warns below and raises above; the check here is exact and comes from the config.
Image.MAX_IMAGE_PIXELS = None


class BadImage(Exception):
    """A source that cannot be used: ``reason`` is a short code, ``detail`` a sentence for the user."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, slots=True)  # of which there may be millions
class Source:
    """A usable image: its name below the source folder (POSIX), content key, and upright size in pixels.

    ``gone`` is set for one that was prepared earlier and whose file is not there any more, or cannot be read.
    ``described`` are the hashes of the descriptions inside it (:func:`prep.images.descriptions.digests`).
    """

    name: str
    key: str
    size_bytes: int
    width: int
    height: int
    gone: bool = False
    described: str = ""


def leads_out(path: Path, folder: Path) -> bool:
    """Tell whether ``path`` is a link to something outside ``folder``."""
    # realpath, because Path.resolve raises for a link that leads to itself
    return path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(folder.resolve())


def read_header(folder: Path, name: str, max_pixels: int) -> Source:
    """Hash a file and check what its header promises, without decoding. Raises BadImage."""
    path = folder / name
    try:
        size_bytes = path.stat().st_size
        if size_bytes == 0:
            raise BadImage("empty", "the file has no bytes")
        with open(path, "rb") as file:
            key = hashlib.file_digest(file, "sha256").hexdigest()[:KEY_DIGITS]
            file.seek(0)
            with _open_image(file, max_pixels, pixels=False) as image:
                width, height = image.size
                if read_orientation(image) >= 5:  # turned by a quarter
                    width, height = height, width
                described = digests(image)
    except OSError as error:
        raise BadImage(UNREADABLE, error.strerror or str(error)) from error
    return Source(name, key, size_bytes, width, height, described=described)


def read_descriptions(folder: Path, name: str) -> dict[str, str]:
    """Return the descriptions inside an image (:func:`prep.images.descriptions.descriptions`). Raises BadImage."""
    try:
        with open(folder / name, "rb") as file, _open_image(file, ANY_SIZE, pixels=False) as image:
            return descriptions(image)
    except OSError as error:
        raise BadImage(UNREADABLE, error.strerror or str(error)) from error


def read_taken(folder: Path, name: str) -> tuple[str, datetime] | None:
    """Return which camera took an image and when, by its EXIF (2.32, tags 272, 36867 and 306); None if nothing says."""
    try:
        with open(folder / name, "rb") as file, _open_image(file, ANY_SIZE, pixels=False) as image:
            exif = Image.Image.getexif(image)
            original = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.DateTimeOriginal)
            when = original or exif.get(ExifTags.Base.DateTime)
            camera = str(exif.get(ExifTags.Base.Model) or "").strip("\0 ")
            return camera, datetime.strptime(str(when).strip("\0 "), "%Y:%m:%d %H:%M:%S")
    except MemoryError:
        raise
    except Exception:  # gone, unreadable, damaged, or without a date: nothing is known of it
        return None


def _open_image(file: BinaryIO, max_pixels: int, pixels: bool) -> Image.Image:
    head = file.read(HEAD)
    file.seek(0)
    if size := webp_size(head):
        _check_size(*size, max_pixels)
    lean, profile = without_metadata(file, pixels)
    try:
        image = Image.open(lean, formats=FORMATS)
    except UnidentifiedImageError:
        if begins_like_an_image(head):
            raise BadImage("truncated", "the header is damaged or cut off") from None
        raise BadImage(
            NOT_AN_IMAGE, f"the content is {foreign_format(head)}, not one of {', '.join(FORMATS)}. Export it as JPEG"
        ) from None
    except MemoryError:  # says something about the machine, here and below
        raise
    except Exception as error:  # readers of hostile headers raise anything; the file is named in the rejects table
        raise _damage("the header cannot be read", error) from error
    if profile:
        image.info["icc_profile"] = profile
    _check_header(image, max_pixels)
    return image


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadImage("too_many_pixels", f"{width}x{height} is more than max_pixels {max_pixels}")


def _check_header(image: Image.Image, max_pixels: int) -> None:
    _check_size(*image.size, max_pixels)
    try:
        # HEIF and MPO (a JPEG with a second one behind it) may have more pictures beside the first: still pictures
        animated = image.format not in ("HEIF", "MPO") and getattr(image, "is_animated", False)
    except MemoryError:
        raise
    except Exception as error:
        raise _damage("the frames cannot be counted", error) from error
    if animated:
        raise BadImage("animated", f"{image.format} with several frames or pages")


def _damage(what: str, error: Exception) -> BadImage:
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    short = isinstance(error, EOFError) or any(word in text.lower() for word in ("truncated", "unexpected end", "eof"))
    return BadImage("truncated" if short else "corrupt", f"{what}: {text}")


def load_canonical(
    folder: Path,
    source: Source,
    max_pixels: int,
    begin: Callable[[], None] = lambda: None,
    bucket: Bucket | None = None,
) -> Image.Image:
    """Decode a source to canonical pixels (RGB). Raises BadImage, also when the file is no longer what was planned.

    ``begin`` is called when the file has been read and its decoding begins; ``bucket`` as of :func:`decode`.
    """
    try:
        data = (folder / source.name).read_bytes()
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            raise BadImage(UNREADABLE, f"the file can no longer be read: {error.strerror}") from error
        if source.gone:
            raise BadImage("source_gone", "the file is gone, and the pixels have to be made again") from error
        raise BadImage("changed_during_run", "the file was deleted after the run had begun") from error
    if hashlib.sha256(data).hexdigest()[:KEY_DIGITS] != source.key:
        raise BadImage("changed_during_run", "the content changed after the run had begun")
    begin()
    return decode(data, max_pixels, bucket)


def decode(data: bytes, max_pixels: int, bucket: Bucket | None = None) -> Image.Image:
    """Return the canonical pixels (RGB) of the bytes of an image file. Raises BadImage.

    A JPEG that is much larger than ``bucket`` comes reduced by a whole number (:func:`prep.dataset.buckets.reduction`).
    """
    if damage := find_damage(data):
        raise BadImage("corrupt", f"damaged inside: {damage}")
    with _open_image(io.BytesIO(data), max_pixels, pixels=True) as image:
        orientation = read_orientation(image)
        try:
            width, height = image.size if orientation < 5 else image.size[::-1]
            factor = reduction(width, height, bucket) if bucket and image.format == "JPEG" else 1
            if factor > 1:
                image.draft(None, (image.width // factor, image.height // factor))
            image.load()
            pixels = canonical_pixels(image, orientation)
            if factor > 1:  # the last column and row are incomplete, and may have come to be the first
                corner = (-width % factor * (orientation in MIRRORED), -height % factor * (orientation in UPSIDE_DOWN))
                pixels.info[REDUCED] = width, height, factor, *(side / factor for side in corner)
            return pixels
        except (BadImage, MemoryError):
            raise
        except Exception as error:  # as in _open_image: any failure of a decoder is a property of the file
            if NO_MEMORY in str(error):
                raise MemoryError(str(error)) from error
            raise _damage("decoding failed", error) from error


def read_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation (1 to 8) of an opened image, without decoding it; 1 for missing or damaged EXIF."""
    try:
        if image.format == "TIFF":  # Pillow's TIFF reader turns the picture itself, and reports the upright size
            return 1
        # Image.getexif, because PngImageFile's own decodes the picture to find a chunk that may come after the pixels
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except MemoryError:
        raise
    except Exception:  # a damaged EXIF block is common and says nothing; the pixels are still good
        return 1
    return orientation if orientation in TRANSPOSE else 1


def canonical_pixels(image: Image.Image, orientation: int = 1) -> Image.Image:
    """Return upright 8-bit sRGB without alpha, as the module says. Raises BadImage for modes without a meaning."""
    profile = image.info.get("icc_profile")
    if image.mode in ("I", "F"):
        raise BadImage(
            "unsupported_mode", f"{image.format or 'image'} of mode {image.mode}: no defined range of values"
        )
    transparent = image.has_transparency_data
    if TRANSPOSE[orientation] is not None:
        image = image.transpose(TRANSPOSE[orientation])
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8))
    alpha = None
    if transparent:
        image = image.convert("LA" if image.mode in ("1", "L", "LA", "La") else "RGBA")
        alpha = image.getchannel("A")
        image = image.convert(image.mode[:-1])
    elif image.mode in ("P", "PA"):
        image = image.convert("RGB")
    elif image.mode == "1":
        image = image.convert("L")
    image = _to_srgb(image, profile)
    if alpha is not None:
        image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
    return image


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if profile and len(profile) <= MAX_PROFILE:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            expected = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab ": "LAB"}.get(source.profile.xcolor_space)
            if expected == image.mode:
                # relative colorimetric with black point compensation: what browsers do with photographs
                return ImageCms.profileToProfile(
                    image, source, SRGB, outputMode="RGB",
                    renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
                    flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
                )  # fmt: skip
        except MemoryError:
            raise
        except Exception:  # Pillow raises several kinds for profiles of strangers
            pass  # a profile nobody can read is common in the wild: the values are then taken for sRGB, as browsers do
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise BadImage("unsupported_mode", f"colour mode {image.mode} has no conversion to RGB") from error
