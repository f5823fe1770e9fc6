"""Work that is done stays done: the rows of every finished batch, so that a killed evaluation goes on where it was.

``OUTPUT/parts/NAME.parquet`` holds the rows of one batch. Its header names the evaluation (weights, dataset, config,
code and packages) and what the batch was; a part of another evaluation is not read, and is written over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from nanodit.files import canonical_json, sha256_bytes, write_atomic
from prep.dataset.layout import parquet_bytes, read_parquet


class FinishedBatches:
    """The parts of one evaluation, ``identity``; without a folder nothing is kept."""

    def __init__(self, folder: Path | None, identity: Mapping[str, Any] | None = None):
        self._folder = folder
        self._identity = sha256_bytes(canonical_json(identity).encode())

    def get(self, name: str, content: Any, compute: Callable[[], pa.Table]) -> pa.Table:
        """Return the table of part ``name``.

        It is read where it is there and of the same ``content`` (JSON), otherwise computed.
        """
        if self._folder is None:
            return compute()
        header = {b"nanodit": canonical_json({"of": self._identity, "content": content}).encode()}
        path = self._folder / f"{name}.parquet"
        try:
            table = read_parquet(path.read_bytes())
            if (table.schema.metadata or {}).get(b"nanodit") == header[b"nanodit"]:
                return table.replace_schema_metadata(None)
        except (OSError, ValueError, pa.ArrowException):  # not there, or cut short by a crash of the machine
            pass
        table = compute()
        write_atomic(path, parquet_bytes(table.replace_schema_metadata(header)))
        return table
