"""Near duplicates and the split into train and holdout: by content, with every group on one side.

Exact duplicates never come this far (``prep/images/scan.py`` refuses them). Two samples are near duplicates when
their perceptual hashes differ in at most ``MAX_DISTANCE`` bits *and* their thumbnails confirm it: drawings and product
shots on one background share a hash by the dozen and are still different pictures. They are also when the cosine of
their DINO class tokens is above a threshold (``cosine.py``), which sees crops, mirrored copies and the next frame of a
series. Groups are what either kind connects, in the holdout also what connects altered forms (``altered.py``).
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from PIL import Image

CODE_VERSION = 1
HASH_SIDE = 8  # the 8x8 lowest frequencies of a 32x32 DCT: the usual "pHash", 64 bits
DCT_SIDE = 32
THUMBNAIL_SIDE = 16
THUMBNAIL_BYTES = THUMBNAIL_SIDE * THUMBNAIL_SIDE * 3
MAX_DISTANCE = 4  # JPEG q50 and half the size change 0 to 4 bits of a photograph
# mean absolute difference of thumbnails, 0-255: those edits stay below 2.5, two figures are above 10
MAX_DIFFERENCE = 3.0
COMPARED = 1 << 22  # hashes compared at once: 36 MB
JOINED = 1 << 22  # pairs that are joined at once
MEASURED = 1 << 14  # thumbnails that are subtracted at once: 25 MB of int16
BANDS = ((0, 13), (13, 13), (26, 13), (39, 13), (52, 12))  # first bit, bits; see near_pairs
# fastdup, which compares features by cosine too, calls images above .98 nearly identical
CLS_COSINE = {"production": 0.98, "demo": 1.0}
OFF = 1.0  # no cosine is above it
HOLDOUT_CAP = 5  # the minimum never takes more than a fifth of a small set

_DCT = np.cos(np.pi * np.outer(np.arange(HASH_SIDE), np.arange(DCT_SIDE) + 0.5) / DCT_SIDE)  # DCT-II, unscaled


def perceptual_hash(pixels: np.ndarray) -> str:
    """Return 16 hexadecimal digits, 64 bits: which low frequencies of uint8 (H, W, 3) are above their median."""
    grey = Image.fromarray(pixels).convert("L").resize((DCT_SIDE, DCT_SIDE), Image.Resampling.BOX)
    frequencies = (_DCT @ np.asarray(grey, np.float64) @ _DCT.T).ravel()
    bits = frequencies > np.median(frequencies[1:])  # the first is the mean brightness
    return np.packbits(bits).tobytes().hex()


def thumbnail(pixels: np.ndarray) -> bytes:
    """Return the 16x16 RGB bytes (768) of uint8 (H, W, 3); the aspect ratio is not kept."""
    return Image.fromarray(pixels).resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX).tobytes()


class DisjointSets:
    """Sets of connected items among ``count`` (a disjoint-set forest)."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def root(self, index: int) -> int:
        """Return the item that stands for all that ``index`` is connected with."""
        parent = self._parent
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    def join(self, a: int, b: int) -> None:
        """Connect two items."""
        self._parent[self.root(b)] = self.root(a)

    def join_all(self, pairs: np.ndarray) -> None:
        """Connect many pairs, int64 (M, 2)."""
        count = len(self._parent)
        if not len(pairs):
            return
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import connected_components

        edges = np.vstack([pairs, np.column_stack([np.arange(count), self._parent])])
        graph = coo_matrix((np.ones(len(edges), bool), edges.T), (count, count))
        _, labels = connected_components(graph, directed=False)
        _, first = np.unique(labels, return_index=True)
        self._parent = first[labels].tolist()

    def roots(self) -> np.ndarray:
        """Return the root of every item, int64 (count,)."""
        return np.array([self.root(index) for index in range(len(self._parent))], np.int64)


