"""The dataset on disk: shards (a bucket and a number) with one tar per layer, index parts, and the index.

A unit is one (shard, layer). Its tar is a plain WebDataset; its index part, a small Parquet file in ``parts/``, is the
commit record: a tar without a part does not exist, and a part is written only after its tar is durable. Readers go
through ``index.parquet`` and read any member with one ranged read.

Formats: USTAR (POSIX.1-1988: 512-byte member header, so data starts at header + 512), NPY 1.0, WebP lossless or JPEG,
Parquet.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from nanodit.errors import DataError
from nanodit.files import canonical_json, sha256_bytes
from nanodit.storage import Storage, open_storage
from prep.dataset.layers import LAYERS

SCHEMA_VERSION = 1

TAR_BLOCK = 512
# what an index may say: bytes of a member, where it begins in its tar, the number of a shard, how wide features are; so
# nobody allocates what a damaged or hostile file asks for
MOST = {"length": 1 << 28, "offset": 1 << 42, "shard": (1 << 31) - 1, "width": 1 << 16}
# kinds of columns; of what width a number is does not matter
KINDS = (pa.types.is_integer, pa.types.is_floating, pa.types.is_string, pa.types.is_boolean, pa.types.is_binary)
# what damaged content raises where it is read and looked through; pyarrow has OSErrors of its own
DAMAGED = (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError, pa.ArrowException)

Bytes = TypeVar("Bytes", bytes, memoryview)


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
    itself (feature widths, for example). ``table`` has the columns that were asked for, ``sha256`` is of all the file.
    ``batches`` has, where a layer records it, the hash of what each batch of rows was computed from, and their number;
    with short captions also the hash of what these were computed from.
    """

    unit: Unit
    recipe: dict[str, Any]
    facts: dict[str, Any]
    tar_bytes: int
    tar_sha256: str
    rejects: tuple[Rejection, ...]
    table: pa.Table
    sha256: str = ""
    batches: tuple[tuple[Any, ...], ...] = ()

    def __post_init__(self) -> None:
        """Raise TypeError where the record, which anybody may have written, has another form."""
        for name, kind in (("recipe", dict), ("facts", dict), ("tar_bytes", int), ("tar_sha256", str)):
            if type(value := getattr(self, name)) is not kind:  # a bool is an int
                raise TypeError(f"{name} is {value!r}")

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the recipe."""
        return fingerprint_of(self.recipe)


def fingerprint_of(recipe: dict[str, Any]) -> str:
    """SHA-256 of a recipe, a tree of plain values."""
    return sha256_bytes(canonical_json(recipe).encode())


def same_recipe(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two recipes have the same fingerprint."""
    return one is other or json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def members_of(layer: str, recipe: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of a layer's members; ``recipe`` (of a unit, or the layer's part of dataset.json) says which.

    px may have another format than WebP, and the others what belongs to the mirrored crop. File names in the tar are
    KEY.MEMBER, columns of the index LAYER/MEMBER/offset and so on.
    """
    return tuple(member.name for member in LAYERS[layer].members_of(recipe))


def member_columns(layer: str, recipe: Mapping[str, Any]) -> dict[str, pa.DataType]:
    """Return the index columns that locate the members of a layer."""
    kinds = {"offset": pa.int64(), "length": pa.int64(), "sha256": pa.string()}
    return {f"{layer}/{member}/{name}": kind for member in members_of(layer, recipe) for name, kind in kinds.items()}


def part_schema(layer: str, recipe: Mapping[str, Any]) -> pa.Schema:
    """Return the schema of the index parts of a layer."""
    return pa.schema({"key": pa.string(), **LAYERS[layer].columns_of(recipe), **member_columns(layer, recipe)})


def parquet_bytes(table: pa.Table) -> bytes:
    """``table`` as the bytes of a Parquet file; equal tables give equal bytes for one version of pyarrow."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def read_parquet(data: bytes, columns: list[str] | None = None, schema: pa.Schema | None = None) -> pa.Table:
    """Read a table, or some columns of it, from a Parquet file's bytes. Raises ArrowException for a damaged one.

    Without Arrow's threads: a process that ends soon after can crash on them (seen with pyarrow 26), and small tables
    gain nothing.
    """
    return pq.read_table(pa.BufferReader(data), columns=columns, schema=schema, use_threads=False, pre_buffer=False)


