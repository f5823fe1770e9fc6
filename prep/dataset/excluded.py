"""The samples that publishing leaves out, ``excluded.json``; ``prep exclude`` writes it (``prep/exclude.py``)."""

from __future__ import annotations

import json
from dataclasses import dataclass

from nanodit.errors import DataError
from nanodit.storage import Storage
from prep.dataset.holdout import PARTS

NAME = "excluded.json"


@dataclass(frozen=True)
class Excluded:
    """The keys that are left out, and the side of the split of each key that ever was: it returns to that one.

    Those of the holdout return to their part of it, too.
    """

    keys: frozenset[str]
    splits: dict[str, str]
    parts: dict[str, str]


def read_excluded(storage: Storage) -> Excluded:
    """Return what is to be left out. Raises DataError for a damaged file."""
    data = storage.read_if_there(NAME)
    if data is None:
        return Excluded(frozenset(), {}, {})
    try:
        record = json.loads(data)
        keys, splits, parts = record["keys"], record.get("splits", {}), record.get("parts", {})
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise ValueError("keys is not a list of texts")
        if not isinstance(splits, dict) or not {*map(str, splits.values())} <= {"train", "holdout"}:
            raise ValueError("splits does not map keys to train or holdout")
        if not isinstance(parts, dict) or not {*map(str, parts.values())} <= {*PARTS}:
            raise ValueError("parts does not map keys to dev or test")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        where = storage.where(NAME)
        raise DataError(f"{where} is damaged ({error}). Restore it, or delete it to exclude nothing") from error
    return Excluded(frozenset(keys), splits, parts)
