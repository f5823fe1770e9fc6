"""The rows of an index, read from its columns when they are asked for: a row holds no values, only its place."""

from __future__ import annotations

import binascii
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from threading import RLock
from typing import Any, BinaryIO, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

DIGEST = 32  # bytes of a SHA-256
BATCH = 1 << 16  # rows that are decoded at a time
WHOLE = 1 << 28  # bytes of a column up to which it is made one piece, which takes them twice for a moment

Load = Callable[[Sequence[str]], dict[str, pa.ChunkedArray]]


class Columns(dict[str, Callable[[int], Any]]):
    """What reads the values of each column, by name; ``names`` are all of them.

    Those that are not ``loaded`` are read by ``load`` when the first of them is asked for, so that long texts take
    memory only where somebody wants them. ``stand_ins`` maps columns to others that are read in their place.
    """

    def __init__(
        self,
        names: Sequence[str],
        loaded: dict[str, pa.ChunkedArray],
        load: Load | None = None,
        stand_ins: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.names, self._stand_ins = dict.fromkeys(names), stand_ins or {}
        self.rows = len(next(iter(loaded.values()), ()))
        self._loaded, self._load, self._lock = loaded, load, RLock()

    def __missing__(self, name: str) -> Callable[[int], Any]:
        reader = self[name] = _reader(self.column(name))
        return reader

    def column(self, name: str) -> pa.ChunkedArray:
        """Return a whole column. Raises KeyError where there is none of this name."""
        name = self._stand_ins.get(name, name)
        with self._lock:
            if self._load and name in self.names and name not in self._loaded:
                self._loaded |= self._load([other for other in self.names if other not in self._loaded])
            return self._loaded[name]

    def with_stand_ins(self, stand_ins: Mapping[str, str]) -> Columns:
        """Return the same columns with others in the place of some."""
        return Columns(self.names, self._loaded, self._load, stand_ins)

    def table(self) -> pa.Table:
        """Return them all."""
        return pa.table({name: self.column(name) for name in self.names})


class Row(Mapping[str, Any]):
    """One row: a mapping from the names of the columns to plain values, without any of its own.

    ``row | {...}`` and ``dict(row)`` are plain dicts.
    """

    __slots__ = ("_columns", "_place")

    def __init__(self, columns: Columns, place: int) -> None:
        self._columns, self._place = columns, place

    def __getitem__(self, name: str) -> Any:
        return self._columns[name](self._place)

    def __contains__(self, name: object) -> bool:
        return name in self._columns.names

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns.names)

    def __len__(self) -> int:
        return len(self._columns.names)

    def __or__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return dict(self) | dict(other)

    def __repr__(self) -> str:
        return repr(dict(self))


class Rows(Sequence[Row]):
    """Some rows, by their places in columns; slices and what is chosen of them share these."""

    def __init__(self, columns: Columns, places: np.ndarray | None = None) -> None:
        self._columns, self._whole = columns, places is None
        self._places = np.arange(columns.rows) if places is None else places

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]] | pa.Table) -> Rows:
        """Return rows as they are, or as such a table or plain mappings, which all have the first one's names."""
        if isinstance(rows, Rows):
            return rows
        table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist([dict(row) for row in rows])
        return cls(Columns(table.column_names, {name: table[name] for name in table.column_names}))

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> Row | Rows:
        return self.take(index) if isinstance(index, slice) else Row(self._columns, self._places.item(index))

    def __iter__(self) -> Iterator[Row]:
        columns = self._columns
        return (Row(columns, place) for place in self._places.tolist())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other))

    __hash__ = None  # type: ignore[assignment]

    def take(self, places: slice | np.ndarray | pa.Array) -> Rows:
        """Return those at some places among these, or those for which a mask is true."""
        return Rows(self._columns, self._places[places if isinstance(places, slice) else np.asarray(places)])

    def column(self, name: str) -> pa.ChunkedArray:
        """Return a column of these rows. Raises KeyError where there is none of this name."""
        column = self._columns.column(name)
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


