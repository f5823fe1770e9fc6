"""The dataset on disk: shards (a bucket and a number) with one tar per layer, index parts, and the index.

A unit is one (shard, layer). Its tar is a plain WebDataset; its index part, a small Parquet file in ``parts/``, is the
commit record: a tar without a part does not exist, and a part is written only after its tar is durable. Readers go
through ``index.parquet`` and read any member with one ranged read.

Formats: USTAR (POSIX.1-1988: 512-byte member header, so data starts at header + 512), NPY 1.0, WebP lossless or JPEG,
Parquet.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from nanodit.errors import DataError
from nanodit.faults import fault
from nanodit.files import canonical_json, sha256_bytes, sha256_file
from nanodit.storage import Storage, open_storage
from prep.dataset.buckets import buckets_for
from prep.dataset.quantise import dequantise

SCHEMA_VERSION = 1

# The members of each layer: file name in the tar is KEY.MEMBER, columns of the index are LAYER/MEMBER/offset, ...
LAYERS: dict[str, tuple[str, ...]] = {
    "px": ("webp",),
    "text": ("txt", "json"),
    "t5": ("t5.npy",),
    "dino": ("cls.npy", "dino.npy", "dino_scale.npy"),
    "pose": ("pose.npy", "json"),
}

# What `flips` adds to them: the mirrored crop's caption, its features, and DINO's, which are no mirror image of the
# others. Features of a caption are of no token where it cannot be flipped, or is its own mirror image.
FLIP_MEMBERS: dict[str, tuple[str, ...]] = {
    "text": ("flip.txt",),
    "t5": ("t5_flip.npy",),
    "dino": ("cls_flip.npy", "dino_flip.npy", "dino_flip_scale.npy"),
}

IMAGE_FORMATS = {"webp": "webp", "jpeg": "jpg"}  # image.format: member of the px layer

# What a layer's index parts say about a sample besides where its members are.
LAYER_COLUMNS: dict[str, dict[str, pa.DataType]] = {
    "px": {"phash": pa.string(), "sharpness": pa.float64(), "thumbnail": pa.binary()},
    "text": {"caption": pa.string()},
    "t5": {"t5_tokens": pa.int32(), "t5_truncated": pa.bool_()},
    "dino": {"dino_h": pa.int32(), "dino_w": pa.int32(), "dino_cosine": pa.float32()},  # worst token's, after int8
    "pose": {"persons": pa.int32()},
}
FLIP_COLUMNS: dict[str, dict[str, pa.DataType]] = {
    "text": {"caption_flip": pa.string()},  # null: not to be flipped, and neither is the image
    "t5": {"t5_flip_tokens": pa.int32()},
}

TAR_BLOCK = 512


@dataclass(frozen=True, order=True)
class Unit:
    """One (shard, layer): what is computed, committed and recomputed as a whole."""

    bucket: str
    shard: int
    layer: str

    @property
    def tar(self) -> str:
        """Path of the tar below the dataset folder, for example ``bucket_64x64/shard-000003.px.tar``."""
        return f"bucket_{self.bucket}/shard-{self.shard:06d}.{self.layer}.tar"

    @property
    def part(self) -> str:
        """Path of the index part below the dataset folder."""
        return f"parts/bucket_{self.bucket}-shard-{self.shard:06d}.{self.layer}.parquet"

    def __str__(self) -> str:
        return self.tar


@dataclass(frozen=True)
class Rejection:
    """A sample that a layer refused: reason is a short code, detail a sentence."""

    key: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Part:
    """A committed unit: one row per sample plus what was refused.

    ``recipe`` is everything the unit was made from, ``fingerprint`` its hash; ``facts`` is what the encoder says of
    itself (feature widths, for example).
    """

    unit: Unit
    recipe: dict[str, Any]
    facts: dict[str, Any]
    tar_bytes: int
    tar_sha256: str
    rejects: tuple[Rejection, ...]
    table: pa.Table

    @property
    def fingerprint(self) -> str:
        """Identifies the recipe."""
        return fingerprint_of(self.recipe)


def fingerprint_of(recipe: dict[str, Any]) -> str:
    """SHA-256 of a recipe, a tree of plain values."""
    return sha256_bytes(canonical_json(recipe).encode())


class LayerWriter:
    """Writes one unit: add samples in key order, then :meth:`commit`; leaving the ``with`` block without it undoes all.

    The old index part goes before the new tar comes, so that no moment exists in which a part describes another tar.
    """

    def __init__(self, root: Path | str | Storage, unit: Unit, recipe: dict[str, Any], facts: dict[str, Any]) -> None:
        self.storage, self.unit, self.recipe, self.facts = open_storage(root), unit, recipe, facts
        self._rows: list[dict[str, Any]] = []
        self._rejects: list[Rejection] = []
        self._temporary = self.storage.draft(unit.tar)
        self._file = open(self._temporary, "wb")  # noqa: SIM115 - closed by commit or __exit__
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(OSError):  # on a full disk closing fails, too, and the first error has been raised already
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def add(self, key: str, members: dict[str, bytes], **columns: Any) -> None:
        """Append one sample: ``members`` by name as in ``members_of``, ``columns`` as in ``columns_of``."""
        layer, expected = self.unit.layer, members_of(self.unit.layer, self.recipe)
        described = columns_of(layer, self.recipe)
        if tuple(members) != expected or set(columns) != set(described):
            raise ValueError(f"{self.unit}: expected members {expected} and columns {set(described)}")
        if self._rows and key <= self._rows[-1]["key"]:
            raise ValueError(f"{self.unit}: key {key} is not after {self._rows[-1]['key']}")
        row: dict[str, Any] = {"key": key, **columns}
        for member, data in members.items():
            info = tarfile.TarInfo(f"{key}.{member}")  # defaults: mtime 0, uid and gid 0, mode 0644, no names
            info.size = len(data)
            row[f"{layer}/{member}/offset"] = self._tar.offset + TAR_BLOCK
            row[f"{layer}/{member}/length"] = len(data)
            row[f"{layer}/{member}/sha256"] = sha256_bytes(data)
            self._tar.addfile(info, io.BytesIO(data))
        self._rows.append(row)

    @property
    def rejected(self) -> int:
        """How many samples were refused so far."""
        return len(self._rejects)

    def reject(self, key: str, reason: str, detail: str) -> None:
        """Note that this layer refuses a sample; it will be missing from the layer and from the index."""
        self._rejects.append(Rejection(key, reason, detail))

    def commit(self) -> None:
        """Make the tar durable and visible, then its index part."""
        self._tar.close()
        self._file.close()
        record = {
            "schema": SCHEMA_VERSION,
            "bucket": self.unit.bucket,
            "shard": self.unit.shard,
            "layer": self.unit.layer,
            "recipe": self.recipe,
            "facts": self.facts,
            "tar_bytes": self._temporary.stat().st_size,
            "tar_sha256": sha256_file(self._temporary),
            "rejects": [vars(reject) for reject in sorted(self._rejects, key=lambda reject: reject.key)],
        }
        fault("shards.before_tar")
        self.storage.delete(self.unit.part)
        self.storage.put_file(self.unit.tar, self._temporary)
        fault("shards.before_part")
        schema = part_schema(self.unit.layer, self.recipe).with_metadata(
            {"nanodit": json.dumps(record, sort_keys=True)}
        )
        self.storage.write(self.unit.part, parquet_bytes(pa.Table.from_pylist(self._rows, schema=schema)))


def members_of(layer: str, recipe: Mapping[str, Any]) -> tuple[str, ...]:
    """The members of a layer; ``recipe`` (of a unit, or the layer's part of dataset.json) says which it has.

    px may have another format than WebP, and the others what belongs to the mirrored crop.
    """
    if layer == "px" and "format" in recipe:
        return (IMAGE_FORMATS[recipe["format"]],)
    return LAYERS[layer] + (FLIP_MEMBERS[layer] if "flip" in recipe else ())


def columns_of(layer: str, recipe: Mapping[str, Any]) -> dict[str, pa.DataType]:
    """What the index parts of a layer say about a sample besides where its members are; ``recipe`` as above."""
    return LAYER_COLUMNS[layer] | (FLIP_COLUMNS.get(layer, {}) if "flip" in recipe else {})


def member_columns(layer: str, recipe: Mapping[str, Any]) -> dict[str, pa.DataType]:
    """The index columns that locate the members of a layer."""
    kinds = {"offset": pa.int64(), "length": pa.int64(), "sha256": pa.string()}
    return {f"{layer}/{member}/{name}": kind for member in members_of(layer, recipe) for name, kind in kinds.items()}


def part_schema(layer: str, recipe: Mapping[str, Any]) -> pa.Schema:
    """Schema of the index parts of a layer."""
    return pa.schema({"key": pa.string(), **columns_of(layer, recipe), **member_columns(layer, recipe)})


def parquet_bytes(table: pa.Table) -> bytes:
    """``table`` as the bytes of a Parquet file; equal tables give equal bytes for one version of pyarrow."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def read_parquet(data: bytes, columns: list[str] | None = None, schema: pa.Schema | None = None) -> pa.Table:
    """The table in the bytes of a Parquet file, or some columns of it. Raises ArrowException for a damaged one.

    Without Arrow's threads: a process that ends soon after can crash on them (seen with pyarrow 26), and small tables
    gain nothing.
    """
    return pq.read_table(pa.BufferReader(data), columns=columns, schema=schema, use_threads=False, pre_buffer=False)


def read_part(root: Path | str | Storage, unit: Unit) -> Part | None:
    """The committed part of a unit; None where there is none, or where its tar is missing or of another size.

    A damaged or foreign part is treated like a missing one: the unit is then computed again. One that cannot be read
    at the moment is not, because what it says of samples whose files are gone exists nowhere else: ResourceError.
    """
    storage = open_storage(root)
    data = storage.read_if_there(unit.part)
    if data is None:
        return None
    try:
        table = read_parquet(data)
        record = json.loads((table.schema.metadata or {}).get(b"nanodit", b"{}"))
    except (OSError, ValueError, pa.ArrowException):  # pyarrow has OSErrors for damaged content, too
        return None
    tar_bytes = storage.size(unit.tar)
    expected = (SCHEMA_VERSION, unit.bucket, unit.shard, unit.layer, tar_bytes)
    if tuple(record.get(name) for name in ("schema", "bucket", "shard", "layer", "tar_bytes")) != expected:
        return None
    rejects = tuple(Rejection(**reject) for reject in record["rejects"])
    return Part(unit, record["recipe"], record["facts"], tar_bytes, record["tar_sha256"], rejects, table)


def read_members(root: Path | str | Storage, part: Part, member: str) -> Iterator[tuple[str, bytes]]:
    """Yield (key, data) of one member for every sample of a committed unit, in key order, each checked by its hash."""
    column = f"{part.unit.layer}/{member}"
    names = ["key", *(f"{column}/{name}" for name in ("offset", "length", "sha256"))]
    storage = open_storage(root)
    for key, offset, length, sha256 in zip(*(part.table[name].to_pylist() for name in names)):
        yield key, read_range(storage, part.unit, key, member, offset, length, sha256)


def read_range(
    root: Path | str | Storage, unit: Unit, key: str, member: str, offset: int, length: int, sha256: str
) -> bytes:
    """Read one member's bytes with a ranged read and check them.

    Raises DataError naming the shard's file and the key when the file is missing or short or the bytes are not those
    that were committed: a bad sample in a published shard always stops the reader.
    """
    where = f"{unit.tar}, sample {key}, member {member}"
    try:
        data = open_storage(root).read_range(unit.tar, offset, length)
    except OSError as error:
        raise DataError(f"{where}: {error.strerror}. Run prep run again to restore the shard.") from error
    if len(data) != length:
        raise DataError(f"{where}: the file ends early. Run prep run again to restore the shard.")
    if sha256_bytes(data) != sha256:
        raise DataError(
            f"{where}: the bytes are not those that were committed (SHA-256 differs). "
            f"Delete {unit.part} and run prep run again."
        )
    return data


def npy_bytes(array: np.ndarray) -> bytes:
    """``array`` as the bytes of an ``.npy`` file, C order, never pickled."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def load_npy(data: bytes) -> np.ndarray:
    """The array in the bytes of an ``.npy`` file; object arrays are refused (they would be pickles)."""
    return np.load(io.BytesIO(data), allow_pickle=False)


def webp_bytes(pixels: np.ndarray) -> bytes:
    """uint8 (H, W, 3) as a lossless WebP, method 0: the fastest to write, and smaller than PNG.

    ``quality`` is the effort here: 25 writes a photograph in a quarter of the time of the default 80 and 2 % larger.
    """
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", lossless=True, method=0, quality=25)
    return buffer.getvalue()


def jpeg_bytes(pixels: np.ndarray) -> bytes:
    """uint8 (H, W, 3) as a JPEG of quality 95 without chroma subsampling: .4 of the lossless size, about 46 dB."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def encode_pixels(pixels: np.ndarray, member: str) -> bytes:
    """uint8 (H, W, 3) as the bytes of a px member, ``webp`` or ``jpg``."""
    return jpeg_bytes(pixels) if member == "jpg" else webp_bytes(pixels)


def decode_pixels(data: bytes) -> np.ndarray:
    """uint8 (H, W, 3) from the bytes of a px member."""
    with Image.open(io.BytesIO(data), formats=["WEBP", "JPEG"]) as image:
        return np.asarray(image.convert("RGB"))


class Dataset:
    """A published dataset, read through its index; every member is checked by its hash as it is read.

    ``info`` is dataset.json, ``fingerprint`` identifies the content, ``table`` is the index sorted by key. Raises
    DataError when the folder is not a dataset, has another schema, or its index is not the one dataset.json names.
    ``root`` is a folder or the URL of an object store. Holds no open files, so it may be shared by threads and forked
    processes.
    """

    def __init__(self, root: Path | str | Storage) -> None:
        self.storage = open_storage(root)
        self.root: Path | str = Path(self.storage.place) if self.storage.is_local else self.storage.place
        manifest, index = (self.storage.where(name) for name in ("dataset.json", "index.parquet"))
        for name in ("dataset.json", "index.parquet"):
            if not self.storage.exists(name):
                raise DataError(
                    f"{self.storage.where(name)} does not exist: {self.root} is not a finished dataset. "
                    "Run: python -m prep run"
                )
        try:
            self.info: dict[str, Any] = json.loads(self.storage.read("dataset.json"))
        except ValueError as error:
            raise DataError(f"{manifest} is damaged ({error}). Run prep run again.") from error
        check_info(self.info, manifest)
        (self._pixels,) = members_of("px", self.info["layers"].get("px", {}))
        self.table: pa.Table = read_parquet(self._published("index.parquet"))
        check_index(self.table, self.info, index)
        self.fingerprint: str = self.info["fingerprint"]

    def _published(self, name: str) -> bytes:
        """The bytes of a file that dataset.json names. Raises DataError when it is missing or another one."""
        path = self.storage.where(name)
        try:
            data = self.storage.read(name)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}. Run prep run again to restore it.") from error
        if sha256_bytes(data) != self.info["hashes"][name]:
            raise DataError(f"{path} is not the file that dataset.json names (SHA-256 differs). Run prep run again.")
        return data

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers this dataset has, in the order of ``LAYERS``."""
        return tuple(layer for layer in LAYERS if layer in self.info["layers"])

    def members(self, layer: str) -> tuple[str, ...]:
        """The members of one of its layers, for example ("webp",) or ("jpg",) of px."""
        return members_of(layer, self.info["layers"][layer])

    def __len__(self) -> int:
        return self.table.num_rows

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        return self.table.to_pylist()

    def rows(self, split: str | None = None) -> list[dict[str, Any]]:
        """The index as plain dicts in key order; ``split`` is "train", "holdout" or None for all."""
        if split not in (None, "train", "holdout"):
            raise ValueError(f"split is {split!r}, expected 'train', 'holdout' or None")
        return [dict(row) for row in self._rows if split in (None, row["split"])]

    def read(self, row: dict[str, Any], member: str) -> bytes:
        """The bytes of one member of a row, for example ``read(row, "dino/cls.npy")``; errors as ``read_range``."""
        layer, name = member.split("/", 1)
        if f"{member}/offset" not in row:
            raise DataError(f"{self.root} has no {member}: its layers are {', '.join(self.layers)}.")
        unit = Unit(row["bucket"], row["shard"], layer)
        place = (row[f"{member}/{column}"] for column in ("offset", "length", "sha256"))
        return read_range(self.storage, unit, row["key"], name, *place)

    def _array(self, row: dict[str, Any], member: str) -> np.ndarray:
        data = self.read(row, member)
        try:
            return load_npy(data)
        except (ValueError, EOFError) as error:  # a pickle, for which numpy has a ValueError, or no array at all
            where = (
                f"{Unit(row['bucket'], row['shard'], member.partition('/')[0])}, sample {row['key']}, member {member}"
            )
            raise DataError(f"{where}: {error}. Run prep verify --repair, then prep run.") from error

    def pixels(self, row: dict[str, Any]) -> np.ndarray:
        """The crop, uint8 (H, W, 3), sRGB; lossless, or as JPEG left it."""
        return decode_pixels(self.read(row, f"px/{self._pixels}"))

    @property
    def has_flips(self) -> bool:
        """Whether it stores what belongs to the mirrored crops."""
        return bool(self.info.get("flips"))

    def flippable(self, row: dict[str, Any]) -> bool:
        """Whether the crop may be mirrored: its caption, if it has one, can be flipped safely."""
        return self.has_flips and ("text" not in self.info["layers"] or row["caption_flip"] is not None)

    def t5(self, row: dict[str, Any], flipped: bool = False) -> np.ndarray:
        """Text features of the valid tokens, float16 (L, Wt); ``flipped``: of the mirrored crop's caption."""
        other = flipped and row["caption_flip"] != row["caption"]
        return self._array(row, "t5/t5_flip.npy" if other else "t5/t5.npy")

    def cls(self, row: dict[str, Any], flipped: bool = False) -> np.ndarray:
        """The DINOv3 class token, float32 (Wd,); ``flipped``: of the mirrored crop."""
        return self._array(row, "dino/cls_flip.npy" if flipped else "dino/cls.npy")

    def patches(self, row: dict[str, Any], flipped: bool = False) -> np.ndarray:
        """The DINOv3 patch tokens on their grid, dequantised, float32 (h, w, Wd); ``flipped``: of the mirrored crop."""
        name = "dino_flip" if flipped else "dino"
        quantised, scale = self._array(row, f"dino/{name}.npy"), self._array(row, f"dino/{name}_scale.npy")
        return dequantise(quantised, scale).reshape(row["dino_h"], row["dino_w"], -1)

    def pose(self, row: dict[str, Any]) -> np.ndarray:
        """Keypoints, float32 (133, 3): x and y in [-1, 1] over the crop, and a confidence that may exceed 1."""
        return self._array(row, "pose/pose.npy")

    def truth(self) -> dict[str, dict[str, Any]] | None:
        """The ground truth of the built-in figures by key (joints and box in pixels of the crop); None without one.

        Raises DataError when the file is not the published one, or says nothing about some sample.
        """
        if "truth.parquet" not in self.info["hashes"]:
            return None
        table = read_parquet(self._published("truth.parquet"))
        truth = {row["key"]: row for row in table.to_pylist()}
        if unknown := [row["source"] for row in self._rows if row["key"] not in truth]:
            raise DataError(
                f"{self.storage.where('truth.parquet')} has no row for {len(unknown)} samples, for example "
                f"{unknown[0]}. "
                "Take truth.parquet out of the source folder, or these images, and run prep run again."
            )
        return truth


