"""Photographs of a camera's size where none are at hand: cuttings from scikit-image's pictures, enlarged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from skimage import data

# all are 400 pixels or more on their shorter side, and come with the package
NAMES = ("astronaut", "chelsea", "coffee", "rocket", "retina", "hubble_deep_field", "immunohistochemistry", "camera")
CUTS = (  # left, top, right, bottom as shares of the picture, and the size of the file
    ((0.0, 0.0, 0.75, 1.0), (1080, 1440)),
    ((0.1, 0.1, 1.0, 0.7), (1620, 1080)),
    ((0.2, 0.0, 1.0, 0.9), (1280, 1280)),
)


def pictures(count: int = len(NAMES) * len(CUTS)) -> Iterator[tuple[str, Image.Image]]:
    """Yield names and pictures, at most 24; enlarged, since ``image.max_upscale`` refuses small ones."""
    cuttings = ((name, number, cut) for number, cut in enumerate(CUTS) for name in NAMES)
    for _, (name, number, (box, size)) in zip(range(count), cuttings):
        picture = Image.fromarray(getattr(data, name)()).convert("RGB")
        box = [round(share * side) for share, side in zip(box, picture.size * 2)]
        yield f"{name}-{number}", picture.resize(size, Image.Resampling.LANCZOS, box)


def write_photographs(folder: Path, count: int = len(NAMES) * len(CUTS)) -> None:
    """Write :func:`pictures` as JPEGs without captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures(count):
        picture.save(folder / f"{name}.jpg", quality=92)
