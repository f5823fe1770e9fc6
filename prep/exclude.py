"""``prep exclude``: which samples the next version of a dataset leaves out, and which it takes in again.

The keys stand in ``excluded.json`` of the dataset, with the side of the split that each was published on. Nothing is
computed or deleted for them: an excluded sample keeps its features in the tars, and publishing leaves it out of the
index. ``prep run --prune`` drops what is gone from the source.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from nanodit.console import say
from nanodit.errors import PROBLEM_BREAK, ConfigError, DataError
from nanodit.files import canonical_json
from nanodit.lock import locked
from nanodit.storage import Storage, open_storage
from prep.dataset.excluded import NAME, read_excluded
from prep.passes.missing_sources import published_sides
from prep.passes.plan import MANIFEST, read_manifest

SHORTEST = 6  # digits of a key that name a sample
SHOWN = 20  # samples that are listed by name
SIMILAR = 3


def exclude(dataset: str, names: Sequence[str], include: bool = False) -> None:
    """Leave samples out of the next version, or with ``include`` take them in again; without names list them.

    A name is the sample's key, its first digits, or its file's name below the source folder. Nothing is changed unless
    every name is known. Raises ConfigError for one that is not, DataError for what is no dataset.
    """
    storage = open_storage(dataset)
    if not storage.exists(MANIFEST):
        raise DataError(f"{storage} holds no dataset. Run: nanodit prep run")
    manifest = read_manifest(storage)
    known = dict(zip(manifest["key"].to_pylist(), manifest["source"].to_pylist()))
    with locked(storage):
        before = read_excluded(storage)
        if not names:
            _list(storage, before.keys, known)
            return
        chosen = _find(names, known)
        after = before.keys - chosen if include else before.keys | chosen
        if after != before.keys:
            new = after - before.keys
            sides, places = published_sides(storage) if new else ({}, {})
            record = {
                "splits": before.splits | {key: sides[key] for key in new & sides.keys()},
                "parts": before.parts | {key: places[key] for key in new & places.keys()},
            }
            known_of = {name: values for name, values in record.items() if values}
            storage.write(NAME, canonical_json({"keys": sorted(after)} | known_of))
    changed = len(after ^ before.keys)
    what = "taken in again" if include else "excluded"
    say(f"{changed} {'sample' if changed == 1 else 'samples'} {what}, {len(after)} excluded in all")
    if changed:
        say(
            f"`nanodit prep run` publishes the version {'with' if include else 'without'} them; trainings that read an "
            "earlier one go on"
        )


def _find(names: Sequence[str], known: dict[str, str]) -> frozenset[str]:
    """Return the keys that the names stand for."""
    by_source = {source: key for key, source in known.items()}
    found, problems = set(), []
    for name in names:
        if name in by_source:
            found.add(by_source[name])
            continue
        matches = [key for key in known if key.startswith(name.lower())] if len(name) >= SHORTEST else []
        if len(matches) == 1:
            found.add(matches[0])
        elif matches:
            problems.append(f"{name}: {len(matches)} keys begin so; give more digits")
        else:
            similar = " or ".join(difflib.get_close_matches(name, by_source, SIMILAR))
            problems.append(f"{name}: no such key or file{similar and f'; is it {similar}?'}")
    if problems:
        raise ConfigError(PROBLEM_BREAK.join(["nothing was changed:", *problems]))
    return frozenset(found)


def _list(storage: Storage, keys: frozenset[str], known: dict[str, str]) -> None:
    say(f"{len(keys)} samples of {storage} are excluded{':' if keys else ''}")
    for key in sorted(keys)[:SHOWN]:
        say(f"  {key}  {known.get(key, 'not in the dataset any more')}")
    if len(keys) > SHOWN:
        say(f"  and {len(keys) - SHOWN} more, in {storage.where(NAME)}")
