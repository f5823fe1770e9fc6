"""Views of the samples for the dataset report, as plain values: counts over all of them, and a few of each kind.

The index is read as whole columns; only samples that are shown become rows. Keys are hashes of the sources, so the
first samples in the order of keys are a fair draw that is the same every time.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nanodit.keypoints import BODY_JOINTS
from nanodit.svg import FOUND, SURE, histogram, skeleton
from prep.dataset.buckets import Bucket, cut_away
from prep.dataset.reader import Dataset
from prep.dataset.rows import Row, Rows
from prep.passes.advice import CROP_COLUMNS
from prep.report.pictures import LARGE, SMALL, RejectThumbnails, SampleThumbnails, in_parallel

FIRST = 18  # pictures at the top of the page
SHEET = 24  # pictures of a contact sheet
CAPTIONS = 6  # shown with their picture
CAPTION_LIMIT, EXTREME_LIMIT = 900, 260  # characters shown; the whole caption is in the index
BLURRED = 6  # the least sharp pictures
EXTREMES = 4  # shortest, longest and cut captions
TEXTS, TEXT_IMAGES = 8, 6  # repeated captions, and pictures of each
OVERLAYS = {"one person": 12, "several people": 6, "no people": 6}
JUDGED_POSES = 512  # samples whose joints are summed up
GROUPS, GROUP_IMAGES = 12, 6
REJECT_IMAGES = 6  # of every reason
DUPLICATE = "duplicate"  # the reason for exact copies
JOINT_GROUPS = {
    "nose": [0],
    "eyes": [1, 2],
    "ears": [3, 4],
    "shoulders": [5, 6],
    "elbows": [7, 8],
    "wrists": [9, 10],
    "hips": [11, 12],
    "knees": [13, 14],
    "ankles": [15, 16],
    "feet": list(range(17, 23)),
    "face": list(range(23, 91)),
    "left hand": list(range(91, 112)),
    "right hand": list(range(112, 133)),
}
View = dict[str, Any]


def rows_at(table: pa.Table, places: Sequence[int] | np.ndarray) -> Rows:
    """Return some rows of the index."""
    return Rows.of(table.take(pa.array(places, pa.int64())))


def first_rows(table: pa.Table, name: str, value: str, count: int) -> Rows:
    """Return the first rows with a value in a column."""
    return Rows.of(table.filter(pc.equal(table[name], value)).slice(0, count))


def numbers(table: pa.Table, name: str) -> np.ndarray:
    """Return a numeric column as an array."""
    return table[name].to_numpy()


def shorten(text: str, limit: int) -> str:
    """Return at most about ``limit`` characters of a text, and how much more there is."""
    if len(text) <= limit:
        return text
    return f"{text[:limit].rstrip()} … ({len(text) - limit:,} more characters)"


def crop_loss(table: pa.Table) -> np.ndarray:
    """Return the share of each source image's area that the crop cuts away, (n,) in [0, 1)."""
    return cut_away(*(numbers(table, name) for name in ("width", "height", *CROP_COLUMNS)))


def crops(table: pa.Table) -> View:
    """Return how much of the sources the crops cut away, over all samples."""
    loss = crop_loss(table)
    median = float(np.median(loss))
    marks = [(median, f"median {100 * median:.1f} %")]
    chart = histogram(loss, "share of the source image cut away", marks, percent=True)
    return {"chart": chart, "median": median, "quarter": int((loss > 0.25).sum()), "worst": float(loss.max())}


# --- pictures ---------------------------------------------------------------------------------------------------------


def first(dataset: Dataset, thumbnails: SampleThumbnails) -> list[View]:
    """Return the first samples of all buckets together."""
    rows = Rows.of(dataset.table.slice(0, FIRST))
    pictures = equal_area_pictures(rows, thumbnails)
    return [one | {"holdout": row["split"] == "holdout"} for row, one in zip(rows, pictures)]


def buckets(dataset: Dataset, thumbnails: SampleThumbnails) -> list[View]:
    """Return every bucket, the fullest first: counts, crop loss, enlargement and a contact sheet."""
    table, views = dataset.table, []
    names, sides = table["bucket"].to_numpy(zero_copy_only=False), table["split"].to_numpy(zero_copy_only=False)
    loss, shards = crop_loss(table), numbers(table, "shard")
    cropped = numbers(table, "crop_right") - numbers(table, "crop_left")  # pixels of the source across the bucket
    for name in sorted(set(names), key=lambda name: (-(names == name).sum(), name)):
        here, bucket = np.flatnonzero(names == name), Bucket.parse(name)
        shown = rows_at(table, here[:SHEET])
        views.append(
            {
                "name": name,
                "width": bucket.width,
                "height": bucket.height,
                "samples": len(here),
                "share": len(here) / len(table),
                "holdout": int((sides[here] == "holdout").sum()),
                "shards": len(set(shards[here])),
                "loss": {"median": float(np.median(loss[here])), "worst": float(loss[here].max())},
                "enlarged": int((cropped[here] < bucket.width * (1 - 1e-9)).sum()),
                "pictures": [
                    {"data": data, "source": row["source"], "holdout": row["split"] == "holdout"}
                    for row, data in zip(shown, thumbnails.make(shown))
                ],
            }
        )
    most = max((view["samples"] for view in views), default=1)
    return [view | {"bar": view["samples"] / most} for view in views]