def thumbnail_rows(thumbnails: pa.ChunkedArray | Sequence[bytes]) -> np.ndarray:
    """Return thumbnails as uint8 (N, 768), without a copy of a column that is one array."""
    if not isinstance(thumbnails, pa.ChunkedArray):
        return np.frombuffer(b"".join(thumbnails), np.uint8).reshape(len(thumbnails), THUMBNAIL_BYTES)
    rows = [np.empty((0, THUMBNAIL_BYTES), np.uint8)]
    for chunk in thumbnails.chunks:
        ends = np.frombuffer(chunk.buffers()[1], np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
        if len(chunk):
            data = np.frombuffer(chunk.buffers()[2], np.uint8)[ends[0] : ends[-1]]
            rows.append(data.reshape(len(chunk), -1))
    return rows[1] if len(rows) == 2 else np.concatenate(rows)


def near_pairs(hashes: Sequence[str], thumbnails: np.ndarray | Sequence[bytes]) -> Iterator[np.ndarray]:
    """Yield the index pairs of near duplicates by hash and thumbnail, int64 (M, 2) at a time (some more than once).

    Hashes that differ in four bits agree in at least one of five bands, so only those that do are compared.
    """
    if not len(hashes):
        return
    bits = np.array([int(text, 16) for text in hashes], dtype=np.uint64)
    small = thumbnails if isinstance(thumbnails, np.ndarray) else thumbnail_rows(thumbnails)
    for first, width in BANDS:
        band = (bits >> np.uint64(first)) & np.uint64((1 << width) - 1)
        order = np.argsort(band, kind="stable")
        ordered = bits[order]
        starts = np.flatnonzero(np.r_[True, band[order][1:] != band[order][:-1]])
        for start, end in zip(starts.tolist(), np.r_[starts[1:], len(order)].tolist()):
            rows = max(1, COMPARED // (end - start))
            for top in range(start, end - 1, rows):
                others = ordered[top:end]
                distances = np.bitwise_count(others[:rows, None] ^ others[None, :])
                a, b = np.nonzero(distances <= MAX_DISTANCE)
                pairs = order[top + np.column_stack([a, b])[a < b]]
                for part in np.array_split(pairs, range(MEASURED, len(pairs), MEASURED)):
                    difference = small[part[:, 0]].astype(np.int16) - small[part[:, 1]]
                    close = part[np.abs(difference).mean(axis=1) <= MAX_DIFFERENCE] if len(part) else part
                    if len(close):
                        yield close


def duplicate_groups(
    keys: Sequence[str],
    hashes: Sequence[str],
    thumbnails: np.ndarray | Sequence[bytes],
    alike: np.ndarray | None = None,
) -> dict[str, str]:
    """Map every key to its group's name, the smallest key that near duplicates connect it with (itself when alone).

    ``thumbnails`` are bytes or the rows of :func:`thumbnail_rows`. ``alike``, int64 (N,) in the order of the keys, are
    the groups by DINO class tokens, where there are any.
    """
    groups = DisjointSets(len(keys))
    pairs = [np.empty((0, 2), np.int64)]
    for found in near_pairs(hashes, thumbnails):
        pairs.append(found)
        if sum(map(len, pairs)) > JOINED:
            groups.join_all(np.concatenate(pairs))
            pairs = pairs[:1]
    groups.join_all(np.concatenate(pairs))
    if alike is not None:
        order = np.argsort(alike, kind="stable")
        same = np.flatnonzero(alike[order][1:] == alike[order][:-1])
        groups.join_all(np.column_stack([order[same], order[same + 1]]))
    roots, names = groups.roots().tolist(), {}
    for key, root in sorted(zip(keys, roots)):
        names.setdefault(root, key)
    return {key: names[root] for key, root in zip(keys, roots)}


def join_groups(groups: Mapping[str, str], pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the groups with those of each pair of keys made one, which is named as the others are."""
    linked = [(groups[left], groups[right]) for left, right in pairs]
    names = sorted({name for pair in linked for name in pair})
    place = {name: number for number, name in enumerate(names)}
    sets = DisjointSets(len(names))
    sets.join_all(np.array([[place[left], place[right]] for left, right in linked], np.int64))
    smallest: dict[int, str] = {}
    renamed = {name: smallest.setdefault(root, name) for name, root in zip(names, sets.roots().tolist())}
    return {key: renamed.get(name, name) for key, name in groups.items()}


@dataclass(frozen=True)
class Split:
    """A split: ``sides`` maps keys to "train" or "holdout", ``linking`` are the new keys that would connect both."""

    sides: dict[str, str]
    linking: list[str]


def holdout_size(count: int, fraction: float, minimum: int) -> int:
    """Return how many of ``count`` samples to hold out: the fraction, or the minimum if a fifth of the set allows."""
    return max(math.floor(count * fraction + 0.5), min(minimum, count // HOLDOUT_CAP))


def assign_splits(
    groups: Mapping[str, str], published: Mapping[str, str], seed: int, fraction: float, minimum: int
) -> Split:
    """Split samples by the hash of their key, whole groups at a time.

    ``groups`` maps keys to group names, ``published`` the keys of an earlier index to their side: those never change
    it. A new sample follows its group; one whose group has published members on both sides is left out and reported.
    """
    members = defaultdict(list)
    for key, name in groups.items():
        members[name].append(key)
    sides = {key: published[key] for key in groups if key in published}
    linking: list[str] = []
    free: list[list[str]] = []
    for group in members.values():
        taken = {published[key] for key in group if key in published}
        new = [key for key in group if key not in published]
        if len(taken) == 2:
            linking += new
        elif taken:
            sides |= dict.fromkeys(new, taken.pop())
        else:
            free.append(new)
    wanted = holdout_size(len(groups) - len(linking), fraction, minimum)
    held = sum(side == "holdout" for side in sides.values())
    for group in sorted(free, key=lambda group: _draw(group, seed)):
        chosen = held + len(group) <= wanted
        held += len(group) if chosen else 0
        sides |= dict.fromkeys(group, "holdout" if chosen else "train")
    return Split(sides, sorted(linking))


def _draw(group: Iterable[str], seed: int) -> str:
    """Return where a group comes in the order: by one of its keys, as the least of all would favour large groups."""
    return hashlib.sha256(f"holdout {seed} {min(group)}".encode()).hexdigest()
