"""Reading a published dataset: any member of any sample with one ranged read, each checked by its hash.

Arrays of a layer that lie side by side come with a single read where they are read together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from copy import copy
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nanodit.errors import DataError
from nanodit.storage import Storage, open_storage
from prep.dataset import versions
from prep.dataset.buckets import Bucket
from prep.dataset.checks import check_index, check_info, undamaged
from prep.dataset.codecs import decode_pixels, load_npy
from prep.dataset.holdout import NEEDED, PARTS, parts_of
from prep.dataset.layers import LAYERS
from prep.dataset.layout import (
    TAR_BLOCK,
    Unit,
    checked,
    fetch,
    members_of,
    read_parquet,
)
from prep.dataset.members import Array
from prep.dataset.quantise import Quantised, dequantise
from prep.dataset.rows import Columns, Rows, column_types, read_columns

TEXTS = LAYERS["text"].columns_of(dict.fromkeys(("flip", "short"))).keys()  # long ones, read when they are asked for
GAP = 2 * TAR_BLOCK  # bytes between neighbours in a tar are fewer: padding of the one, header of the other


class Dataset:
    """A published dataset, read through its index; every member is checked by its hash as it is read.

    ``info`` is dataset.json, ``fingerprint`` identifies the content. Raises DataError when the folder is not a dataset,
    has another schema, or its index is not the one dataset.json names.
    ``root`` is a folder or the URL of an object store. Holds no open files, so it may be shared by threads and forked
    processes. What is read is of one version from the first read to the last, whatever ``prep run`` changes meanwhile:
    the newest when it was opened, or an earlier one that is kept, by its fingerprint, ``version``.
    """

    # of a view: layer -> what was read last, and whence
    _spans: dict[str, tuple[tuple[Unit, int, str], bytes]] | None = None
    _short = False  # a view of the short captions

    def __init__(self, root: Path | str | Storage, version: str | None = None) -> None:
        self.storage = open_storage(root)
        self.root: Path | str = Path(self.storage.place) if self.storage.is_local else self.storage.place
        self._moved: dict[Unit, str] = {}  # the kept tars of units that were replaced since
        self._tars: dict[str, str] = {}  # name -> hash of this version's, once one was replaced
        self._earlier = version is not None
        described = versions.kept_description(version) if version else "dataset.json"
        if version and not versions.is_kept(self.storage, version):
            raise DataError(
                f"{self.root}: no version {version} is kept there; nanodit prep versions lists those that are"
            )
        for name in () if version else (described, "index.parquet"):
            if not self.storage.exists(name):
                raise DataError(
                    f"{self.storage.where(name)} does not exist: {self.root} is not a finished dataset. "
                    "Run: nanodit prep run"
                )
        try:
            self._open(described)
        except DataError as error:
            if version:
                raise self._lost(version, error) from error
            raise
        self.fingerprint: str = self.info["fingerprint"]
        if version and self.fingerprint != version:
            other = DataError(f"{self.storage.where(described)} describes version {self.fingerprint}")
            raise self._lost(version, other)

    def _open(self, described: str) -> None:
        """Read dataset.json, or what is kept of it, and the index that it names."""
        manifest, index = (self.storage.where(name) for name in (described, "index.parquet"))
        try:
            self.info: dict[str, Any] = json.loads(self.storage.read(described))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{manifest} is damaged ({error}). Run nanodit prep run again.") from error
        check_info(self.info, manifest)
        (self._pixels,) = members_of("px", self.info["layers"].get("px", {}))
        with self._published("index.parquet") as file, undamaged(index):
            types = column_types(file)
            names = [name for name, _ in types]
            loaded = read_columns(file, [name for name in names if name not in TEXTS])
        self._columns = Columns(names, loaded, self._load)
        check_index(types, pa.table(loaded), self.info, index)

    def _load(self, names: Sequence[str]) -> dict[str, pa.ChunkedArray]:
        """Read columns that were left out; the index may have been kept since, and another one be in its place."""
        try:
            with self._published("index.parquet") as file, undamaged(self.storage.where("index.parquet")):
                return read_columns(file, names)
        except DataError as error:
            raise self._unreadable("index.parquet", error) from error

    @cached_property
    def table(self) -> pa.Table:
        """The index, sorted by key, as :func:`prep.dataset.rows.read_columns` has it."""
        return self._columns.table()

    def _lost(self, version: str, error: DataError) -> DataError:
        """Say of a version that is kept what became of it; no run makes that good, as it does of the newest one."""
        return DataError(
            f"{self.root}: what is kept of version {version} is damaged: {str(error).partition('. Run nanodit')[0]}. "
            "No run restores that: go on with the newest version, and drop this one (nanodit prep versions "
            f"{self.root} --drop {version[:16]})"
        )

    def _published(self, name: str) -> BinaryIO:
        """Open a file that dataset.json names, or what was kept of it; DataError when neither is the right one."""
        sha256 = self.info["hashes"][name]
        kept = versions.kept_table(sha256) if versions.is_hash(sha256) else name
        wanted = kept if self._earlier else name
        path = self.storage.where(wanted)
        missing: OSError | None = None
        for file in dict.fromkeys((kept, name) if self._earlier else (name, kept)):
            try:
                data = self.storage.open(file)
                if hashlib.file_digest(data, "sha256").hexdigest() == sha256:
                    data.seek(0)  # of the very file that was hashed, whatever is put in its place
                    return data
                data.close()
            except OSError as error:
                missing = error if file == wanted else missing
        if missing:
            raise DataError(f"{path}: {missing.strerror}. Run nanodit prep run again to restore it.") from missing
        raise DataError(
            f"{path} is not the file that dataset.json names (SHA-256 differs). Run nanodit prep run again."
        )

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers this dataset has, in the order of ``LAYERS``."""
        return tuple(layer for layer in LAYERS if layer in self.info["layers"])

    def members(self, layer: str) -> tuple[str, ...]:
        """Return the members of one of its layers, for example ("webp",) or ("jpg",) of px."""
        return members_of(layer, self.info["layers"][layer])

    def __len__(self) -> int:
        return self._columns.rows

    @cached_property
    def _rows(self) -> Rows:
        return Rows(self._columns)

    def rows(self, split: str | None = None) -> Rows:
        """Return the rows of the index in key order; ``split`` is "train", "holdout" or None for all.

        It may also be one of the holdout's parts, "dev" or "test" (:mod:`prep.dataset.holdout`).
        """
        if split not in (None, "train", "holdout", *PARTS):
            raise ValueError(f"split is {split!r}, expected 'train', 'holdout', 'dev', 'test' or None")
        if split in PARTS:
            return self.rows("holdout").take(self._parts == split)
        return self._rows if split is None else self._rows.take(pc.equal(self._rows.column("split"), split))

    @cached_property
    def _parts(self) -> np.ndarray:
        """The part of each row of the holdout."""
        held = self.rows("holdout")
        parts = parts_of(pa.table({name: held.column(name) for name in NEEDED if name in self._columns.names}))
        return np.array([parts[row["key"]] for row in held], dtype=object)

    def together(self) -> Dataset:
        """Return a view that reads a sample's arrays of a layer at once, where one of them is asked for.

        It keeps the last such read of each layer, so it is for one thread, and for one sample after another.
        """
        if self._spans is not None:
            return self
        view = copy(self)
        view._spans = {}
        return view

    def read(self, row: Mapping[str, Any], member: str) -> bytes:
        """Read one member of a row, for example ``read(row, "dino/cls.npy")``; errors as ``read_range``."""
        return bytes(self._member(row, member))

    def _member(self, row: Mapping[str, Any], member: str) -> bytes | memoryview:
        layer, name = member.split("/", 1)
        if f"{member}/offset" not in row:
            raise DataError(f"{self.root} has no {member}: its layers are {', '.join(self.layers)}.")
        unit = Unit(row["bucket"], row["shard"], layer)
        offset, length, sha256 = (row[f"{member}/{column}"] for column in ("offset", "length", "sha256"))
        start, end = (offset, offset + length) if self._spans is None else _span(row, layer, name)

        def read(tar: str) -> bytes | memoryview:
            if self._spans is None:
                data = fetch(self.storage, unit, row["key"], name, offset, length, tar)
            else:
                if self._spans.get(layer, (None, b""))[0] != (unit, start, tar):
                    span = fetch(self.storage, unit, row["key"], name, start, end - start, tar)
                    self._spans[layer] = (unit, start, tar), span
                data = memoryview(self._spans[layer][1])[offset - start : offset - start + length]
            return checked(data, unit, row["key"], name, length, sha256)

        try:
            return read(self._moved.get(unit, unit.tar))
        except DataError as error:
            if self._moved.pop(unit, None):  # the version is the newest again, or was dropped
                return self._member(row, member)
            kept = self._kept(unit)  # the unit was replaced since, or it is damaged
            if kept is None:
                raise self._unreadable(unit.tar, error) from error
        try:
            data = read(kept)
        except DataError as error:
            raise self._unreadable(unit.tar, error) from error
        self._moved[unit] = kept
        return data

    def _kept(self, unit: Unit) -> str | None:
        """Return where the tar of this version is kept; None where it is not."""
        if not self._tars:
            self._tars.update(versions.tars_of(self.storage, self.fingerprint) or {})
        kept = versions.kept_tar(self._tars[unit.tar]) if unit.tar in self._tars else None
        return kept if kept and self.storage.exists(kept) else None

    def _unreadable(self, name: str, error: DataError) -> DataError:
        """Return what to say of a file: ``error`` of the newest version, that another one is damaged, or dropped."""
        newest = versions.published(self.storage) or self.info
        if newest["fingerprint"] == self.fingerprint:
            return error
        if versions.is_kept(self.storage, self.fingerprint):
            return self._lost(self.fingerprint, error)
        return DataError(
            f"{self.root}: {name} of version {self.fingerprint} is not there any more: the dataset has changed "
            "since, and that version was dropped. Open the newest one"
        )

    def array(self, row: Mapping[str, Any], member: str) -> np.ndarray:
        """Return the array of a member as it is stored, for example ``array(row, "pose/pose.npy")``."""
        data = self._member(row, member)
        try:
            return load_npy(data)
        except (ValueError, EOFError) as error:  # a pickle, for which numpy has a ValueError, or no array at all
            raise self._wrong(row, member, error) from error

    def _wrong(self, row: Mapping[str, Any], member: str, error: Exception) -> DataError:
        where = f"{Unit(row['bucket'], row['shard'], member.partition('/')[0])}, sample {row['key']}, member {member}"
        return DataError(f"{where}: {error}. Run nanodit prep verify --repair, then nanodit prep run.")

    def pixels(self, row: Mapping[str, Any]) -> np.ndarray:
        """Return the crop, uint8 (H, W, 3), sRGB; lossless, or as JPEG left it."""
        bucket = Bucket.parse(row["bucket"])
        data = self.read(row, f"px/{self._pixels}")
        try:
            return decode_pixels(data, (bucket.width, bucket.height))
        except (ValueError, OSError) as error:  # OSError: of Pillow, for what it cannot decode
            raise self._wrong(row, f"px/{self._pixels}", error) from error

    @property
    def has_flips(self) -> bool:
        """Whether it stores what belongs to the mirrored crops."""
        return bool(self.info.get("flips"))

    def flippable(self, row: Mapping[str, Any]) -> bool:
        """Whether the crop may be mirrored: its caption, if it has one, can be flipped safely."""
        return self.has_flips and ("text" not in self.info["layers"] or row["caption_flip"] is not None)

    @property
    def has_short(self) -> bool:
        """Whether it stores short captions beside the long ones."""
        return "short" in self.info["layers"].get("t5", {})

    def t5(self, row: Mapping[str, Any], flipped: bool = False) -> np.ndarray:
        """Text features of the valid tokens, float16 (L, Wt); ``flipped``: of the mirrored crop's caption."""
        return self.t5_short(row, flipped) if self._short else self.t5_long(row, flipped)

    def t5_long(self, row: Mapping[str, Any], flipped: bool = False) -> np.ndarray:
        """Return what :meth:`t5` does, of the long caption also in a view of the short ones."""
        other = flipped and row["caption_flip"] != row["caption"]
        return self.array(row, "t5/t5_flip.npy" if other else "t5/t5.npy")

    def t5_short(self, row: Mapping[str, Any], flipped: bool = False) -> np.ndarray:
        """Return what :meth:`t5` does, of the short caption; of the long one where a mirrored crop has no short one."""
        same = row["t5_short_tokens"] == 0  # as the long one
        if not flipped:
            return self.t5_long(row) if same else self.array(row, "t5/t5_short.npy")
        if same or row["caption_short_flip"] is None:
            return self.t5_long(row, flipped=True)
        other = row["caption_short_flip"] != row["caption_short"]
        return self.array(row, "t5/t5_short_flip.npy" if other else "t5/t5_short.npy")

    def with_short_captions(self) -> Dataset:
        """Return a view whose captions, and their features, are the short ones: of rows and table, and of :meth:`t5`.

        Its rows say nothing of mirrored crops. Raises DataError for a dataset without short captions.
        """
        if not self.has_short:
            version = f"version {self.fingerprint[:16]} of " if self._earlier else ""
            newest = ", and train on the version that it makes" if self._earlier else ""
            raise DataError(
                f"{version}{self.root} was prepared without short captions. Run nanodit prep run with "
                f"captions.short=true{newest}"
            )
        view = copy(self)
        for cached in ("_rows", "table"):
            vars(view).pop(cached, None)
        view._short, view._columns = True, self._columns.with_stand_ins({"caption": "caption_short"})
        return view

    def cls(self, row: Mapping[str, Any], flipped: bool = False) -> np.ndarray:
        """Return the DINOv3 class token, float32 (Wd,); ``flipped``: of the mirrored crop."""
        return self.array(row, "dino/cls_flip.npy" if flipped else "dino/cls.npy")

    def patches(self, row: Mapping[str, Any], flipped: bool = False) -> np.ndarray:
        """Return the DINOv3 patch tokens on their grid, float32 (h, w, Wd); ``flipped``: of the mirrored crop."""
        stored = self.stored_patches(row, flipped)
        return dequantise(stored.values, stored.scale)

    def stored_patches(self, row: Mapping[str, Any], flipped: bool = False) -> Quantised:
        """Return what :meth:`patches` are stored as, on their grid."""
        name = "dino_flip" if flipped else "dino"
        arrays = map(partial(self.together().array, row), (f"dino/{name}.npy", f"dino/{name}_scale.npy"))
        try:
            return Quantised(*(array.reshape(row["dino_h"], row["dino_w"], -1) for array in arrays))
        except (ValueError, TypeError) as error:  # the index says another grid
            raise self._wrong(row, f"dino/{name}.npy", error) from error

    def pose(self, row: Mapping[str, Any]) -> np.ndarray:
        """Keypoints, float32 (133, 3): x and y in [-1, 1] over the crop, and a confidence that may exceed 1."""
        return self.array(row, "pose/pose.npy")

    def truth(self) -> dict[str, dict[str, Any]] | None:
        """Return the ground truth of built-in figures by key (joints and box in pixels of the crop); None without one.

        Raises DataError when the file is not the published one, or says nothing about some sample.
        """
        if "truth.parquet" not in self.info["hashes"]:
            return None
        with self._published("truth.parquet") as file, undamaged(self.storage.where("truth.parquet")):
            truth = {row["key"]: row for row in read_parquet(file.read()).to_pylist()}
        if unknown := [row["source"] for row in self._rows if row["key"] not in truth]:
            raise DataError(
                f"{self.storage.where('truth.parquet')} has no row for {len(unknown)} samples, for example "
                f"{unknown[0]}. "
                "Remove truth.parquet or these images from the source folder, and run nanodit prep run again."
            )
        return truth


