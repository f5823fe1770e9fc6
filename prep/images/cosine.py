"""Which rows have a cosine above a threshold: exact, without an N x N matrix, and only for rows that are new.

Unit vectors with cosine c are at squared distance 2 - 2c, and no orthogonal projection makes distances longer. So pairs
are looked for in the few directions that hold most of the variance, and only those that are close there are measured
further. How many directions pay is found from a sample: where features share most of their length, few of them keep
little apart. The last word is a sum of its own per pair, so that groups depend neither on the order, nor on tiles and
threads of the matrix product, nor on which rows were there first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

SLACK = 1e-3  # of cosines, and so of half the squared distances, for the rounding of float32
TILE = 4096  # rows that are read at a time, and times as many compared: 64 MB
CHUNK = 1 << 20  # candidates in hand at a time
MEASURED = 1 << 12  # pairs measured in all dimensions at once: 64 MB at width 1024
DENSE = 200  # where more than one pair of so many is a candidate, a matrix product is cheaper than measuring each
SAMPLE, SAMPLE_PAIRS = 8192, 512  # rows that directions are found from, and rows that are compared with the others
FEW = 30  # times width squared: for fewer pairs than that, finding directions costs more than it saves
# nanoseconds of a core: a multiplication and addition in a matrix product, its result, looking at the results of a row
# once more, and measuring one pair by itself in some directions and in all
PRODUCT, RESULT, LOOK, SOME, ALL = 0.02, 0.6, 0.6, 150, 4000

Rows = Callable[[np.ndarray], np.ndarray]  # unit vectors of some rows, float32 (n, width)


class Components:
    """Sets of connected items among ``count``, each named after its smallest member."""

    def __init__(self, count: int) -> None:
        self._parent = np.arange(count)

    def roots(self, items: np.ndarray) -> np.ndarray:
        """Return the name of the set of each item."""
        roots = self._parent[items]
        while not np.array_equal(above := self._parent[roots], roots):
            roots = above
        self._parent[items] = roots
        return roots

    def labels(self) -> np.ndarray:
        """Return the name of every item's set, int64 (count,)."""
        return self.roots(np.arange(len(self._parent)))

    def connect(self, left: np.ndarray, right: np.ndarray) -> None:
        """Connect pairs of items."""
        while len(left):
            left, right = self.roots(left), self.roots(right)
            low, high = np.minimum(left, right), np.maximum(left, right)
            apart = low < high
            left, right = low[apart], high[apart]
            self._parent[right] = left  # of several for one, the last; the others have their turn in the next round


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Return float (N, D) as float32 of length 1; zeros stay zeros, which are near to nothing."""
    vectors = np.asarray(vectors, np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    lengths[~np.isfinite(lengths)] = 0  # like no other, and no product with the others becomes NaN
    return np.where(lengths > 0, vectors, 0) / np.maximum(lengths, 1e-12)


def regroup(
    labels: np.ndarray, lost: np.ndarray, unit: Rows, threshold: float, done: Callable[[int], None] = lambda pairs: None
) -> Components:
    """Connect the rows that ``labels`` say are connected, int64 (N,) with -1 for rows that nobody has compared yet.

    Rows whose group ``lost`` a member, bool (N,), are compared with each other again: it may have held them together.
    Those of other groups are as far from them as before. ``done`` is told how many pairs were compared.
    """
    groups = Components(len(labels))
    whole = np.flatnonzero((labels >= 0) & ~lost)
    order = whole[np.argsort(labels[whole], kind="stable")]
    alike = labels[order][1:] == labels[order][:-1]
    groups.connect(order[:-1][alike], order[1:][alike])
    connect_near(groups, unit, threshold, np.flatnonzero(lost), done=done)
    return groups


def connect_near(
    groups: Components,
    unit: Rows,
    threshold: float,
    new: np.ndarray,
    old: np.ndarray | None = None,
    done: Callable[[int], None] = lambda pairs: None,
) -> None:
    """Connect in ``groups`` all pairs of rows with a cosine above ``threshold`` of which one, at least, is ``new``.

    The other one is new too, or ``old``. Both are row numbers, without repetition.
    """
    old = np.empty(0, np.int64) if old is None else old
    if not len(new) or len(new) + len(old) < 2:
        return
    search = _Search(groups, unit, threshold, _find_directions(unit, threshold, new, old))
    table, tiles = [], []
    for rows in _blocks(new, TILE):
        table.append(search.project(unit(rows)))
        tiles.append(rows)
        for other, columns in zip(table, tiles):
            search.compare(table[-1], rows, other, columns)
            done(len(rows) * len(columns) if columns is not rows else len(rows) * (len(rows) - 1) // 2)
    for rows, vectors in _ahead(unit, old):
        projected = search.project(vectors)
        for other, columns in zip(table, tiles):
            search.compare(other, columns, projected, rows)
            done(len(rows) * len(columns))


def count_pairs(new: int, old: int) -> int:
    """Return how many pairs :func:`connect_near` compares."""
    return new * (new - 1) // 2 + new * old


def _blocks(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _ahead(unit: Rows, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield rows and their vectors, tile by tile, the next one read while one is compared."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        coming: Future | None = None
        for block in [*_blocks(rows, TILE), None]:
            ready, coming = coming, None if block is None else pool.submit(lambda block=block: (block, unit(block)))
            if ready is not None:
                yield ready.result()


@dataclass(frozen=True)
class _Directions:
    """Where pairs are looked for: the directions of largest variance first, around the mean.

    ``first`` of them are compared by a matrix product, the others for those that are close in these. No ``basis``: all
    dimensions are compared as they are.
    """

    first: int
    mean: np.ndarray | None = None
    basis: np.ndarray | None = None


def _find_directions(unit: Rows, threshold: float, new: np.ndarray, old: np.ndarray) -> _Directions:
    rows = np.sort(np.concatenate([new, old]))
    width = unit(rows[:1]).shape[1]
    if count_pairs(len(new), len(old)) < FEW * width**2:
        return _Directions(width)
    sample = unit(rows[:: 1 + len(rows) // SAMPLE])
    counts = [1 << power for power in range(3, 9) if 1 << power < min(width, len(sample))]
    if not counts:
        return _Directions(width)
    mean = sample.mean(axis=0)
    sample = sample - mean
    basis = _leading(sample, counts[-1])
    few, many = np.split(sample, [min(SAMPLE_PAIRS, len(sample) // 2)])

    def close(a: np.ndarray, b: np.ndarray) -> float:
        """Return the share of pairs that are not known to be further apart than the threshold."""
        halves = (a * a).sum(axis=1)[:, None] / 2 + (b * b).sum(axis=1) / 2
        return float(np.mean(a @ b.T - halves >= threshold - 1 - SLACK))

    shares = {count: close(few @ basis[:, :count], many @ basis[:, :count]) for count in counts}
    shares[width] = close(few, many)

    def cost(count: int) -> float:
        """Return the nanoseconds that a pair takes on average."""
        dense = PRODUCT * width + RESULT
        again = LOOK * min(1, TILE * shares[count])
        if count == width:
            return dense + again + min(shares[width] * ALL, dense)
        further = shares[count] * SOME + min(shares[_further(count, counts)] * ALL, dense)
        return PRODUCT * count + RESULT + again + further

    first = min([*counts, width], key=cost)
    if first == width:
        return _Directions(width)
    return _Directions(first, mean, basis[:, : _further(first, counts)])


def _leading(centred: np.ndarray, count: int) -> np.ndarray:
    """Return orthonormal directions of large variance, the largest first, float32 (D, count).

    By subspace iteration (Halko, Martinsson and Tropp 2011, algorithm 4.4), which is quick; pairs would be found in any
    directions that are orthonormal.
    """
    basis = np.linalg.qr(centred[:count].T)[0]
    for _ in range(2):
        basis = np.linalg.qr(centred.T @ (centred @ basis))[0]
    turned = centred @ basis
    return basis @ np.linalg.eigh(turned.T @ turned)[1][:, ::-1]  # which come in the order of rising variance


def _further(count: int, counts: list[int]) -> int:
    """Return how many directions are looked at for pairs that are close in the first ``count``."""
    return min(4 * count, counts[-1])


class _Search:
    """Compares tiles of rows and connects what is near."""

    def __init__(self, groups: Components, unit: Rows, threshold: float, directions: _Directions) -> None:
        self.groups, self.unit, self.threshold, self.directions = groups, unit, threshold, directions
        self._product = np.empty(TILE**2, np.float32)
        self._limit = threshold - 1 - SLACK  # of minus half of a squared distance

    def project(self, unit: np.ndarray) -> np.ndarray:
        """Return -|x|^2 / 2 over the first directions, 1, and x in all of them."""
        it = self.directions
        flat = unit if it.basis is None else (unit - it.mean) @ it.basis
        half = (flat[:, : it.first] ** 2).sum(axis=1, keepdims=True) / 2
        return np.hstack([-half, np.ones_like(half), flat])

    def compare(self, left: np.ndarray, rows: np.ndarray, right: np.ndarray, columns: np.ndarray) -> None:
        """Connect what is near between projected ``rows`` and ``columns``, or among them where both are the same."""
        width = self.directions.first + 2
        turned = right[:, :width].copy()
        turned[:, :2] = right[:, 1::-1]
        # minus half of the squared distance, where that of the last tile stood: new pages would cost as much
        product = self._product[: len(rows) * len(columns)].reshape(len(rows), len(columns))
        np.matmul(left[:, :width], turned.T, out=product)
        if rows is columns:  # each pair once, and none with itself
            place = np.arange(len(rows))
            product[place[:, None] >= place] = -np.inf
        some = np.flatnonzero(product.max(axis=1) >= self._limit)
        for these in _blocks(some, max(1, CHUNK // len(columns))):
            a, b = np.nonzero(product[these] >= self._limit)
            a = these[a]
            if len(a) * DENSE > len(these) * len(columns):
                a, b = self._close_in_all(a, b, rows, columns)
            elif self.directions.basis is not None:
                a, b = self._apart(a, b, rows, columns)
                further = left[a, width:] - right[b, width:]
                keep = product[a, b] - (further * further).sum(axis=1) / 2 >= self._limit
                a, b = a[keep], b[keep]
            self._connect_measured(rows[a], columns[b])

    def _apart(self, a: np.ndarray, b: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> tuple:
        """Leave out the pairs that are connected by now: in a large group most are."""
        apart = self.groups.roots(rows[a]) != self.groups.roots(columns[b])
        return a[apart], b[apart]

    def _close_in_all(self, a: np.ndarray, b: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> tuple:
        """Leave out what a matrix product in all dimensions keeps apart."""
        a, b = self._apart(a, b, rows, columns)
        if self.directions.basis is None or not len(a):
            return a, b
        (tops, a_place), (others, b_place) = (np.unique(side, return_inverse=True) for side in (a, b))
        cosines = self.unit(rows[tops]) @ self.unit(columns[others]).T
        keep = cosines[a_place, b_place] >= self.threshold - SLACK
        return a[keep], b[keep]

    def _connect_measured(self, a: np.ndarray, b: np.ndarray) -> None:
        while len(a):
            apart = self.groups.roots(a) != self.groups.roots(b)
            a, b = a[apart], b[apart]
            left, right = a[:MEASURED], b[:MEASURED]
            if not len(left):
                return
            products = self.unit(left).astype(np.float64) * self.unit(right)
            near = products.sum(axis=1) > self.threshold
            self.groups.connect(left[near], right[near])
            a, b = a[MEASURED:], b[MEASURED:]
