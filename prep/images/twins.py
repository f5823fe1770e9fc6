"""Which holdout samples of a version training has in an altered form: what a version says, or its thumbnails show."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from weakref import WeakKeyDictionary

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prep.dataset.layout import DAMAGED, Unit, read_parquet
from prep.dataset.reader import Dataset
from prep.dataset.rows import Rows
from prep.images.altered import altered_pairs
from prep.images.duplicates import THUMBNAIL_BYTES, thumbnail_rows

REQUESTS = 16  # files that are read at once
COLUMN = "altered_twin"
_known: WeakKeyDictionary[Dataset, dict[str, str] | None] = WeakKeyDictionary()  # comparing may take a minute


def altered_twins(dataset: Dataset) -> dict[str, str] | None:
    """Map the keys of holdout samples to the training sample that shows the same, altered (``prep/images/altered.py``).

    A version that was published before there was the column is compared here, by the thumbnails beside it. None where
    those are not all there.
    """
    if dataset not in _known:
        _known[dataset] = _find(dataset)
    return _known[dataset]


def _find(dataset: Dataset) -> dict[str, str] | None:
    rows = Rows.of(dataset.rows())
    if not len(rows):
        return {}
    if COLUMN in rows[0]:
        named = rows.take(pc.is_valid(rows.column(COLUMN)))
        return dict(zip(named.column("key").to_pylist(), named.column(COLUMN).to_pylist()))
    thumbnails = _thumbnails(dataset, rows)
    if thumbnails is None:
        return None
    held = np.asarray(pc.equal(rows.column("split"), "holdout"))
    twins: dict[str, str] = {}
    for row, other in altered_pairs(thumbnails, np.flatnonzero(held)).tolist():
        if not held[other]:
            key, trained = rows[row]["key"], rows[other]["key"]
            twins[key] = min(trained, twins.get(key, trained))
    return twins


def _thumbnails(dataset: Dataset, rows: Rows) -> np.ndarray | None:
    """Return the thumbnails of all samples, uint8 (N, 768) in the order of the index."""
    storage, places = dataset.storage, pa.table({name: rows.column(name) for name in ("bucket", "shard")})
    shards = places.group_by(["bucket", "shard"]).aggregate([]).to_pylist()
    units = [Unit(str(place["bucket"]), place["shard"], "px") for place in shards]

    def read(unit: Unit) -> pa.Table | None:
        data = storage.read_if_there(unit.part)
        try:
            return None if data is None else read_parquet(data, columns=["key", "thumbnail"])
        except DAMAGED:
            return None

    with ThreadPoolExecutor(max_workers=REQUESTS) as pool:
        tables = list(pool.map(read, units))
    if not tables or any(found is None or found.num_columns < 2 for found in tables):
        return None
    stored = pa.concat_tables(tables)
    keys = rows.column("key").cast(pa.string())
    places = pc.index_in(keys, value_set=stored["key"].combine_chunks())
    lengths = pc.binary_length(stored["thumbnail"])
    if places.null_count or not pc.all(pc.fill_null(pc.equal(lengths, THUMBNAIL_BYTES), False)).as_py():
        return None
    return thumbnail_rows(stored["thumbnail"])[places.to_numpy()]  # Arrow takes no more than 2 GB from a column
