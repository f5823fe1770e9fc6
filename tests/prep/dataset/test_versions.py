"""Versions: who opened a dataset reads what was published then, whatever is added, mended and pruned meanwhile."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nanodit.errors import ConfigError, DataError
from nanodit.files import canonical_json
from nanodit.storage import LocalFolder, open_storage
from prep.__main__ import main
from prep.config import PrepConfig
from prep.dataset import readers, versions
from prep.dataset.layout import Unit
from prep.dataset.reader import Dataset, open_version
from prep.passes.cost import kept_bytes
from prep.passes.plan import make_plan
from prep.run import print_plan, run
from prep.verify.verify import verify
from prep.versions import list_versions
from tests.forked import in_child
from tests.prep.object_store import s3_server
from tests.prep.passes.test_plan import config, write_images
from tests.prep.prepared import compute_here, prepare
from tests.prep.runs import files_of

Content = dict[str, tuple]


def content(dataset: Dataset) -> Content:
    """Everything that the samples of a text dataset hold, by key."""
    members = [f"{layer}/{name}" for layer in dataset.layers for name in dataset.members(layer)]
    together = dataset.together()
    found = {}
    for row in dataset.rows():
        data = [view.read(row, name) for view in (dataset, together) for name in members]
        found[row["key"]] = (row["split"], row["caption"], *data)
    return found


def change(source: Path) -> None:
    """Prune two images, mend a caption, add four images."""
    for number in (0, 3):
        (source / f"image-{number:03d}.png").unlink()
    (source / "image-005.txt").write_text("A caption that was mended.")
    write_images(source, 4, first=20)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Ten images and the dataset of their captions. Read only."""
    folder = tmp_path_factory.mktemp("versions")
    write_images(folder / "source", 10)
    with pytest.MonkeyPatch.context() as patch:
        compute_here(patch)
        run(config(folder))
    return folder


@pytest.fixture
def settings(made, tmp_path, monkeypatch) -> PrepConfig:
    """The config of a copy of it."""
    compute_here(monkeypatch)
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return config(tmp_path)


@pytest.fixture
def changed(settings) -> tuple[PrepConfig, str, Content]:
    """A dataset after a change: its config, and the fingerprint and content of the version before."""
    before = Dataset(settings.output)
    expected = content(before)
    change(Path(settings.source))
    run(settings, prune=True)
    return settings, before.fingerprint, expected


def test_a_reader_sees_one_version_from_its_first_read_to_its_last(settings):
    dataset = Dataset(settings.output)
    rows, expected = dataset.rows(), content(dataset)
    change(Path(settings.source))
    run(settings, prune=True)
    assert content(dataset) == expected
    assert dataset.rows() == rows
    newest = Dataset(settings.output)
    assert len(newest) == 12
    assert newest.fingerprint != dataset.fingerprint
    earlier = open_version(settings.output, dataset.fingerprint)
    assert earlier.fingerprint == dataset.fingerprint
    assert content(earlier) == expected
    (Path(settings.source) / "image-006.txt").write_text("Mended as well.")
    run(settings)
    assert content(dataset) == content(open_version(settings.output, dataset.fingerprint)) == expected
    assert content(newest) == content(open_version(settings.output, newest.fingerprint))
    assert len({dataset.fingerprint, newest.fingerprint, Dataset(settings.output).fingerprint}) == 3
    verify(settings.output)
    assert open_version(settings.output, "0" * 64).fingerprint == Dataset(settings.output).fingerprint


def test_an_external_glob_sees_one_version(changed):
    settings, _, _ = changed
    assert len(list(Path(settings.output).glob("bucket_*/shard-*.t5.tar"))) == 6
    assert not {path.suffix for path in (Path(settings.output) / "kept").iterdir()} - {".tar", ".json", ".parquet"}
    for path in (Path(settings.output) / "kept").glob("*.tar"):
        assert re.fullmatch(r"[0-9a-f]{64}", path.stem)
    before = sorted(path.name for path in (Path(settings.output) / "kept").iterdir())
    run(settings, prune=True)
    assert sorted(path.name for path in (Path(settings.output) / "kept").iterdir()) == before


def test_nothing_is_kept_without_a_change_and_no_tar_where_images_are_only_added(settings):
    run(settings)
    assert not (Path(settings.output) / "kept").exists()
    write_images(Path(settings.source), 3, first=20)
    run(settings)
    kept = [path.suffix for path in (Path(settings.output) / "kept").iterdir()]
    assert ".tar" not in kept
    assert kept.count(".parquet") == 3
    assert [version.kept for version in list_versions(open_storage(settings.output))][1] < 50_000


