"""Mutants of images, and what they found: each file becomes a crop or a refusal within a gigabyte and ten seconds."""

import struct
import subprocess
import sys
import zlib

import pytest

from tests.mutated_images import hunt, seeds
from tests.prep.images.test_metadata import chunk, png
from tests.prep.images.test_sources import animation

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limits of the child are Linux's")
NAMED = dict(seeds())


def webp_chunk(kind: bytes, length: int) -> bytes:
    """The small WebP with a chunk in front that promises a length."""
    data = NAMED["webp"]
    return data[:12] + struct.pack("<4sI", kind, length) + data[12:]


def canvas(width: int, height: int) -> bytes:
    """A small moving WebP with a large canvas, which is allowed: its frames cover a corner."""
    data = bytearray(animation("WEBP"))
    data[24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(data)


KEPT = {
    "a WebP whose chunk promises 1.9 GB": (webp_chunk(b"VP8X", 0x6E650C00), "corrupt"),
    "a WebP whose header is empty": (NAMED["webp"][:16] + bytes(4) + NAMED["webp"][30:], "corrupt"),
    "a WebP whose profile promises 2 GB": (webp_chunk(b"ICCP", 0x7FFFFFF0), "truncated"),
    "a WebP with a canvas of 268 megapixels": (canvas(16384, 16384), "too_many_pixels"),
    "a PNG whose palette promises 2 GB": (
        png(struct.pack(">I", 0x7FFFFFF0) + b"PLTE"),
        "truncated",
    ),
    "a PNG with a profile that unpacks to 200 MB": (
        png(chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(200 << 20)))),
        "crop",
    ),
}


def test_what_mutants_found(tmp_path):
    for number, (data, _) in enumerate(KEPT.values()):
        (tmp_path / str(number)).write_bytes(data)
    code = (
        "import sys; from pathlib import Path\n"
        "from tests.mutated_images import MEMORY, limit_memory, through_the_door\n"
        "limit_memory(MEMORY); folder = Path(sys.argv[1])\n"
        "for number in range(int(sys.argv[2])):\n"
        "    print(through_the_door(folder, (folder / str(number)).read_bytes()))"
    )
    command = [sys.executable, "-c", code, tmp_path, str(len(KEPT))]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert dict(zip(KEPT, run.stdout.split())) == {name: outcome for name, (_, outcome) in KEPT.items()}, run.stderr


def test_some_mutants_end_well():
    outcomes, broken = hunt(seconds=60, seed=1, keep=None, most=200)
    assert broken == {}
    assert outcomes["crop"] > 10
    assert outcomes["corrupt"] + outcomes["truncated"] > 10
