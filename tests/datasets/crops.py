"""Crops of photographs, without text: many of each, from the whole of it to an eighth of its height.

``python -m tests.datasets.crops --output FOLDER [--packages FOLDER] [--crops 200] [--size 64] [--seed 0]``: the
photographs of ``tests/benchmarks/holdout_gate.py``, Debian's packages of wallpapers (``apt-get download``, nothing is
installed) and scikit-image's. Writes PHOTOGRAPH-NUMBER.png, so that ``split.group_by: name`` keeps a photograph on one
side of the split, and ``LICENCES.md``. See docs/emoji.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data

from nanodit.console import Progress, say
from nanodit.errors import ConfigError, NanoditError
from nanodit.rng import generator
from tests.benchmarks.holdout_gate import PACKAGES, PHOTOGRAPHS, TEXTURES, fetch, wallpapers

SIZE, CROPS = 64, 200
SMALLEST = 1 / 8  # of the photograph's shorter side; below that little but blur and noise is left of most
FLAT = 4.0  # grey levels of standard deviation; the skies of two photographs would be near duplicates of each other
LICENCES = "LICENCES.md"


def crops(photograph: Image.Image, name: str, count: int, size: int = SIZE, seed: int = 0) -> Iterator[Image.Image]:
    """Yield square crops of ``size`` pixels a side: ``count``, less those that are flat. None is enlarged.

    Sides are log-uniform, so that all scales are as frequent, places uniform. A function of the seed and the name.
    Raises :class:`ConfigError` for a photograph smaller than a crop.
    """
    image, shorter = photograph.convert("RGB"), min(photograph.size)
    if shorter < size:
        raise ConfigError(f"{name} is {image.width}x{image.height} pixels, too small for crops of {size}")
    random = generator("crops", seed, name)
    smallest = max(size, shorter * SMALLEST)
    for _ in range(count):
        side = min(shorter, round(smallest * (shorter / smallest) ** random.random()))
        left, top = (int(random.integers(longer - side + 1)) for longer in image.size)
        box = (left, top, left + side, top + side)
        crop = image.resize((size, size), Image.Resampling.LANCZOS, box)
        if np.asarray(crop.convert("L")).std() >= FLAT:
            yield crop


def photographs(packages: Path) -> dict[str, Callable[[], Image.Image]]:
    """Return what opens each photograph by its name, which has no hyphen; ``packages`` holds Debian's."""
    fetch(packages)
    opened = {name: lambda path=path: Image.open(path) for name, path in wallpapers(packages).items()}
    own = {name: lambda name=name: Image.fromarray(getattr(data, name)()) for name in (*PHOTOGRAPHS, *TEXTURES)}
    return opened | own


def write(
    output: Path, found: dict[str, Callable[[], Image.Image]], count: int = CROPS, size: int = SIZE, seed: int = 0
) -> int:
    """Write the crops of all photographs and return how many they are; the same bytes every time.

    Raises :class:`ConfigError` where the folder has other pictures.
    """
    output.mkdir(parents=True, exist_ok=True)
    digits = len(str(count - 1))
    names = {f"{name}-{number:0{digits}}.png" for name in found for number in range(count)}
    if others := {path.name for path in output.glob("*.png")} - names:
        raise ConfigError(f"{output} has {len(others)} other pictures, {min(others)} for one: give a folder of its own")
    written = 0
    with Progress("crops", len(found), "photographs") as progress:
        for name, photograph in found.items():
            for number, crop in enumerate(crops(photograph(), name, count, size, seed)):
                crop.save(output / f"{name}-{number:0{digits}}.png")
                written += 1
            progress.advance()
    return written


def licences(packages: Path) -> str:
    """Return whose photographs these are: what Debian's packages say, and where scikit-image says it."""
    lines = [
        "# Photographs of these crops",
        f"{', '.join((*PHOTOGRAPHS, *TEXTURES))}: of scikit-image; the docstring of each in `skimage.data` says where "
        "it is from. The others are Debian's, with these licences:",
    ]
    for name in PACKAGES:
        text = (packages / "usr/share/doc" / name / "copyright").read_text(encoding="utf-8")
        lines += [f"## {name}", "\n".join(f"    {line}".rstrip() for line in text.splitlines())]
    return "\n\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--packages", type=Path, help="where Debian's packages are or go; OUTPUT/packages by default")
    parser.add_argument("--crops", type=int, default=CROPS, help="of each photograph, less those that are flat")
    parser.add_argument("--size", type=int, default=SIZE, help="pixels a side")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    packages = options.packages or options.output / "packages"
    try:
        found = photographs(packages)
        written = write(options.output, found, options.crops, options.size, options.seed)
        (options.output / LICENCES).write_text(licences(packages), encoding="utf-8")
    except NanoditError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    say(f"wrote {written} crops of {len(found)} photographs to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
