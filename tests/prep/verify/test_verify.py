"""prep verify: every damage is found and named, repaired where it can be, and nothing hostile is ever obeyed."""

import io
import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanodit.errors import ConfigError, DataError
from nanodit.files import canonical_json, sha256_bytes, sha256_file
from nanodit.storage import open_storage
from prep.config import PrepConfig
from prep.dataset.codecs import npy_bytes
from prep.dataset.layout import Unit, fingerprint_of, parquet_bytes, read_part
from prep.dataset.reader import Dataset
from prep.passes.plan import make_plan
from prep.verify.units import check_unit
from prep.verify.verify import verify
from tests.prep.passes.test_plan import config, write_images
from tests.prep.prepared import prepare


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Eight images in three shards with every layer, among them two near duplicates."""
    from PIL import Image, ImageEnhance

    folder = tmp_path_factory.mktemp("verify")
    write_images(folder / "source", 7)
    with Image.open(folder / "source" / "image-002.png") as image:
        ImageEnhance.Brightness(image).enhance(1.004).save(folder / "source" / "image-007.png")
    (folder / "source" / "image-007.txt").write_text("Once more.")
    prepare(config(folder, layers=["text", "dino", "pose"]))
    return folder


@pytest.fixture
def settings(prepared, tmp_path) -> PrepConfig:
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    return config(tmp_path, layers=["text", "dino", "pose"])


@pytest.fixture
def root(settings) -> Path:
    return Path(settings.output)


@pytest.fixture(scope="module")
def pose_unit(prepared, tmp_path_factory) -> tuple[Path, Unit, bytes, bytes]:
    """A copy of one unit, to be changed again and again."""
    unit, root = unit_of(prepared / "out", "pose"), tmp_path_factory.mktemp("unit")
    for name in (unit.tar, unit.part):
        (root / name).parent.mkdir()
        shutil.copy(prepared / "out" / name, root / name)
    return root, unit, (root / unit.tar).read_bytes(), (root / unit.part).read_bytes()


def unit_of(root: Path, layer: str) -> Unit:
    row = Dataset(root).rows()[0]
    return Unit(row["bucket"], row["shard"], layer)


def found(root: Path, capsys, *words: str) -> None:
    """Verify, and expect all words in one line of findings, and the exit code for data."""
    with pytest.raises(DataError) as error:
        verify(root)
    assert error.value.exit_code == 3
    lines = capsys.readouterr().out.splitlines()
    assert any(all(word in line for word in words) for line in lines), lines


def recommit(root: Path, unit: Unit, tar: bytes, rows: list[dict] | None = None) -> None:
    """Put another tar in a unit's place with an index part that vouches for it, as an attacker would."""
    part = read_part(root, unit)
    record = json.loads(part.table.schema.metadata[b"nanodit"])
    record |= {"tar_bytes": len(tar), "tar_sha256": sha256_bytes(tar)}
    table = part.table if rows is None else pa.Table.from_pylist(rows, schema=part.table.schema)
    (root / unit.tar).write_bytes(tar)
    (root / unit.part).write_bytes(parquet_bytes(table.replace_schema_metadata({"nanodit": json.dumps(record)})))


def rewrite(root: Path, unit: Unit, key: str, member: str, data: bytes) -> None:
    """Replace one member in a unit, with hashes and offsets to match."""
    rows, buffer = read_part(root, unit).table.to_pylist(), io.BytesIO()
    with (
        tarfile.open(root / unit.tar) as old,
        tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as new,
    ):
        for info in old.getmembers():
            name, _, kind = info.name.partition(".")
            content = data if (name, kind) == (key, member) else old.extractfile(info).read()
            row = next(row for row in rows if row["key"] == name)
            place = f"{unit.layer}/{kind}"
            row[f"{place}/offset"], row[f"{place}/length"] = new.offset + 512, len(content)
            row[f"{place}/sha256"] = sha256_bytes(content)
            added = tarfile.TarInfo(info.name)
            added.size = len(content)
            new.addfile(added, io.BytesIO(content))
    recommit(root, unit, buffer.getvalue(), rows)


def publish_again(root: Path, name: str, table: pa.Table) -> None:
    """Replace a published table, with a dataset.json that vouches for it."""
    (root / name).write_bytes(parquet_bytes(table))
    info = json.loads((root / "dataset.json").read_text())
    info["hashes"][name] = sha256_file(root / name)
    del info["fingerprint"]
    (root / "dataset.json").write_text(canonical_json(info | {"fingerprint": fingerprint_of(info)}))


def files(root: Path) -> dict[str, bytes]:
    paths = (path for path in root.rglob("*") if path.is_file() and not {"runs", "kept", "readers"} & {*path.parts})
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


