"""Sources: what is found, what is refused and why, and canonical pixels of every kind of file."""

import hashlib
import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from prep.images.scan import scan
from prep.images.sources import BadImage, canonical_pixels, decode, load_canonical, read_header

CAP = 178_956_970


def picture(width=60, height=40, seed=0) -> Image.Image:
    """A smooth picture without symmetry, so that every turn and flip differs."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 / width, y * 255 / height, 128 + 0 * x], axis=-1).astype(np.uint8)
    pixels[2:8, 3:15] = np.random.default_rng(seed).integers(0, 256, 3)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def reason_of(data: bytes) -> str:
    with pytest.raises(BadImage) as error:
        decode(data, CAP)
    return error.value.reason


def png_with_header(width: int, height: int) -> bytes:
    """A PNG whose header promises any size and whose data are a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


# --- what is found -------------------------------------------------------------------------------------------------


def test_files_are_found_recursively_in_the_order_of_their_names(tmp_path):
    (tmp_path / "z").mkdir()
    for number, name in enumerate(["b.png", "z/a.JPG", "a.txt", "truth.parquet", "z/no-suffix"]):
        (tmp_path / name).write_bytes(encoded(picture(seed=number)))
    found = scan(tmp_path, CAP)
    assert [source.name for source in found.sources] == ["b.png", "z/a.JPG", "z/no-suffix"]
    assert found.rejects == []
    assert (found.sources[0].width, found.sources[0].height) == (60, 40)


def test_trap_05_the_key_is_the_hash_of_the_content_not_the_name(tmp_path):
    data = encoded(picture())
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.png").write_bytes(data if folder == "a" else encoded(picture(seed=1)))
    first, second = scan(tmp_path, CAP).sources
    assert first.key == hashlib.sha256(data).hexdigest()[:32]  # trap 5
    assert first.key != second.key


def test_of_equal_files_the_first_name_is_kept(tmp_path):
    for name in ("c.png", "a.png", "b.png"):
        (tmp_path / name).write_bytes(encoded(picture()))
    found = scan(tmp_path, CAP)
    assert [source.name for source in found.sources] == ["a.png"]
    assert [(reject.source, reject.reason) for reject in found.rejects] == [
        ("b.png", "duplicate"),
        ("c.png", "duplicate"),
    ]
    assert "a.png" in found.rejects[0].detail


@pytest.mark.parametrize(
    ("captioned", "kept"), [("", "a.png"), ("c", "c.png"), ("bc", "b.png"), ("ac", "a.png"), ("abc", "a.png")]
)
def test_of_equal_files_the_first_with_a_caption_is_kept(tmp_path, captioned, kept):
    for number, name in enumerate(("a.png", "b.png", "c.png", "b2.png", "0.png")):
        (tmp_path / name).write_bytes(encoded(picture(seed=max(0, number - 2))))
    found = scan(tmp_path, CAP, captioned=lambda name: name[0] in captioned)
    assert [source.name for source in found.sources] == sorted(["0.png", "b2.png", kept])
    others = sorted({"a.png", "b.png", "c.png"} - {kept})
    assert [(reject.source, reject.detail) for reject in found.rejects] == [
        (name, f"same bytes as {kept}") for name in others
    ]


