"""Rows of an index without values of their own: as plain dicts have it, in a fraction of the memory."""

import gc
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evaluate.subject import select_holdout
from nanodit.errors import DataError
from prep.dataset import rows as module
from prep.dataset.reader import TEXTS, Dataset
from prep.dataset.rows import Rows, by_key
from tests.benchmarks.growth import write_index
from train.data.order import Order
from train.data.samples import TrainingSet

PLAIN = {
    "number": [3, 1, 2, 5, 4, 9, 7],
    "some": [None, 1, 2, None, 4, 5, 6],
    "small": [0.1, float("inf"), -2.5, 3.0, 4.0, 5.0, 1e30],
    "text": ["b", "", "Grün", "a", "b", "漢字", "c"],
    "perhaps": [None, "", "x", None, "y", None, "z"],
    "yes": [True, False, True, True, False, False, True],
    "none": [None] * 7,
    "a/fingerprint": ["f0", "f1", "f0", "f0", "f2", "f1", "f1"],
    "a/b.npy/sha256": [f"{i:x}" * 64 for i in range(9, 16)],
    "loud/sha256": ["AB" * 32] * 7,  # not as the format has them
    "short/sha256": ["ab"] * 7,
    "other/sha256": ["zz" * 32] * 7,
    "lost/sha256": [*["ab" * 32] * 6, None],
}


def published(root: Path, count: int = 40) -> list[dict]:
    """Write an index and return its rows as plain dicts."""
    write_index(root, count)
    return pq.read_table(root / "index.parquet").to_pylist()


@pytest.mark.parametrize("batch", [1, 2, 3, 100])
@pytest.mark.parametrize("group", [2, 5, 100])
def test_rows_are_what_parquet_has(tmp_path, monkeypatch, batch, group):
    table = pa.table({**PLAIN, "small": pa.array(PLAIN["small"], pa.float32())})
    pq.write_table(table, tmp_path / "table.parquet", row_group_size=group)
    monkeypatch.setattr(module, "BATCH", batch)
    with open(tmp_path / "table.parquet", "rb") as file:
        columns = module.read_columns(file, table.column_names)
    assert columns["a/b.npy/sha256"].type == pa.binary(32)
    rows, plain = Rows(module.Columns(table.column_names, columns)), table.to_pylist()
    assert rows == plain
    assert [{name: type(value) for name, value in row.items()} for row in rows] == [
        {name: type(value) for name, value in row.items()} for row in plain
    ]


def test_a_row_is_a_mapping_that_holds_nothing(tmp_path):
    plain = published(tmp_path)
    dataset = Dataset(tmp_path)
    rows = dataset.rows()
    assert (len(dataset), len(rows)) == (40, 40)
    assert rows == plain
    assert rows != plain[:-1]
    assert rows != [*plain[:-1], {**plain[-1], "caption": "another"}]
    assert rows[-1] == plain[-1]
    with pytest.raises(IndexError):
        rows[40]
    row = rows[3]
    assert "bucket" in row
    assert "mood" not in row
    assert row.get("mood", 7) == 7
    with pytest.raises(KeyError):
        row["mood"]
    assert row | {"split": "none"} == plain[3] | {"split": "none"}
    assert list(row) == list(plain[3])
    for split in ("train", "holdout"):
        assert dataset.rows(split) == [row for row in plain if row["split"] == split]
    with pytest.raises(ValueError, match="expected 'train'"):
        dataset.rows("validation")


