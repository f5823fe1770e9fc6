"""How often damage inside a JPEG is noticed, by kind of damage and of file, and how often a good file is blamed.

    python -m tests.benchmarks.damaged_jpegs [--pictures 24] [--each 3] [--json]

Photographs from scikit-image and flat, ruled and noisy pictures are encoded at several qualities, with the tables of
annex K and with their own, with restart markers, progressive, in grey. Each copy is damaged in the middle half of its
data. "decoder" is what Pillow refuses by itself, "certain" what `prep.images.jpeg_damage` adds, "warnings" what
libjpeg-turbo's warnings would tell, where the package simplejpeg is installed. "seen" are damages that change a pixel.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
from PIL import Image

from nanodit.console import say
from prep.images.jpeg_damage import find_damage
from tests.rehearsal.photographs import pictures

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

KINDS = {
    "quality 50": {"quality": 50},
    "quality 75": {"quality": 75},
    "quality 92": {"quality": 92},
    "quality 100, 4:4:4": {"quality": 100, "subsampling": 0},
    "own tables": {"quality": 92, "optimize": True},
    "restarts": {"quality": 92, "restart_marker_rows": 1},
    "progressive": {"quality": 92, "progressive": True},
    "grey": {"quality": 92},
}
LENGTHS = (64, 256, 1024, 4096)


def made_up() -> Iterator[Image.Image]:
    """Pictures whose data are runs of one bit, or nearly: flat, ruled, a ramp, noise of all strengths."""
    random = np.random.default_rng(0)
    for level in (0, 1, 127, 254, 255):
        yield Image.new("RGB", (1500, 1000), (level,) * 3)
    yield Image.new("RGB", (1500, 1000), (255, 0, 0))
    for step in (8, 16, 64):
        y, x = np.mgrid[:1000, :1500]
        yield Image.fromarray(np.repeat(((x // step + y // step) % 2 * 255).astype(np.uint8)[..., None], 3, 2))
    ramp = np.repeat(np.linspace(255, 0, 1500).astype(np.uint8)[None], 1000, 0)
    yield Image.fromarray(np.repeat(ramp[..., None], 3, 2))
    for strength in (2, 16, 255):
        yield Image.fromarray((128 + random.integers(-strength, strength + 1, (1000, 1500, 3)) / 2).astype(np.uint8))


def encode(picture: Image.Image, kind: str) -> bytes:
    """Encode as one of ``KINDS``."""
    file = io.BytesIO()
    (picture.convert("L") if kind == "grey" else picture).save(file, "JPEG", **KINDS[kind])
    return file.getvalue()


def damages(data: bytes, random: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Yield damaged copies: runs of zeros, single bits, blocks that are missing or of another place."""
    start = data.index(b"\xff\xda") + 14
    low, high = start + (len(data) - start) // 4, start + 3 * (len(data) - start) // 4
    for length in LENGTHS:
        if low + length < high:
            at = int(random.integers(low, high - length))
            yield f"zeros, {length} bytes", data[:at] + bytes(length) + data[at + length :]
    at = int(random.integers(low, high))
    yield "one bit", data[:at] + bytes([data[at] ^ 1 << int(random.integers(8))]) + data[at + 1 :]
    if high - low > 2 * 4096:
        at = int(random.integers(low, high - 4096))
        yield "4096 bytes missing", data[:at] + data[at + 4096 :]
        other = int(random.integers(low, high - 4096))
        yield "4096 bytes of another place", data[:at] + data[other : other + 4096] + data[at + 4096 :]


def pixels(data: bytes) -> np.ndarray | None:
    """Return what Pillow decodes; None where it refuses."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image)
    except (OSError, SyntaxError):
        return None


def warned(data: bytes, kind: str) -> bool:
    """Tell whether libjpeg-turbo has a warning."""
    try:
        simplejpeg.decode_jpeg(data, colorspace="GRAY" if kind == "grey" else "RGB", strict=True)
    except ValueError:
        return True
    return False


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--each", type=int, default=3, help="damages of each kind per file")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    random = np.random.default_rng(0)
    counts: dict[str, dict[str, dict[str, int]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(int)))
    seconds, size = 0.0, 0
    good = defaultdict(int)
    for picture in [*(picture for _, picture in pictures(options.pictures)), *made_up()]:
        for kind in KINDS:
            data = encode(picture, kind)
            begun = time.perf_counter()
            blamed = find_damage(data) is not None
            seconds, size = seconds + time.perf_counter() - begun, size + len(data)
            good["files"] += 1
            good["certain"] += blamed
            good["warnings"] += bool(simplejpeg) and warned(data, kind)
            before = pixels(data)
            for _ in range(options.each):
                for what, damaged in damages(data, random):
                    after = pixels(damaged)
                    cell = counts[what][kind]
                    cell["files"] += 1
                    cell["decoder"] += after is None
                    if after is not None:
                        cell["seen"] += not np.array_equal(before, after)
                        cell["certain"] += find_damage(damaged) is not None
                        cell["warnings"] += bool(simplejpeg) and warned(damaged, kind)
    if options.json:
        say(json.dumps({"good": good, "damaged": counts, "ms_per_mb": seconds / size * 1e9}))
        return
    say(f"good files: {dict(good)}; {seconds / size * 1e9:.2f} ms per MB")
    for what, kinds in counts.items():
        for kind, cell in kinds.items():
            say(
                f"{what:<28}{kind:<20}"
                + "".join(f"{name} {cell[name]:>4}  " for name in ("files", "decoder", "seen", "certain", "warnings"))
            )


if __name__ == "__main__":
    main()