def open_version(root: Path | str | Storage, fingerprint: str) -> Dataset:
    """Open a dataset at the version of a fingerprint; at the newest one where that is not kept, so compare the two."""
    storage = open_storage(root)
    if versions.is_kept(storage, fingerprint):
        return Dataset(storage, fingerprint)
    dataset = Dataset(storage)
    if dataset.fingerprint != fingerprint and versions.is_kept(storage, fingerprint):  # which was just published
        return Dataset(storage, fingerprint)
    return dataset


def _span(row: Mapping[str, Any], layer: str, name: str) -> tuple[int, int]:
    """Return where the arrays begin and end, in the tar, that lie side by side with a member of a sample.

    Those of the crop, or those of the mirrored one: who reads some of either reads most of it.
    """

    def place(other: str) -> tuple[int, int]:
        offset = row[f"{layer}/{other}/offset"]
        return offset, offset + row[f"{layer}/{other}/length"]

    start, end = place(name)
    flip = LAYERS[layer].flip
    for half in (LAYERS[layer].members, flip.members if flip else ()):
        names = [member.name for member in half if isinstance(member.kind, Array)]
        if name in names:
            here = names.index(name)
            for other in reversed(names[:here]):
                if not 0 <= start - place(other)[1] < GAP:
                    break
                start = place(other)[0]
            for other in names[here + 1 :]:
                if not 0 <= place(other)[0] - end < GAP:
                    break
                end = place(other)[1]
    return start, end
