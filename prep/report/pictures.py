"""Small pictures for the dataset report: of samples, and of refused sources where their pixels can be had safely."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import yaml
from PIL import Image

from nanodit.errors import NanoditError
from nanodit.storage import Storage
from prep.dataset.layout import Unit, read_parquet
from prep.dataset.reader import Dataset
from prep.images.scan import HIDDEN, UNREADABLE_FOLDER
from prep.images.sources import UNREADABLE, BadImage, decode, leads_out

SMALL, LARGE = 176, 320  # pixels of the longer side
QUALITY = 74  # of lossy WebP
THREADS = 4  # decoders release the GIL, and object stores like company

# A report must not die of what killed a worker; and what a decoder refused once it will refuse again.
NEVER_DECODED = {
    *("crashes_worker", "hangs_worker", "out_of_memory", "too_many_pixels", "truncated", "corrupt", "empty"),
    *("not_an_image", "animated", "unsupported_mode", "outside_source", "linked_folder"),
    *(UNREADABLE, UNREADABLE_FOLDER, HIDDEN),
}
MAX_FILE_BYTES, MAX_PIXELS = 64 << 20, 64_000_000  # of a refused source that is decoded for its thumbnail


def embed(image: Image.Image, side: int) -> str:
    """Return ``image`` as a data URI, its longer side reduced to at most ``side`` pixels."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=QUALITY, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def in_parallel(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """Return ``function`` of every item, in their order."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, items))


class SampleThumbnails:
    """Pictures of a dataset's samples as data URIs; each sample is read and decoded once per size."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self._made: dict[tuple[str, int], str] = {}

    def make(self, rows: Sequence[Mapping[str, Any]], side: int = SMALL) -> list[str]:
        """Return one picture per row of the index. Raises DataError for a damaged shard."""
        new = {row["key"]: row for row in rows if (row["key"], side) not in self._made}
        pictures = in_parallel(lambda row: embed(Image.fromarray(self.dataset.pixels(row)), side), new.values())
        self._made |= {(key, side): picture for key, picture in zip(new, pictures)}
        return [self._made[row["key"], side] for row in rows]


class RejectThumbnails:
    """Pictures of refused sources: the crop if the sample came as far as that, else the source itself.

    Sources are looked for in ``folder``, which the caller names, never where a dataset says that its own were: that of
    a stranger could name any folder of this machine. Where there is no picture it is "", never an error: files move.
    """

    def __init__(self, dataset: Dataset, folder: Path | None) -> None:
        self.dataset, self.folder = dataset, folder
        self._places: dict[str, tuple[str, str, int]] = {}

    def make(self, rejects: Sequence[Mapping[str, str]]) -> list[str]:
        """Return one data URI, or "", per row of the rejects table."""
        self._places = _places(self.dataset.storage, [reject["source"] for reject in rejects])
        return in_parallel(self._picture, rejects)

    def _picture(self, reject: Mapping[str, str]) -> str:
        if reject["stage"] not in ("source", "px"):
            if reject["reason"] in NEVER_DECODED:  # the crop may be what the encoder died of, but not our decoder
                return self._crop(reject["source"])
            return self._crop(reject["source"]) or self._source(reject["source"])
        return "" if reject["reason"] in NEVER_DECODED else self._source(reject["source"])

    def _crop(self, name: str) -> str:
        if name not in self._places:
            return ""
        key, bucket, shard = self._places[name]
        try:
            data = self.dataset.storage.read(Unit(bucket, shard, "px").part)
            part = read_parquet(data)
            for row in part.filter(pc.equal(part["key"], key)).to_pylist():
                return embed(Image.fromarray(self.dataset.pixels(row | {"bucket": bucket, "shard": shard})), SMALL)
        except (OSError, pa.ArrowException, NanoditError):
            pass
        return ""

    def _source(self, name: str) -> str:
        if self.folder is None or ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute():
            return ""
        path = self.folder / name
        try:
            if leads_out(path, self.folder) or not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
                return ""
            return embed(decode(path.read_bytes(), MAX_PIXELS), SMALL)
        except (OSError, ValueError, BadImage):
            return ""


def source_folder(storage: Storage) -> Path | None:
    """Return the source folder of the newest run, where that is a folder of this machine."""
    configs = [name for name in storage.names("runs/") if name.endswith("/config.yaml")]
    try:
        folder = Path(yaml.safe_load(storage.read(max(configs)))["source"])
        return folder if folder.is_dir() else None
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):  # no run, or not a config of this version
        return None


def _places(storage: Storage, sources: Sequence[str]) -> dict[str, tuple[str, str, int]]:
    """Return key, bucket and shard of those of ``sources`` that the manifest knows."""
    columns = ["source", "key", "bucket", "shard"]
    try:
        table = read_parquet(storage.read("manifest.parquet"), columns)
    except (OSError, pa.ArrowException):
        return {}
    table = table.filter(pc.is_in(table["source"], pa.array(sources, pa.string())))
    return {row.pop("source"): tuple(row.values()) for row in table.to_pylist()}
