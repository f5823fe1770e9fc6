"""A finished batch is computed once, unless anything that it depends on is another."""

import pyarrow as pa
import pytest

from evaluate.drawing.finished import FinishedBatches

TABLE = pa.table({"key": ["a", "b"], "psnr": [1.5, None]})


class Work:
    """Counts how often it is done."""

    def __init__(self):
        self.done = 0

    def __call__(self) -> pa.Table:
        self.done += 1
        return TABLE


def test_a_finished_part_is_read_back(tmp_path):
    work = Work()
    first = FinishedBatches(tmp_path, {"weights": 1}).get("x", ["a", "b"], work)
    again = FinishedBatches(tmp_path, {"weights": 1}).get("x", ["a", "b"], work)
    assert work.done == 1
    assert first.to_pylist() == again.to_pylist() == TABLE.to_pylist()


@pytest.mark.parametrize(
    ("identity", "name", "content"),
    [({"weights": 2}, "x", ["a"]), ({"weights": 1}, "y", ["a"]), ({"weights": 1}, "x", ["b"])],
)
def test_another_evaluation_or_batch_is_computed_again(tmp_path, identity, name, content):
    work = Work()
    FinishedBatches(tmp_path, {"weights": 1}).get("x", ["a"], work)
    FinishedBatches(tmp_path, identity).get(name, content, work)
    assert work.done == 2


@pytest.mark.parametrize("damage", [b"", b"PAR1", b"PAR1" + bytes(40) + b"PAR1"])
def test_a_damaged_part_is_computed_again(tmp_path, damage):
    work, parts = Work(), FinishedBatches(tmp_path, {"weights": 1})
    parts.get("x", [], work)
    (tmp_path / "x.parquet").write_bytes(damage)
    assert parts.get("x", [], work).to_pylist() == TABLE.to_pylist()
    assert work.done == 2


def test_without_a_folder_nothing_is_kept(tmp_path):
    work, parts = Work(), FinishedBatches(None)
    parts.get("x", [], work)
    parts.get("x", [], work)
    assert work.done == 2
    assert list(tmp_path.iterdir()) == []