def sharpness(dataset: Dataset, thumbnails: SampleThumbnails) -> View | None:
    """Return how sharp the crops are, and the least sharp of them; None for an index without that column."""
    table = dataset.table
    if "sharpness" not in table.column_names:
        return None
    values = numbers(table, "sharpness")
    median = float(np.median(values))
    least = np.argsort(values, kind="stable")[:BLURRED]
    pictures = equal_area_pictures(rows_at(table, least), thumbnails)
    return {
        "chart": histogram(values, "sharpness (variance of the Laplacian)", [(median, f"median {median:,.0f}")]),
        "least": [one | {"value": f"{values[place]:,.4g}"} for one, place in zip(pictures, least)],
    }


def equal_area_pictures(rows: Sequence[Row], thumbnails: SampleThumbnails, side: int = SMALL) -> list[View]:
    """Return the pictures of some rows, each with the stretch that makes all of them equal in area."""
    views = []
    for row, data in zip(rows, thumbnails.make(rows, side)):
        bucket = Bucket.parse(row["bucket"])
        stretch = f"{(bucket.width / bucket.height) ** 0.5:.3f}"
        views.append({"data": data, "source": row["source"], "stretch": stretch})
    return views


def duplicates(dataset: Dataset, thumbnails: SampleThumbnails, rejects: pa.Table | None) -> View:
    """Return groups of near duplicates, the largest first, and how many sources were exact copies of another."""
    table = dataset.table
    counted = table.group_by("duplicate_group").aggregate([("key", "count"), ("split", "count_distinct")])
    counted = counted.filter(pc.greater(counted["key_count"], 1))
    counted = counted.sort_by([("key_count", "descending"), ("duplicate_group", "ascending")])
    sizes = numbers(counted, "key_count")
    groups = []
    for name, size in zip(counted["duplicate_group"].to_pylist()[:GROUPS], sizes):
        members = first_rows(table, "duplicate_group", name, GROUP_IMAGES)
        groups.append(
            {
                "name": name,
                "size": int(size),
                "split": members[0]["split"],
                "pictures": equal_area_pictures(members, thumbnails),
            }
        )
    exact = 0 if rejects is None else pc.sum(pc.equal(rejects["reason"], DUPLICATE)).as_py() or 0
    return {
        "groups": groups,
        "total": len(sizes),
        "samples": int(sizes.sum()),
        "split": int((numbers(counted, "split_count_distinct") > 1).sum()),
        "exact": exact,
    }


def refused(rejects: pa.Table | None, pictures: RejectThumbnails) -> list[View]:
    """Return the refused sources by stage and reason, the most frequent first, with examples."""
    if rejects is None or not len(rejects):
        return []
    counted = rejects.group_by(["stage", "reason"]).aggregate([("source", "count")])
    order = [("source_count", "descending"), ("stage", "ascending"), ("reason", "ascending")]
    views = []
    for row in counted.sort_by(order).to_pylist():
        same = pc.and_(pc.equal(rejects["stage"], row["stage"]), pc.equal(rejects["reason"], row["reason"]))
        examples = rejects.filter(same).slice(0, REJECT_IMAGES).to_pylist()
        data = pictures.make(examples)
        shown = [one | {"data": data} for one, data in zip(examples, data)]
        views.append(row | {"count": row["source_count"], "examples": shown, "pictures": any(data)})
    return views


# --- text -------------------------------------------------------------------------------------------------------------


def captions(dataset: Dataset, thumbnails: SampleThumbnails) -> View | None:
    """Return lengths, cut captions, repeated ones, and a few to read; None without the text layer."""
    if "text" not in dataset.layers:
        return None
    table = dataset.table
    texts = table["caption"]
    words = pc.count_substring_regex(texts, r"\S+").to_numpy()
    order = np.argsort(words, kind="stable")
    shown = Rows.of(table.slice(0, CAPTIONS))
    view: View = {
        "samples": len(table),
        "distinct": len(pc.unique(texts)),
        "median": int(np.median(words)),
        "least": int(words.min()),
        "most": int(words.max()),
        "words": histogram(words, "words of a caption", [(float(np.median(words)), f"median {np.median(words):,.0f}")]),
        "shown": _with_pictures(shown, thumbnails, CAPTION_LIMIT, words),
        "shortest": _with_pictures(
            rows_at(table, order[:EXTREMES]), thumbnails, EXTREME_LIMIT, words[order[:EXTREMES]]
        ),
        "longest": _with_pictures(
            rows_at(table, order[::-1][:EXTREMES]), thumbnails, EXTREME_LIMIT, words[order[::-1][:EXTREMES]]
        ),
        "repeated": repeated_captions(table, thumbnails),
        "tokens": None,
        "short": None,
    }
    if "caption_short" in table.column_names:
        short = pc.count_substring_regex(table["caption_short"], r"\S+").to_numpy()
        view["short"] = {
            "median": int(np.median(short)),
            "most": int(short.max()),
            "same": pc.sum(pc.equal(table["caption_short"], texts)).as_py(),
        }
    if "t5" in dataset.layers:
        tokens, cut = numbers(table, "t5_tokens"), table["t5_truncated"].to_numpy(zero_copy_only=False).astype(bool)
        limit = dataset.info["layers"]["t5"].get("max_tokens")
        marks = [(float(np.median(tokens)), f"median {np.median(tokens):,.0f}")]
        places = np.flatnonzero(cut)[:EXTREMES]
        view |= {
            "tokens": histogram(tokens, "T5 tokens", marks + ([(limit, f"at most {limit}")] if limit else [])),
            "median_tokens": int(np.median(tokens)),
            "limit": limit,
            "truncated": int(cut.sum()),
            "cut": _with_pictures(rows_at(table, places), thumbnails, EXTREME_LIMIT, words[places]),
        }
    return view


