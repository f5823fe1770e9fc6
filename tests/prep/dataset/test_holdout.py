"""The two parts of the holdout: whole groups, halves, and what was published stays."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from nanodit.errors import DataError
from prep.dataset.holdout import COLUMN, assign_parts
from prep.dataset.reader import Dataset
from prep.verify.verify import verify
from tests.prep.passes.test_plan import config, write_images
from tests.prep.prepared import prepare
from tests.prep.verify.test_verify import publish_again


def groups_of(sizes: list[int]) -> dict[str, str]:
    return {f"{group:03d}-{member}": f"{group:03d}" for group, size in enumerate(sizes) for member in range(size)}


@pytest.mark.parametrize("sizes", [[1] * 128, [1] * 7, [3] * 21 + [1] * 40, [8, 1, 1, 1, 1, 1, 1, 1, 1]])
def test_each_part_gets_half_and_no_group_is_in_both(sizes):
    groups = groups_of(sizes)
    parts = assign_parts(groups)
    assert parts.keys() == groups.keys()
    for group in set(groups.values()):
        assert len({parts[key] for key in groups if groups[key] == group}) == 1
    counts = Counter(parts.values())
    assert abs(counts["test"] - counts["dev"]) <= max(sizes)
    if max(sizes) == 1:
        assert 0 <= counts["test"] - counts["dev"] <= 1


def test_the_parts_are_a_draw_of_the_keys_and_not_of_their_order():
    groups = groups_of([1] * 200)
    parts = assign_parts(groups)
    assert parts == assign_parts(dict(reversed(groups.items())))
    first = Counter(part for key, part in sorted(parts.items())[:100])
    assert 30 <= first["test"] <= 70


def test_published_samples_keep_their_part_and_new_ones_follow_their_group():
    published = {"a": "test", "b": "dev", "c": "test", "gone": "dev"}
    groups = {"a": "A", "a2": "A", "b": "B", "b2": "B", "c": "B", "d": "D"}
    parts = assign_parts(groups, published)
    assert parts == {"a": "test", "a2": "test", "b": "dev", "b2": "dev", "c": "test", "d": parts["d"]}
    assert assign_parts({"a": "A", "new": "N"}, {"a": "test"})["new"] == "dev"  # which has fewer


def test_what_evaluations_leave_out_is_no_part_of_the_half():
    groups = groups_of([1] * 60)
    unread = sorted(groups)[:20]
    parts = assign_parts(groups, {}, unread)
    assert Counter(part for key, part in parts.items() if key not in unread) == {"test": 20, "dev": 20}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    settings = config(tmp_path, shard_size=64, holdout=0.2)
    write_images(tmp_path / "source", 30)
    prepare(settings)
    return tmp_path


def parts_of(folder: Path) -> dict[str, str]:
    dataset = Dataset(folder / "out")
    return {row["key"]: part for part in ("test", "dev") for row in dataset.rows(part)}


def without_column(folder: Path) -> None:
    """Make the dataset one of before there were parts."""
    index = pq.read_table(folder / "out" / "index.parquet")
    publish_again(folder / "out", "index.parquet", index.drop_columns([COLUMN]))


def test_the_index_names_the_part_of_every_holdout_sample(folder):
    dataset, parts = Dataset(folder / "out"), parts_of(folder)
    assert {row["key"]: row[COLUMN] for row in dataset.rows()} == dict.fromkeys(
        (row["key"] for row in dataset.rows()), None
    ) | parts
    assert parts.keys() == {row["key"] for row in dataset.rows("holdout")}
    assert Counter(parts.values()) == {"test": 3, "dev": 3}
    assert {row["key"] for row in dataset.rows("dev")}.isdisjoint(row["key"] for row in dataset.rows("test"))
    assert dataset.rows("dev")[0]["split"] == "holdout"
    verify(folder / "out")


def test_of_a_version_without_the_column_the_reader_tells_and_the_next_one_writes_the_same(folder):
    named = parts_of(folder)
    without_column(folder)
    before = {path: path.read_bytes() for path in (folder / "out").rglob("*") if path.is_file()}
    derived, fingerprint = parts_of(folder), Dataset(folder / "out").fingerprint
    assert derived == named
    assert before == {path: path.read_bytes() for path in (folder / "out").rglob("*") if path.is_file()}
    write_images(folder / "source", 60)
    prepare(config(folder, shard_size=64, holdout=0.4))
    dataset = Dataset(folder / "out")
    after = {row["key"]: row[COLUMN] for row in dataset.rows("holdout")}
    assert len(after) > 2 * len(derived)
    assert derived.items() <= after.items()
    assert dataset.fingerprint != fingerprint
    assert Dataset(folder / "out", version=fingerprint).rows("test") is not None
    earlier = Dataset(folder / "out", version=fingerprint)
    assert {row["key"]: part for part in ("test", "dev") for row in earlier.rows(part)} == derived


@pytest.mark.parametrize("wrong", ["validation", None])
def test_a_part_that_there_is_not_is_damage(folder, wrong):
    index = pq.read_table(folder / "out" / "index.parquet")
    values = [wrong if part == "dev" else part for part in index[COLUMN].to_pylist()]
    place = index.column_names.index(COLUMN)
    publish_again(folder / "out", "index.parquet", index.set_column(place, index.field(COLUMN), [values]))
    with pytest.raises(DataError, match=r"names a part of the holdout (None|validation), and there are test and dev"):
        Dataset(folder / "out")
