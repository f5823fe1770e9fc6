"""Which images of a step are given their short caption in place of the long one (``captions.short`` of ``prep``)."""

from __future__ import annotations

from typing import Any

from nanodit.errors import ConfigError
from nanodit.rng import generator


def draw_short(seed: int, step: int, image: int, probability: float) -> bool:
    """Whether image number ``image`` of an optimiser step is given its short caption, if any caption."""
    return bool(generator(seed, "short caption", step, image).random() < probability)


def check_short(dataset: Any, key: str, wanted: bool) -> None:
    """Raise :class:`ConfigError`, naming the config's ``key``, where short captions are wanted and there are none."""
    if wanted and not dataset.has_short:
        raise ConfigError(
            f"{key} asks for short captions, but {dataset.root} was prepared without. Run nanodit prep run on it with "
            f"captions.short=true, which keeps everything else, or leave {key} out"
        )