# --- whole, and repaired ----------------------------------------------------------------------------------------------


def test_a_whole_dataset_is_proven_in_one_line(root, capsys):
    before = files(root)
    verify(root)
    size = sum(path.stat().st_size for path in root.glob("bucket_*/*.tar"))
    proof = f"8 samples, 15 units, {size} bytes: 0 damaged, 0 leaks, 0 orphans"
    assert capsys.readouterr().out.splitlines()[-1] == proof
    assert files(root) == before


@pytest.mark.parametrize("layer", ["px", "text", "t5", "dino", "pose"])
def test_p09_a_flipped_bit_is_named_and_only_its_unit_is_computed_again(settings, root, capsys, layer):
    before, unit = files(root), unit_of(root, layer)
    part = read_part(root, unit)
    column = next(name for name in part.table.column_names if name.endswith("/offset"))
    data = bytearray((root / unit.tar).read_bytes())
    data[part.table[column][1].as_py() + 3] ^= 1
    (root / unit.tar).write_bytes(data)
    found(root, capsys, f"damaged: {unit.tar}: the bytes are not those that were committed")
    found(root, capsys, unit.tar, part.table["key"][1].as_py(), column.split("/")[1])
    with pytest.raises(DataError, match=r"commit records of 1 units were removed; nanodit prep run computes"):
        verify(root, repair=True)
    assert set(make_plan(settings).missing) == {unit}
    assert set(prepare(settings).missing) == {unit}
    verify(root)
    assert files(root) == before


@pytest.mark.parametrize(
    ("layer", "member", "array", "words"),
    [
        ("t5", "t5.npy", np.zeros((3, 4), np.float16), "expected float16"),
        ("dino", "cls.npy", np.zeros(7, np.float32), "expected float32"),
        ("dino", "dino.npy", None, "expected int8"),
        ("pose", "pose.npy", np.zeros((133, 3), np.float64), "float64 (133, 3), expected float32 (133, 3)"),
        ("pose", "pose.npy", np.full((133, 3), np.nan, np.float32), "not finite"),
    ],
)
def test_p09_a_wrong_array_is_found_although_its_hashes_agree(settings, root, capsys, layer, member, array, words):
    unit = unit_of(root, layer)
    key = read_part(root, unit).table["key"][0].as_py()
    if array is None:
        array = Dataset(root).array(Dataset(root).rows()[0], "dino/dino.npy").astype(np.int16)
    rewrite(root, unit, key, member, npy_bytes(array))
    found(root, capsys, unit.tar, key, member, words)
    with pytest.raises(DataError, match="1 units"):
        verify(root, repair=True)
    assert set(make_plan(settings).missing) == {unit}


