"""The trials of a blind comparison: which prompts, which picture on which side, and the catch trials between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evaluate.records import cluster_of
from nanodit.rng import generator

Row = Mapping[str, Any]  # of a dataset's index

LEFT, RIGHT, TIE = "left", "right", "tie"
A, B, TRUTH = "A", "B", "real"  # what a side shows: a run's picture, or the real image
PAIR, CATCH = "pair", "catch"
PER_CATCH = 7  # pairs for each catch trial, which then are one in eight
FEWEST_CATCHES = 2  # one alone could be a slip of the finger


def catches_for(pairs: int) -> int:
    """Return how many catch trials are mixed into so many pairs."""
    return max(FEWEST_CATCHES, round(pairs / PER_CATCH))


def cluster(row: Row) -> str:
    """Return what a prompt is resampled with, as evaluations do."""
    return cluster_of({"key": row["key"], "cluster": row.get("split_group") or row.get("duplicate_group")})


def make_trials(prompts: Sequence[Row], others: Sequence[Row], seed: str) -> list[dict[str, Any]]:
    """Return the trials in the order in which they are shown, a function of their rows and the seed alone.

    A trial names its prompt's ``key``, ``cluster`` and ``kind``, what ``left`` and ``right`` show (A, B or TRUTH) and
    the ``donor``, the prompt of a picture that is of another one. A is left in half of the ``prompts``, or in one more.
    Catch trials ask about ``others``, holdout samples that are not compared, or about ``prompts`` where there are too
    few. Raises ``ValueError`` where all prompts are near duplicates of one another.
    """
    random = generator("votes", seed)
    order = [prompts[place] for place in random.permutation(len(prompts)).tolist()]
    left = random.permutation(len(order)).tolist()
    pairs = [
        _trial(row, PAIR, *((A, B) if place < (len(order) + 1) // 2 else (B, A))) for row, place in zip(order, left)
    ]
    count = catches_for(len(order))
    known = {cluster(row) for row in prompts}
    asked = [row for row in others if cluster(row) not in known][:count]
    asked += [order[place % len(order)] for place in range(count - len(asked))]
    catches = [_catch(row, prompts, place, random) for place, row in enumerate(asked)]
    trials = []
    for place, catch in enumerate(catches):  # one in each stretch: also who stops early has met some
        stretch = pairs[len(pairs) * place // count : len(pairs) * (place + 1) // count]
        stretch.insert(int(random.integers(0, len(stretch) + 1)), catch)
        trials += stretch
    return trials


def _trial(row: Row, kind: str, left: str, right: str, donor: str | None = None) -> dict[str, Any]:
    sides = {"left": left, "right": right}
    return {"key": row["key"], "cluster": cluster(row), "kind": kind, **sides, "donor": donor}


def _catch(row: Row, prompts: Sequence[Row], place: int, random: Any) -> dict[str, Any]:
    """Return the real image of a prompt beside a run's picture of another prompt.

    One of two things tells them apart whatever the runs can do: pictures of a weak model do not look real, and those of
    a strong one show what the other prompt asks for. The model's own picture of the prompt would differ from neither
    once it is good, and two pictures of a model that does not follow prompts yet cannot be told apart by them. The
    other prompt is of the same shape where there is one, and has the fewest words in common.
    """
    foreign = [other for other in prompts if cluster(other) != cluster(row)]
    if not foreign:
        raise ValueError("all prompts are near duplicates")
    words = _words(row)

    def alike(other: Row) -> tuple[bool, float, str]:
        own = _words(other)
        return other["bucket"] != row["bucket"], len(words & own) / max(1, len(words | own)), other["key"]

    sides = [(A, B)[place % 2], TRUTH]
    left, right = sides if random.integers(0, 2) else reversed(sides)
    return _trial(row, CATCH, left, right, min(foreign, key=alike)["key"])


def _words(row: Row) -> set[str]:
    return set((row.get("caption") or "").lower().split())
