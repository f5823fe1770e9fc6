"""The rows of an index, read from its columns when they are asked for: a row holds no values, only its place."""

from __future__ import annotations

import binascii
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

DIGEST = 32  # bytes of a SHA-256


class Row(Mapping[str, Any]):
    """One row: a mapping from the names of the columns to plain values, without any of its own.

    ``row | {...}`` and ``dict(row)`` are plain dicts.
    """

    __slots__ = ("_place", "_read")

    def __init__(self, read: Mapping[str, Callable[[int], Any]], place: int) -> None:
        self._read, self._place = read, place

    def __getitem__(self, name: str) -> Any:
        return self._read[name](self._place)

    def __contains__(self, name: object) -> bool:
        return name in self._read

    def __iter__(self) -> Iterator[str]:
        return iter(self._read)

    def __len__(self) -> int:
        return len(self._read)

    def __or__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return dict(self) | dict(other)

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce__(self) -> tuple[type, tuple[dict[str, Any]]]:
        return dict, (dict(self),)


class Rows(Sequence[Row]):
    """Some rows of a table, by their places in it; slices and what is chosen of them share its columns."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        self._read = {name: _reader(table[name]) for name in table.column_names}
        self._places, self._whole = np.arange(table.num_rows), True

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> Rows:
        """Return rows as they are, or plain mappings, which all have the first one's names, as such."""
        return rows if isinstance(rows, Rows) else cls(pa.Table.from_pylist([dict(row) for row in rows]))

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> Row | Rows:
        return self.take(index) if isinstance(index, slice) else Row(self._read, self._places.item(index))

    def __iter__(self) -> Iterator[Row]:
        read = self._read
        return (Row(read, place) for place in self._places.tolist())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other))

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[type, tuple[pa.Table]]:
        return Rows, (self._table.take(self._places),)

    def take(self, places: slice | np.ndarray | pa.Array) -> Rows:
        """Return those at some places among these, or those for which a mask is true."""
        chosen = Rows.__new__(Rows)
        chosen._table, chosen._read = self._table, self._read
        chosen._places = self._places[places if isinstance(places, slice) else np.asarray(places)]
        chosen._whole = False
        return chosen

    def column(self, name: str) -> pa.ChunkedArray:
        """Return a column of these rows. Raises KeyError where there is none of this name."""
        column = self._table[name]
        return column if self._whole else column.take(pa.array(self._places))

    def by(self, name: str) -> dict[Any, Rows]:
        """Return the rows of each value of a column, values in the order in which they come first."""
        if not len(self):
            return {}
        found = pc.dictionary_encode(self.column(name)).combine_chunks()
        codes, values = np.asarray(found.indices), found.dictionary.to_pylist()
        ends = np.cumsum(np.bincount(codes, minlength=len(values)))[:-1]
        places = np.split(np.argsort(codes, kind="stable"), ends)
        return {value: self.take(own) for value, own in zip(values, places)}

    def sorted_by(self, *names: str) -> Rows:
        """Return them in the order of some columns of text."""
        columns = pa.table({name: self.column(name) for name in names})
        return self.take(pc.sort_indices(columns, [(name, "ascending") for name in names]))


def by_key(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Row]:
    """Return rows as a mapping from their keys, in the order of these."""
    return _ByKey(Rows.of(rows).sorted_by("key"))


class _ByKey(Mapping[str, Row]):
    def __init__(self, rows: Rows) -> None:
        self._rows = rows  # sorted by key

    def __getitem__(self, key: str) -> Row:
        place = bisect_left(self._rows, key, key=lambda row: row["key"])
        if place == len(self._rows) or (row := self._rows[place])["key"] != key:
            raise KeyError(key)
        return row

    def __iter__(self) -> Iterator[str]:
        return (row["key"] for row in self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def read_columns(file: BinaryIO) -> pa.Table:
    """Read an index from a Parquet file, one column after another, so that little of it is in memory twice.

    Columns named ``.../sha256`` become binary (32 bytes in place of 64 digits), those named ``.../fingerprint``
    dictionaries; rows have both as text. Raises ArrowException for a damaged file. As for
    :func:`prep.dataset.layout.read_parquet` without Arrow's threads.
    """
    names = pq.ParquetFile(file).schema_arrow.names
    few = [name for name in names if name.endswith("/fingerprint")]
    parquet = pq.ParquetFile(file, read_dictionary=few, pre_buffer=False)
    columns = {name: _compact(name, parquet.read([name], use_threads=False)[name]) for name in names}
    return pa.table(columns, metadata=parquet.schema_arrow.metadata)


def _compact(name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    if name.endswith("/sha256"):
        chunks = [_digests(chunk) for chunk in column.chunks]
        column = pa.chunked_array(chunks) if chunks and None not in chunks else column
    if column.num_chunks > 1 and column.nbytes < 1 << 31:  # the places of text in a chunk are 32 bits
        column = pa.chunked_array([column.unify_dictionaries().combine_chunks()])
    return column


def _digests(column: pa.Array) -> pa.Array | None:
    """Return hashes in 64 lowercase digits as bytes; None where some are none."""
    count = len(column)
    if column.type != pa.string() or column.null_count or not count:
        return None
    places = np.frombuffer(column.buffers()[1], np.int32, count + 1, offset=4 * column.offset)
    if not (np.diff(places) == 2 * DIGEST).all():
        return None
    digits = np.frombuffer(column.buffers()[2], np.uint8)[places[0] : places[-1]]
    try:
        found = binascii.unhexlify(digits)
    except binascii.Error:
        return None
    if not np.array_equal(np.frombuffer(binascii.hexlify(found), np.uint8), digits):  # capital letters
        return None
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(DIGEST), count, [None, pa.py_buffer(found)])


def _reader(column: pa.ChunkedArray) -> Callable[[int], Any]:
    """Return what reads a value: the fastest there is for what training reads all the time."""
    kind, array = column.type, column.chunk(0) if column.num_chunks == 1 else None
    if array is None or array.null_count or array.offset:
        if pa.types.is_fixed_size_binary(kind):
            return lambda place: column[place].as_py().hex()
        return lambda place: column[place].as_py()
    if pa.types.is_fixed_size_binary(kind):
        digests = memoryview(array.buffers()[1])
        return lambda place: digests[DIGEST * place : DIGEST * (place + 1)].hex()
    if pa.types.is_string(kind):
        places, text = memoryview(array.buffers()[1]).cast("i"), memoryview(array.buffers()[2] or b"")
        return lambda place: str(text[places[place] : places[place + 1]], "utf-8")
    if pa.types.is_dictionary(kind):
        values, codes = array.dictionary.to_pylist(), array.indices.to_numpy()
        return lambda place: values[codes.item(place)]
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return array.to_numpy().item
    return lambda place: array[place].as_py()