def test_p09_truncated_tars_and_missing_halves_are_found(settings, root, capsys):
    before = files(root)
    cut, gone, alone = unit_of(root, "px"), unit_of(root, "t5"), unit_of(root, "pose")
    os.truncate(root / cut.tar, (root / cut.tar).stat().st_size // 2)
    (root / gone.tar).unlink()
    (root / alone.part).unlink()
    with pytest.raises(
        DataError, match=r"2 units are damaged\. Run: nanodit prep verify --repair, then nanodit prep run"
    ):
        verify(root)
    output = capsys.readouterr().out
    for line in (f"{cut.tar}: has ", f"orphan: {gone.part}: {gone.tar} is missing", f"{alone.tar}: has no index part"):
        assert line in output
    with pytest.raises(DataError):
        verify(root, repair=True)
    assert set(prepare(settings).missing) == {cut, gone, alone}
    assert files(root) == before


def test_what_killed_writers_and_strangers_left_is_an_orphan(root, capsys):
    bucket = next(root.glob("bucket_*")).name
    left = [f"{bucket}/.shard-000000.px.tar.tmp-77", "parts/.x.parquet.tmp-8", ".index.parquet.tmp-9"]
    for name in [*left, f"{bucket}/notes.txt", "parts/bucket_64x64-shard-1.px.parquet"]:
        (root / name).write_bytes(b"")
    with pytest.raises(DataError, match="belong to no unit"):
        verify(root, repair=True)
    assert "0 damaged, 0 leaks, 5 orphans" in capsys.readouterr().out
    assert not any((root / name).exists() for name in left)
    assert (root / bucket / "notes.txt").exists()  # not ours to delete


# --- the published files ----------------------------------------------------------------------------------------------


def test_published_files_are_checked_against_dataset_json_and_each_other(root, capsys):
    index = pq.read_table(root / "index.parquet")
    rejects = (root / "rejects.parquet").read_bytes()
    (root / "rejects.parquet").write_bytes(rejects + b" ")
    found(root, capsys, "rejects.parquet", "not the file that dataset.json names")
    (root / "rejects.parquet").write_bytes(rejects)
    caption = index["caption"].to_pylist()
    changed = index.set_column(index.column_names.index("caption"), "caption", pa.array(["else", *caption[1:]]))
    publish_again(root, "index.parquet", changed)
    found(root, capsys, "index.parquet", index["key"][0].as_py(), "caption differs from the text unit")
    publish_again(root, "index.parquet", index.slice(1))
    found(root, capsys, index["key"][0].as_py(), "complete in every layer, but missing here")
    found(root, capsys, "dataset.json", "counts 8 samples, but there are 7")
    info = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(canonical_json(info | {"base": 128}))
    found(root, capsys, "dataset.json", "fingerprint does not match its content")
    (root / "dataset.json").unlink()
    found(root, capsys, "dataset.json", "cannot be used")


def test_a_place_without_a_dataset_is_called_that_and_stays_as_it_is(tmp_path):
    (tmp_path / "holiday.png").touch()
    for repair in (False, True):
        with pytest.raises(DataError, match="is not a finished dataset"):
            verify(tmp_path, repair)
    assert [path.name for path in tmp_path.rglob("*")] == ["holiday.png"]


def test_units_of_an_older_version_are_upgraded_not_repaired(root, capsys):
    unit = unit_of(root, "px")
    table = read_part(root, unit).table
    record = json.loads(table.schema.metadata[b"nanodit"])
    record["recipe"]["code"] = 1
    old = table.drop_columns(["sharpness"]).replace_schema_metadata({"nanodit": json.dumps(record)})
    (root / unit.part).write_bytes(parquet_bytes(old))
    for repair in (False, True):
        with pytest.raises(
            DataError, match=r": 1 units were made by an older version\. nanodit prep run upgrades them$"
        ):
            verify(root, repair)
        assert "0 damaged, 0 leaks, 0 orphans, 1 of an older version" in capsys.readouterr().out
    assert (root / unit.part).exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"counts": 3}, "not of the expected form"),
        ({"stages": []}, "not of the expected form"),
        ({"layers": {"px": None, "t5": 1}}, "no usable layer px, layer t5"),
        ({"layers": {"px": {"format": None}}}, "no usable layer px"),
        ({"stages": {"split": {"cls_cosine": "no"}}}, "not of the expected form"),
    ],
)
def test_descriptions_of_another_form_are_findings(root, capsys, changes, said):
    info = json.loads((root / "dataset.json").read_text()) | changes
    del info["fingerprint"]
    (root / "dataset.json").write_text(canonical_json(info | {"fingerprint": fingerprint_of(info)}))
    found(root, capsys, "dataset.json", said)


@pytest.mark.parametrize(("name", "value"), [("recipe", []), ("facts", None), ("tar_bytes", 1.5), ("tar_sha256", 7)])
def test_a_record_of_another_form_is_damage(root, capsys, name, value):
    unit = unit_of(root, "dino")
    table = read_part(root, unit).table
    record = json.loads(table.schema.metadata[b"nanodit"]) | {name: value}
    other = table.drop_columns(["dino_h"]).replace_schema_metadata({"nanodit": json.dumps(record)})
    (root / unit.part).write_bytes(parquet_bytes(other))
    assert read_part(root, unit) is None
    found(root, capsys, unit.part, f"is not an index part (TypeError: {name} is ")


def test_p05_a_near_duplicate_on_the_other_side_is_a_leak(root, capsys):
    index = pq.read_table(root / "index.parquet")
    rows = index.to_pylist()
    first, second = [
        row for row in rows if [other["duplicate_group"] for other in rows].count(row["duplicate_group"]) == 2
    ]
    first["split"], second["split"] = "train", "holdout"
    first["holdout_part"], second["holdout_part"] = None, "test"
    publish_again(root, "index.parquet", pa.Table.from_pylist(rows, schema=index.schema))
    found(root, capsys, "leak", second["key"], "is in holdout and near duplicates are in train", first["key"])
    second["duplicate_group"] = second["key"]  # an index that denies the group does not hide the leak
    first["duplicate_group"] = first["key"]
    publish_again(root, "index.parquet", pa.Table.from_pylist(rows, schema=index.schema))
    found(root, capsys, "leak", second["key"], first["key"])