def test_links_and_hidden_names_are_refused_with_a_row(tmp_path):
    source, outside = tmp_path / "source", tmp_path / "outside"
    (source / ".git").mkdir(parents=True)
    outside.mkdir()
    (outside / "secret.png").write_bytes(encoded(picture()))
    (source / "good.png").write_bytes(encoded(picture(seed=1)))
    (source / "._good.png").write_bytes(b"\0\5\x16\7")
    (source / "._good.txt").write_bytes(b"\0\5\x16\7")  # of a caption, which is no source either
    (source / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    (source / "out.png").symlink_to(outside / "secret.png")
    (source / "folder").symlink_to(outside)
    (source / "nowhere.png").symlink_to(source / "missing.png")
    (source / "loop.png").symlink_to(source / "loop.png")
    found = scan(source, CAP)
    assert [item.name for item in found.sources] == ["good.png"]
    assert {reject.source: reject.reason for reject in found.rejects} == {
        "._good.png": "hidden",
        ".git": "hidden",
        "Thumbs.db": "hidden",
        "out.png": "outside_source",
        "folder": "linked_folder",
        "nowhere.png": "unreadable",
        "loop.png": "unreadable",
    }


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not allow such names")
def test_a_name_that_is_not_utf8_is_refused_under_a_printable_name(tmp_path):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")).write_bytes(encoded(picture()))
    (reject,) = scan(tmp_path, CAP).rejects
    assert reject.reason == "name_not_utf8"
    assert reject.source.encode() == b"caf\\xe9.png"


def test_a_file_that_changes_during_the_run_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(picture()))
    source = read_header(tmp_path, "a.png", CAP)
    (tmp_path / "a.png").write_bytes(encoded(picture(seed=1)))
    with pytest.raises(BadImage) as error:
        load_canonical(tmp_path, source, CAP)
    assert error.value.reason == "changed_during_run"
    (tmp_path / "a.png").unlink()
    with pytest.raises(BadImage, match="changed_during_run"):
        load_canonical(tmp_path, source, CAP)


# --- what is refused -----------------------------------------------------------------------------------------------


