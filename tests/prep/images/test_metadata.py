"""Metadata of any size costs neither the picture nor memory, and what decides about pixels is not lost with it."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from prep.images.scan import describe_file
from prep.images.sources import BadImage, decode
from tests.prep.images.test_sources import CAP, encoded, picture, swapped_profile

PLAIN = {
    kind: encoded(picture(), kind, **({"lossless": True} if kind == "WEBP" else {})) for kind in ("PNG", "JPEG", "WEBP")
}
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
MB = 1 << 20


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks: bytes, late: bool = False) -> bytes:
    """The plain PNG with chunks before or behind its pixels."""
    place = -12 if late else 33
    return PLAIN["PNG"][:place] + b"".join(chunks) + PLAIN["PNG"][place:]


def jpeg(*segments: tuple[int, bytes]) -> bytes:
    packed = (struct.pack(">BBH", 255, marker, len(body) + 2) + body for marker, body in segments)
    return PLAIN["JPEG"][:2] + b"".join(packed) + PLAIN["JPEG"][2:]


def padded_profile(size: int) -> bytes:
    """A profile of that size in which red and green have changed places."""
    profile = swapped_profile()
    return struct.pack(">I", size) + profile[4:] + bytes(size - len(profile))


def icc_segments(profile: bytes) -> list[tuple[int, bytes]]:
    parts = [profile[start : start + 65519] for start in range(0, len(profile), 65519)]
    return [(0xE2, b"ICC_PROFILE\0" + bytes([n, len(parts)]) + part) for n, part in enumerate(parts, 1)]


WORKFLOW = b"workflow\0"
LARGE = {
    "zTXt of 4 MB": png(chunk(b"zTXt", WORKFLOW + b"\0" + zlib.compress(b"x" * 4 * MB))),
    "zTXt behind the pixels": png(chunk(b"zTXt", WORKFLOW + b"\0" + zlib.compress(b"x" * 4 * MB)), late=True),
    "iTXt of 4 MB": png(chunk(b"iTXt", WORKFLOW + b"\1\0\0\0" + zlib.compress(b"x" * 4 * MB))),
    "a compressed XMP of 4 MB": png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b"x" * 4 * MB))),
    "70 texts of a megabyte": png(*[chunk(b"tEXt", b"k%d\0" % number + b"x" * MB) for number in range(70)]),
    "XMP of 64 MB": png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + b"x" * 64 * MB)),
    "a text with a wrong checksum": png(chunk(b"tEXt", b"Software\0a")[:-4] + b"0000"),
    "JPEG with 16 MB of EXIF": jpeg(*[(0xE1, b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0" + b"x" * 65000)] * 250),
    "JPEG with 16 MB of XMP": jpeg(*[(0xE1, b"http://ns.adobe.com/xmp/extension/\0" + b"x" * 65000)] * 250),
    "JPEG with 16 MB of comments": jpeg(*[(0xFE, b"x" * 65000)] * 250),
    "WebP with 16 MB of XMP": encoded(picture(), "WEBP", lossless=True, xmp=b"x" * 16 * MB),
    "TIFF with 16 MB of XMP": encoded(picture(), "TIFF", tiffinfo={700: b"x" * 16 * MB}),
    "TIFF with LZW and 16 MB of XMP": encoded(
        picture(), "TIFF", tiffinfo={700: b"x" * 16 * MB}, compression="tiff_lzw"
    ),
    "TIFF with 15 MB of profile": encoded(picture(), "TIFF", icc_profile=b"x" * 15 * MB),
    "BigTIFF with 16 MB of XMP": encoded(picture(), "TIFF", tiffinfo={700: b"x" * 16 * MB}, big_tiff=True),
    "WebP with 4 MB of EXIF": encoded(picture(), "WEBP", lossless=True, exif=b"Exif\0\0" + b"x" * 4 * MB),
}


@pytest.mark.parametrize("name", LARGE)
def test_the_pixels_are_read_and_the_rest_is_skipped(tmp_path, name):
    kind = name.split()[0] if name.startswith(("JPEG", "WebP")) else "PNG"  # a TIFF has the same pixels
    (tmp_path / "x").write_bytes(LARGE[name])
    assert describe_file(tmp_path, "x", CAP)["width"] == 60
    plain = np.asarray(Image.open(io.BytesIO(PLAIN[kind.upper()])).convert("RGB"))
    assert np.array_equal(np.asarray(decode(LARGE[name], CAP)), plain)


@pytest.mark.parametrize("late", [False, True])
def test_a_large_colour_profile_of_a_png_is_applied(late):
    red = encoded(Image.new("RGB", (8, 8), (255, 0, 0)))
    place = -12 if late else 33
    data = red[:place] + chunk(b"iCCP", b"p\0\0" + zlib.compress(padded_profile(3 * MB))) + red[place:]
    assert np.abs(np.asarray(decode(data, CAP)).astype(int) - [0, 255, 0]).max() <= 4


def test_a_profile_beyond_the_limit_counts_as_unreadable_in_every_format():
    plain = np.asarray(picture()).astype(int)
    for kind, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})):
        within, beyond = (
            np.asarray(decode(encoded(picture(), kind, icc_profile=padded_profile(size * MB), **options), CAP)).astype(
                int
            )
            for size in (15, 17)
        )
        assert np.abs(within[..., :2] - plain[..., 1::-1]).max() <= 40, kind  # red and green have changed places
        assert np.array_equal(beyond, plain), kind


def test_the_largest_profile_of_a_jpeg_is_applied():
    image = Image.new("RGB", (8, 8), (255, 0, 0))
    plain = encoded(image, "JPEG", quality=100)
    packed = [
        struct.pack(">BBH", 255, marker, len(body) + 2) + body for marker, body in icc_segments(padded_profile(15 * MB))
    ]
    pixels = np.asarray(decode(plain[:2] + b"".join(packed) + plain[2:], CAP)).astype(int)
    assert np.abs(pixels - [0, 255, 0]).max() <= 4


@pytest.mark.parametrize(
    "data",
    [
        png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)),
        png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP))),
        jpeg((0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP)),
        encoded(picture(), "WEBP", lossless=True, xmp=XMP),
    ],
    ids=["PNG", "PNG, compressed", "JPEG", "WebP"],
)
def test_trap_05_an_orientation_that_only_xmp_names_is_kept(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    header = describe_file(tmp_path, "x", CAP)
    assert (header["width"], header["height"]) == decode(data, CAP).size == (40, 60)  # trap 5


def test_an_exif_block_with_a_wrong_checksum_costs_its_orientation_at_most():
    exif = Image.Exif()
    exif[274] = 6
    block = chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    assert decode(png(block[:-4] + b"0000"), CAP).size == (40, 60)


def test_pieces_of_unusual_files_are_left_to_the_reader():
    with pytest.raises(BadImage, match=r"corrupt|truncated"):
        decode(png(chunk(b"zT\0t", b"x")), CAP)
    fill = PLAIN["JPEG"][:2] + b"\xff\xff" + PLAIN["JPEG"][2:]  # a fill byte before a marker: T.81, B.1.1.2
    assert np.array_equal(np.asarray(decode(fill, CAP)), np.asarray(decode(PLAIN["JPEG"], CAP)))
    behind = PLAIN["PNG"] + b"x" * 100
    assert np.array_equal(np.asarray(decode(behind, CAP)), np.asarray(picture()))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_metadata_cost_no_memory(tmp_path):
    """Headers are checked in eight threads: none may hold what a stranger wrote into a file."""
    for number, data in enumerate(LARGE.values()):
        (tmp_path / f"{number}.x").write_bytes(data)
    code = (
        "import re, sys; from pathlib import Path; from prep.images.scan import describe_file\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1]) // 1024\n"
        "before, folder = peak(), Path(sys.argv[1])\n"
        f"widths = {{describe_file(folder, path.name, {CAP}).get('width') for path in folder.iterdir()}}\n"
        "print(widths == {60}, peak() - before)"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True, timeout=60)
    all_read, megabytes = run.stdout.split()
    assert all_read == "True"
    assert int(megabytes) < 24
