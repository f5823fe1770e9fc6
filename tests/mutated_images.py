"""Mutated images through the door of ``prep``: each becomes a crop or a ``BadImage``, whatever it holds.

    python -m tests.mutated_images [--seconds 600] [--seed 0] [--keep FOLDER]

Small valid files of every format are changed: bits, spans, lengths, whole chunks, with checksums made right again. Each
goes through header check, decoding and crop in a child process with ``MEMORY`` bytes to grow by. What ends the child,
takes ``PATIENCE`` seconds, raises anything else, or decodes to another size than its header promised, is printed and
written to FOLDER. The exit code is 1 then. Mutant N of a seed is always the same file.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from nanodit.console import say
from prep.dataset.buckets import Bucket, choose_bucket, crop_to_bucket
from prep.images.sources import BadImage, load_canonical, read_header

PATIENCE = 10.0  # seconds
MEMORY = 1 << 30
MAX_PIXELS = 1 << 24  # of which the decoders may make some copies within MEMORY
SMALL = Bucket(8, 8)
VALUES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def _saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.copy().save(file, kind, **options)  # which leaves a JPEG's settings in the image
    return file.getvalue()


@cache
def seeds() -> tuple[tuple[str, bytes], ...]:
    """Return small valid files, each with its name."""
    y, x = np.mgrid[:37, :53]
    pixels = np.stack([x * 4, y * 6, (x * y) % 256], axis=-1).astype(np.uint8)
    rgb = Image.fromarray(pixels)
    rgba = Image.fromarray(np.dstack([pixels, (x * 4).astype(np.uint8)]))
    grey, palette, bits = rgb.convert("L"), rgb.convert("P"), rgb.convert("1")
    deep = Image.fromarray((x * y * 13 % 65536).astype(np.uint16))
    exif = Image.Exif()
    exif[274], exif[271] = 6, "a camera"
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    xmp = b'<x:xmpmeta xmlns:tiff="" tiff:Orientation="8"/>'
    named = {"exif": exif, "icc_profile": srgb}

    def moving(kind: str) -> bytes:
        return _saved(rgb, kind, save_all=True, append_images=[rgb.rotate(90), rgb.rotate(180)])

    files = {
        "jpeg": _saved(rgb, "JPEG", quality=80, xmp=xmp, comment=b"text", **named),
        "jpeg restarts": _saved(rgb, "JPEG", restart_marker_blocks=2),
        "jpeg progressive": _saved(rgb, "JPEG", progressive=True, subsampling=0),
        "jpeg own tables": _saved(grey, "JPEG", optimize=True),
        "jpeg cmyk": _saved(rgb.convert("CMYK"), "JPEG"),
        "mpo": moving("MPO"),
        "png": _saved(rgb, "PNG", **named),
        "png rgba": _saved(rgba, "PNG"),
        "png palette": _saved(palette, "PNG", transparency=3),
        "png bits": _saved(bits, "PNG"),
        "png 16 bit": _saved(deep, "PNG"),
        "png moving": moving("PNG"),
        "webp": _saved(rgb, "WEBP", xmp=xmp, **named),
        "webp lossless": _saved(rgba, "WEBP", lossless=True),
        "webp moving": moving("WEBP"),
        "bmp": _saved(rgb, "BMP"),
        "bmp palette": _saved(palette, "BMP"),
        "gif": _saved(palette, "GIF", transparency=3, comment=b"text"),
        "gif moving": moving("GIF"),
        "tiff": _saved(rgb, "TIFF", **named),
        "tiff lzw": _saved(rgb, "TIFF", compression="tiff_lzw"),
        "tiff deflate": _saved(rgba, "TIFF", compression="tiff_adobe_deflate"),
        "tiff jpeg": _saved(rgb, "TIFF", compression="jpeg"),
        "tiff fax": _saved(bits, "TIFF", compression="group4"),
        "tiff 16 bit": _saved(deep, "TIFF"),
        "tiff pages": moving("TIFF"),
    }
    return tuple(files.items())


def mutant(seed: int, number: int) -> tuple[str, bytes]:
    """Return the mutant of that number, and the name of the file that it was made from."""
    random = np.random.default_rng([seed, number])
    name, data = seeds()[number % len(seeds())]
    changed = bytearray(data)
    for _ in range(int(random.choice([1, 1, 2, 4, 16]))):
        MUTATIONS[int(random.integers(len(MUTATIONS)))](changed, random)
    if name.startswith("png") and random.random() < 0.7:
        changed = bytearray(_with_checksums(bytes(changed)))
    return name, bytes(changed)


def _place(data: bytearray, random: np.random.Generator) -> int:
    """Return a place, every second time in the first 200 bytes, where headers are."""
    end = max(1, min(len(data), 200 if random.random() < 0.5 else len(data)))
    return int(random.integers(end))


def _bit(data: bytearray, random: np.random.Generator) -> None:
    if data:
        data[_place(data, random)] ^= 1 << int(random.integers(8))


def _byte(data: bytearray, random: np.random.Generator) -> None:
    if data:
        data[_place(data, random)] = int(random.integers(256))


def _number(data: bytearray, random: np.random.Generator) -> None:
    place, value = _place(data, random), int(random.choice(VALUES))
    size = int(random.choice([1, 2, 4]))
    packed = (value & (1 << 8 * size) - 1).to_bytes(size, "big" if random.random() < 0.5 else "little")
    data[place : place + size] = packed


def _span(data: bytearray, random: np.random.Generator) -> tuple[int, int]:
    place = _place(data, random)
    return place, place + int(random.choice([1, 4, 12, 64, 300]))


def _drop(data: bytearray, random: np.random.Generator) -> None:
    start, end = _span(data, random)
    del data[start:end]


def _repeat(data: bytearray, random: np.random.Generator) -> None:
    start, end = _span(data, random)
    data[end:end] = data[start:end] * int(random.choice([1, 2, 50]))


def _zero(data: bytearray, random: np.random.Generator) -> None:
    start, end = _span(data, random)
    data[start:end] = bytes(len(data[start:end]))


def _noise(data: bytearray, random: np.random.Generator) -> None:
    start, end = _span(data, random)
    data[start:end] = random.bytes(end - start)


def _move(data: bytearray, random: np.random.Generator) -> None:
    start, end = _span(data, random)
    piece = data[start:end]
    del data[start:end]
    place = _place(data, random)
    data[place:place] = piece


def _foreign(data: bytearray, random: np.random.Generator) -> None:
    other = seeds()[int(random.integers(len(seeds())))][1]
    start, end = _span(bytearray(other), random)
    place = _place(data, random)
    data[place : place + end - start] = other[start:end]


def _cut(data: bytearray, random: np.random.Generator) -> None:
    del data[int(random.integers(len(data) + 1)) :]


MUTATIONS: tuple[Callable[[bytearray, np.random.Generator], None], ...] = (
    *(_bit, _byte, _number) * 3, _drop, _repeat, _zero, _noise, _move, _foreign, _cut,
)  # fmt: skip


def _with_checksums(data: bytes) -> bytes:
    """Return a PNG with the right checksum behind every chunk, as far as its lengths lead."""
    pieces, place = [data[:8]], 8
    while place + 12 <= len(data):
        length = struct.unpack_from(">I", data, place)[0]
        body = data[place + 4 : place + 8 + length]
        pieces.append(data[place : place + 4] + body + struct.pack(">I", zlib.crc32(body)))
        place += 12 + length
    return b"".join(pieces) + data[place:]


def through_the_door(folder: Path, data: bytes) -> str:
    """Return what became of an image: "crop", or why it was refused. Raises what must not happen."""
    (folder / "x").write_bytes(data)
    try:
        source = read_header(folder, "x", MAX_PIXELS)
        image = load_canonical(folder, source, MAX_PIXELS)
    except BadImage as bad:
        bad.detail.encode()  # its words can be written
        return bad.reason
    assert image.size == (source.width, source.height), f"{image.size}, its header said {source.width, source.height}"
    small = load_canonical(folder, source, MAX_PIXELS, bucket=SMALL)  # reduced while it is decoded, if it is a JPEG
    for pixels, bucket in ((image, choose_bucket(*image.size, 64)), (small, SMALL)):
        assert np.asarray(crop_to_bucket(pixels, bucket)).shape == (bucket.height, bucket.width, 3)
    return "crop"


def limit_memory(size: int) -> None:
    """Let this process grow by so many bytes."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (taken + size, resource.RLIM_INFINITY))


