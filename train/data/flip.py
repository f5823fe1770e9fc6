"""Which images of a step are mirrored.

A sample is mirrored as a whole: pixels and pose by the functions of :mod:`train.model.mirror`, the caption and its T5
features by what ``prep`` stored of the flipped caption (``prep/captions/mirror.py``), DINO's features by those that it
stored of the mirrored crop: what the network sees in a mirrored image is not what it saw, mirrored
(``docs/measurements.md``).
"""

from __future__ import annotations

from typing import Any

from nanodit.errors import ConfigError
from nanodit.rng import generator


def draw_flip(seed: int, step: int, image: int, probability: float) -> bool:
    """Whether image number ``image`` of an optimiser step is to be mirrored, if its caption allows it."""
    return bool(generator(seed, "flip", step, image).random() < probability)


def check_flips(dataset: Any, probability: float) -> None:
    """Raise :class:`ConfigError` where images are to be mirrored, and the dataset lacks what belongs to the mirror."""
    if probability > 0 and not dataset.has_flips:
        raise ConfigError(
            f"data.flip is {probability:g}, but {dataset.root} was prepared without flips: mirrored images need their "
            "own captions and features. Run nanodit prep run on it with flips=true, or set data.flip=0"
        )