def test_a_version_that_comes_back_is_kept_no_longer_and_its_readers_go_on(settings):
    dataset, expected, caption = Dataset(settings.output), None, Path(settings.source) / "image-005.txt"
    expected, before = content(dataset), caption.read_text()
    files = files_of(Path(settings.output))
    caption.write_text("Another caption.")
    run(settings)
    assert content(dataset) == expected  # it reads what is kept from here on
    caption.write_text(before)
    run(settings)
    assert files_of(Path(settings.output)) == files
    assert not versions.is_kept(open_storage(settings.output), dataset.fingerprint)
    assert content(dataset) == expected


@pytest.fixture(scope="module")
def undisturbed(made, tmp_path_factory) -> dict[str, str]:
    """The hashes of the files of a changed dataset."""
    folder = tmp_path_factory.mktemp("undisturbed")
    shutil.copytree(made, folder, dirs_exist_ok=True)
    change(folder / "source")
    with pytest.MonkeyPatch.context() as patch:
        compute_here(patch)
        run(config(folder), prune=True)
    return files_of(folder / "out")


MOMENTS = [
    "versions.before_description:kill", "versions.kept_unit:kill", "versions.kept_unit:kill:3",
    "shards.before_tar:kill:2", "shards.before_part:kill", "publish.after_index:kill", "publish.after_dataset:kill",
]  # fmt: skip


@pytest.mark.parametrize("moment", MOMENTS)
def test_p11_a_kill_between_keeping_and_replacing_loses_neither_version(settings, moment, undisturbed):
    dataset = Dataset(settings.output)
    expected = content(dataset)
    change(Path(settings.source))
    assert in_child(lambda: run(settings, prune=True), moment) == -signal.SIGKILL
    assert content(dataset) == expected
    assert content(open_version(settings.output, dataset.fingerprint)) == expected
    run(settings, prune=True)
    assert content(open_version(settings.output, dataset.fingerprint)) == expected
    verify(settings.output)
    assert files_of(Path(settings.output)) == undisturbed


def test_units_of_dropped_layers_and_shards_stay_readable(settings):
    dataset = Dataset(settings.output)
    expected = content(dataset)
    for path in Path(settings.source).glob("*.png"):
        path.unlink()
    write_images(Path(settings.source), 3, size=(64, 80), first=30)  # of another bucket: no shard of before is left
    run(settings, prune=True)
    assert not list(Path(settings.output).glob("bucket_80x56"))
    assert content(dataset) == content(open_version(settings.output, dataset.fingerprint)) == expected


def test_a_unit_that_is_repaired_and_made_again_stays_what_it_was(settings):
    dataset = Dataset(settings.output)
    expected = content(dataset)
    unit = Unit(dataset.rows()[0]["bucket"], 0, "text")
    (Path(settings.output) / unit.part).write_bytes(b"damaged")  # the tar is good
    with pytest.raises(DataError):
        verify(settings.output, repair=True)
    change(Path(settings.source))
    run(settings, prune=True)
    assert content(dataset) == content(open_version(settings.output, dataset.fingerprint)) == expected
    verify(settings.output)


def test_d1_damage_is_told_from_a_change(settings):
    dataset = Dataset(settings.output)
    row = dataset.rows()[0]
    tar = Path(settings.output) / Unit(row["bucket"], row["shard"], "t5").tar
    data = tar.read_bytes()
    tar.write_bytes(data[: row["t5/t5.npy/offset"]] + b"?" + data[row["t5/t5.npy/offset"] + 1 :])
    with pytest.raises(DataError, match=r"SHA-256 differs\). Run nanodit prep verify --repair, then nanodit prep run"):
        dataset.t5(row)


def test_damage_in_what_is_kept_is_named_by_reader_and_verify(changed, capsys):
    settings, fingerprint, _ = changed
    kept = Path(settings.output) / "kept"
    tar = next(path for path in sorted(kept.glob("*.tar")) if path.stat().st_nlink == 1)
    data = tar.read_bytes()
    tar.write_bytes(bytes(len(data)))
    with pytest.raises(DataError, match="SHA-256 differs"):
        content(open_version(settings.output, fingerprint))
    with pytest.raises(DataError, match=r"drop them: nanodit prep versions .* --drop FINGERPRINT"):
        verify(settings.output)
    assert f"damaged: kept/{tar.name}: the bytes are not those that were kept" in capsys.readouterr().out
    tar.unlink()
    with pytest.raises(DataError):
        verify(settings.output)
    assert f"damaged: kept/{fingerprint}.json: 1 of its tars are missing" in capsys.readouterr().out
    assert main(["versions", settings.output, "--drop", fingerprint, "--yes"]) == 0
    verify(settings.output)