def animation(kind: str) -> bytes:
    frames = [picture(seed=seed) for seed in (1, 2)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("empty.jpg", b"", "empty"),
        ("page.jpg", b"<html><body>404</body></html>", "not_an_image"),
        ("text.png", b"hello", "not_an_image"),
        ("fits.png", b"SIMPLE  =                    T" + b" " * 3000, "not_an_image"),
        ("zip.png", b"PK\3\4" + b"\0" * 100, "not_an_image"),
        ("cut.png", encoded(picture())[:20], "truncated"),
        ("cut.webp", encoded(picture(), "WEBP")[:40], "corrupt"),
        ("bomb.png", png_with_header(50_000, 50_000), "too_many_pixels"),
        ("moving.gif", animation("GIF"), "animated"),
        ("moving.png", animation("PNG"), "animated"),
        ("moving.webp", animation("WEBP"), "animated"),
        ("pages.tif", animation("TIFF"), "animated"),
    ],
)
def test_bad_files_are_refused_from_their_header(tmp_path, name, data, reason):
    (tmp_path / name).write_bytes(data)
    (reject,) = scan(tmp_path, CAP).rejects
    assert (reject.source, reject.stage, reject.reason) == (name, "source", reason)
    assert reject.detail


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "BMP", "GIF"])
def test_a_picture_that_ends_early_is_refused_when_it_is_decoded(kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8))
    data = encoded(noise, kind)
    assert reason_of(data[: len(data) // 2]) in ("truncated", "corrupt")


def test_a_damaged_picture_is_refused():
    data = bytearray(encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8))))
    data[len(data) // 2] ^= 255
    assert reason_of(bytes(data)) in ("truncated", "corrupt")


def test_a_photograph_with_a_second_one_behind_it_is_a_still_picture():
    data = encoded(picture(), "MPO", save_all=True, append_images=[picture(seed=1)])
    assert decode(data, CAP).size == (60, 40)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_bombs_cost_no_memory(tmp_path):
    """A header of 2.5 gigapixels and compressed chunks that unpack to gigabytes are refused within 150 MB."""
    (tmp_path / "bomb.png").write_bytes(png_with_header(50_000, 50_000))
    text = b"a\0\0" + zlib.compress(b"\0" * 200_000_000, 9)
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    plain = encoded(picture())
    (tmp_path / "text.png").write_bytes(plain[:33] + chunk + plain[33:])
    webp = bytearray(encoded(picture(), "WEBP", exif=b"Exif"))
    webp[24:30] = b"\xff\x3f\x00" * 2  # a canvas of 16384 x 16384, for which its reader makes room at once
    (tmp_path / "canvas.webp").write_bytes(webp)
    code = (  # VmHWM, because ru_maxrss of a child starts at what its parent used
        "import re, sys; from pathlib import Path; from prep.images.scan import scan\n"
        f"found = scan(Path(sys.argv[1]), {CAP})\n"
        "peak = re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1]\n"
        "print(len(found.sources), len(found.rejects), int(peak) // 1024)"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True, timeout=60)
    sources, rejects, megabytes = map(int, run.stdout.splitlines()[-1].split())  # after the line about the scan
    assert (sources, rejects) == (1, 2)
    assert megabytes < 150


# --- canonical pixels ----------------------------------------------------------------------------------------------

TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_trap_05_the_exif_orientation_is_applied(tmp_path, kind, orientation):
    upright = np.asarray(picture())
    stored = Image.fromarray(np.ascontiguousarray(TURNS[orientation](upright)))  # as a camera held that way stores it
    exif = Image.Exif()
    exif[274] = orientation
    options = {
        "JPEG": {"quality": 100, "subsampling": 0},
        "WEBP": {"lossless": True},
        "AVIF": {"quality": 100, "subsampling": "4:4:4"},
        "HEIF": {"quality": -1, "chroma": 444, "matrix_coefficients": 0},
    }.get(kind, {})
    # in HEIF it is a property of the picture, which the writer makes of bytes alone
    data = encoded(stored, kind, exif=exif.tobytes() if kind == "HEIF" else exif, **options)
    (tmp_path / "x").write_bytes(data)
    header = read_header(tmp_path, "x", CAP)
    pixels = np.asarray(decode(data, CAP)).astype(int)
    assert (header.height, header.width) == upright.shape[:2] == pixels.shape[:2]  # trap 5
    assert np.abs(pixels - upright).max() <= {"JPEG": 4, "AVIF": 12}.get(kind, 0)


def test_trap_05_an_orientation_behind_the_pixels_of_a_png_is_found_without_decoding(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    payload = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(payload)) + b"eXIf" + payload + struct.pack(">I", zlib.crc32(b"eXIf" + payload))
    plain = encoded(picture())
    (tmp_path / "late.png").write_bytes(plain[:-12] + chunk + plain[-12:])
    header = read_header(tmp_path, "late.png", CAP)
    assert (header.width, header.height) == (40, 60) == load_canonical(tmp_path, header, CAP).size


def test_a_damaged_exif_block_costs_the_orientation_only():
    data = encoded(picture(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xff" * 40)
    assert decode(data, CAP).size == (60, 40)


def test_trap_05_alpha_goes_over_white():
    """Opaque stays, transparent becomes white whatever colour hides under it, half is the mean with white."""
    pixels = np.zeros((4, 3, 4), np.uint8)
    pixels[:, 0] = (200, 100, 0, 255)
    pixels[:, 1] = (0, 0, 0, 0)
    pixels[:, 2] = (200, 100, 0, 128)
    for kind in ("PNG", "WEBP", "TIFF"):
        options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
        row = np.asarray(decode(encoded(Image.fromarray(pixels, "RGBA"), kind, **options), CAP))[0].tolist()
        assert row[0] == [200, 100, 0]
        assert row[1] == [255, 255, 255]  # trap 5
        assert np.abs(np.array(row[2]) - [227, 177, 127]).max() <= 1


def test_trap_05_palette_and_grey_with_transparency():
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 10, 200, 30])
    palette.putpixel((1, 0), 1)
    for kind in ("PNG", "GIF"):
        pixels = np.asarray(decode(encoded(palette, kind, transparency=0), CAP))
        assert pixels[0].tolist() == [[255, 255, 255], [10, 200, 30]]
    grey = Image.fromarray(np.array([[[7, 255], [7, 0]]], np.uint8), "LA")
    assert np.asarray(decode(encoded(grey), CAP))[0].tolist() == [[7, 7, 7], [255, 255, 255]]


def test_trap_05_sixteen_bits_are_scaled_not_cut():
    values = np.array([[0, 257, 32896, 65535, 128, 129]], np.uint16)
    for kind in ("PNG", "TIFF"):
        pixels = np.asarray(decode(encoded(Image.fromarray(values), kind), CAP))
        assert pixels[0, :, 0].tolist() == [0, 1, 128, 255, 0, 1]  # trap 5
        assert pixels.shape == (1, 6, 3)


def test_trap_05_one_bit_and_cmyk():
    bits = Image.new("1", (2, 1))
    bits.putpixel((1, 0), 1)
    assert np.asarray(decode(encoded(bits), CAP))[0].tolist() == [[0, 0, 0], [255, 255, 255]]
    inks = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    for kind in ("JPEG", "TIFF"):
        assert np.abs(np.asarray(decode(encoded(inks, kind), CAP)).astype(int) - [255, 0, 0]).max() <= 2


def test_modes_without_a_defined_range_are_refused():
    assert reason_of(encoded(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF")) == "unsupported_mode"
    assert reason_of(encoded(Image.fromarray(np.ones((2, 2), np.int32)), "TIFF")) == "unsupported_mode"


def swapped_profile() -> bytes:
    """An ICC profile in which red and green have changed places: sRGB with those two tags swapped."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for entry in range(struct.unpack_from(">I", data, 128)[0]):
        at = 132 + 12 * entry
        name = bytes(data[at : at + 4])
        data[at : at + 4] = {b"rXYZ": b"gXYZ", b"gXYZ": b"rXYZ"}.get(name, name)
    return bytes(data)


def test_trap_05_the_icc_profile_is_converted_to_srgb():
    image = Image.new("RGB", (8, 8), (255, 0, 0))
    for kind, options in (("PNG", {}), ("JPEG", {"quality": 100}), ("TIFF", {}), ("WEBP", {"lossless": True})):
        pixels = np.asarray(decode(encoded(image, kind, icc_profile=swapped_profile(), **options), CAP)).astype(int)
        assert np.abs(pixels - [0, 255, 0]).max() <= 4, kind  # trap 5


def test_the_srgb_profile_changes_nothing_and_a_broken_one_is_ignored():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    plain = np.asarray(picture()).astype(int)
    assert np.abs(np.asarray(decode(encoded(picture(), icc_profile=srgb), CAP)) - plain).max() <= 1
    foreign = srgb[:16] + b"\xc3\xff\x00\xe9" + srgb[20:]  # a colour space that is no text
    for broken in (b"broken" * 40, foreign):
        assert np.array_equal(np.asarray(decode(encoded(picture(), icc_profile=broken), CAP)), plain)


def test_p01_a_palette_picture_without_a_palette_is_refused():
    data = encoded(Image.new("P", (8, 8)))
    start, end = data.index(b"PLTE") - 4, data.index(b"IDAT") - 4
    with pytest.raises(BadImage, match="corrupt: decoding failed: AssertionError"):
        decode(data[:start] + data[end:], CAP)


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("PIL.Image.open", MemoryError()),
        ("PIL.ImageFile.ImageFile.load", MemoryError()),
        ("PIL.ImageFile.ImageFile.load", OSError("out of memory error when reading image file")),
        ("PIL.Image.Image.getexif", MemoryError()),
        ("PIL.ImageCms.profileToProfile", MemoryError()),
    ],
)
def test_p12_a_lack_of_memory_is_no_damage_of_the_image(monkeypatch, place, error):
    data = encoded(picture(), icc_profile=swapped_profile())

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(place, fail)
    with pytest.raises(MemoryError):
        decode(data, CAP)


MODES = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I;16", "I;16B"]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(mode):
    assert canonical_pixels(Image.new(mode, (5, 3))).mode == "RGB"
