"""``prep export --flat``: a dataset in the layout of prx-tg, one tar per shard with everything decoded and padded.

Per sample of the index, float16 and float32 instead of compressed pixels and int8, about nine times the room:

| member | dtype, shape | range |
|---|---|---|
| `KEY.image.npy` | float16 (3, H, W) | RGB in [0, 1], pixel / 255 |
| `KEY.dinov3.npy` | float32 (width,) | the class token after the final norm |
| `KEY.dinov3_patches.npy` | float32 (h * w, width) | patch tokens in rows from the top left, without registers |
| `KEY.t5h.npy` | float16 (512, width) | T5's last hidden state, zeros after the valid tokens |
| `KEY.t5m.npy` | uint8 (512,) | 1 for valid tokens, 0 for padding |
| `KEY.pose.npy` | float16 (133, 3) | x and y as 2 x / W - 1 with x = 0 in the middle of the first pixel; confidence |
| `KEY.json` | | caption, bucket, width, height, split, source, dino_h, dino_w |

Names, shapes and ranges are those of its README ("Embedding Extraction", "WebDataset Sharding"); patches are float32,
as its code wrote them. How the mask is stored and what follows the valid tokens is left open there. A member whose
layer the dataset does not have is missing. That layout knows no split: what the JSON calls ``holdout`` must be left out
by whoever trains on it, and no mirrored crops: what `flips` stored is left out. Other
layers, if any, have their arrays as they are stored.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from nanodit.console import Progress, say
from nanodit.errors import ConfigError, DataError, ResourceError
from nanodit.files import canonical_json
from nanodit.storage import LocalFolder, Storage, open_storage
from prep.dataset.buckets import Bucket
from prep.dataset.codecs import npy_bytes
from prep.dataset.layers import LAYERS
from prep.dataset.members import Array
from prep.dataset.reader import Dataset
from prep.dataset.rows import Row
from prep.report.pictures import source_folder
from prep.verify.verify import TEMPORARY

TEXT_TOKENS = 512
MARKER = "flat.json"  # says which dataset the tars are made from
HEADERS = 16 * 1024  # bytes of tar and NPY headers, padding, pose and JSON per sample, at most


def export_flat(dataset: Path | str | Storage, output: Path | str | Storage) -> None:
    """Write ``OUTPUT/bucket_WIDTHxHEIGHT/shard-NNNNNN.tar`` for every shard; equal datasets give equal bytes.

    Each tar appears when it is complete, and the same call continues where another one was killed. Raises ConfigError
    when the folder holds anything but an export of this dataset, ResourceError when it cannot be written or there is
    too little room, DataError for damaged samples.
    """
    data, storage = Dataset(dataset), open_storage(output)
    shards: dict[str, Sequence[Row]] = {}
    for bucket, rows in data.rows().by("bucket").items():
        shards |= {f"bucket_{bucket}/shard-{shard:06d}.tar": own for shard, own in rows.by("shard").items()}
    _check_place(data, storage)
    try:
        _mark(data, storage)
    except OSError as error:
        raise ResourceError(f"{storage} cannot be written: {error.strerror}. Choose another folder") from error
    missing = {name: rows for name, rows in sorted(shards.items()) if not storage.exists(name)}
    _check_room(data, storage, missing)
    done = len(data) - sum(map(len, missing.values()))
    with Progress("export", len(data), done=done) as progress:
        for name, rows in missing.items():
            _write_shard(data, storage, name, rows, progress)
    size = sum(storage.size(name) or 0 for name in shards)
    say(f"wrote {len(missing)} of {len(shards)} tars to {storage}: {len(data)} samples, {size / 1e9:.2f} GB")
    if data.has_flips:
        say("flipped captions and the features of mirrored crops are left out: the flat layout has no place for them")
    if data.has_short:
        say("short captions and their features are left out: the flat layout has no place for them")


def _check_place(data: Dataset, storage: Storage) -> None:
    """Raise ConfigError for a place inside the dataset, or inside the folder that its sources come from."""
    if not isinstance(storage, LocalFolder):
        inside = [data.storage] if f"{storage}/".startswith(f"{data.storage}/") else []
    else:
        places = [Path(data.storage.place) if data.storage.is_local else None, source_folder(data.storage)]
        output = storage.root.resolve()
        inside = [place for place in places if place and output.is_relative_to(place.resolve())]
    if inside:
        raise ConfigError(f"{storage} lies inside {inside[0]}, which an export must not change. Choose another folder")


def _mark(data: Dataset, storage: Storage) -> None:
    """Record in the output which dataset it exports. Raises ConfigError when it already exports another one."""
    if storage.exists(MARKER):
        try:
            before = json.loads(storage.read(MARKER))["dataset"]
        except (ValueError, KeyError, TypeError):
            before = "unknown"
        if before != data.fingerprint:
            raise ConfigError(
                f"{storage} holds the export of a dataset with fingerprint {before}, not {data.fingerprint}. "
                "Choose another folder, or delete that one"
            )
    elif others := [name for name in storage.names() if not TEMPORARY.fullmatch(name)]:
        raise ConfigError(
            f"{storage} is not empty and holds no export ({others[0]} is there, {MARKER} is not). Choose another folder"
        )
    storage.remove_temporary_files()
    storage.write(MARKER, canonical_json({"dataset": data.fingerprint}))


def _check_room(data: Dataset, storage: Storage, missing: dict[str, Sequence[Row]]) -> None:
    """Raise ResourceError when what is to be written does not fit on a local disk."""
    needed = sum(_bytes_of(data, row) for rows in missing.values() for row in rows)
    if isinstance(storage, LocalFolder) and needed > (free := shutil.disk_usage(storage.root).free):
        raise ResourceError(
            f"{storage}: the export takes {needed / 1e9:.1f} GB; {free / 1e9:.1f} GB are free. Choose another folder"
        )


def _bytes_of(data: Dataset, row: Row) -> int:
    bucket, layers = Bucket.parse(row["bucket"]), data.info["layers"]
    size = 2 * 3 * bucket.width * bucket.height + HEADERS
    if "t5" in layers:
        size += 2 * TEXT_TOKENS * layers["t5"]["width"]
    if "dino" in layers:
        size += 4 * (row["dino_h"] * row["dino_w"] + 1) * layers["dino"]["width"]
    for layer in data.layers:
        if LAYERS[layer].flat and layer not in CONVERTED:
            size += sum(row[f"{layer}/{member}/length"] for member in data.members(layer))
    return size


def _write_shard(data: Dataset, storage: Storage, name: str, rows: Sequence[Row], progress: Progress) -> None:
    from webdataset import TarWriter  # here: it imports torch

    draft = storage.draft(name)
    fixed = {"user": "", "group": "", "mode": 0o644, "mtime": 0}  # equal bytes whoever writes them, and when
    try:
        with open(draft, "wb") as file, TarWriter(file, encoder=False, **fixed) as tar:
            for row in rows:
                for member, content in flat_members(data, row).items():  # one by one: it would sort them
                    tar.write({"__key__": row["key"], member: content})
                progress.advance()
        storage.put_file(name, draft)
    finally:
        draft.unlink(missing_ok=True)


def flat_members(data: Dataset, row: Row) -> dict[str, bytes]:
    """Return the members of one sample by name, as the table above has them. Raises DataError for damaged samples."""
    data, bucket, members = data.together(), Bucket.parse(row["bucket"]), {}
    for layer in [*CONVERTED, *(layer for layer in data.layers if layer not in CONVERTED)]:
        if layer in data.layers and (names := LAYERS[layer].flat):
            arrays = CONVERTED[layer](data, row) if layer in CONVERTED else stored_arrays(data, row, layer)
            members |= {name: npy_bytes(array) for name, array in zip(names, arrays, strict=True)}
    about = {"bucket": row["bucket"], "width": bucket.width, "height": bucket.height}
    about |= {name: row[name] for name in ("caption", "split", "source", "dino_h", "dino_w") if name in row}
    return members | {"json": canonical_json(about).encode()}


def stored_arrays(data: Dataset, row: Row, layer: str) -> list[np.ndarray]:
    """Return the arrays of a layer as they are stored, without those of the mirrored crop."""
    members = LAYERS[layer].members
    return [data.array(row, f"{layer}/{member.name}") for member in members if isinstance(member.kind, Array)]


def flat_image(data: Dataset, row: Row) -> list[np.ndarray]:
    """Return the crop, float16 (3, H, W) in [0, 1]."""
    return [(data.pixels(row).astype(np.float32) / 255).astype(np.float16).transpose(2, 0, 1)]


def flat_features(data: Dataset, row: Row) -> list[np.ndarray]:
    """Return DINO's class token, float32 (width,), and patches, float32 (h * w, width)."""
    patches = data.patches(row)
    return [data.cls(row), patches.reshape(-1, patches.shape[-1])]


