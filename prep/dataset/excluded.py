"""The samples that publishing leaves out, ``excluded.json``; ``prep exclude`` writes it (``prep/exclude.py``)."""

from __future__ import annotations

import json

from nanodit.errors import DataError
from nanodit.storage import Storage

NAME = "excluded.json"


def read_excluded(storage: Storage) -> frozenset[str]:
    """Return the keys that are to be left out. Raises DataError for a damaged file."""
    data = storage.read_if_there(NAME)
    if data is None:
        return frozenset()
    try:
        keys = json.loads(data)["keys"]
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise ValueError("keys is not a list of texts")
    except (ValueError, KeyError, TypeError) as error:
        where = storage.where(NAME)
        raise DataError(f"{where} is damaged ({error}). Restore it, or delete it to exclude nothing") from error
    return frozenset(keys)