# --- hostile files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("absolute", "has an absolute name"),
        ("parent", "leads out of the folder"),
        ("symbolic link", "symbolic link"),
        ("hard link", "hard link"),
        ("device", "device"),
        ("folder", "folder"),
        ("duplicate", "appears twice"),
        ("interleaved", "is interleaved"),
        ("foreign", "does not belong to this unit"),
        ("appended", "holds something else after its last member"),
        ("hidden by a header", "were committed"),
    ],
)
def test_p07_a_hostile_tar_is_named_and_nothing_is_written(root, capsys, kind, words):
    unit, canary = unit_of(root, "pose"), root.parent / "canary"
    with tarfile.open(root / unit.tar) as tar:
        members = [(info, tar.extractfile(info).read()) for info in tar.getmembers()]
    hostile = tarfile.TarInfo(str(canary) if kind == "absolute" else "../../canary")
    hostile.size = 4
    types = {"symbolic link": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "device": tarfile.CHRTYPE}
    if kind in types | {"folder": 0}:
        hostile = tarfile.TarInfo(members[1][0].name)
        hostile.type, hostile.linkname = types.get(kind, tarfile.DIRTYPE), str(canary)
    if kind == "duplicate":
        members.insert(1, members[0])
    elif kind == "interleaved":
        members[1], members[2] = members[2], members[1]
    elif kind == "foreign":
        members[1][0].name = "payload.pth"
    elif kind not in ("appended", "hidden by a header"):
        members.insert(1, (hostile, b"evil"))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for position, (info, data) in enumerate(members):
            if kind == "hidden by a header" and position == 1:
                header = tarfile.TarInfo("pax")
                header.type, record = tarfile.XHDTYPE, b"30 comment=a header of its own\n"
                header.size = len(record)
                tar.addfile(header, io.BytesIO(record))
            tar.addfile(info, io.BytesIO(data) if info.isreg() else None)
    data = buffer.getvalue()
    if kind == "appended":
        data += b"evil" * 2560
    before = set(root.parent.rglob("*"))
    recommit(root, unit, data)
    found(root, capsys, unit.tar, words)
    assert not canary.exists()
    assert set(root.parent.rglob("*")) == before
    # readers take bytes from an offset and check their hash; no name in the tar means anything to them
    dataset = Dataset(root)
    for row in [row for row in dataset.rows() if (row["bucket"], row["shard"]) == (unit.bucket, unit.shard)]:
        if data[row["pose/pose.npy/offset"] :][:6] == b"\x93NUMPY":
            assert dataset.pose(row).shape == (133, 3)
        else:
            with pytest.raises(DataError, match=f"{unit.tar}, sample {row['key']}"):
                dataset.pose(row)


@given(st.data(), st.booleans())
def test_p07_any_change_of_a_tar_is_found_and_none_stops_the_check(pose_unit, data, vouched):
    """``vouched``: the index part carries the changed tar's hash, as an attacker's would; then no crash is enough."""
    root, unit, tar, part = pose_unit
    start = data.draw(st.integers(0, len(tar)))
    end = data.draw(st.integers(start, min(len(tar), start + 1024)))
    changed = tar[:start] + data.draw(st.binary(max_size=1024)) + tar[end:]
    (root / unit.part).write_bytes(part)
    (root / unit.tar).write_bytes(changed)
    if vouched:
        (root / unit.tar).write_bytes(tar)
        recommit(root, unit, changed)
    checked = check_unit(open_storage(root), unit)
    assert vouched or bool(checked.findings) == (changed != tar)


class Canary:
    """A pickle of this runs code when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_p08_pickles_are_never_loaded(root, capsys):
    unit, canary = unit_of(root, "pose"), root.parent / "canary"
    buffer = io.BytesIO()
    np.save(buffer, np.array([Canary(canary)], dtype=object), allow_pickle=True)
    row = Dataset(root).rows()[0]
    for data, words in ((buffer.getvalue(), "Python objects"), (pickle.dumps(Canary(canary)), "magic string")):
        rewrite(root, unit, row["key"], "pose.npy", data)
        found(root, capsys, unit.tar, row["key"], "pose.npy", words)
        index = pq.read_table(root / "index.parquet").to_pylist()
        committed = {item["key"]: item for item in read_part(root, unit).table.to_pylist()}
        rows = [item | committed.get(item["key"], {}) for item in index]
        publish_again(root, "index.parquet", pa.Table.from_pylist(rows))
        dataset = Dataset(root)
        with pytest.raises(DataError, match=rf"{unit.tar}, sample {row['key']}, member pose/pose.npy"):
            dataset.pose(dataset.rows()[0])
    pickle.loads(pickle.dumps(Canary(canary)))  # that is what it would have done
    assert canary.exists()


def test_p08_commands_are_no_places(tmp_path):
    for place in ("pipe:touch canary", "pipe://touch canary", "file:///etc", "https://host/x", "simplecache::s3://b/x"):
        with pytest.raises(ConfigError, match=r"s3://bucket/name"):
            Dataset(place)
    assert not Path("canary").exists()
