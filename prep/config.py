"""The configuration of ``prep run``; every key is explained in ``configs/prep/base.yaml``."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from nanodit.config import Config, Place
from nanodit.errors import ConfigError
from prep.captions.config import CaptionConfig
from prep.dataset.buckets import buckets_for
from prep.dataset.layers import CHOICES, ENCODER_LAYERS, LAYERS
from prep.images.altered import ALTERED, CANDIDATE
from prep.images.filters import FilterConfig

Chosen = Literal[CHOICES]  # layers that the config may ask for
Taken = Literal[("captions", *ENCODER_LAYERS)]  # what takes memory on a GPU


class ImageConfig(Config):
    """Limits on source images, and how the crops are stored."""

    max_pixels: int = Field(178_956_970, gt=0)  # Pillow's own limit against decompression bombs
    max_upscale: float = Field(1.3334, gt=0)  # 4/3 with room for rounding
    format: Literal["webp", "jpeg"] = "webp"


class DuplicateConfig(Config):
    """When two samples are near duplicates besides their perceptual hash; None means what ``encoders`` stands for."""

    cls_cosine: float | None = Field(None, gt=0, le=1)
    altered_cosine: float = Field(ALTERED, gt=CANDIDATE, le=1)


class SplitConfig(Config):
    """What stays on one side of the split besides near duplicates; each other key belongs to one way to group."""

    group_by: Literal["folder", "name", "csv", "date"] | None = None
    pattern: str | None = None
    csv: Place | None = None
    column: str | None = None
    minutes: float | None = Field(None, gt=0, le=10**9)  # two thousand years: more is no duration

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> Self:
        needed = {"name": {"pattern"}, "csv": {"csv", "column"}, "date": {"minutes"}}.get(self.group_by or "", set())
        given = {name for name in ("pattern", "csv", "column", "minutes") if getattr(self, name) is not None}
        if lacking := sorted(needed - given):
            raise ValueError(f"split.group_by {self.group_by} needs split.{' and split.'.join(lacking)}")
        if wrong := sorted(given - needed):
            raise ValueError(f"split.{wrong[0]} is not for split.group_by {self.group_by or 'null'}")
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise ValueError(f"split.pattern {self.pattern!r} is no regular expression: {error}") from None
        return self


class T5Config(Config):
    """The text encoder; ``model`` None means the one that ``encoders`` names."""

    model: str | None = None
    revision: str | None = None
    sha256: dict[str, str] | None = None  # of every file of the model at ``revision``, a commit
    max_tokens: int = Field(512, ge=2, le=512)  # T5 was trained on 512, and so many are all that training accepts
    words: Place | list[str] | None = Field(None, min_length=1)  # of the demo T5; None: those of the figures' captions
    batch_size: int = Field(16, ge=1)


class DINOv3Config(Config):
    """The image encoder; None means what ``encoders`` stands for."""

    model: str | None = None
    revision: str | None = None
    sha256: dict[str, str] | None = None  # as in T5Config
    input_scale: float | None = Field(None, gt=0)
    batch_size: int = Field(16, ge=1)


class PoseConfig(Config):
    """The two networks of DWPose as ONNX files; None means the ones that ``encoders`` names."""

    detector: str | None = None
    pose: str | None = None
    sha256: dict[Literal["detector", "pose"], str] | None = None
    batch_size: int = Field(16, ge=1)


class PlacementConfig(Config):
    """Where layers are computed; ``vram_gb`` replaces the built-in estimates of what a layer takes on a GPU."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    vram_gb: dict[Taken, Annotated[float, Field(ge=0)]] = Field({})
    actors_per_gpu: int = Field(2, ge=1)


class PrepConfig(Config):
    """Everything ``prep run`` can be told."""

    source: Place
    output: Place
    seed: int = Field(0, ge=0)
    base: int = 1024
    encoders: Literal["demo", "production"] = "production"
    layers: list[Chosen] = Field(["text", "dino", "pose"], min_length=1)
    flips: bool = False
    image: ImageConfig = ImageConfig()
    filters: FilterConfig = FilterConfig()
    duplicates: DuplicateConfig = DuplicateConfig()
    split: SplitConfig = SplitConfig()
    captions: CaptionConfig = CaptionConfig()
    t5: T5Config = T5Config()
    dino: DINOv3Config = DINOv3Config()
    pose: PoseConfig = PoseConfig()
    placement: PlacementConfig = PlacementConfig()
    shard_size: int = Field(128, ge=1)
    holdout: float = Field(0.02, ge=0, lt=1)
    holdout_min: int = Field(128, ge=0)
    max_reject_rate: float = Field(0.5, ge=0, le=1)
    sample_timeout: float = Field(120, gt=0)
    memory_limit_gb: float | None = Field(None, gt=0)
    workers: int | None = Field(None, ge=1)

    @field_validator("base")
    @classmethod
    def _has_buckets(cls, base: int) -> int:
        try:
            buckets_for(base)
        except ConfigError as error:
            raise ValueError(str(error)) from None  # what pydantic reports with the key's path
        return base

    @model_validator(mode="after")
    def _words_are_of_the_demo_t5(self) -> Self:
        if self.t5.words is not None and (self.encoders != "demo" or self.t5.model is not None):
            raise ValueError("t5.words is for the demo T5 alone: set encoders: demo and t5.model: null, or leave it")
        return self

    @model_validator(mode="after")
    def _filters_have_their_layer(self) -> Self:
        if self.filters.counts_persons and "pose" not in self.layers:
            raise ValueError("filters.min_persons and filters.max_persons need the pose layer: add it to layers")
        return self

    @property
    def active_layers(self) -> tuple[str, ...]:
        """The layers of the dataset in the order of the data flow: px always, text brings t5 with it."""
        flow = list(LAYERS)
        if self.filters.counts_persons:
            flow.sort(key=lambda layer: "text" in (layer, LAYERS[layer].upstream))  # captions last
        wanted = {"px", *self.layers}
        return tuple(layer for layer in flow if layer in wanted or LAYERS[layer].upstream in self.layers)

    def upstream(self, layer: str) -> str:
        """Return the layer that ``layer`` is made from (px is made from the source).

        Where the number of people decides about a sample, only what the pose layer accepted is captioned.
        """
        return "pose" if layer == "text" and self.filters.counts_persons else LAYERS[layer].upstream
