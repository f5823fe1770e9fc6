"""Batches of an encoder that need not be computed again, because the committed unit has them.

A mended caption changes the text layer of its whole shard, and with it the recipe of the shard's T5 features. All
batches but its own would give the same bytes once more: their inputs are recorded in the unit's index part as a hash.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from nanodit.errors import DataError
from nanodit.files import sha256_bytes
from nanodit.storage import Storage
from prep.dataset.layers import LAYERS
from prep.dataset.layout import Unit, members_of, read_part, read_range

SAME = ("layer", "code", "encoder", "flip")  # of a recipe: with these equal, equal inputs give equal bytes


def inputs_hash(inputs: Sequence[Any]) -> str:
    """Return the hash of what a batch is computed from: a list of plain values, keys among them."""
    return sha256_bytes(json.dumps(inputs).encode())


class CommittedBatches:
    """The batches of the unit that is about to be replaced, by the hash of their inputs."""

    def __init__(self, storage: Storage, unit: Unit, recipe: dict[str, Any]) -> None:
        self._storage, self._unit, self._recipe = storage, unit, recipe
        self._rows: dict[tuple[str, int], list[dict[str, Any]]] = {}
        part = read_part(storage, unit)
        if part is None or any(part.recipe.get(name) != recipe.get(name) for name in SAME):
            return
        kinds = 1 + (part.recipe.get("short") == recipe.get("short"))
        start, rows = 0, part.table.to_pylist()
        for digest, count, *others in part.batches:
            for kind, one in enumerate([digest, *others][:kinds]):
                self._rows[one, kind] = rows[start : start + count]
            start += count

    def get(self, digest: str, kind: int = 0) -> list[tuple[dict[str, bytes], dict[str, Any]]] | None:
        """Return members and index columns of each sample of a batch; None where it has to be computed.

        ``kind`` 0 is what there is without short captions, 1 what these add. Members are checked by their hashes: those
        of a damaged tar are computed.
        """
        try:
            return list(self._read(self._rows[digest, kind], kind)) if (digest, kind) in self._rows else None
        except DataError:
            return None

    def _read(self, rows: Sequence[dict[str, Any]], kind: int) -> Iterator[tuple[dict[str, bytes], dict[str, Any]]]:
        layer = self._unit.layer
        long = {name: value for name, value in self._recipe.items() if name != "short"}
        names, columns = members_of(layer, long), LAYERS[layer].columns_of(long)
        if kind:
            names = [name for name in members_of(layer, self._recipe) if name not in names]
            columns = [name for name in LAYERS[layer].columns_of(self._recipe) if name not in columns]
        for row in rows:
            members = {}
            for member in names:
                place = [row[f"{layer}/{member}/{name}"] for name in ("offset", "length", "sha256")]
                members[member] = read_range(self._storage, self._unit, row["key"], member, *place)
            yield members, {name: row[name] for name in columns}