def check_info(info: Any, path: str) -> None:
    """Raise DataError, naming the file, unless dataset.json has the schema of this version and what readers rely on."""
    schema = info.get("schema") if isinstance(info, dict) else None
    if schema != SCHEMA_VERSION:
        raise DataError(
            f"{path}: schema is {schema}, this version reads {SCHEMA_VERSION}. "
            "Prepare the dataset again with this version."
        )
    kinds = {"fingerprint": str, "base": int, "layers": dict, "hashes": dict}
    wrong = [name for name, kind in kinds.items() if not isinstance(info.get(name), kind)]
    if wrong or "index.parquet" not in info["hashes"]:
        raise DataError(f"{path} is damaged (no usable {', '.join(wrong) or 'hash of the index'}). Run prep run again.")


def check_index(table: pa.Table, info: dict[str, Any], path: str) -> None:
    """Raise DataError, naming the file, for an index without a column that readers use or with an unknown bucket."""
    columns = ["key", "source", "bucket", "shard", "split"]
    for layer in set(info["layers"]) & set(LAYERS):
        columns += member_columns(layer, info["layers"][layer])
    if missing := sorted(set(columns) - set(table.column_names)):
        raise DataError(f"{path} has no column {', '.join(missing)}. Run prep run again.")
    known = {str(bucket) for bucket in buckets_for(info["base"])}
    if unknown := sorted(set(table["bucket"].to_pylist()) - known):
        raise DataError(
            f"{path} names bucket {', '.join(unknown)}, base {info['base']} has {', '.join(sorted(known))}. "
            "Run prep run again."
        )
