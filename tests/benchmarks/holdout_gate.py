"""Which altered forms of an image the split keeps on one side: found, missed and false links, and what it costs.

``python -m tests.benchmarks.holdout_gate FOLDER [--figures 2500] [--scale 100000]``: fetches Debian's packages of
wallpapers into FOLDER where they are not there yet (``apt-get download``, nothing is installed), and takes one picture
of each wallpaper, scikit-image's photographs, and the built-in figures. Textures are counted apart: of a crop of them
nothing in sixteen by sixteen pixels is left where it was.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
from skimage import data

from prep.dataset.buckets import buckets_for, centre_crop
from prep.figures.figures import write_figures
from prep.images.altered import altered_pairs
from prep.images.duplicates import near_pairs, perceptual_hash, thumbnail, thumbnail_rows

PACKAGES = ("plasma-workspace-wallpapers", "mate-backgrounds")
WALLPAPERS = {
    "usr/share/wallpapers": (
        "Autumn", "BytheWater", "ColdRipple", "ColorfulCups", "DarkestHour", "EveningGlow", "FallenLeaf", "Grey",
        "Kite", "OneStandsOut", "PastelHills", "Path", "summer_1am",
    ),
    "usr/share/backgrounds/mate": (
        "Aqua", "Blinds", "Dune", "FreshFlower", "Garden", "GreenMeadow", "LadyBird", "RainDrops", "Storm", "TwoWings",
        "Wood", "YellowFlower",
    ),
}  # fmt: skip
PHOTOGRAPHS = (
    "astronaut", "chelsea", "coffee", "rocket", "retina", "immunohistochemistry", "camera", "moon", "coins", "clock",
)  # fmt: skip
TEXTURES = ("brick", "grass", "gravel", "hubble_deep_field")
SIDE = 256


def edit(kind: type, factor: float) -> Callable[[Image.Image], Image.Image]:
    return lambda image: kind(image).enhance(factor)


def crop(share: float, corner: bool = False) -> Callable[[Image.Image], Image.Image]:
    def apply(image: Image.Image) -> Image.Image:
        width, height = (round(side * share) for side in image.size)
        left, top = (0, 0) if corner else ((image.width - width) // 2, (image.height - height) // 2)
        return image.crop((left, top, left + width, top + height))

    return apply


def turned(image: Image.Image) -> Image.Image:
    return crop(0.96)(image.rotate(1, Image.Resampling.BICUBIC))


FORMS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "half the size": lambda image: image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS),
    "mirrored": ImageOps.mirror,
    "10 % brighter": edit(ImageEnhance.Brightness, 1.1),
    "10 % darker": edit(ImageEnhance.Brightness, 0.9),
    "contrast 20 % higher": edit(ImageEnhance.Contrast, 1.2),
    "mirrored and 10 % brighter": lambda image: edit(ImageEnhance.Brightness, 1.1)(ImageOps.mirror(image)),
    "the middle 95 %": crop(0.95),
    "the middle 95 %, mirrored": lambda image: crop(0.95)(ImageOps.mirror(image)),
    "95 % from a corner": crop(0.95, corner=True),
    "the middle 90 %": crop(0.9),
    "turned by 1 degree, the middle 96 %": turned,
    "grey": lambda image: image.convert("L").convert("RGB"),
}


def fetch(folder: Path) -> None:
    """Download and unpack Debian's packages into the folder, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in PACKAGES:
        if not list(folder.glob(f"{name}_*.deb")):
            subprocess.run(["apt-get", "download", name], cwd=folder, check=True)
    if not (folder / "usr").exists():
        for file in folder.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", file, folder], check=True)


def wallpapers(folder: Path) -> dict[str, Path]:
    """Return the largest picture of each wallpaper by its name."""
    found = {}
    for place, names in WALLPAPERS.items():
        for name in names:
            inside = [path for path in (folder / place).rglob("*") if name in (path.stem, *path.parts[-4:-1])]
            found[name] = max(
                (path for path in inside if path.suffix == ".jpg" or path.suffix == ".png"), key=os.path.getsize
            )
    return found


def small(image: Image.Image) -> Image.Image:
    image = image.convert("RGB")
    image.thumbnail((1000, 1000))
    return image


def described(image: Image.Image) -> tuple[str, bytes]:
    """Return the hash and the thumbnail that preparation at 256 stores."""
    bucket = min(buckets_for(SIDE), key=lambda one: abs(np.log(one.width / one.height * image.height / image.width)))
    box = centre_crop(*image.size, bucket)
    pixels = np.asarray(image.resize(
        (bucket.width, bucket.height), Image.Resampling.LANCZOS, (box.left, box.top, box.right, box.bottom)
    ))  # fmt: skip
    return perceptual_hash(pixels), thumbnail(pixels)


def counts(originals: list[Image.Image], form: Callable[[Image.Image], Image.Image]) -> tuple[int, int, int]:
    """Return how many copies the hashes find, how many this finds, and how many of its links are false."""
    every = [described(image) for image in [*originals, *map(form, originals)]]
    rows, count = thumbnail_rows([small for _, small in every]), len(originals)
    wanted = {(index, index + count) for index in range(count)}
    by_hash = {tuple(sorted(pair)) for found in near_pairs([one for one, _ in every], rows) for pair in found.tolist()}
    found = {tuple(sorted(pair)) for pair in altered_pairs(rows, np.arange(len(rows))).tolist()}
    return len(by_hash & wanted), len(found & wanted), len(found - wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--figures", type=int, default=2500)
    parser.add_argument("--scale", type=int, default=100_000, help="rows of noise of which 2 %% are compared with all")
    options = parser.parse_args()
    fetch(options.folder)
    photographs = [small(Image.open(path)) for path in wallpapers(options.folder).values()]
    photographs += [small(Image.fromarray(getattr(data, name)())) for name in PHOTOGRAPHS]
    textures = [small(Image.fromarray(getattr(data, name)())) for name in TEXTURES]
    print(f"| form | hashes: found of {len(photographs)} | found | false links | found of {len(textures)} textures |")
    print("|---|---|---|---|---|")
    for name, form in FORMS.items():
        by_hash, found, false = counts(photographs, form)
        print(f"| {name} | {by_hash} | {found} | {false} | {counts(textures, form)[1]} |", flush=True)
    with TemporaryDirectory() as folder:
        write_figures(Path(folder), options.figures, size=96, seed=1, workers=os.cpu_count())
        rows = thumbnail_rows([described(Image.open(path))[1] for path in sorted(Path(folder).glob("*.png"))])
    cpu = time.process_time()
    links = len(altered_pairs(rows, np.arange(len(rows))))
    cpu = (time.process_time() - cpu) / len(rows) ** 2 * 1e6
    print(f"\n{len(rows)} figures, all pairs: {links} links, {cpu:.2f} us of CPU a pair")
    rows = np.random.default_rng(0).integers(0, 256, (options.scale, 768), dtype=np.uint8)
    held = np.arange(0, options.scale, 50)
    start, cpu = time.monotonic(), time.process_time()
    altered_pairs(rows, held)
    pairs = len(held) * options.scale
    print(
        f"{len(held)} of {options.scale} rows with all: {time.monotonic() - start:.1f} s, "
        f"{(time.process_time() - cpu) / pairs * 1e9:.1f} ns of CPU a pair"
    )


if __name__ == "__main__":
    main()
