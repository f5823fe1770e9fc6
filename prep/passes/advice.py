"""What a user should know about a dataset that is formally right."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prep.dataset.buckets import cut_away
from prep.dataset.holdout import COLUMN as HOLDOUT_PART
from prep.images.duplicates import HOLDOUT_CAP
from prep.images.filters import CROPPED, crop_remarks

CROP_COLUMNS = ("crop_left", "crop_top", "crop_right", "crop_bottom")
FEW = 1000  # training samples that a network learns by heart
# whoever deletes it deletes the version, of which nothing else says what its split was
ANEW = (
    "To split anew, delete index.parquet and run nanodit prep run; what was trained on this version can then neither "
    "go on nor be evaluated"
)
NAMED = 5  # samples that a command names
LARGE_GROUP = 0.01  # a group of near duplicates above this share of the set is worth a warning


RUN, MEND = "nanodit prep run --config CONFIG.yaml", "nanodit prep captions DATASET --list"


@dataclass(frozen=True)
class Advice:
    """What a user should know or decide, and the command that carries the decision out.

    In the command CONFIG.yaml, DATASET and other words in capitals stand for what the reader has.
    """

    words: str
    command: str


def count_values(column: pa.ChunkedArray) -> Counter[str]:
    """Count each value of a column."""
    return Counter({item["values"]: item["counts"] for item in pc.value_counts(column).to_pylist()})


def warn(table: pa.Table, buckets: Mapping[str, Any]) -> list[str]:
    """Return what a user should know about a dataset that is formally right."""
    return [one.words for one in advise(table, buckets)]


def advise(table: pa.Table, buckets: Mapping[str, Any]) -> list[Advice]:
    """Return what :func:`warn` says, each with a command."""
    found: list[Advice] = []

    def say(words: str, command: str) -> None:
        found.append(Advice(words, command))

    splits = count_values(table["split"])
    if 0 < splits["train"] < FEW:
        say(
            f"{splits['train']} training images are few: a network that begins with nothing learns them by heart, a "
            "few thousand are needed. `train run --init-from CHECKPOINT` begins with one that has learnt from others",
            "nanodit train run --config CONFIG.yaml dataset=DATASET --init-from CHECKPOINT",
        )
    if not splits["holdout"]:
        few = (
            f"{len(table)} samples are too few for a holdout, or too alike (duplicates.altered_cosine): what shows the "
            "same stays on one side"
        )
        if "split_group" in table.column_names:
            sizes = pc.value_counts(table["split_group"]).field("counts")
            few = f"{len(table)} samples in {len(sizes)} groups by split.group_by: none is small enough for a holdout"
        say(f"{few}. Nothing can be validated with this dataset", f"{RUN} source=FOLDER_WITH_MORE")
    parts = count_values(table[HOLDOUT_PART].drop_null()) if HOLDOUT_PART in table.column_names else Counter()
    if len(parts) == 1:
        (there,), held = parts, splits["holdout"]
        what = "a single image" if held == 1 else f"{held} images that show the same"
        lacking = "what is reported" if there == "dev" else "validation and sweeps"
        # what is published stays where it is, and of a small set no more than a fifth is held out
        anew = 2 * held <= len(table) // HOLDOUT_CAP
        say(
            f"the holdout is {what}: all of it is {there}, and nothing is left for {lacking}. "
            + (ANEW if anew else "Of images that come to the dataset some are held out, for the other part"),
            f"rm DATASET/index.parquet && {RUN} holdout_min={2 * held}" if anew else f"{RUN} source=FOLDER_WITH_MORE",
        )
    alone = [name for name, bucket in buckets.items() if bucket["samples"] == 1]
    if alone:
        rows = table.filter(pc.is_in(table["bucket"], pa.array(alone, pa.string()))).slice(0, NAMED)
        say(
            f"buckets with a single sample: {', '.join(alone)}. A micro-batch comes from one bucket, so such an image "
            "fills one alone; crop it to another shape, or add images of its own",
            shlex.join(["nanodit", "prep", "exclude", "DATASET", *rows["key"].to_pylist()]),
        )
    groups = pc.value_counts(table["duplicate_group"])  # in the order of the table
    if torn := len(table.group_by(["duplicate_group", "split"]).aggregate([])) - len(groups):
        say(
            f"{torn} groups of near duplicates lie on both sides of the split: they were published before the present "
            f"rules found them, and published samples stay where they are. {ANEW}",
            f"rm DATASET/index.parquet && {RUN}",
        )
    if "altered_twin" in table.column_names and (held := len(table) - table["altered_twin"].null_count):
        say(
            f"{held} holdout images are mirrored, brighter or cropped in train too: they were published before the "
            f"present rules found that, and stay where they are; an evaluation leaves them out. {ANEW}",
            f"rm DATASET/index.parquet && {RUN}",
        )
    sizes = groups.field("counts").to_numpy()
    name, size, alike = groups.field("values")[int(np.argmax(sizes))].as_py(), int(sizes.max()), sizes[sizes > 1]
    if size > max(1, LARGE_GROUP * len(table)):
        others = f", the largest of {len(alike)} groups with {alike.sum()} samples" if len(alike) > 1 else ""
        words = f"{size} of {len(table)} samples are near duplicates of each other (group {name}{others})"
        say(words, "nanodit prep exclude DATASET SAMPLE...")
    if CROP_COLUMNS[0] in table.column_names:
        lost = cut_away(*(table[name].to_numpy() for name in ("width", "height", *CROP_COLUMNS)))
        rows = np.flatnonzero(lost > CROPPED)
        for words in crop_remarks(zip(lost[rows].tolist(), table["source"].take(rows).to_pylist())):
            say(words, f"{RUN} filters.max_aspect=2.5")
    if "t5_truncated" in table.column_names and (cut := pc.sum(table["t5_truncated"]).as_py()):
        say(f"{cut} captions were longer than t5.max_tokens and were cut", f"{MEND} --flagged")
    if "caption_flip" in table.column_names and (unsure := table["caption_flip"].null_count):
        words = f"{unsure} of {len(table)} captions cannot be flipped safely: training never mirrors their images"
        say(words, MEND)
    return found