def read_part(
    root: Path | str | Storage, unit: Unit, columns: Sequence[str] | None = None, known: str | None = None
) -> Part | None:
    """Read the committed part of a unit; None where there is none, or its tar is missing or of another size.

    With ``columns`` the table has these alone, without the record, which is in the other fields. The others are read
    all the same, because they may be damaged, unless ``known`` is the file's hash: then somebody has read them.
    A damaged or foreign part is treated like a missing one: the unit is then computed again. One that cannot be read
    at the moment is not, because what it says of samples whose files are gone exists nowhere else: ResourceError.
    """
    storage = open_storage(root)
    data = storage.read_if_there(unit.part)
    if data is None:
        return None
    tar_bytes = storage.size(unit.tar)
    expected = (SCHEMA_VERSION, unit.bucket, unit.shard, unit.layer, tar_bytes)
    try:
        sha256 = sha256_bytes(data)
        # a fraction of the time that pyarrow.parquet.read_table takes for a file as small as these
        file = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)
        record = json.loads((file.schema_arrow.metadata or {}).get(b"nanodit", b"{}"))
        table = file.read(columns=columns if sha256 == known else None, use_threads=False)
        if sha256 != known:
            recipe, types = record["recipe"], {field.name: field.type for field in file.schema_arrow}
            needed = {"key": pa.string(), **member_columns(unit.layer, recipe)}
            own = {name: kind for name, kind in LAYERS[unit.layer].columns_of(recipe).items() if name in types}
            check_columns(types, table, needed, own)
            fingerprint_of(recipe)
        if columns is not None:
            table = table.select(columns).replace_schema_metadata(None)
        if tuple(record[name] for name in ("schema", "bucket", "shard", "layer", "tar_bytes")) != expected:
            return None
        rejects = tuple(Rejection(**reject) for reject in record["rejects"])
        batches = tuple((digest, count, *more) for digest, count, *more in record.get("batches", ()))
        return Part(
            unit, record["recipe"], record["facts"], tar_bytes, record["tar_sha256"], rejects, table, sha256, batches
        )
    except DAMAGED:
        return None


def check_columns(
    types: Mapping[str, pa.DataType],
    table: pa.Table,
    needed: Mapping[str, pa.DataType],
    others: Mapping[str, pa.DataType],
) -> None:
    """Raise ValueError for an index or a part of one without a column that readers need, or with one of another type.

    ``types`` are those in the file, of which ``table`` may have some in other ones. Of ``needed`` no value is missing.
    """
    if missing := sorted({*needed, *others} - set(types)):
        raise ValueError(f"has no column {', '.join(missing)}")
    for name, kind in {**others, **needed}.items():
        if types[name] != kind and not any(is_kind(types[name]) and is_kind(kind) for is_kind in KINDS):
            raise ValueError(f"has a column {name} of type {types[name]}, not {kind}")
    for name in needed:
        if table[name].null_count:
            raise ValueError(f"{table[name].null_count} rows have no {name}")


def read_members(
    root: Path | str | Storage, part: Part, member: str, known: Container[str] = ()
) -> Iterator[tuple[str, bytes]]:
    """Yield (key, data) of one member for every sample of a committed unit, in key order, each checked by its hash.

    Those of ``known`` keys are not read: their data is empty.
    """
    column = f"{part.unit.layer}/{member}"
    names = ["key", *(f"{column}/{name}" for name in ("offset", "length", "sha256"))]
    storage = open_storage(root)
    for key, offset, length, sha256 in zip(*(part.table[name].to_pylist() for name in names)):
        known_already = key in known
        yield key, b"" if known_already else read_range(storage, part.unit, key, member, offset, length, sha256)


def read_range(
    root: Path | str | Storage, unit: Unit, key: str, member: str, offset: int, length: int, sha256: str
) -> bytes:
    """Read one member's bytes with a ranged read and check them.

    Raises DataError naming the shard's file and the key when the file is missing or short or the bytes are not those
    that were committed: a bad sample in a published shard always stops the reader.
    """
    return checked(fetch(root, unit, key, member, offset, length), unit, key, member, length, sha256)


def fetch(
    root: Path | str | Storage, unit: Unit, key: str, member: str, offset: int, length: int, tar: str | None = None
) -> bytes:
    """Read bytes of a unit's tar, or of the one that ``tar`` names, for a member; errors as :func:`read_range`."""
    where = f"{unit.tar}, sample {key}, member {member}"
    if not (0 <= offset <= MOST["offset"] and 0 <= length <= MOST["length"]):
        raise DataError(f"{where}: {length:,} bytes at {offset:,} are not in a tar. Run nanodit prep run again.")
    try:
        return open_storage(root).read_range(tar or unit.tar, offset, length)
    except OSError as error:
        raise DataError(f"{where}: {error.strerror}. Run nanodit prep run again to restore the shard.") from error


def checked(data: Bytes, unit: Unit, key: str, member: str, length: int, sha256: str) -> Bytes:
    """Return a member's bytes if they are all there and those that were committed; errors as :func:`read_range`."""
    where = f"{unit.tar}, sample {key}, member {member}"
    if len(data) != length:
        raise DataError(f"{where}: the file ends early. Run nanodit prep run again to restore the shard.")
    if sha256_bytes(data) != sha256:
        raise DataError(
            f"{where}: the bytes are not those that were committed (SHA-256 differs). "
            "Run nanodit prep verify --repair, then nanodit prep run."
        )
    return data
