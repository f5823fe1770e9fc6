"""The layers of a dataset, one record each: what it holds, what it is made from and with what, and what that takes.

Whatever treats layers alike reads these records: planning, placement, costs, workers, ``prep verify``, ``prep doctor``,
reports and exports. A new layer that an encoder makes from the crops is a record here, a section of ``PrepConfig`` with
a ``batch_size``, and the module of its encoder, whose name is enough here because torch takes seconds to import.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from nanodit.keypoints import JOINTS
from prep.dataset.buckets import Bucket
from prep.dataset.members import Array, Json, Member, Picture, Row, Text
from prep.dataset.quantise import GROUP

Config = Any  # a ``PrepConfig``, which itself is made from these records
SOURCE = "source"  # what px is made from

NPY = 128  # bytes of an array's header
FULL_SIDE = 1024  # pixels, of the rates and of PX_MB
TABLE_TOKENS, TABLE_SIDE = 512, 512  # of the captions and images that ``Encoder.activations_gb`` is of
# MB of a crop of 1024 x 1024, measured on photographs: WebP lossless method 0, JPEG q95 4:4:4
PX_MB = {"webp": 1.03, "jpeg": 0.41}
T5_TOKENS = 220  # of a caption of 150 to 200 words
SHORT_TOKENS = 32  # of a short one as it is computed, padded
# of a slot's time for a long caption, an estimate: the picture has been read, and a tenth of the words are written
SHORT_SHARE = 0.2
CELL = 16  # pixels of the scaled image per side of a DINO patch, whatever the encoder's own patch size
MIN_GRID = 8  # patches per side: fewer say too little about layout, so small images are enlarged


@dataclass(frozen=True)
class Flip:
    """What ``flips`` adds to a layer, of the mirrored crop; ``code`` as in :class:`Layer`."""

    code: int
    members: tuple[Member, ...]
    columns: Mapping[str, pa.DataType] = field(default_factory=dict)


@dataclass(frozen=True)
class Short(Flip):
    """What ``captions.short`` adds to a layer, of the short captions; ``flip`` what it adds together with ``flips``."""

    flip: Flip | None = None


@dataclass(frozen=True)
class Encoder:
    """What computes a layer: a module of ``prep.encoders``, its models, and the memory that one process takes.

    ``module`` has ``fingerprint(**arguments)``, everything that determines the features, and ``build(**arguments,
    device)``. The arguments are ``options`` and, where ``model`` names what ``encoders: production`` stands for, that
    and its ``revision`` and ``sha256``, or the ``files`` in its place and their ``sha256``; all are keys of the layer's
    section of the config. ``options`` maps each to what it is by default with ``encoders``. An encoder has ``memory``
    (a ``Halving``), ``fingerprint()`` and the attributes ``facts``, which dataset.json records; one of images has
    ``samples(images, flips)``, which yields the members and columns of each of uint8 (B, H, W, 3).

    ``beside_ms`` are milliseconds of a CPU per sample of 1024 pixels beside a GPU: decoding, preparing, writing.
    ``weights_gb`` are GB of the weights on a GPU, ``activations_gb`` those of the activations of a batch of 16, both
    estimates; the latter grow with the batch and with ``growth``. On a CPU all is ``on_cpu`` times as much.
    """

    module: str
    weights_gb: float
    activations_gb: float
    growth: Callable[[Config], float] = lambda config: 1.0
    on_cpu: int = 2  # fp32 instead of bf16
    beside_ms: float = 0.0
    model: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    facts: tuple[str, ...] = ()
    width: Mapping[str, int] = field(default_factory=dict)  # of the features, by ``encoders``


@dataclass(frozen=True)
class Layer:
    """A layer: its files and index columns, what it is made from and how, and estimates of what that takes.

    ``code`` is raised when the code gives other bytes for the same inputs; encoders carry their own number.
    ``upstream`` is the layer that it is made from. ``formats`` are the choices for the only member of a layer that has
    any, by the name of the format in the recipe. ``rates`` are samples a second of one worker with one thread ("cpu"),
    on a graphics card ("cuda") or of a slot of a caption server ("captions") with the full-size encoders at 1024
    pixels, divided by ``work`` at other sizes. ``sizes`` are the bytes of a sample's members. ``flat`` names what the
    flat export makes of it.
    """

    name: str
    code: int
    members: tuple[Member, ...]
    columns: Mapping[str, pa.DataType]
    rates: Mapping[str, float]
    sizes: Callable[[Config, Bucket], Sequence[float]]
    work: Callable[[Config], float] = lambda config: 1.0
    upstream: str = "px"
    formats: Mapping[str, Member] = field(default_factory=dict)
    flip: Flip | None = None
    short: Short | None = None
    encoder: Encoder | None = None
    flat: tuple[str, ...] = ()

    def members_of(self, recipe: Mapping[str, Any]) -> tuple[Member, ...]:
        """Return the members that a unit of this recipe has."""
        if "format" in recipe and self.formats:
            return (self.formats[recipe["format"]],)
        return sum((added.members for added in self._added(recipe)), self.members)

    def columns_of(self, recipe: Mapping[str, Any]) -> dict[str, pa.DataType]:
        """Return what the index parts say about a sample besides where its members are."""
        columns = dict(self.columns)
        for added in self._added(recipe):
            columns |= added.columns
        return columns

    def switches(self, flips: bool, short: bool) -> dict[str, int]:
        """Return what recipes and dataset.json say of ``flips`` and ``captions.short``, as far as they concern it.

        Where they are off nothing is said of them, as it always was.
        """
        codes = {"flip": self.flip if flips else None, "short": self.short if short else None}
        return {name: added.code for name, added in codes.items() if added}

    def _added(self, recipe: Mapping[str, Any]) -> list[Flip]:
        short = self.short if "short" in recipe else None
        added = [self.flip if "flip" in recipe else None, short, short.flip if short and "flip" in recipe else None]
        return [one for one in added if one]


def option(config: Config, layer: str, name: str) -> Any:
    """Return an encoder's option: as configured, else what ``encoders`` stands for."""
    encoder = LAYERS[layer].encoder
    assert encoder is not None
    return getattr(getattr(config, layer), name) or encoder.options[name][config.encoders]


