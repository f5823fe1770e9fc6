"""A published dataset whose index or members say what they must not: named, before anything is allocated."""

from __future__ import annotations

import io
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from nanodit.errors import DataError
from nanodit.files import sha256_file
from prep.dataset.reader import Dataset
from tests.train.tiny import write_dataset


@pytest.fixture
def dataset(tmp_path) -> Path:
    return write_dataset(tmp_path / "dataset")


def change(dataset: Path, name: str, value: object) -> None:
    """Let the first row of the index say something else, and dataset.json name that index."""
    file, info = dataset / "index.parquet", json.loads((dataset / "dataset.json").read_text())
    table = pq.read_table(file)
    values = table[name].to_pylist()
    values[0] = value
    place = table.column_names.index(name)
    kind = pa.int64() if isinstance(value, int) else table.schema.field(name).type
    pq.write_table(table.set_column(place, name, pa.array(values, kind)), file)
    info["hashes"]["index.parquet"] = sha256_file(file)
    (dataset / "dataset.json").write_text(json.dumps(info))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("key", None, "1 rows have no key"),
        ("bucket", None, "1 rows have no bucket"),
        ("shard", None, "1 rows have no shard"),
        ("shard", -1, "shard is -1"),
        ("shard", 1 << 40, "shard is 1,099,511,627,776, and no more than"),
        ("split", None, "1 rows have no split"),
        ("split", "test", "names a split test"),
        ("t5/t5.npy/offset", None, "1 rows have no t5/t5.npy/offset"),
        ("t5/t5.npy/offset", -512, "t5/t5.npy/offset is -512"),
        ("t5/t5.npy/length", 1 << 40, "t5/t5.npy/length is 1,099,511,627,776, and no more than"),
        ("dino/cls.npy/length", 10**9, "dino/cls.npy/length is 1,000,000,000, and no more than"),
        ("dino/cls.npy/sha256", None, "1 rows have no dino/cls.npy/sha256"),
    ],
)
def test_an_index_that_cannot_be_is_refused(dataset, name, value, said):
    change(dataset, name, value)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=said) as caught:
            Dataset(dataset)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()
    assert "index.parquet" in str(caught.value)


@pytest.mark.parametrize("value", [None, 3, 1 << 40])
def test_a_grid_that_the_features_do_not_have_is_refused(dataset, value):
    change(dataset, "dino_h", value)
    opened = Dataset(dataset)
    with pytest.raises(DataError, match=r"member dino/dino.npy: "):
        opened.patches(opened.rows()[0])


def test_pixels_of_another_size_are_refused_before_they_are_decoded(dataset, monkeypatch):
    opened = Dataset(dataset)
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((4000, 4000, 3), np.uint8)).save(buffer, "WEBP", lossless=True, method=0)
    monkeypatch.setattr(Dataset, "read", lambda self, row, member: buffer.getvalue())
    monkeypatch.setattr(np, "asarray", lambda image: pytest.fail("was decoded"))
    with pytest.raises(DataError, match=r"member px/webp: its pixels are 4000x4000 and not \d+x\d+"):
        opened.pixels(opened.rows()[0])
