"""A dataset of the real format and sizes without a real image: for measuring, for rehearsals and for tests.

What a sample holds depends on the seed, its bucket and its number alone, so it is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from nanodit.files import canonical_json, sha256_bytes, write_atomic
from nanodit.rng import generator
from prep.captions.mirror import flip_caption
from prep.config import PrepConfig
from prep.dataset.buckets import Bucket
from prep.dataset.codecs import encode_pixels, npy_bytes
from prep.dataset.layers import LAYERS, SHORT_TOKENS, T5_TOKENS, Layer, dino_grid, option
from prep.dataset.layout import Unit, parquet_bytes, read_part
from prep.dataset.members import Array, Member, Picture, Text
from prep.dataset.reader import Dataset
from prep.dataset.writer import LayerWriter
from train.plan.rehearsal import StandIn

# (random numbers, shape, row of the index) -> the content of a member: pixels (H, W, 3), or the array that is stored
Draw = Callable[[np.random.Generator, tuple[int, ...], Mapping[str, Any]], np.ndarray]

# pixels between colours, and the noise on what lies between: a lossless WebP is then as large as a photograph's (PX_MB)
PATCH, GRAIN = 170, 0.6
SPREAD = (0.005, 0.02)  # of scales: what is stored as int8 then reads back as numbers of order 1
# by a sample's number: usual captions, one that cannot be flipped, and one that is its own mirror image
ENDINGS = (" It is on the left.", " Somebody left it.", "", " It is on the left.")


def write_made_up(
    prep: PrepConfig,
    root: Path,
    counts: Mapping[str, tuple[int, int]],
    *,
    seed: int = 0,
    drawn: int | None = None,
    tokens: Callable[[np.random.Generator, int], int] | None = None,
    layers: Mapping[str, Mapping[str, Any]] | None = None,
    draws: Mapping[str, Draw] | None = None,
) -> Dataset:
    """Write a dataset as ``prep`` would, of made-up samples; returns it.

    ``counts`` are the samples of each bucket for training and those held out. Of them ``drawn`` differ and the others
    repeat these, None: all differ. ``tokens`` is how many a caption has, by the sample's number; by default the usual
    length. ``layers`` are those that it has and what dataset.json says of each, ``draws`` other contents by the name of
    a member, or of a layer that has a single one.
    """
    stand_in = StandIn(prep)
    if layers is None:
        layers = {name: dict(stand_in.info["layers"].get(name, {})) for name in prep.active_layers}
    usual = min(T5_TOKENS, prep.t5.max_tokens)
    tokens = tokens or (lambda rng, number: usual)
    index: list[dict[str, Any]] = []
    for bucket, (train, held_out) in counts.items():
        count = train + held_out
        keys = sorted(sha256_bytes(f"{seed}/{bucket}/{number}".encode())[:32] for number in range(count))
        made = [_row(prep, bucket, number, seed, tokens) for number in range(min(count, drawn or count))]
        rows = {
            key: {"key": key, "source": f"{key[:8]}.png", "split": "train" if i < train else "holdout"}
            for i, key in enumerate(keys)
        }
        for name, facts in layers.items():
            layer, recipe = LAYERS[name], {"made": "up"} | _form(prep, name)
            contents = [_members(layer, recipe, row, facts, seed, i, draws or {}) for i, row in enumerate(made)]
            unit, known = Unit(bucket, 0, name), layer.columns_of(recipe)
            with LayerWriter(root, unit, recipe, facts={**facts}) as writer:
                for i, key in enumerate(keys):
                    row = made[i % len(made)]
                    columns = {column: row.get(column, _plain(kind)) for column, kind in known.items()}
                    writer.add(key, contents[i % len(made)], **columns)
                writer.commit()
            for found in read_part(root, unit).table.to_pylist():
                rows[found["key"]].update(found)
        index += [{**row, "bucket": bucket, "shard": 0, "duplicate_group": None} for row in rows.values()]
    table = parquet_bytes(pa.Table.from_pylist(sorted(index, key=lambda row: row["key"])))
    write_atomic(root / "index.parquet", table)
    described = {name: {**facts, **_form(prep, name)} for name, facts in layers.items()}
    digest = sha256_bytes(table)
    info = {**stand_in.info, "schema": 1, "layers": described, "fingerprint": digest}
    info |= {"hashes": {"index.parquet": digest}, **({"flips": True} if prep.flips else {})}
    write_atomic(root / "dataset.json", canonical_json(info))  # last, as everywhere
    return Dataset(root)


def _row(
    prep: PrepConfig, name: str, number: int, seed: int, tokens: Callable[[np.random.Generator, int], int]
) -> dict[str, Any]:
    """Return what the index says of a sample, as far as the sizes of its members follow from it."""
    bucket, rng = Bucket.parse(name), generator("made up", seed, name, number)
    caption = f"Picture {number} of {name}.{ENDINGS[number % len(ENDINGS)] if prep.flips else ''}"
    flipped, short = flip_caption(caption), caption if number % 4 == 3 else f"Picture {number}."
    usual = tokens(rng, number)
    mirrored = tokens(rng, number) if flipped not in (None, caption) else 0
    grid = dino_grid(bucket.height, bucket.width, option(prep, "dino", "input_scale"))
    return {
        "bucket": name, "caption": caption, "caption_flip": flipped, "t5_tokens": usual,
        # none where the caption cannot be flipped, or is its own mirror image
        "t5_flip_tokens": mirrored,
        # of one in four the caption is one sentence, and the others say the same of the mirror image
        "caption_short": short, "caption_short_flip": flip_caption(short), "t5_short_flip_tokens": 0,
        "t5_short_tokens": min(usual, SHORT_TOKENS) if short != caption else 0,
        **dict(zip(("dino_h", "dino_w"), grid)),
    }  # fmt: skip


def _members(
    layer: Layer,
    recipe: Mapping[str, Any],
    row: Mapping[str, Any],
    facts: Mapping[str, Any],
    seed: int,
    number: int,
    draws: Mapping[str, Draw],
) -> dict[str, bytes]:
    members = layer.members_of(recipe)
    found = {}
    for member in members:
        rng = generator("made up", seed, row["bucket"], number, layer.name, member.name)
        draw = draws.get(member.name) or (draws.get(layer.name) if len(members) == 1 else None)
        found[member.name] = _bytes(member, row, facts, rng, draw)
    return found


def _bytes(
    member: Member, row: Mapping[str, Any], facts: Mapping[str, Any], rng: np.random.Generator, draw: Draw | None
) -> bytes:
    """Return a member that is as large as a real one."""
    kind = member.kind
    if isinstance(kind, Picture):
        bucket = Bucket.parse(row["bucket"])
        pixels = (draw or photograph)(rng, (bucket.height, bucket.width, 3), row)
        return encode_pixels(pixels.clip(0, 255).astype(np.uint8), member.name)
    if isinstance(kind, Array):
        shape = kind.shape(row, facts)
        return npy_bytes((draw or DRAWS.get(member.name) or _array(kind))(rng, shape, row).astype(kind.dtype))
    if isinstance(kind, Text):
        return (row[kind.column] or "").encode()
    return b'{"persons": 1}'


def photograph(rng: np.random.Generator, shape: tuple[int, ...], row: Mapping[str, Any]) -> np.ndarray:
    """Draw a picture (H, W, 3) whose lossless WebP takes the bytes of a photograph's."""
    height, width, channels = shape
    colours = rng.integers(0, 256, (max(2, height // PATCH), max(2, width // PATCH), channels), np.uint8)
    smooth = np.asarray(Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC))
    return smooth + GRAIN * rng.standard_normal(shape, np.float32)


def joints(rng: np.random.Generator, shape: tuple[int, ...], row: Mapping[str, Any]) -> np.ndarray:
    """Draw joints (J, 3) anywhere in the picture: x, y in [-1, 1] and a confidence."""
    return np.concatenate([rng.uniform(-1, 1, (shape[0], 2)), rng.uniform(0, 1, (shape[0], 1))], 1)


DRAWS: Mapping[str, Draw] = {"pose.npy": joints}


def _array(kind: Array) -> Draw:
    if np.dtype(kind.dtype).kind == "i":
        return lambda rng, shape, row: rng.integers(-127, 128, shape)
    if kind.negative:
        return lambda rng, shape, row: rng.uniform(*SPREAD, shape)
    return lambda rng, shape, row: rng.standard_normal(shape, np.float32)


def _form(prep: PrepConfig, name: str) -> dict[str, Any]:
    """Return what recipe and dataset.json both say of a layer: the format of its member, and what else it has."""
    layer = LAYERS[name]
    switches = layer.switches(prep.flips, prep.captions.short)
    return ({"format": prep.image.format} if layer.formats else {}) | switches


def _plain(kind: pa.DataType) -> Any:
    return {pa.string(): "0", pa.binary(): b"", pa.bool_(): False}.get(kind, 1)
