"""What readers rely on in dataset.json and its index, which anybody may have written: looked at before it is used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from nanodit.errors import ConfigError, DataError, first_line
from prep.dataset.buckets import buckets_for
from prep.dataset.holdout import COLUMN as HOLDOUT_PART
from prep.dataset.holdout import PARTS
from prep.dataset.layers import LAYERS
from prep.dataset.layout import DAMAGED, MOST, SCHEMA_VERSION, check_columns, member_columns

KEYS = {**dict.fromkeys(("key", "source", "bucket", "split"), pa.string()), "shard": pa.int32()}


@contextmanager
def undamaged(path: str) -> Iterator[None]:
    """Raise DataError, naming the file, where one cannot be read as Parquet."""
    try:
        yield
    except DAMAGED as error:
        raise DataError(f"{path} is damaged ({first_line(error)}). Run nanodit prep run again.") from error


def check_info(info: Any, path: str) -> None:
    """Raise DataError, naming the file, unless dataset.json has the schema of this version and what readers rely on."""
    schema = info.get("schema") if isinstance(info, dict) else None
    if schema != SCHEMA_VERSION:
        raise DataError(
            f"{path}: schema is {schema}, but this version reads {SCHEMA_VERSION}. "
            "Prepare the dataset again with this version."
        )
    kinds = {"fingerprint": str, "base": int, "layers": dict, "hashes": dict, "encoders": str}
    wrong = [name for name, kind in kinds.items() if type(info.get(name)) is not kind]  # a bool is an int
    if not wrong:
        wrong += [f"hash of {name}" for name, value in info["hashes"].items() if not isinstance(value, str)]
        wrong += [f"layer {name}" for name, layer in info["layers"].items() if not _is_described(name, layer)]
        wrong += ["hash of the index"] if "index.parquet" not in info["hashes"] else []
    if wrong:
        raise DataError(f"{path} is damaged (no usable {', '.join(wrong)}). Run nanodit prep run again.")


def _is_described(name: str, described: Any) -> bool:
    """Whether dataset.json says of a layer what readers rely on; of one that this version does not know, anything."""
    layer = LAYERS.get(name)
    if layer is None or not isinstance(described, dict):
        return layer is None
    width, kind = described.get("width"), described.get("format", next(iter(layer.formats), None))
    wide = type(width) is int and 0 < width <= MOST["width"]
    needs_width = layer.encoder is not None and "width" in layer.encoder.facts
    return (wide or not needs_width) and (not layer.formats or (isinstance(kind, str) and kind in layer.formats))


def check_index(types: Sequence[tuple[str, pa.DataType]], table: pa.Table, info: dict[str, Any], path: str) -> None:
    """Raise DataError, naming the file, for an index without a column that readers use or with an unknown bucket.

    ``types`` are the names and types in the file, of which ``table`` has most, some in other types.
    """
    try:
        if len(dict(types)) < len(types):
            raise ValueError("has several columns of one name")
        layers = {name: layer for name, layer in info["layers"].items() if name in LAYERS}
        needed, others = dict(KEYS), {}
        for name, layer in layers.items():
            needed |= member_columns(name, layer)
            others |= {} if name == "px" else LAYERS[name].columns_of(layer)  # those of px are for reports alone
        check_columns(dict(types), table, needed, others)
        _check_values(table, needed, info["base"])
    except (ValueError, ConfigError) as error:
        raise DataError(f"{path}: {error}. Run nanodit prep run again.") from error


def _check_values(table: pa.Table, needed: dict[str, pa.DataType], base: int) -> None:
    known = {str(bucket) for bucket in buckets_for(base)}
    if unknown := sorted(map(str, set(pc.unique(table["bucket"]).to_pylist()) - known)):
        raise ValueError(f"names bucket {', '.join(unknown)}, but base {base} has {', '.join(sorted(known))}")
    for name in needed:
        column, most = table[name], MOST.get(name.rpartition("/")[2], MOST["shard"])
        if pa.types.is_integer(column.type) and len(column):
            least, largest = pc.min_max(column).as_py().values()
            if least < 0 or largest > most:
                wrong = least if least < 0 else largest
                raise ValueError(f"{name} is {wrong:,}, and no more than {most:,}")
    if odd := sorted(set(pc.unique(table["split"]).to_pylist()) - {"train", "holdout"}):
        raise ValueError(f"names a split {', '.join(odd)}")
    if HOLDOUT_PART in table.column_names:
        parts = set(pc.unique(table.filter(pc.equal(table["split"], "holdout"))[HOLDOUT_PART]).to_pylist())
        if odd := sorted(map(str, parts - set(PARTS))):
            raise ValueError(f"names a part of the holdout {', '.join(odd)}, and there are {' and '.join(PARTS)}")