def test_rows_are_chosen_and_sorted_as_plain_ones(tmp_path):
    plain = published(tmp_path, 200)
    rows = Dataset(tmp_path).rows()
    assert rows[5:90:7] == plain[5:90:7]
    assert rows[::-1][:3] == plain[::-1][:3]
    assert rows.take(np.array([4, 4, 1])) == [plain[4], plain[4], plain[1]]
    own = rows[::3]
    assert own.column("key").to_pylist() == [row["key"] for row in plain[::3]]
    buckets = own.by("bucket")
    assert list(buckets) == list(dict.fromkeys(row["bucket"] for row in plain[::3])), "as they come first"
    for bucket, members in buckets.items():
        assert members == [row for row in plain[::3] if row["bucket"] == bucket]
    order = lambda row: (row["bucket"], row["phash"])  # noqa: E731
    assert own.sorted_by("bucket", "phash") == sorted(plain[::3], key=order)
    assert own.sorted_by("bucket", "phash").column("key").to_pylist() == [
        row["key"] for row in sorted(plain[::3], key=order)
    ]
    found = by_key(plain[::-1])
    assert dict(found) == {row["key"]: row for row in plain}
    assert "0" * 32 not in found
    assert "z" not in found
    assert rows[::-1].column("key").to_pylist() == [row["key"] for row in plain[::-1]]
    uneven = [["a"], ["b", "c"], ["d"]]
    assert Rows.of(pa.table({"text": pa.chunked_array(uneven)})) == [{"text": text} for text in "abcd"]
    for texts in (["ab", "cd"], ["a\0", "\0b"], ["ü", "ab"], ["", ""], ["ab", "c"]):
        assert Rows.of([{"text": text} for text in texts]) == [{"text": text} for text in texts]
    table = Dataset(tmp_path).table
    assert Rows.of(table.slice(3, 9)) == Rows.of(table.take(pa.array(range(3, 12)))) == plain[3:12]
    assert Rows.of(pa.concat_tables([table.slice(8, 2), table.slice(1, 3)])) == plain[8:10] + plain[1:4]
    assert len(Rows.of([])) == 0
    assert Rows.of([]).by("bucket") == {}


def test_captions_take_no_memory_before_somebody_asks_and_are_of_the_version_that_was_opened(tmp_path):
    plain, index = published(tmp_path), tmp_path / "index.parquet"
    dataset, late = Dataset(tmp_path), Dataset(tmp_path)
    assert [row["bucket"] for row in dataset.rows()] == [row["bucket"] for row in plain]
    assert TEXTS.isdisjoint(dataset._columns._loaded)
    kept = tmp_path / "kept" / f"{dataset.info['hashes']['index.parquet']}.parquet"
    kept.parent.mkdir()
    index.rename(kept)
    pq.write_table(pa.table({"caption": ["Another."] * 40}), index)
    assert dataset.rows()[7]["caption"] == plain[7]["caption"]
    assert dataset.table["caption"].to_pylist() == [row["caption"] for row in plain]
    kept.unlink()
    with pytest.raises(DataError, match=r"index\.parquet is not the file that dataset\.json names"):
        late.rows()[7]["caption"]


@pytest.mark.slow
def test_an_index_of_200_000_rows_takes_no_object_per_row(tmp_path):
    count = 200_000
    write_index(tmp_path, count)
    gc.collect()
    arrow, objects = pa.total_allocated_bytes(), len(gc.get_objects())
    tracemalloc.start()
    dataset = Dataset(tmp_path)
    data = TrainingSet(dataset, 0.0)
    chosen = select_holdout(dataset, 64)
    slot = data.select(Order(data.sizes, 32, 0)[5])
    gc.collect()
    python, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (len(chosen), len(slot), sum(data.sizes.values()) > 0.9 * count) == (64, 32, True)
    assert len(gc.get_objects()) - objects < 20_000
    assert pa.total_allocated_bytes() - arrow + python < 800 * count, "an eighth of what dicts take"
    assert most < 600 * count


@pytest.mark.parametrize("sizes", [[3], [2, 1], [1, 2], [0, 3], [2, 0], [2, 2, 1], [1, 1, 3], [0, 0]])
def test_chunks_of_any_lengths_are_read_at_their_places(sizes):
    names = [f"{number:032x}" for number in range(sum(sizes))]
    chunks, start = [], 0
    for size in sizes:
        chunks.append(pa.array(names[start : start + size], pa.string()))
        start += size
    table = pa.table(
        {
            "key": pa.chunked_array(chunks, pa.string()),
            "n": pa.chunked_array([range(size) for size in sizes], pa.int64()),
        }
    )
    assert [dict(row) for row in Rows.of(table)] == table.to_pylist()
