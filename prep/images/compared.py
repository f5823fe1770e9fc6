"""What was found when class tokens were compared, written down: only samples that are new are compared with the others.

``runs/tokens.parquet`` has a row per sample with the hash of its class token and its group, and ``runs/tokens/*.npy``
hold the tokens, so that no tar has to be opened for those that were compared before. Both can be deleted at any time:
groups are those of an exact relation (``prep/images/cosine.py``), and what is missing here is read and compared again.
Nothing in them is taken on trust: the table bears the hash of its content, and every token that is used has the hash
that the committed part names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from threading import Lock
from tokenize import TokenError
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nanodit.console import Progress, say
from nanodit.errors import DataError
from nanodit.faults import fault
from nanodit.files import canonical_json, sha256_bytes
from nanodit.storage import LocalFolder, Storage
from prep.dataset.class_tokens import class_tokens, reading_order
from prep.dataset.codecs import npy_bytes
from prep.dataset.layout import fingerprint_of, parquet_bytes, read_parquet
from prep.images.cosine import TILE, Components, connect_near, count_pairs, regroup, unit_rows

CODE_VERSION = 2  # of the relation: with another one everything is compared again
NAME, FOLDER = "runs/tokens.parquet", "runs/tokens/"
SCHEMA = pa.schema({"key": pa.string(), "sha256": pa.string(), "place": pa.int64(), "group": pa.int64()})
BATCH = 1 << 17  # samples that are compared between two commits: half a gigabyte of tokens at width 1024
MANY_FILES = 32  # or twice as many rows as are needed: then the files are made one
DOWNLOAD = 1 << 26  # bytes at a time
MILLION, SILENT = 10**6, 10**9  # pairs: what progress counts, and what takes a few seconds

Read = Callable[[np.ndarray], Iterator[np.ndarray]]  # the class tokens of some rows, in their order, some at a time


class Damaged(DataError):
    """What was written down cannot be used."""


@dataclass
class Record:
    """What is written down: a table in the order of ``SCHEMA``, and what its content was made with.

    ``files`` are the names of arrays and their rows; a ``place`` counts the rows of all of them, one after another.
    ``group`` is -1 for what was not compared yet.
    """

    cosine: float
    code: int = CODE_VERSION
    files: list[tuple[str, int]] = field(default_factory=list)
    table: pa.Table = field(default_factory=SCHEMA.empty_table)

    def settings(self) -> dict[str, Any]:
        """Return everything besides the table, and the hash of both."""
        made_with = {"cosine": self.cosine, "code": self.code, "files": [list(file) for file in self.files]}
        columns = [sha256_bytes(_content(self.table[name])) for name in SCHEMA.names]
        return made_with | {"hash": fingerprint_of(made_with | {"columns": columns})}

    def save(self, storage: Storage) -> None:
        """Write it down."""
        table = self.table.replace_schema_metadata({"nanodit": canonical_json(self.settings())})
        storage.write(NAME, parquet_bytes(table))

    @classmethod
    def load(cls, storage: Storage) -> Record | None:
        """Read it; None where there is none. Raises Damaged."""
        try:
            table = read_parquet(storage.read(NAME))
            settings = json.loads((table.schema.metadata or {}).get(b"nanodit", b""))
            if table.schema.remove_metadata() != SCHEMA:
                raise Damaged("it has other columns")
            files = [(str(name), int(rows)) for name, rows in settings["files"]]
            record = cls(settings["cosine"], settings["code"], files, table.replace_schema_metadata(None))
            if record.settings() != settings:
                raise Damaged("its content is not what was written")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise Damaged(f"it cannot be read ({error})") from error
        return record

    def column(self, name: str) -> np.ndarray:
        """Return places or groups, int64 (N,)."""
        return self.table[name].to_numpy()


def _content(column: pa.ChunkedArray) -> bytes:
    """Return what determines a column of strings without line feeds, or of numbers."""
    if pa.types.is_string(column.type):
        return "\n".join(column.to_pylist()).encode()
    return column.to_numpy().tobytes()


def _header(file: IO[bytes]) -> tuple[int, tuple[int, int]]:
    """Return where the numbers of an NPY file of float32 (N, D) begin, and N and D. Raises ValueError for others."""
    file.seek(0)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("another version of NPY")
    try:
        shape, _, kind = np.lib.format.read_array_header_1_0(file)
    except TokenError as error:
        raise ValueError("no header of NPY") from error
    if len(shape) != 2 or kind != np.float32:
        raise ValueError(f"numbers {shape} of {kind}")
    return file.tell(), shape


class Tokens:
    """The files of tokens, opened when they are asked for; to be closed."""

    def __init__(self, storage: Storage, files: list[tuple[str, int]]) -> None:
        self.storage, self.files = storage, list(files)
        self._open: dict[str, tuple[IO[bytes], int, tuple[int, int]]] = {}
        self._lock = Lock()  # the next rows are read while some are compared
        self._stack = ExitStack()

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return sum(rows for _, rows in self.files)

    def close(self) -> None:
        """Close all files."""
        self._stack.close()

    def read(self, places: np.ndarray) -> np.ndarray:
        """Return the tokens at some places, float32 (n, width). Raises Damaged."""
        found, first = np.zeros(len(places), bool), 0
        tokens: np.ndarray | None = None
        for name, rows in self.files:
            here = np.flatnonzero((places >= first) & (places < first + rows))
            if len(here):
                with self._lock:
                    file, start, width = self._opened(name, rows)
                    if tokens is None:
                        tokens = np.empty((len(places), width), np.float32)
                    if tokens.shape[1] != width:
                        raise Damaged(f"{name} has tokens of another width")
                    # runs of neighbours, each read at once; a mapped file would count as memory of this process
                    steps = (np.diff(here) != 1) | (np.diff(places[here]) != 1)
                    for run in np.split(here, np.flatnonzero(steps) + 1):
                        file.seek(start + (int(places[run[0]]) - first) * 4 * width)
                        block = memoryview(tokens[run[0] : run[-1] + 1]).cast("B")
                        if file.readinto(block) != len(block):
                            raise Damaged(f"{name} ends early")
                found[here] = True
            first += rows
        if tokens is None or not found.all():
            raise Damaged("it names tokens that are in no file")
        return tokens

    def _opened(self, name: str, rows: int) -> tuple[IO[bytes], int, int]:
        """Return a file that is open, where its numbers begin, and the width of its rows."""
        if name not in self._open:
            file = self._fetched(name)
            try:
                self._open[name] = file, *_header(file)
            except ValueError as error:
                raise Damaged(f"{name} is not what was written ({error})") from error
        file, start, (count, width) = self._open[name]
        if count != rows:
            raise Damaged(f"{name} has {count} tokens instead of {rows}")
        return file, start, width

    def _fetched(self, name: str) -> IO[bytes]:
        try:
            if isinstance(self.storage, LocalFolder):
                return self._stack.enter_context(open(self.storage.root / name, "rb", buffering=0))
            file = self._stack.enter_context(TemporaryFile())  # noqa: SIM115 - closed with the others
            for offset in range(0, self.storage.size(name) or 0, DOWNLOAD):
                file.write(self.storage.read_range(name, offset, DOWNLOAD))
            file.flush()
            return file
        except OSError as error:
            raise Damaged(f"{name} cannot be read ({error.strerror})") from error

    def append(self, rows: int, arrays: Iterator[np.ndarray], write: bool) -> None:
        """Add a file of some rows; without ``write`` a temporary one. Raises DataError where they differ in width."""
        name = self._next() if write else f"temporary-{len(self.files)}"
        draft = self.storage.draft(name) if write else None
        try:
            file = self._stack.enter_context(open(draft, "w+b") if draft else TemporaryFile())  # noqa: SIM115
            width = None
            for array in arrays:
                if width is None:
                    width = array.shape[1]
                    header = {"descr": "<f4", "fortran_order": False, "shape": (rows, width)}
                    np.lib.format.write_array_header_1_0(file, header)
                if array.shape[1] != width:
                    widths = f"{width} and {array.shape[1]}"
                    raise DataError(f"class tokens have {widths} numbers. Run nanodit prep verify --repair")
                file.write(memoryview(np.ascontiguousarray(array, "<f4")).cast("B"))
            file.flush()
            if draft:
                self.storage.put_file(name, draft)
        finally:
            if draft:
                draft.unlink(missing_ok=True)
        fault("tokens.after_file")
        self._open[name] = file, *_header(file)
        self.files.append((name, rows))

    def _next(self) -> str:
        numbers = [Path(name).stem for name in self.storage.names(FOLDER)]
        last = max((int(number) for number in numbers if number.isdigit()), default=0)
        return f"{FOLDER}{last + 1:06d}.npy"

    def remove_others(self) -> None:
        """Delete files that are none of these: of a run that was killed, or merged since."""
        for name in set(self.storage.names(FOLDER)) - {name for name, _ in self.files}:
            self.storage.delete(name)


class Alike:
    """Groups of rows by their class tokens; ``labels`` are int64 (N,), the same for rows of one group."""

    def __init__(self, labels: np.ndarray, unit: Callable[[np.ndarray], np.ndarray], cosine: float) -> None:
        self.labels, self._unit, self._cosine = labels, unit, cosine

    def kept(self, keep: np.ndarray) -> Alike:
        """Return the groups among the rows that are kept, bool (N,): fewer rows may connect less."""
        rows = np.flatnonzero(keep)
        lost = np.isin(self.labels[keep], self.labels[~keep])
        groups = regroup(self.labels[keep], lost, lambda some: self._unit(rows[some]), self._cosine)
        return Alike(groups.labels(), lambda some: self._unit(rows[some]), self._cosine)


@contextmanager
def compared(
    storage: Storage,
    keys: pa.Array,
    hashes: pa.Array,
    read: Read,
    cosine: float,
    order: np.ndarray | None = None,
    write: bool = False,
    anew: bool = False,
) -> Iterator[Alike]:
    """Yield which samples have class tokens with a cosine above ``cosine``, comparing what was not compared before.

    ``hashes`` are those of the tokens' members, ``read`` gives the tokens of rows, which it is asked for in ``order``.
    ``write`` writes down what is found, for whoever holds the dataset's lock; ``anew`` ignores what was.
    """
    with ExitStack() as stack:
        comparison = _Comparison(storage, keys, hashes, read, cosine, order, write, stack)
        try:
            found = comparison.run(None if anew else Record.load(storage))
        except Damaged as error:
            say(f"{storage.where(NAME)}: {error}. All class tokens are read and compared again")
            found = comparison.run(None)
        yield found


def compared_tokens(
    storage: Storage, index: pa.Table, cosine: float, write: bool = False, anew: bool = False
) -> AbstractContextManager[Alike]:
    """Return :func:`compared` for the rows of an index, whose tokens are read from their tars."""
    keys, hashes = (index[name].combine_chunks() for name in ("key", "dino/cls.npy/sha256"))
    read = partial(class_tokens, storage, index)
    return compared(storage, keys, hashes, read, cosine, reading_order(index), write, anew)


class _Comparison:
    """See :func:`compared`."""

    def __init__(
        self,
        storage: Storage,
        keys: pa.Array,
        hashes: pa.Array,
        read: Read,
        cosine: float,
        order: np.ndarray | None,
        write: bool,
        stack: ExitStack,
    ) -> None:
        self.storage, self.keys, self.hashes, self.read_fresh, self.cosine = storage, keys, hashes, read, cosine
        self.order = np.arange(len(keys)) if order is None else order
        self.write, self.stack = write, stack

    def run(self, record: Record | None) -> Alike:
        """Compare what ``record`` does not know."""
        count = len(self.keys)
        self.places, labels = np.full((2, count), -1)
        self.sure = np.zeros(count, bool)  # whose bytes have the hash that they must have
        lost, changed = np.zeros(count, bool), record is None
        if record is not None:
            rows, position = self._known(record)
            self.places[rows] = record.column("place")[position]
            changed = not (len(rows) == count == len(record.table))
            if (record.cosine, record.code) == (self.cosine, CODE_VERSION):
                groups = record.column("group")
                labels[rows] = groups[position]
                gone = np.ones(len(groups), bool)
                gone[position] = False
                lost = (labels >= 0) & np.isin(labels, groups[gone])
            else:
                changed = True
        self.tokens = self.stack.enter_context(closing(Tokens(self.storage, record.files if record else [])))
        todo = self.order[labels[self.order] < 0]
        pairs = count_pairs(np.count_nonzero(lost), 0) + count_pairs(len(todo), count - len(todo))
        with Progress("near duplicates", pairs // MILLION, "million pairs") if pairs > SILENT else nullcontext() as bar:
            compared = 0

            def done(number: int) -> None:
                nonlocal compared
                compared += number
                if bar:
                    bar.update(compared // MILLION)

            groups = regroup(labels, lost, self.unit, self.cosine, done)
            known = labels >= 0
            for start in range(0, len(todo), BATCH):
                batch = todo[start : start + BATCH]
                self._fetch(batch[self.places[batch] < 0])
                before = np.flatnonzero(known)
                before = before[np.argsort(self.places[before])]  # as they lie in the files
                connect_near(groups, self.unit, self.cosine, batch, before, done)
                known[batch] = True
                if self.write and start + BATCH < len(todo):
                    self._save(groups, known)
        if self.write and (changed or len(todo)):
            if len(self.tokens.files) > MANY_FILES or self.tokens.rows > 2 * count:
                self._merge()
            self._save(groups, known)
            self.tokens.remove_others()
        return Alike(groups.labels(), self._unit_anyway, self.cosine)

    def _unit_anyway(self, rows: np.ndarray) -> np.ndarray:
        """Return what :meth:`unit` does, from the tars where the files are lost: the groups do not depend on these."""
        try:
            return self.unit(rows)
        except Damaged:
            return unit_rows(np.concatenate(list(self.read_fresh(rows))))

    def _known(self, record: Record) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows whose tokens are those of a record, and where they stand in it."""
        theirs = record.table.combine_chunks()
        position = pc.index_in(self.keys, value_set=theirs["key"].chunk(0)) if len(theirs) else pa.array([], pa.int32())
        rows = np.flatnonzero(position.is_valid())
        position = position.take(rows).to_numpy()
        same = pc.equal(self.hashes.take(rows), theirs["sha256"].take(position)).to_numpy()
        return rows[same], position[same]

    def unit(self, rows: np.ndarray) -> np.ndarray:
        """Return class tokens of length 1, float32 (n, width), each with the hash it must have. Raises Damaged."""
        vectors = self.tokens.read(self.places[rows])
        unsure = np.flatnonzero(~self.sure[rows])
        if len(unsure):
            width = vectors.shape[1]
            start = hashlib.sha256(npy_bytes(vectors[0])[: -4 * width])
            for vector, sha256 in zip(
                vectors if len(unsure) == len(rows) else vectors[unsure], self.hashes.take(rows[unsure]).to_pylist()
            ):
                content = start.copy()
                content.update(vector)
                if content.hexdigest() != sha256:
                    raise Damaged("a class token is not the one that was committed")
            self.sure[rows] = True
        return unit_rows(vectors)

    def _fetch(self, rows: np.ndarray) -> None:
        if len(rows):
            first = self.tokens.rows
            self.tokens.append(len(rows), self.read_fresh(rows), self.write)
            self.places[rows] = np.arange(first, self.tokens.rows)
            self.sure[rows] = True

    def _merge(self) -> None:
        """Put all tokens into one file."""
        order = np.argsort(self.places)
        blocks = (self.tokens.read(self.places[order[start : start + TILE]]) for start in range(0, len(order), TILE))
        self.tokens.append(len(order), blocks, write=True)
        self.tokens.files = self.tokens.files[-1:]
        self.places[order] = np.arange(len(order))

    def _save(self, groups: Components, known: np.ndarray) -> None:
        there = self.places >= 0
        columns = (self.keys, self.hashes, pa.array(self.places), pa.array(np.where(known, groups.labels(), -1)))
        table = pa.table(dict(zip(SCHEMA.names, columns)), schema=SCHEMA).filter(pa.array(there))
        Record(self.cosine, CODE_VERSION, self.tokens.files, table).save(self.storage)
        fault("tokens.after_record")
