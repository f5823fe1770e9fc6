"""Rules for which images are wanted: on the header, on the sharpness of the crop and on the number of people.

Pure functions. Each answers with a reason code and a sentence for ``rejects.parquet``, or None for an image that may
stay. The header is judged in the plan, before anything is computed; sharpness in the px layer, which is where the
pixels are; people in the pose layer. Rules that are switched off leave no trace in any recipe.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Self

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from nanodit.config import Config
from prep.dataset.buckets import Bucket, centre_crop, choose_bucket, cut_away

SHARPNESS_SIDE = 512  # pixels: large enough to see a blur of two pixels at 1024, small enough to cost milliseconds
DECISIONS = ("blurred", "too_few_persons", "too_many_persons")  # of layers, that the config asks for: no failures
CHOICES = ("too_small", "too_elongated", *DECISIONS)  # all reasons of this module
CROPPED = 0.5  # share of an image's area: who cuts away more, a panorama say, should know it
NAMED = 3  # of them

Problem = tuple[str, str]


class FilterConfig(Config):
    """The limits of wanted images; None switches a rule off."""

    min_side: int | None = Field(None, ge=1)  # pixels
    min_pixels: int | None = Field(None, ge=1)
    max_aspect: float | None = Field(None, ge=1)
    min_sharpness: float | None = Field(None, ge=0)
    min_persons: int | None = Field(None, ge=0)
    max_persons: int | None = Field(None, ge=0)

    @property
    def counts_persons(self) -> bool:
        """Tell whether the number of people decides about a sample."""
        return self.min_persons is not None or self.max_persons is not None

    @model_validator(mode="after")
    def _some_number_is_allowed(self) -> Self:
        if None not in (self.min_persons, self.max_persons) and self.min_persons > self.max_persons:
            raise ValueError(f"min_persons {self.min_persons} is above max_persons {self.max_persons}")
        return self


def header_problem(width: int, height: int, filters: FilterConfig, base: int, max_upscale: float) -> Problem | None:
    """Return what is wrong with an upright image of ``width`` x ``height`` pixels."""
    size = f"{width}x{height}"
    if filters.min_side is not None and min(width, height) < filters.min_side:
        return "too_small", f"{size}: the shorter side is below filters.min_side {filters.min_side}"
    if filters.min_pixels is not None and width * height < filters.min_pixels:
        return "too_small", f"{size} is fewer pixels than filters.min_pixels {filters.min_pixels}"
    if filters.max_aspect is not None and max(width, height) > filters.max_aspect * min(width, height):
        return "too_elongated", f"{size}: one side is more than filters.max_aspect {filters.max_aspect} times the other"
    bucket = choose_bucket(width, height, base)
    scale = centre_crop(width, height, bucket).scale
    if scale > max_upscale:
        return "too_small", f"{size} would be enlarged {scale:.2f} times to fill {bucket}"
    return None


def lost_area(width: int, height: int, bucket: Bucket) -> float:
    """Return the share of an upright image's area that the crop to ``bucket`` cuts away, from 0 to 1."""
    return float(cut_away(width, height, *centre_crop(width, height, bucket).box))


def crop_remarks(cropped: Iterable[tuple[float, str]]) -> list[str]:
    """Say in one line which images lose more than ``CROPPED`` of their area; no line where none does.

    ``cropped`` are those images: the share that each loses, and its name.
    """
    worst = sorted(cropped, key=lambda item: (-item[0], item[1]))
    if not worst:
        return []
    named = ", ".join(f"{name} ({share:.0%})" for share, name in worst[:NAMED])
    more = f" and {len(worst) - NAMED} more" if len(worst) > NAMED else ""
    return [
        f"{len(worst)} images lose more than {CROPPED:.0%} of their area to the crop: {named}{more}. "
        "filters.max_aspect leaves out images that are longer than so many times their shorter side"
    ]


def sharpness(pixels: np.ndarray) -> float:
    """Return the variance of the Laplacian of uint8 (H, W, 3), in squared grey levels, to three decimals.

    The value is equal on every machine.

    Pictures are first reduced to the area of a square of ``SHARPNESS_SIDE``, so that the value belongs to the picture
    and not to its resolution; smaller ones stay as they are. A flat picture has 0, a blurred photograph some tens, a
    sharp one hundreds or thousands. (Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy", ICPR 2000.)
    """
    grey = Image.fromarray(pixels).convert("L")
    scale = SHARPNESS_SIDE / math.sqrt(grey.width * grey.height)
    if scale < 1:
        grey = grey.resize((round(grey.width * scale), round(grey.height * scale)), Image.Resampling.BOX)
    grid = np.asarray(grey, np.int32)
    edges = grid[:-2, 1:-1] + grid[2:, 1:-1] + grid[1:-1, :-2] + grid[1:-1, 2:] - 4 * grid[1:-1, 1:-1]
    total, squares = int(edges.sum(dtype=np.int64)), int((edges * edges).sum(dtype=np.int64))  # exact
    return round(squares / edges.size - (total / edges.size) ** 2, 3)


def blur_problem(value: float, filters: FilterConfig) -> Problem | None:
    """Return what is wrong with a crop of this :func:`sharpness`."""
    if filters.min_sharpness is None or value >= filters.min_sharpness:
        return None
    return "blurred", f"sharpness {value:.1f} is below filters.min_sharpness {filters.min_sharpness}"


def persons_problem(persons: int, filters: FilterConfig) -> Problem | None:
    """Return what is wrong with a crop in which so many people were found."""
    if filters.min_persons is not None and persons < filters.min_persons:
        return "too_few_persons", f"{persons} found, filters.min_persons is {filters.min_persons}"
    if filters.max_persons is not None and persons > filters.max_persons:
        return "too_many_persons", f"{persons} found, filters.max_persons is {filters.max_persons}"
    return None


def filter_recipe(layer: str, filters: FilterConfig) -> dict[str, Any]:
    """Return the part of a layer's recipe about the filters that act in it; empty without any."""
    acting = {"px": ("min_sharpness",), "pose": ("min_persons", "max_persons")}.get(layer, ())
    set_ = {name: value for name in acting if (value := getattr(filters, name)) is not None}
    return {"filters": set_} if set_ else {}
