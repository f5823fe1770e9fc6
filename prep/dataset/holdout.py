"""The two parts of a holdout: ``dev``, by which people choose, and ``test``, which is read for what they report.

Whoever stops a training, picks an arm of a sweep or a guidance by some images can no longer be told by these how good
the chosen one is: it was chosen because it did well on them.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Mapping

import pyarrow as pa
import pyarrow.compute as pc

COLUMN = "holdout_part"  # of the index
NEEDED = ("key", "split", COLUMN, "duplicate_group", "split_group", "altered_twin")  # columns, of which some may lack
PARTS = ("test", "dev")
CODE_VERSION = 1
NOTHING: Mapping[str, str] = {}


def assign_parts(
    groups: Mapping[str, str], published: Mapping[str, str] = NOTHING, unread: Collection[str] = ()
) -> dict[str, str]:
    """Map the keys of a holdout to "test" or "dev": about half of the samples each, whole groups at a time.

    ``groups`` maps the keys to names of groups, ``published`` keys to the part that they were published in, which they
    keep. A new sample follows its group, to dev where that has members in both. Further groups come in the order of
    the hash of their smallest key, each to the part that has fewer samples; test where both have equally many.
    Samples that are ``unread``, as evaluations leave them out, are not counted.
    """
    unread = frozenset(unread)
    members = defaultdict(list)
    for key, name in groups.items():
        members[name].append(key)
    parts = {key: published[key] for key in groups if key in published}
    free = []
    for group in members.values():
        taken = {parts[key] for key in group if key in parts}
        if taken:
            part = taken.pop() if len(taken) == 1 else "dev"
            parts |= {key: part for key in group if key not in parts}
        else:
            free.append(group)
    sizes = {part: sum(own == part and key not in unread for key, own in parts.items()) for part in PARTS}
    for group in sorted(free, key=lambda group: _draw(min(group))):
        part = min(PARTS, key=lambda part: sizes[part])
        sizes[part] += sum(key not in unread for key in group)
        parts |= dict.fromkeys(group, part)
    return parts


def _draw(key: str) -> str:
    return hashlib.sha256(f"holdout part {key}".encode()).hexdigest()


def parts_of(table: pa.Table) -> dict[str, str]:
    """Map the keys of the holdout rows of an index to their part, which an index of earlier versions does not name.

    There it follows from keys and groups alone, and so is the same for every reader, and for the next version.
    """
    held = table.filter(pc.equal(table["split"], "holdout"))
    keys = held["key"].to_pylist()
    if COLUMN in held.column_names:
        return dict(zip(keys, held[COLUMN].to_pylist()))
    groups = held["key"].cast(pa.string())
    for name in ("duplicate_group", "split_group"):
        if name in held.column_names:
            groups = pc.coalesce(held[name].cast(pa.string()), groups)
    known = "altered_twin" in held.column_names
    unread = held.filter(pc.is_valid(held["altered_twin"]))["key"].to_pylist() if known else ()
    return assign_parts(dict(zip(keys, groups.to_pylist())), unread=unread)
