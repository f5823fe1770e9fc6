"""The split of an index into train and two parts of a holdout, and which samples are groups of near duplicates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nanodit.console import Progress, say
from nanodit.errors import DataError
from nanodit.files import canonical_json
from nanodit.storage import Storage
from prep.config import PrepConfig
from prep.dataset.excluded import read_excluded
from prep.dataset.holdout import COLUMN as HOLDOUT_PART
from prep.dataset.holdout import NEEDED, assign_parts, parts_of
from prep.dataset.layout import read_parquet
from prep.images import duplicates
from prep.images.altered import altered_pairs
from prep.images.compared import MILLION, Alike
from prep.passes.grouping import join_named, table_hash

INDEX, DATASET = "index.parquet", "dataset.json"
SPLIT_RULES = "nanodit.split"  # in the metadata of the index: what `split_rules` says
LONG = 10**8  # pairs: what takes some seconds


def split_rules(config: PrepConfig) -> str:
    """Write the part of the config that decides the split of new samples as text, which the index carries."""
    rules = {"seed": config.seed, "holdout": config.holdout, "holdout_min": config.holdout_min}
    if config.split.group_by is not None:
        rules["split"] = config.split.model_dump() | {"csv": table_hash(config)}
    return canonical_json(rules)


@dataclass(frozen=True)
class PublishedSplit:
    """Where samples were published, and so stay: keys -> "train" or "holdout", and those of the holdout -> its part."""

    sides: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=dict)


def published_split(storage: Storage, config: PrepConfig) -> PublishedSplit:
    """Return the split of the index that was published before; empty when there is none.

    An index without dataset.json is of a first publication that was killed. Nobody has read it, so its split counts
    only as long as the config asks for the same one.
    """
    data = storage.read_if_there(INDEX)
    if data is None:
        return PublishedSplit()
    try:
        there = dict.fromkeys(pq.ParquetFile(pa.BufferReader(data)).schema_arrow.names)
        table = read_parquet(data, columns=[name for name in NEEDED if name in there])
    except (OSError, pa.ArrowException) as error:
        path = storage.where(INDEX)
        raise DataError(
            f"{path} is damaged ({error}), so the published split is unknown. Restore it, or delete it and accept "
            "another split"
        ) from error
    rules = (table.schema.metadata or {}).get(SPLIT_RULES.encode(), b"").decode()
    if not storage.exists(DATASET) and rules != split_rules(config):
        return PublishedSplit()
    sides = table["split"].combine_chunks().dictionary_encode()
    names = sides.dictionary.to_pylist()  # one string for all, not a million
    index = zip(table["key"].to_pylist(), map(names.__getitem__, sides.indices.to_pylist()))
    excluded = read_excluded(storage)  # those were published before they were excluded
    return PublishedSplit(excluded.splits | dict(index), excluded.parts | parts_of(table))


def add_split(
    config: PrepConfig,
    table: pa.Table,
    published: PublishedSplit,
    alike: Alike | None = None,
    named: Mapping[str, str] | None = None,
) -> tuple[pa.Table, list[str]]:
    """Add ``split``, its part, ``duplicate_group`` and ``altered_twin``; also returns the keys that had to be left out.

    Those would connect published samples of both sides (see ``assign_splits``). ``alike`` are the groups of the rows by
    DINO class tokens, where they decide about duplicates. No holdout sample is an altered form of a training sample
    (``prep/images/altered.py``) but where both were published before the rules found that: there ``altered_twin`` of
    the holdout sample is the key of the other. With ``named``, the groups by ``split.group_by``, ``split_group`` is
    what of them is on one side.
    """
    keys, hashes = table["key"].to_pylist(), table["phash"].to_pylist()
    thumbnails = duplicates.thumbnail_rows(table["thumbnail"])
    groups = duplicates.duplicate_groups(keys, hashes, thumbnails, alike.labels if alike else None)
    split, altered, torn = _draw(config, keys, thumbnails, groups, named, published.sides)
    if split.linking:  # without them the rest falls into other groups
        kept = pc.invert(pc.is_in(table["key"], pa.array(split.linking)))
        table, more = add_split(config, table.filter(kept), published, alike and alike.kept(np.asarray(kept)), named)
        return table, sorted(split.linking + more)
    joined, twins = sort_links(altered, split.sides)
    groups = duplicates.join_groups(groups, joined)
    columns = {"split": split.sides, HOLDOUT_PART: {}, "duplicate_group": groups, "altered_twin": twins}
    if named is not None:
        by_side = {key: f"{split.sides[key]} {named[key]}" for key in keys if key in named}
        columns["split_group"], _ = join_named(groups, by_side, split.sides)
        if torn:
            both = f"warning: {torn} groups by split.group_by lie on both sides"
            say(f"{both}: images of them, or copies of such images, are published there")
    together = columns.get("split_group", groups)
    held = {key: together[key] for key in keys if split.sides[key] == "holdout"}
    columns[HOLDOUT_PART] = assign_parts(held, published.parts, twins)
    for name, values in columns.items():
        position = table.column_names.index("width")
        table = table.add_column(position, name, pa.array([values.get(key) for key in keys], pa.string()))
    return table, []


def _draw(
    config: PrepConfig, keys: Sequence[str], thumbnails: np.ndarray, groups: Mapping[str, str],
    named: Mapping[str, str] | None, published: Mapping[str, str],
) -> tuple[duplicates.Split, list[tuple[str, str]], int]:  # fmt: skip
    """Draw the split, and compare what is drawn for the holdout with all others until nothing else is drawn.

    Also returns the pairs of keys that are altered forms of each other, and how many of the ``named`` groups cannot be
    on one side. Of a million samples the holdout alone is compared: links between two training samples decide nothing.
    """
    links: list[tuple[str, str]] = []
    compared = np.zeros(len(keys), bool)
    while True:
        # what is torn already tells nothing of where new samples belong
        usable = [pair for pair in links if len({published.get(key) for key in pair} - {None}) < 2]
        joined = duplicates.join_groups(groups, usable)
        units, torn = (joined, 0) if named is None else join_named(joined, named, published)
        split = duplicates.assign_splits(units, published, config.seed, config.holdout, config.holdout_min)
        held = np.fromiter((split.sides.get(key) == "holdout" for key in keys), bool, len(keys))
        new = np.flatnonzero(held & ~compared)
        found = find_links(keys, thumbnails, new, config.duplicates.altered_cosine)
        compared[new] = True
        links += found
        if not found:
            return split, links, torn


def find_links(
    keys: Sequence[str], thumbnails: np.ndarray, rows: np.ndarray, threshold: float
) -> list[tuple[str, str]]:
    """Return the pairs of keys, one of the given rows first, that are altered forms; none at ``duplicates.OFF``."""
    if threshold >= duplicates.OFF:
        return []
    pairs = len(rows) * len(keys)
    bar = Progress("holdout against all", pairs // MILLION, "million pairs") if pairs > LONG else nullcontext()
    with bar as progress:
        seen = 0

        def done(count: int) -> None:
            nonlocal seen
            if progress is not None:
                progress.advance((seen + count) // MILLION - seen // MILLION)
            seen += count

        return [(keys[row], keys[other]) for row, other in altered_pairs(thumbnails, rows, done, threshold).tolist()]


def sort_links(
    links: Iterable[tuple[str, str]], sides: Mapping[str, str]
) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """Return the links within the holdout, and of each holdout key with links to training the smallest such key."""
    inside, twins = [], {}
    for pair in links:
        held, trained = ([key for key in pair if sides[key] == side] for side in ("holdout", "train"))
        if not trained:
            inside.append(pair)
        elif held:
            twins[held[0]] = min(trained[0], twins.get(held[0], trained[0]))
    return inside, twins


def cls_cosine(config: PrepConfig) -> float:
    """Return the cosine of DINO class tokens above which samples are near duplicates; ``OFF`` without the layer."""
    if "dino" not in config.layers:
        return duplicates.OFF
    return config.duplicates.cls_cosine or duplicates.CLS_COSINE[config.encoders]