def _with_pictures(rows: Sequence[Row], thumbnails: SampleThumbnails, limit: int, words: Sequence[int]) -> list[View]:
    return [
        {"source": row["source"], "caption": shorten(row["caption"], limit), "data": data, "words": int(count)}
        | {"short": shorten(row["caption_short"], limit) if "caption_short" in row else None}
        for row, data, count in zip(rows, thumbnails.make(rows), words)
    ]


def repeated_captions(table: pa.Table, thumbnails: SampleThumbnails) -> View:
    """Return how many texts several images share, and the most frequent ones with their images."""
    counted = table.group_by("caption").aggregate([("key", "count")])
    counted = counted.filter(pc.greater(counted["key_count"], 1))
    counted = counted.sort_by([("key_count", "descending"), ("caption", "ascending")])
    listed = []
    for row in counted.slice(0, TEXTS).to_pylist():
        same = first_rows(table, "caption", row["caption"], TEXT_IMAGES)
        text = shorten(row["caption"], EXTREME_LIMIT)
        listed.append({"caption": text, "count": row["key_count"], "pictures": equal_area_pictures(same, thumbnails)})
    return {"listed": listed, "total": len(counted), "samples": int(numbers(counted, "key_count").sum())}


# --- poses ------------------------------------------------------------------------------------------------------------


def poses(dataset: Dataset, thumbnails: SampleThumbnails) -> View | None:
    """Return how many people, how sure the joints are, and skeletons over pictures; None without the pose layer."""
    if "pose" not in dataset.layers:
        return None
    table = dataset.table
    persons = numbers(table, "persons")
    kinds = {
        "no people": np.flatnonzero(persons == 0),
        "one person": np.flatnonzero(persons == 1),
        "several people": np.flatnonzero(persons > 1),
    }
    overlays = []
    for kind, limit in OVERLAYS.items():
        shown = rows_at(table, kinds[kind][:limit])
        drawn = in_parallel(lambda row: _skeleton(dataset, row), shown)
        pictures = [one | drawing for one, drawing in zip(equal_area_pictures(shown, thumbnails, LARGE), drawn)]
        overlays.append({"kind": kind, "pictures": pictures, "total": len(kinds[kind])})
    judged = rows_at(table, np.flatnonzero(persons > 0)[:JUDGED_POSES])
    confidence = np.array([joints[:, 2] for joints in in_parallel(dataset.pose, judged)])
    return {
        "kinds": [
            {"name": name, "count": len(places), "share": len(places) / len(table)} for name, places in kinds.items()
        ],
        "most": int(persons.max()),
        "overlays": [one for one in overlays if one["pictures"]],
        "judged": len(judged),
        "found_people": int((persons > 0).sum()),
        "joints": joint_summary(confidence) if len(judged) else [],
        "found": FOUND,
        "sure": SURE,
    }


def _skeleton(dataset: Dataset, row: View) -> View:
    bucket = Bucket.parse(row["bucket"])
    joints = dataset.pose(row).astype(np.float64)
    size = np.array([bucket.width, bucket.height])
    pixels = np.concatenate([(joints[:, :2] + 1) / 2 * size, joints[:, 2:]], axis=1)
    people = json.loads(dataset.read(row, "pose/json"))
    body = joints[:BODY_JOINTS, 2]
    return {
        "drawing": skeleton(pixels, people["boxes"], bucket.width, bucket.height),
        "persons": row["persons"],
        "found": int((body >= FOUND).sum()),
        "mean": float(body.mean()),
        "width": bucket.width,
        "height": bucket.height,
    }


def joint_summary(confidence: np.ndarray) -> list[View]:
    """Return for each group of joints the share that was found and the median confidence, from (samples, 133)."""
    return [
        {
            "name": name,
            "found": float((confidence[:, joints] >= FOUND).mean()),
            "median": float(np.median(confidence[:, joints])),
        }
        for name, joints in JOINT_GROUPS.items()
    ]
