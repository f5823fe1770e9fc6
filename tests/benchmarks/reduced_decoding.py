"""What decoding large JPEGs at a reduced scale saves of the px layer's time, and what it changes.

    python -m tests.benchmarks.reduced_decoding [--pictures 24] [--rounds 3] [--base 1024] [--enlarge 2.5]

Photographs from scikit-image as JPEGs, enlarged by a factor so that they are of a camera's size at base 1024; with
`--enlarge 1 --base 256` they keep their own detail and are as much larger than the bucket. "draft", as in `prep run`,
lets the decoder scale by 1/2, 1/4 or 1/8 to at least twice the crop; "gap 2" and "gap 3" reduce by whole factors before
Lanczos (`reducing_gap`). "stage" is all that the px layer does with an image. PSNR is to the crop of all pixels; times
are those of the processor, the shortest of the rounds.
"""

from __future__ import annotations

import argparse
import io
import time
from collections import defaultdict
from collections.abc import Callable

import numpy as np
from PIL import Image

from nanodit.console import say
from prep.dataset.buckets import Bucket, centre_crop, choose_bucket, crop_to_bucket
from prep.dataset.codecs import encode_pixels
from prep.images.duplicates import perceptual_hash, thumbnail
from prep.images.filters import sharpness
from prep.images.jpeg_damage import find_damage
from prep.images.sources import decode
from tests.rehearsal.photographs import pictures

MAX_PIXELS = 178_956_970


def reduced(gap: float) -> Callable[[bytes, Bucket], Image.Image]:
    """Decode all, and reduce by whole factors first."""

    def crop(data: bytes, bucket: Bucket) -> Image.Image:
        image = decode(data, MAX_PIXELS)
        box = centre_crop(*image.size, bucket).box
        return image.resize((bucket.width, bucket.height), Image.Resampling.LANCZOS, box=box, reducing_gap=gap)

    return crop


WAYS: dict[str, Callable[[bytes, Bucket], Image.Image]] = {
    "all": lambda data, bucket: crop_to_bucket(decode(data, MAX_PIXELS), bucket),
    "draft": lambda data, bucket: crop_to_bucket(decode(data, MAX_PIXELS, bucket), bucket),
    "gap 2": reduced(2.0),
    "gap 3": reduced(3.0),
}


def rest_of_stage(pixels: np.ndarray) -> None:
    """Do what the px layer does with a crop."""
    sharpness(pixels), perceptual_hash(pixels), thumbnail(pixels), encode_pixels(pixels, "webp")


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--base", type=int, default=1024)
    parser.add_argument("--enlarge", type=float, default=2.5)
    options = parser.parse_args()
    seconds, psnr, rest, damage = defaultdict(list), defaultdict(list), [], []
    for _, picture in pictures(options.pictures):
        size = [round(side * options.enlarge) for side in picture.size]
        file = io.BytesIO()
        picture.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=92)
        data, bucket = file.getvalue(), choose_bucket(*size, options.base)
        taken = defaultdict(list)
        crops = {}
        for _ in range(options.rounds):  # in turns, so that other work on the machine meets all alike
            for name, way in WAYS.items():
                begun = time.process_time()
                crops[name] = np.asarray(way(data, bucket))
                taken[name].append(time.process_time() - begun)
            begun = time.process_time()
            find_damage(data)
            taken["damage"].append(time.process_time() - begun)
            begun = time.process_time()
            rest_of_stage(crops["all"])
            taken["rest"].append(time.process_time() - begun)
        rest.append(min(taken["rest"]))
        damage.append(min(taken["damage"]))
        for name, crop in crops.items():
            seconds[name].append(min(taken[name]))
            error = np.square(crop.astype(np.float64) - crops["all"]).mean()
            psnr[name].append(10 * np.log10(255**2 / max(error, 1e-9)))
    stage = np.mean(seconds["all"]) + np.mean(rest)
    say(
        f"{len(rest)} pictures, base {options.base}, enlarged {options.enlarge}; "
        f"after the crop {1000 * np.mean(rest):.1f} ms"
    )
    say(f"of decoding, looking for damage {1000 * np.mean(damage):.1f} ms")
    for name in WAYS:
        gain = 1 - (np.mean(seconds[name]) + np.mean(rest)) / stage
        say(
            f"{name:<8}decode and crop {1000 * np.mean(seconds[name]):6.1f} ms   stage {-100 * gain:+6.1f} %   "
            f"PSNR min {min(psnr[name]):5.1f}  median {np.median(psnr[name]):5.1f}"
        )


if __name__ == "__main__":
    main()