def _child(seed: int, start: int) -> None:
    """Send mutants through the door from ``start`` on; a line for each before, and one for what became of it."""
    warnings.simplefilter("ignore")
    seeds()
    limit_memory(MEMORY)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        number = start
        while True:
            print(number, flush=True)
            try:
                outcome = through_the_door(Path(folder), mutant(seed, number)[1])
            except Exception as error:  # what nobody foresaw is what is looked for
                outcome = f"! {type(error).__name__}: {' '.join(str(error).split())}"
            print(outcome, flush=True)
            number += 1


def hunt(seconds: float, seed: int, keep: Path | None, most: int | None = None) -> tuple[Counter[str], dict[int, str]]:
    """Return how many mutants ended how, and by number those that must not end as they did."""
    outcomes: Counter[str] = Counter()
    broken: dict[int, str] = {}
    number, deadline = 0, time.monotonic() + seconds
    while time.monotonic() < deadline and (most is None or number < most):
        command = [sys.executable, "-m", "tests.mutated_images", "--child", str(seed), str(number)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert child.stdout is not None
        os.set_blocking(child.stdout.fileno(), False)
        buffer, last, at = b"", time.monotonic(), number
        waiting = False  # for the outcome of ``at``
        while time.monotonic() < deadline and (most is None or number < most):
            piece = child.stdout.read()
            if piece:
                *lines, buffer = (buffer + piece).split(b"\n")
                last = time.monotonic()
                for line in lines:
                    if not waiting:
                        at, waiting = int(line), True
                        continue
                    outcome, waiting = line.decode(errors="replace"), False
                    number = at + 1
                    outcomes[outcome.split(":")[0]] += 1
                    if outcome.startswith("!"):
                        broken[at] = outcome
            elif piece == b"" and child.poll() is not None:
                outcomes["! ended"] += 1
                broken[at], number = f"! the process ended with {child.returncode}", at + 1
                break
            elif time.monotonic() - last > PATIENCE + (0 if waiting else 60):  # the first has imports before it
                outcomes["! slow"] += 1
                broken[at], number = f"! longer than {PATIENCE:.0f} seconds", at + 1
                break
            else:
                time.sleep(0.02)
        child.kill()
        child.wait()
    for at, why in broken.items():
        name, data = mutant(seed, at)
        say(f"{at} ({name}, {len(data)} bytes): {why}")
        if keep:
            keep.mkdir(parents=True, exist_ok=True)
            (keep / f"{seed}-{at}.{name.replace(' ', '-')}").write_bytes(data)
    return outcomes, broken


def main() -> int:
    """Hunt, and print what was found."""
    if sys.argv[1:2] == ["--child"]:
        _child(int(sys.argv[2]), int(sys.argv[3]))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    outcomes, broken = hunt(options.seconds, options.seed, options.keep)
    say(f"{sum(outcomes.values())} mutants: " + ", ".join(f"{count} {name}" for name, count in outcomes.most_common()))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