def test_the_plan_says_how_much_room_a_change_keeps(settings, capsys):
    assert kept_bytes(make_plan(settings)) == 0
    change(Path(settings.source))
    expected = kept_bytes(make_plan(settings, prune=True))
    print_plan(settings, prune=True)
    assert re.search(
        r"keeps [\d.]+ [kM]B of the present version .* --drop FINGERPRINT frees them", capsys.readouterr().out
    )
    run(settings, prune=True)
    tars = (Path(settings.output) / "kept").glob("*.tar")
    assert sum(path.stat().st_size for path in tars) == expected > 0


# --- listing and dropping ---------------------------------------------------------------------------------------------


def test_versions_are_listed_with_their_bytes_and_readers_and_dropped_when_asked(changed, capsys):
    settings, fingerprint, _ = changed
    storage, now = open_storage(settings.output), time.time()
    record = {"host": "elsewhere", "pid": 7, "run": "/runs/a", "version": fingerprint, "seen": now - 7200}
    storage.write("readers/elsewhere-7.json", canonical_json(record))
    storage.write("readers/odd.json", "no record")
    assert main(["versions", settings.output]) == 0
    out = capsys.readouterr().out
    newest = Dataset(settings.output).fingerprint
    assert re.search(rf"^{newest[:16]}  20\d\d-\d\d-\d\d \d\d:\d\d UTC  12 .*the newest$", out, re.MULTILINE)
    assert re.search(rf"^{fingerprint[:16]}  20\d\d.* UTC  10 .*[kM]B +[\d.]+ [kM]B$", out, re.MULTILINE)
    assert f"reader /runs/a (process 7 on elsewhere): version {fingerprint[:16]}; silent, last seen 2h 00m ago" in out
    with pytest.raises(ConfigError, match=r"nothing was dropped. Add --yes"):  # nobody can be asked here
        main(["versions", settings.output, "--drop", fingerprint])
    with pytest.raises(ConfigError, match="that is the newest version"):
        main(["versions", settings.output, "--drop", newest[:12], "--yes"])
    with pytest.raises(ConfigError, match="there is no such version"):
        main(["versions", settings.output, "--drop", "xyz", "--yes"])
    with pytest.raises(ConfigError, match="not a number of days"):
        main(["versions", settings.output, "--older-than", "soon"])
    assert main(["versions", settings.output, "--older-than", "30d"]) == 0
    assert "no version is to be dropped" in capsys.readouterr().out
    opened = open_version(settings.output, fingerprint)
    assert main(["versions", settings.output, "--drop", fingerprint[:12], "--yes"]) == 0
    assert list((Path(settings.output) / "kept").iterdir()) == []
    assert [path.name for path in (Path(settings.output) / "readers").iterdir()] == ["odd.json"]
    with pytest.raises(DataError, match=f"of version {fingerprint} is not there any more"):
        content(opened)
    verify(settings.output)


def test_a_versions_time_is_that_of_the_run_that_published_it(changed):
    settings, *_ = changed
    newest, earlier = list_versions(open_storage(settings.output))
    logs = [json.loads((Path(settings.output) / f"runs/000{n}/log.jsonl").read_text().splitlines()[-1]) for n in (1, 2)]
    assert [newest.time, earlier.time] == [logs[1]["time"], logs[0]["time"]]
    log = Path(settings.output) / "runs/0001/log.jsonl"
    log.write_text(log.read_text().replace(str(logs[0]["time"]), str(logs[0]["time"] - 31 * 86400)))
    assert main(["versions", settings.output, "--older-than", "30d", "--yes"]) == 0
    assert [version.newest for version in list_versions(open_storage(settings.output))] == [True]


def test_what_two_versions_share_goes_with_the_second(changed):
    settings, fingerprint, _ = changed
    second = Dataset(settings.output).fingerprint
    (Path(settings.source) / "image-006.txt").write_text("Mended as well.")
    run(settings)
    expected = content(open_version(settings.output, second))
    assert main(["versions", settings.output, "--drop", fingerprint, "--yes"]) == 0
    assert content(open_version(settings.output, second)) == expected
    verify(settings.output)


