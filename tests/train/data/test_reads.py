"""How often training asks the dataset's place for bytes: once for each layer of a sample, whatever it is made of."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from nanodit.errors import DataError
from nanodit.storage import open_storage
from prep.dataset.layout import Unit
from prep.dataset.reader import Dataset
from prep.export import flat_members
from tests.prep.object_store import s3_server
from train.data.samples import TrainingSet, load_conditions

LAYERS = ("px", "t5", "dino", "pose")


@pytest.fixture(scope="module")
def url(tiny_dataset):
    """The tiny dataset in an object store."""
    with s3_server("reads"):
        storage = open_storage("s3://reads/tiny")
        for path in (path for path in Path(tiny_dataset).rglob("*") if path.is_file()):
            storage.write(path.relative_to(tiny_dataset).as_posix(), path.read_bytes())
        yield storage.place


@pytest.fixture(params=["folder", "s3"])
def dataset(request, tiny_dataset) -> Dataset:
    return Dataset(tiny_dataset if request.param == "folder" else request.getfixturevalue("url"))


def count_reads(dataset: Dataset, monkeypatch) -> list[tuple[str, int]]:
    """The list that every ranged read of the dataset's place is added to from now on: file and bytes."""
    reads, kind = [], type(dataset.storage)
    ranged = kind.read_range

    def counted(storage, name: str, offset: int, length: int) -> bytes:
        reads.append((name, length))
        return ranged(storage, name, offset, length)

    monkeypatch.setattr(kind, "read_range", counted)
    return reads


def rows_of(dataset: Dataset) -> list[dict]:
    return [row for row in dataset.rows("train") if row["bucket"] == "64x64" and dataset.flippable(row)][:3]


@pytest.mark.parametrize("flipped", [False, True])
def test_a_sample_is_one_read_for_each_layer(dataset, monkeypatch, flipped):
    rows = rows_of(dataset)
    expected = [
        (dataset.t5(row, flipped), dataset.cls(row, flipped), dataset.patches(row, flipped), dataset.pose(row))
        for row in rows
    ]
    reads = count_reads(dataset, monkeypatch)
    training = TrainingSet(dataset, cache_gb=1)
    _, conditions = training.load(rows, flips=[flipped] * len(rows))
    assert Counter(name for name, _ in reads) == Counter(
        Unit(row["bucket"], row["shard"], layer).tar for row in rows for layer in LAYERS
    )
    for index, (text, cls, patches, pose) in enumerate(expected):
        np.testing.assert_array_equal(conditions.text[index, : len(text)], text)
        np.testing.assert_array_equal(conditions.cls[index], cls)
        np.testing.assert_array_equal(conditions.patches[index], patches)
        if not flipped:
            np.testing.assert_array_equal(conditions.pose[index], pose)
    training.load(rows, flips=[flipped] * len(rows))
    assert len(reads) == 4 * len(rows), "the second time memory answers"


def test_who_reads_one_member_reads_that_alone(dataset, monkeypatch):
    row = rows_of(dataset)[0]
    reads = count_reads(dataset, monkeypatch)
    dataset.cls(row)
    assert [length for _, length in reads] == [row["dino/cls.npy/length"]]
    reads.clear()
    dataset.patches(row)
    assert len(reads) == 1
    reads.clear()
    flat_members(dataset, row)
    assert len(reads) == 4


@pytest.fixture
def copied(tiny_dataset, tmp_path) -> Path:
    shutil.copytree(tiny_dataset, tmp_path / "dataset")
    return tmp_path / "dataset"


def test_members_that_lie_elsewhere_are_read_there(copied, monkeypatch):
    """An index may point to anywhere in a tar."""
    dataset = Dataset(copied)
    row = rows_of(dataset)[0]
    expected = dataset.cls(row), dataset.patches(row)
    tar = copied / Unit(row["bucket"], row["shard"], "dino").tar
    for moved, count in (("dino_scale.npy", 2), ("dino.npy", 3)):
        other = row | {f"dino/{moved}/offset": tar.stat().st_size}
        with tar.open("ab") as file:
            file.write(dataset.read(row, f"dino/{moved}"))
        with monkeypatch.context() as patch:
            reads = count_reads(dataset, patch)
            together = dataset.together()
            np.testing.assert_array_equal(together.cls(other), expected[0])
            np.testing.assert_array_equal(together.patches(other), expected[1])
            assert len(reads) == count


@pytest.mark.parametrize("damage", ["bytes", "end"])
def test_a_damaged_member_is_named_and_its_neighbours_are_not(copied, damage):
    dataset = Dataset(copied)
    row = max(
        (row for row in dataset.rows() if row["bucket"] == "64x64"),
        key=lambda row: (row["shard"], row["dino/cls.npy/offset"]),
    )
    tar = copied / Unit(row["bucket"], row["shard"], "dino").tar
    data = bytearray(tar.read_bytes())
    place = row["dino/dino_scale.npy/offset"] + 130
    data[place] ^= 1
    tar.write_bytes(data if damage == "bytes" else data[:place])
    said = "bytes are not those that were committed" if damage == "bytes" else "the file ends early"
    together = dataset.together()
    together.cls(row)
    together.array(row, "dino/dino.npy")
    with pytest.raises(DataError, match=rf"{tar.name}, sample {row['key']}, member dino_scale.npy: .*{said}"):
        together.array(row, "dino/dino_scale.npy")
    with pytest.raises(DataError, match=rf"member dino_scale.npy: .*{said}"):
        load_conditions(dataset, [row])