def column_types(file: BinaryIO) -> list[tuple[str, pa.DataType]]:
    """Return the names and types of the columns of a Parquet file. Raises as :func:`read_columns`."""
    return [(field.name, field.type) for field in pq.ParquetFile(file).schema_arrow]


def read_columns(file: BinaryIO, names: Sequence[str]) -> dict[str, pa.ChunkedArray]:
    """Read columns of an index from a Parquet file, one after another and in batches: little is in memory twice.

    Those named ``.../sha256`` become binary (32 bytes in place of 64 digits) and those named ``.../fingerprint``
    dictionaries; rows have both as text. Raises ArrowException for a damaged file. Without Arrow's threads, as
    :func:`prep.dataset.layout.read_parquet`.
    """
    few = [name for name in names if name.endswith("/fingerprint")]
    parquet = pq.ParquetFile(file, read_dictionary=few, pre_buffer=False, buffer_size=1 << 20)
    found = {name: _read(parquet, name) for name in names}
    pa.default_memory_pool().release_unused()
    return found


def _read(parquet: pq.ParquetFile, name: str) -> pa.ChunkedArray:
    kind = parquet.schema_arrow.field(name).type
    chunks = [batch[name] for batch in parquet.iter_batches(BATCH, columns=[name], use_threads=False)]
    if name.endswith("/sha256"):
        digests = [_digests(chunk) for chunk in chunks]
        chunks = digests if None not in digests else chunks
    column = pa.chunked_array(chunks, chunks[0].type if chunks else kind)
    if pa.types.is_string(column.type):
        column.validate(full=True)  # that it is UTF-8
    if column.num_chunks > 1 and column.nbytes < WHOLE:
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


def _equally_long(column: pa.Array) -> np.ndarray | None:
    """Return texts as bytes, where all are of one length, as keys are; None otherwise."""
    places = np.frombuffer(column.buffers()[1], np.int32, len(column) + 1)
    length = int(places[1]) if len(column) and not places[0] else 0
    if not length or not (np.diff(places) == length).all():
        return None
    letters = np.frombuffer(column.buffers()[2], np.uint8, length * len(column))
    return letters.view(f"S{length}") if letters.all() else None  # numpy would cut off zeros


def _reader(column: pa.ChunkedArray) -> Callable[[int], Any]:
    """Return what reads a value of a column: the fastest there is for what training reads all the time."""
    kind, chunks = column.type, column.chunks
    sizes = [len(chunk) for chunk in chunks]
    even = len(sizes) < 2 or (set(sizes[:-1]) == {sizes[0]} and sizes[0] >= max(1, sizes[-1]))
    regular = even and not column.null_count and not any(chunk.offset for chunk in chunks)
    if pa.types.is_string(kind) and chunks and regular:
        size = len(chunks[0])
        if len(chunks) == 1 and (keys := _equally_long(chunks[0])) is not None:
            return lambda place: keys.item(place).decode()
        texts = [(memoryview(one.buffers()[1]).cast("i"), memoryview(one.buffers()[2] or b"")) for one in chunks]

        def text(place: int) -> str:
            chunk, place = divmod(place, size)
            places, letters = texts[chunk]
            return str(letters[places[place] : places[place + 1]], "utf-8")

        return text
    if len(chunks) == 1 and regular:
        array = chunks[0]
        if pa.types.is_fixed_size_binary(kind):
            digests = np.frombuffer(array.buffers()[1], f"V{kind.byte_width}", len(array))
            return lambda place: digests.item(place).hex()
        if pa.types.is_dictionary(kind):
            values, codes = array.dictionary.to_pylist(), array.indices.to_numpy()
            return lambda place: values[codes.item(place)]
        if pa.types.is_integer(kind) or pa.types.is_floating(kind):
            return array.to_numpy().item
    if pa.types.is_fixed_size_binary(kind):
        return lambda place: column[place].as_py().hex()
    return lambda place: column[place].as_py()
