"""The on-disk format: what is written can be read by anybody, and what is damaged is never read silently."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanodit.errors import DataError
from nanodit.files import sha256_bytes, sha256_file
from prep.dataset.codecs import decode_pixels, encode_pixels, load_npy, npy_bytes
from prep.dataset.layout import Part, Unit, fingerprint_of, parquet_bytes, read_members, read_part
from prep.dataset.reader import Dataset
from prep.dataset.writer import LayerWriter

UNIT = Unit("64x64", 3, "pose")
RECIPE = {"layer": "pose", "code": 1, "encoder": {"model": "none"}}
KEYS = [f"{number:032x}" for number in (5, 17, 300)]


def write(root, unit=UNIT, keys=KEYS, seed=0) -> Part:
    generator = np.random.default_rng(seed)
    with LayerWriter(root, unit, RECIPE, {"width": 3}) as writer:
        for key in keys:
            pose = generator.normal(size=(133, 3)).astype(np.float32)
            writer.add(key, {"pose.npy": npy_bytes(pose), "json": b"{}\n"}, persons=1)
        writer.reject("f" * 32, "no_reason", "only for this test")
        writer.commit()
    return read_part(root, unit)


def test_offsets_and_lengths_are_those_of_the_tar(tmp_path):
    part = write(tmp_path)
    data = (tmp_path / UNIT.tar).read_bytes()
    with tarfile.open(tmp_path / UNIT.tar) as tar:
        names = tar.getnames()
        assert names == [f"{key}.{member}" for key in KEYS for member in ("pose.npy", "json")]
        for row in part.table.to_pylist():
            for member in ("pose.npy", "json"):
                start, length = row[f"pose/{member}/offset"], row[f"pose/{member}/length"]
                assert tar.extractfile(f"{row['key']}.{member}").read() == data[start : start + length]
    assert [key for key, _ in read_members(tmp_path, part, "pose.npy")] == KEYS
    assert part.rejects[0].reason == "no_reason"
    assert (part.recipe, part.facts) == (RECIPE, {"width": 3})
    assert part.fingerprint == fingerprint_of(RECIPE)


def test_equal_content_gives_equal_bytes_whenever_and_wherever_it_is_written(tmp_path):
    for folder in ("a", "b"):
        write(tmp_path / folder)
    for path in (UNIT.tar, UNIT.part):
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()
    with tarfile.open(tmp_path / "a" / UNIT.tar) as tar:
        for info in tar:
            assert (info.mtime, info.uid, info.gid, info.uname, info.gname, info.mode) == (0, 0, 0, "", "", 0o644)
    assert pq.read_schema(tmp_path / "a" / UNIT.part).metadata.keys() == {b"nanodit"}


def test_a_unit_without_commit_leaves_nothing(tmp_path):
    with LayerWriter(tmp_path, UNIT, RECIPE, {}) as writer:
        writer.add(KEYS[0], {"pose.npy": b"1", "json": b"{}"}, persons=0)
    assert read_part(tmp_path, UNIT) is None
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_old_part_goes_before_the_new_tar_comes(tmp_path, monkeypatch):
    """A kill between the two renames must not leave a part that describes another tar."""
    write(tmp_path, seed=0)
    replace = os.replace

    def die_after_the_tar(source, target):
        replace(source, target)
        if str(target).endswith(".tar"):
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die_after_the_tar)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, seed=1)
    assert (tmp_path / UNIT.tar).is_file()
    assert read_part(tmp_path, UNIT) is None


def test_the_writer_refuses_wrong_order_members_and_columns(tmp_path):
    with LayerWriter(tmp_path, UNIT, RECIPE, {}) as writer:
        writer.add(KEYS[1], {"pose.npy": b"1", "json": b"{}"}, persons=0)
        with pytest.raises(ValueError, match="is not after"):
            writer.add(KEYS[0], {"pose.npy": b"1", "json": b"{}"}, persons=0)
        with pytest.raises(ValueError, match="expected members"):
            writer.add(KEYS[2], {"pose.npy": b"1"}, persons=0)
        with pytest.raises(ValueError, match="columns"):
            writer.add(KEYS[2], {"pose.npy": b"1", "json": b"{}"})


@pytest.mark.parametrize("damage", ["missing tar", "short tar", "damaged part", "part of another unit"])
def test_a_part_without_its_tar_is_no_commit(tmp_path, damage):
    write(tmp_path)
    tar, part = tmp_path / UNIT.tar, tmp_path / UNIT.part
    if damage == "missing tar":
        tar.unlink()
    elif damage == "short tar":
        os.truncate(tar, 512)
    elif damage == "damaged part":
        part.write_bytes(part.read_bytes()[:-9])
    else:
        write(tmp_path, Unit("64x64", 4, "pose"))
        os.replace(tmp_path / Unit("64x64", 4, "pose").part, part)
    assert read_part(tmp_path, UNIT) is None


@pytest.mark.parametrize("damage", ["flipped bit", "cut off", "removed"])
def test_trap_35_a_bad_sample_stops_the_reader_and_is_named(tmp_path, damage):
    part = write(tmp_path)
    tar = tmp_path / UNIT.tar
    if damage == "flipped bit":
        data = bytearray(tar.read_bytes())
        data[part.table["pose/pose.npy/offset"][1].as_py() + 200] ^= 1
        tar.write_bytes(data)
    elif damage == "cut off":
        os.truncate(tar, part.table["pose/pose.npy/offset"][1].as_py() + 10)
    else:
        tar.unlink()
    with pytest.raises(DataError) as error:
        list(read_members(tmp_path, part, "pose.npy"))
    assert UNIT.tar in str(error.value)  # trap 35
    assert KEYS[0 if damage == "removed" else 1] in str(error.value)
    assert "prep run" in str(error.value)


def test_a_damaged_column_is_noticed_though_others_are_asked_for(tmp_path):
    write(tmp_path, UNIT)
    whole = read_part(tmp_path, UNIT)
    part = read_part(tmp_path, UNIT, ["key"], whole.sha256)
    assert part.table.column_names == ["key"]
    assert part.table["key"].equals(whole.table["key"])
    assert (part.recipe, part.sha256, part.tar_sha256) == (whole.recipe, whole.sha256, whole.tar_sha256)
    path = tmp_path / UNIT.part
    data = bytearray(path.read_bytes())
    places = pq.ParquetFile(path).metadata.row_group(0).column(1)
    start = places.dictionary_page_offset or places.data_page_offset
    data[start : start + places.total_compressed_size] = bytes(places.total_compressed_size)
    path.write_bytes(data)
    assert read_part(tmp_path, UNIT, ["key"]) is None
    assert read_part(tmp_path, UNIT, ["key"], sha256_bytes(bytes(data))) is not None  # somebody vouches for it


def test_pixels_survive_unchanged():
    pixels = np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)
    assert np.array_equal(decode_pixels(encode_pixels(pixels, "webp")), pixels)


def test_a_jpeg_keeps_its_colours_at_full_resolution():
    y, x = np.mgrid[:48, :80] / 80
    pixels = np.stack([x, y, np.where((np.indices(x.shape)[1] // 2) % 2, 1.0, 0.0)], axis=-1)  # blue stripes, 2 wide
    pixels = (pixels * 255).astype(np.uint8)
    data = encode_pixels(pixels, "jpg")
    assert data[:2] == b"\xff\xd8"
    error = decode_pixels(data).astype(float) - pixels
    assert np.sqrt((error**2).mean()) < 5  # with subsampled chroma the stripes are gone, and it is 60
    assert encode_pixels(pixels, "jpg") == data


def test_object_arrays_are_refused():
    buffer = io.BytesIO()
    np.save(buffer, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="never loaded"):
        load_npy(buffer.getvalue())


# --- a dataset's own files --------------------------------------------------------------------------------------------


@pytest.fixture
def published(tmp_path) -> Path:
    """A dataset of three poses at base 64, with a truth."""
    table = write(tmp_path).table
    rows = [row | {"source": "a.png", "bucket": "64x64", "shard": 3, "split": "train"} for row in table.to_pylist()]
    republish(tmp_path, {"index.parquet": rows, "truth.parquet": [{"key": key, "top": "red"} for key in KEYS]})
    return tmp_path


def republish(root: Path, tables: dict[str, list[dict]], **changes) -> None:
    info = {"schema": 1, "fingerprint": "1", "base": 64, "encoders": "demo", "layers": {"pose": {}}, "hashes": {}}
    if (root / "dataset.json").exists():
        info = json.loads((root / "dataset.json").read_text())
    for name, rows in tables.items():
        (root / name).write_bytes(parquet_bytes(pa.Table.from_pylist(rows)))
        info["hashes"][name] = sha256_file(root / name)
    (root / "dataset.json").write_text(json.dumps(info | changes))


def test_a_dataset_is_read_through_its_index(published):
    dataset = Dataset(published)
    assert dataset.pose(dataset.rows()[2]).shape == (133, 3)
    assert dataset.truth()[KEYS[0]]["top"] == "red"


@pytest.mark.parametrize("info", ["[]", "{", '{"schema": 1}', '{"schema": 2}'])
def test_a_damaged_description_is_named(published, info):
    (published / "dataset.json").write_text(info)
    with pytest.raises(DataError, match=r"dataset\.json"):
        Dataset(published)


@pytest.mark.parametrize("changes", [{"hashes": {}}, {"base": "64"}, {"layers": []}])
def test_a_description_without_what_readers_need_is_named(published, changes):
    republish(published, {}, **changes)
    with pytest.raises(DataError, match=r"dataset\.json is damaged"):
        Dataset(published)


@pytest.mark.parametrize("column", ["split", "pose/pose.npy/offset"])
def test_an_index_without_a_column_is_named(published, column):
    rows = [{name: row[name] for name in row if name != column} for row in Dataset(published).rows()]
    republish(published, {"index.parquet": rows})
    with pytest.raises(DataError, match=rf"index\.parquet: has no column {column}\."):
        Dataset(published)


def test_an_index_with_a_bucket_of_another_base_is_named(published):
    rows = [dict(row) for row in Dataset(published).rows()]
    rows[1]["bucket"] = "128x128"
    republish(published, {"index.parquet": rows})
    with pytest.raises(DataError, match=r"index\.parquet: names bucket 128x128, but base 64 has .*64x64"):
        Dataset(published)


def test_the_truth_is_the_published_one_or_an_error(published):
    dataset, path = Dataset(published), published / "truth.parquet"
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(DataError, match=r"truth\.parquet is not the file that dataset\.json names"):
        dataset.truth()
    path.unlink()
    with pytest.raises(DataError, match=r"truth\.parquet: No such file"):
        dataset.truth()
    republish(published, {"truth.parquet": [{"key": KEYS[0]}]})
    with pytest.raises(DataError, match=r"truth\.parquet has no row for 2 samples, for example a\.png"):
        Dataset(published).truth()
    republish(published, {}, hashes={"index.parquet": sha256_file(published / "index.parquet")})
    assert Dataset(published).truth() is None  # a file that the dataset does not name is no truth