def dino_grid(height: int, width: int, input_scale: float) -> tuple[int, int]:
    """Return the DINO patches (rows, columns) of a crop of ``height`` x ``width`` pixels; at least eight a side."""
    rows, columns = (max(MIN_GRID, math.floor(input_scale * side / CELL + 0.5)) for side in (height, width))
    return rows, columns


def _area(config: Config) -> float:
    return (config.base / FULL_SIDE) ** 2


def _px_sizes(config: Config, bucket: Bucket) -> Sequence[float]:
    return (PX_MB[config.image.format] * 1e6 * bucket.width * bucket.height / (FULL_SIDE * FULL_SIDE),)


PX = Layer(
    "px",
    code=2,
    members=(Member("webp", Picture()),),
    columns={"phash": pa.string(), "sharpness": pa.float64(), "thumbnail": pa.binary()},
    upstream=SOURCE,
    formats={"webp": Member("webp", Picture()), "jpeg": Member("jpg", Picture())},  # by image.format
    rates={"cpu": 10.0},  # measured
    work=_area,
    sizes=_px_sizes,
    flat=("image.npy",),
)

TEXT = Layer(
    "text",
    code=1,  # of prep/captions/sidecar.py
    members=(Member("txt", Text("caption", "is empty, or not the caption of the index")), Member("json", Json())),
    columns={"caption": pa.string()},
    flip=Flip(
        code=1,  # of prep/captions/mirror.py: raise it when the same caption is flipped into another one
        members=(Member("flip.txt", Text("caption_flip", "is not the flipped caption of the index", empty=True)),),
        columns={"caption_flip": pa.string()},  # null: not to be flipped, and neither is the image
    ),
    short=Short(
        code=1,  # of prep/captions/sentences.py
        members=(Member("short.txt", Text("caption_short", "is empty, or not the short caption of the index")),),
        columns={"caption_short": pa.string()},
        flip=Flip(
            code=1,
            members=(
                Member(
                    "short_flip.txt",
                    Text("caption_short_flip", "is not the flipped short caption of the index", empty=True),
                ),
            ),
            columns={"caption_short_flip": pa.string()},
        ),
    ),
    rates={"cpu": 500.0, "captions": 1 / 7.5},
    sizes=lambda config, bucket: (
        (1200, 300) + (1200,) * config.flips + (100,) * config.captions.short * (1 + config.flips)
    ),
)


def _t5_sizes(config: Config, bucket: Bucket) -> Sequence[float]:
    width, counts = LAYERS["t5"].encoder.width[config.encoders], [T5_TOKENS] + [SHORT_TOKENS] * config.captions.short
    return tuple(NPY + 2 * min(tokens, config.t5.max_tokens) * width for tokens in counts) * (2 if config.flips else 1)


# T5-Large's encoder, .335 G parameters in bf16. 16 x 512 tokens: 16 heads x 512 x 512 scores x 16 captions in bf16 and
# fp32 are .4 GB, the feed-forward's 4,096 channels .07 GB a tensor. x 2 x 220 tokens = .15 TFLOP; a core does about .02
# a second (the rehearsal, docs/measurements.md), a card like a 3060 about 25 in bf16 at what such networks reach.
T5 = Layer(
    "t5",
    code=1,
    members=(Member("t5.npy", Array(np.float16, lambda row, facts: (row["t5_tokens"], facts["width"]))),),
    columns={"t5_tokens": pa.int32(), "t5_truncated": pa.bool_()},
    upstream="text",
    flip=Flip(  # no tokens where the caption cannot be flipped, or is its own mirror image
        code=1,
        members=(Member("t5_flip.npy", Array(np.float16, lambda row, facts: (row["t5_flip_tokens"], facts["width"]))),),
        columns={"t5_flip_tokens": pa.int32()},
    ),
    short=Short(  # no tokens where another member has the same caption
        code=1,
        members=(
            Member("t5_short.npy", Array(np.float16, lambda row, facts: (row["t5_short_tokens"], facts["width"]))),
        ),
        columns={"t5_short_tokens": pa.int32()},
        flip=Flip(
            code=1,
            members=(
                Member(
                    "t5_short_flip.npy",
                    Array(np.float16, lambda row, facts: (row["t5_short_flip_tokens"], facts["width"])),
                ),
            ),
            columns={"t5_short_flip_tokens": pa.int32()},
        ),
    ),
    rates={"cpu": 0.12, "cuda": 60.0},
    sizes=_t5_sizes,
    encoder=Encoder(
        "prep.encoders.t5",
        model="google-t5/t5-large",
        options={"max_tokens": {}},
        facts=("width", "max_tokens"),
        width={"production": 1024, "demo": 128},
        weights_gb=0.67,
        activations_gb=0.6,
        growth=lambda config: config.t5.max_tokens / TABLE_TOKENS,
    ),
    flat=("t5h.npy", "t5m.npy"),
)