def test_a_reader_leaves_a_record_while_it_reads(settings):
    dataset, storage = Dataset(settings.output), open_storage(settings.output)
    with readers.reading(dataset, "runs/mine"):
        deadline = time.monotonic() + 10
        while not readers.read_readers(storage) and time.monotonic() < deadline:
            time.sleep(0.01)
        (reader,) = readers.read_readers(storage).values()
        assert (reader.version, reader.pid) == (dataset.fingerprint, os.getpid())
        assert reader.run == str(Path("runs/mine").absolute())
        assert reader.state(time.time()) == "lives"
        assert reader.state(time.time() + 3600) == "silent"
    assert readers.read_readers(storage) == {}
    child = subprocess.Popen(["true"])
    child.wait()
    assert readers.Reader(reader.host, child.pid, "run", "v", time.time()).state(time.time()) == "gone"


# --- other places -----------------------------------------------------------------------------------------------------


def test_a_read_only_dataset_is_read_at_any_version_and_leaves_no_record(changed, tmp_path):
    settings, fingerprint, expected = changed
    place = tmp_path / "mounted"
    place.mkdir()
    done = subprocess.run(["mount", "--bind", settings.output, place], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this process may not mount: {done.stderr.strip()}")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", place], check=True)
        dataset = open_version(place, fingerprint)
        with readers.reading(dataset, "run"):
            assert content(dataset) == expected
        assert main(["versions", str(place)]) == 0
        verify(place)
    finally:
        subprocess.run(["umount", place], check=True)
    assert not (Path(settings.output) / "readers").exists()


def spoil(name: str, data: bytes | None) -> Callable[[Path, str], None]:
    """Return what replaces, or deletes, files of ``kept/``; VERSION in the name is a fingerprint."""

    def change(kept: Path, version: str) -> None:
        for path in kept.glob(name.replace("VERSION", version)):
            path.unlink() if data is None else path.write_bytes(data)

    return change


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (spoil("*.tar", None), "kept of version {} is damaged: bucket_"),
        (spoil("*.tar", b"short"), "kept of version {} is damaged: bucket_"),
        (spoil("VERSION.tars.json", None), "kept of version {} is damaged: bucket_"),
        (spoil("*.parquet", None), "kept of version {} is damaged: .*kept/[0-9a-f]{{64}}.parquet: No such file"),
        (spoil("*.parquet", b"other"), "kept/[0-9a-f]{{64}}.parquet is not the file that dataset.json names"),
        (spoil("VERSION.json", b"{"), "kept/{0}.json is damaged"),
        (
            lambda kept, version: shutil.copy(kept.parent / "dataset.json", kept / f"{version}.json"),
            "describes version",
        ),
    ],
)
def test_a_damaged_version_says_that_no_run_restores_it(changed, damage, said):
    settings, fingerprint, _ = changed
    damage(Path(settings.output) / "kept", fingerprint)
    with pytest.raises(DataError, match=said.format(fingerprint)) as caught:
        content(open_version(settings.output, fingerprint))
    advice, _, command = str(caught.value).partition("No run restores that: ")[2].partition(" (nanodit prep ")
    assert advice == "go on with the newest version, and drop this one"
    assert "Run nanodit" not in str(caught.value)
    assert main([*command.removesuffix(")").split(), "--yes"]) == 0
    verify(settings.output)


def test_where_there_are_no_hard_links_tars_are_copied(settings, monkeypatch):
    def refuse(*names: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    dataset = Dataset(settings.output)
    expected = content(dataset)
    change(Path(settings.source))
    run(settings, prune=True)
    assert content(dataset) == expected
    verify(settings.output)


def test_versions_in_an_object_store(settings):
    with s3_server("versions"):
        there = settings.model_copy(update={"output": "s3://versions/set"})
        prepare(there)
        dataset = Dataset(there.output)
        expected = content(dataset)
        change(Path(settings.source))
        run(there, prune=True)
        assert content(dataset) == content(open_version(there.output, dataset.fingerprint)) == expected
        verify(there.output)
        newest = Dataset(there.output).fingerprint
        run(settings, prune=True)
        assert Dataset(settings.output).fingerprint == newest
        assert main(["versions", there.output, "--drop", dataset.fingerprint, "--yes"]) == 0
        assert open_storage(there.output).names("kept/") == []
        verify(there.output)


def test_names_of_files_come_from_hashes_alone(settings):
    """What a stranger's dataset.json says leads nowhere else."""
    path = Path(settings.output) / "dataset.json"
    info = json.loads(path.read_text()) | {"fingerprint": "../../outside"}
    path.write_text(json.dumps(info))
    storage = LocalFolder(settings.output)
    versions.keep_version(storage)
    assert not (Path(settings.output) / "kept").exists()
    assert not versions.is_kept(storage, "../dataset")
    assert open_version(settings.output, "../dataset").fingerprint == "../../outside"
