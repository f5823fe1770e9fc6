"""Writing one unit, a shard's layer: its tar becomes durable, then its index part commits it."""

from __future__ import annotations

import io
import json
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import pyarrow as pa

from nanodit.faults import fault
from nanodit.files import sha256_bytes, sha256_file
from nanodit.storage import Storage, open_storage
from prep.dataset.layers import LAYERS
from prep.dataset.layout import (
    SCHEMA_VERSION,
    TAR_BLOCK,
    Rejection,
    Unit,
    members_of,
    parquet_bytes,
    part_schema,
)
from prep.dataset.versions import keep_unit


class LayerWriter:
    """Writes one unit: add samples in key order, then :meth:`commit`; leaving the ``with`` block without it undoes all.

    A published tar is kept for its readers before that. The old index part goes before the new tar comes, so that no
    moment exists in which a part describes another tar. ``batches`` is to be filled as :class:`Part` has it.
    """

    def __init__(self, root: Path | str | Storage, unit: Unit, recipe: dict[str, Any], facts: dict[str, Any]) -> None:
        self.storage, self.unit, self.recipe, self.facts = open_storage(root), unit, recipe, facts
        self.batches: list[tuple[Any, ...]] = []
        self._rows: list[dict[str, Any]] = []
        self._rejects: list[Rejection] = []
        self._temporary = self.storage.draft(unit.tar)
        self._file = open(self._temporary, "wb")  # noqa: SIM115 - closed by commit or __exit__
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(OSError):  # on a full disk closing fails, too, and the first error has been raised already
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def add(self, key: str, members: dict[str, bytes], **columns: Any) -> None:
        """Append one sample: ``members`` by name and ``columns`` as the layer's record has them."""
        layer, expected = self.unit.layer, members_of(self.unit.layer, self.recipe)
        described = LAYERS[layer].columns_of(self.recipe)
        if tuple(members) != expected or set(columns) != set(described):
            raise ValueError(f"{self.unit}: expected members {expected} and columns {set(described)}")
        if self._rows and key <= self._rows[-1]["key"]:
            raise ValueError(f"{self.unit}: key {key} is not after {self._rows[-1]['key']}")
        row: dict[str, Any] = {"key": key, **columns}
        for member, data in members.items():
            info = tarfile.TarInfo(f"{key}.{member}")  # defaults: mtime 0, uid and gid 0, mode 0644, no names
            info.size = len(data)
            row[f"{layer}/{member}/offset"] = self._tar.offset + TAR_BLOCK
            row[f"{layer}/{member}/length"] = len(data)
            row[f"{layer}/{member}/sha256"] = sha256_bytes(data)
            self._tar.addfile(info, io.BytesIO(data))
        self._rows.append(row)

    @property
    def rejected(self) -> int:
        """How many samples were refused so far."""
        return len(self._rejects)

    def reject(self, key: str, reason: str, detail: str) -> None:
        """Note that this layer refuses a sample; it will be missing from the layer and from the index."""
        self._rejects.append(Rejection(key, reason, detail))

    def commit(self) -> None:
        """Make the tar durable and visible, then its index part."""
        self._tar.close()
        self._file.close()
        record = {
            "schema": SCHEMA_VERSION,
            "bucket": self.unit.bucket,
            "shard": self.unit.shard,
            "layer": self.unit.layer,
            "recipe": self.recipe,
            "facts": self.facts,
            "tar_bytes": self._temporary.stat().st_size,
            "tar_sha256": sha256_file(self._temporary),
            "rejects": [vars(reject) for reject in sorted(self._rejects, key=lambda reject: reject.key)],
        }
        if self.batches:
            record["batches"] = self.batches
        keep_unit(self.storage, self.unit, record["tar_sha256"])
        fault("shards.before_tar")
        self.storage.delete(self.unit.part)
        self.storage.put_file(self.unit.tar, self._temporary)
        fault("shards.before_part")
        schema = part_schema(self.unit.layer, self.recipe).with_metadata(
            {"nanodit": json.dumps(record, sort_keys=True)}
        )
        self.storage.write(self.unit.part, parquet_bytes(pa.Table.from_pylist(self._rows, schema=schema)))