def _dino_members(suffix: str = "") -> tuple[Member, ...]:
    """Return the class token, patches and scales, of the crop or of the mirrored one."""

    def patches(row: Row, facts: Row) -> tuple[int, ...]:
        return row["dino_h"] * row["dino_w"], facts["width"]

    def scales(row: Row, facts: Row) -> tuple[int, ...]:
        return row["dino_h"] * row["dino_w"], -(-facts["width"] // GROUP)

    return (
        Member(f"cls{suffix}.npy", Array(np.float32, lambda row, facts: (facts["width"],))),
        Member(f"dino{suffix}.npy", Array(np.int8, patches)),
        Member(f"dino{suffix}_scale.npy", Array(np.float16, scales, negative="has scales below 0")),
    )


def _dino_sizes(config: Config, bucket: Bucket) -> Sequence[float]:
    width = LAYERS["dino"].encoder.width[config.encoders]
    tokens = math.prod(dino_grid(bucket.height, bucket.width, option(config, "dino", "input_scale")))
    sizes = (2 * width, tokens * width, 2 * tokens * math.ceil(width / GROUP))
    return tuple(NPY + size for size in sizes) * (2 if config.flips else 1)


# ViT-L, .303 G parameters in bf16. 16 x 1,024 tokens x 4,096 channels are .13 GB a tensor, about four such at a time
# with the pixels; more with the square of the input's side. x 2 x 1,029 tokens and attention = .7 TFLOP.
DINO = Layer(
    "dino",
    code=2,
    members=_dino_members(),
    columns={"dino_h": pa.int32(), "dino_w": pa.int32(), "dino_cosine": pa.float32()},  # worst token's, after int8
    flip=Flip(code=1, members=_dino_members("_flip")),  # which are no mirror image of the others
    rates={"cpu": 0.06, "cuda": 25.0},
    work=lambda config: _area(config) * (option(config, "dino", "input_scale") / 0.5) ** 2,
    sizes=_dino_sizes,
    encoder=Encoder(
        "prep.encoders.dinov3",
        model="facebook/dinov3-vitl16-pretrain-lvd1689m",
        # half the crop's resolution is a quarter of the cost and of the bytes; the demo images are small already
        options={"input_scale": {"production": 0.5, "demo": 1.0}},
        facts=("width", "registers", "patch_size", "input_scale"),
        width={"production": 1024, "demo": 96},
        beside_ms=31.0,
        weights_gb=0.61,
        activations_gb=0.5,
        growth=lambda config: (config.base * option(config, "dino", "input_scale") / TABLE_SIDE) ** 2,
    ),
    flat=("dinov3.npy", "dinov3_patches.npy"),
)

# YOLOX-L and DW-LL, .09 G parameters in fp32; the first feature maps, 16 x 64 x 320 x 320, are .42 GB each, and
# onnxruntime's arena keeps about three of them. .155 and .01 TFLOP in fp32, of which a card like a 3060 does about 8 a
# second, and 15 ms on the CPU for resizing and decoding.
POSE = Layer(
    "pose",
    code=1,
    members=(
        Member("pose.npy", Array(np.float32, lambda row, facts: (JOINTS, 3))),
        Member("json", Json("persons", "counts other people than the index")),
    ),
    columns={"persons": pa.int32()},
    rates={"cpu": 0.3, "cuda": 25.0},
    sizes=lambda config, bucket: (NPY + 4 * 3 * JOINTS, 100),
    encoder=Encoder(
        "prep.encoders.dwpose",
        files={"detector": "yzd-v/DWPose:yolox_l.onnx", "pose": "yzd-v/DWPose:dw-ll_ucoco_384.onnx"},
        weights_gb=0.35,
        activations_gb=1.3,
        beside_ms=21.0,
        on_cpu=1,  # the ONNX files are fp32 anyway
    ),
    flat=("pose.npy",),
)

# in the order of the data flow
LAYERS: dict[str, Layer] = {layer.name: layer for layer in (PX, TEXT, T5, DINO, POSE)}
CHOICES = tuple(name for name, layer in LAYERS.items() if layer.upstream == "px")  # the others come with what they need
ENCODER_LAYERS = tuple(name for name, layer in LAYERS.items() if layer.encoder)