def pad_text(tokens: np.ndarray, row: Row) -> tuple[np.ndarray, np.ndarray]:
    """Return valid tokens (L, width) as float16 (512, width), zeros after them, and their mask, uint8 (512,)."""
    count, width = tokens.shape
    if count > TEXT_TOKENS:
        raise DataError(f"sample {row['key']} has {count} text tokens, but the flat layout holds {TEXT_TOKENS}")
    hidden, mask = np.zeros((TEXT_TOKENS, width), np.float16), np.zeros(TEXT_TOKENS, np.uint8)
    hidden[:count], mask[:count] = tokens, 1
    return hidden, mask


def flat_pose(joints: np.ndarray, bucket: Bucket) -> np.ndarray:
    """Turn our joints (133, 3), x as 2 (x + .5) / W - 1, into float16 of 2 x / W - 1; y alike, absent joints stay 0."""
    shift = np.array([1 / bucket.width, 1 / bucket.height, 0], np.float32)
    return np.where(joints[:, 2:] > 0, joints - shift, 0).astype(np.float16)


CONVERTED: dict[str, Callable[[Dataset, Row], Sequence[np.ndarray]]] = {  # in the order of that layout
    "px": flat_image,
    "dino": flat_features,
    "t5": lambda data, row: pad_text(data.t5(row), row),
    "pose": lambda data, row: [flat_pose(data.pose(row), Bucket.parse(row["bucket"]))],
}
