"""Which caption files ``prep captions --write-txt`` wrote: one that nobody has changed since is the model's still.

``captions/written.parquet`` below the dataset: ``key`` of the sample, ``sha256`` of the file's bytes.
"""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from nanodit.errors import DataError
from nanodit.storage import Storage
from prep.dataset.layout import parquet_bytes, read_parquet

NAME = "captions/written.parquet"
SCHEMA = pa.schema({"key": pa.string(), "sha256": pa.string()})


def read_written(storage: Storage) -> dict[str, str]:
    """Return the hash of what was written, by key; empty where nothing was. Raises DataError for a damaged file."""
    data = storage.read_if_there(NAME)
    if data is None:
        return {}
    try:
        table = read_parquet(data, schema=SCHEMA)
    except (OSError, pa.ArrowException) as error:
        where = storage.where(NAME)
        raise DataError(
            f"{where} is damaged ({error}). Restore it, or delete it: caption files that were written from the dataset "
            "then count as a person's"
        ) from error
    return dict(zip(table["key"].to_pylist(), table["sha256"].to_pylist()))


def record_written(storage: Storage, written: Mapping[str, str]) -> None:
    """Record all that was written."""
    keys = sorted(written)
    storage.write(NAME, parquet_bytes(pa.table([keys, [written[key] for key in keys]], schema=SCHEMA)))
