"""Places of datasets: a folder and an object store keep the same promises, with the same bytes."""

import errno
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from nanodit import lock
from nanodit.errors import ConfigError, DataError, ResourceError
from nanodit.lock import LOCK, locked
from nanodit.storage import LocalFolder, ObjectStore, absolute_place, open_storage
from prep.__main__ import main
from prep.dataset.layout import read_members, read_part
from prep.dataset.reader import Dataset
from prep.passes.plan import make_plan
from prep.verify.verify import verify
from tests.prep.dataset.test_layout import KEYS, UNIT, write
from tests.prep.object_store import StallingProxy, s3_server
from tests.prep.passes.test_plan import config, write_images
from tests.prep.prepared import prepare

PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def endpoint():
    with s3_server("bucket") as url:
        yield url


@pytest.fixture
def url(endpoint, request) -> str:
    """A place of its own in the object store."""
    return f"s3://bucket/{request.node.name.partition('[')[0]}/{time.monotonic_ns()}"


@pytest.fixture(params=["folder", "s3"])
def storage(request, tmp_path):
    return open_storage(tmp_path / "out" if request.param == "folder" else request.getfixturevalue("url"))


def contents(place) -> dict[str, bytes]:
    storage = open_storage(place)
    outside = ("runs/", "kept/", "readers/")
    return {name: storage.read(name) for name in storage.names() if not name.startswith(outside)}


# --- files ------------------------------------------------------------------------------------------------------------


def test_both_kinds_of_place_do_the_same(storage):
    assert storage.names() == storage.names("parts/") == []
    storage.write("parts/b.parquet", b"0123456789")
    storage.write("index.parquet", "täxt")
    storage.write("bucket_64x64/shard-000000.px.tar", b"")
    assert storage.names() == ["bucket_64x64/shard-000000.px.tar", "index.parquet", "parts/b.parquet"]
    assert storage.names("parts/") == storage.names("pa") == ["parts/b.parquet"]
    assert storage.names("bucket_") == ["bucket_64x64/shard-000000.px.tar"]
    assert storage.names("parts/c") == storage.names("nothing/") == []
    assert storage.read("index.parquet").decode() == "täxt"
    ranges = [(0, 3), (7, 100), (10, 5), (99, 5)]
    assert [storage.read_range("parts/b.parquet", *place) for place in ranges] == [b"012", b"789", b"", b""]
    assert storage.read_ranges("parts/b.parquet", ranges) == [b"012", b"789", b"", b""]
    assert [storage.size(name) for name in ("parts/b.parquet", "bucket_64x64/shard-000000.px.tar")] == [10, 0]
    assert storage.size("missing") is None
    assert not storage.exists("missing")
    storage.write("parts/b.parquet", b"new")
    assert storage.read("parts/b.parquet") == b"new"
    for _ in range(2):
        storage.delete("parts/b.parquet")
    ranged = (lambda name: storage.read_range(name, 0, 1), lambda name: storage.read_ranges(name, [(0, 1)]))
    for read in (storage.read, *ranged):
        with pytest.raises(FileNotFoundError) as error:
            read("parts/b.parquet")
        assert error.value.strerror
    draft = storage.draft("bucket_64x64/shard-000001.px.tar")
    draft.write_bytes(b"large")
    assert storage.names("bucket_64x64/s") == ["bucket_64x64/shard-000000.px.tar"]
    storage.put_file("bucket_64x64/shard-000001.px.tar", draft)
    assert storage.read("bucket_64x64/shard-000001.px.tar") == b"large"
    assert not draft.exists()
    assert storage.where("index.parquet") == f"{storage}/index.parquet"


def test_what_killed_writers_left_is_collected(storage):
    draft = storage.draft("bucket_64x64/shard-000001.px.tar")
    draft.write_bytes(b"half")
    storage.remove_temporary_files()
    storage.remove_empty_folders()
    assert not draft.exists()
    assert not draft.parent.name.startswith("bucket_") or not draft.parent.exists()


def test_a_storage_may_be_shared_by_threads_forked_and_sent(storage):
    storage.write("a", b"1" * 1000)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(storage.read, ["a"] * 40)) == [b"1" * 1000] * 40
    queue = multiprocessing.get_context("fork").Queue()
    child = multiprocessing.get_context("fork").Process(target=lambda: queue.put(storage.read("a")))
    child.start()
    assert queue.get(timeout=30) == b"1" * 1000
    child.join()
    assert pickle.loads(pickle.dumps(storage)).read("a") == b"1" * 1000


def test_a_folder_that_cannot_be_listed_is_not_empty(tmp_path, monkeypatch):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "a").touch()
    assert open_storage(tmp_path).names("parts/") == ["parts/a"]
    assert open_storage(tmp_path).names("gone/") == []

    def scandir(path):  # root may list everything
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ResourceError, match=r"parts cannot be read: Stale file handle"):
        open_storage(tmp_path).names("parts/")


def test_what_the_system_keeps_at_the_top_of_a_disk_is_passed_over(tmp_path, monkeypatch):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "a").touch()
    (tmp_path / "lost+found").mkdir()
    real = os.scandir

    def scandir(path):  # root may list everything
        if Path(path).name == "lost+found":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert open_storage(tmp_path).names() == ["parts/a"]


def test_places_are_folders_or_urls_of_object_stores(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert isinstance(open_storage("a/b"), LocalFolder)
    assert isinstance(open_storage("s3://bucket/name/"), ObjectStore)
    assert open_storage("s3://bucket/name/").url == "s3://bucket/name"
    assert absolute_place("s3://bucket/name/") == "s3://bucket/name"
    assert absolute_place("a/b") == absolute_place(Path("a/b")) == str(tmp_path / "a" / "b")
    with pytest.raises(ConfigError, match="cannot read ftp URLs"):
        open_storage("ftp://host/x")
    with pytest.raises(ConfigError, match="bucket is missing"):
        open_storage("s3://")
    for place in ("s3:/bucket/name", "file:/tmp/x", "pipe:cat"):
        with pytest.raises(ConfigError, match="neither a folder nor the URL"):
            open_storage(place)
    assert isinstance(open_storage("C:/datasets"), LocalFolder)
    (tmp_path / "coffee.png").touch()
    with pytest.raises(ConfigError, match=r"coffee\.png is a file, not a folder"):
        open_storage("coffee.png")
    with pytest.raises(ValueError, match="was a URL"):
        open_storage(Path("s3://bucket/name"))


def test_a_missing_package_is_named_with_the_command_that_installs_it():
    code = "import sys; sys.modules['s3fs'] = None\nfrom prep.dataset.reader import Dataset\nDataset('s3://bucket/x')"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert "ConfigError: s3://bucket/x needs the package s3fs, which is not installed" in done.stderr
    assert "Run: pip install 'nanodit[s3]'" in done.stderr


def test_a_store_that_cannot_be_reached_or_written_is_named(endpoint, monkeypatch):
    with pytest.raises(ResourceError, match=r"s3://nobody/x/a: there is no such bucket"):
        open_storage("s3://nobody/x").write("a", b"")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # botocore's five take twelve seconds
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()
    with pytest.raises(ResourceError, match=r"s3://bucket/x/a: .*AWS_ENDPOINT_URL"):
        open_storage("s3://bucket/x").read("a")
    S3FileSystem.clear_instance_cache()


# --- units ------------------------------------------------------------------------------------------------------------


def test_a_unit_has_the_same_bytes_everywhere(url, tmp_path):
    parts = [write(place) for place in (tmp_path, url)]
    assert contents(tmp_path) == contents(url)
    assert contents(url).keys() == {UNIT.tar, UNIT.part}
    assert parts[0].table == parts[1].table
    assert list(read_members(url, parts[1], "pose.npy")) == list(read_members(tmp_path, parts[0], "pose.npy"))
    storage = open_storage(url)
    storage.write(UNIT.tar, storage.read(UNIT.tar)[:700])
    assert read_part(url, UNIT) is None
    with pytest.raises(DataError, match=rf"{UNIT.tar}, sample {KEYS[0]}, member pose.npy: the file ends early"):
        list(read_members(url, parts[1], "pose.npy"))
    storage.delete(UNIT.tar)
    with pytest.raises(DataError, match=rf"{UNIT.tar}, sample {KEYS[0]}.*: No such object"):
        list(read_members(url, parts[1], "pose.npy"))


WRITE_ONE_UNIT = """
import sys
from tests.prep.dataset.test_layout import write
write(sys.argv[1], seed=int(sys.argv[2]))
"""
WRITE_MUCH = """
import sys
from prep.dataset.layout import Unit
from prep.dataset.writer import LayerWriter
with LayerWriter(sys.argv[1], Unit("64x64", 3, "pose"), {}, {}) as writer:
    writer.add("0" * 32, {"pose.npy": bytes(8 << 20), "json": b"{}"}, persons=0)
    writer.commit()
"""


@pytest.mark.parametrize("point", ["shards.before_tar", "shards.before_part"])
def test_p11_a_writer_killed_between_tar_and_part_leaves_no_commit(storage, point):
    write(storage, seed=0)
    environment = os.environ | {"NANODIT_FAULT": f"{point}:kill"}
    command = [sys.executable, "-c", WRITE_ONE_UNIT, storage.place, "1"]
    done = subprocess.run(command, cwd=PROJECT, env=environment, timeout=60)
    assert done.returncode == -signal.SIGKILL
    if point == "shards.before_tar":
        assert read_part(storage, UNIT).table == write(storage, seed=0).table  # the old unit is untouched
    else:
        assert read_part(storage, UNIT) is None
    storage.remove_temporary_files()
    part = write(storage, seed=1)
    assert set(contents(storage)) == {UNIT.tar, UNIT.part}
    assert len(list(read_members(storage, part, "pose.npy"))) == len(KEYS)


def test_p11_a_killed_upload_leaves_nothing(endpoint, url):
    """The process dies with a third of the object on its way."""
    proxy = StallingProxy(endpoint, limit=3 << 20)
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE_MUCH, url], cwd=PROJECT, env=os.environ | {"AWS_ENDPOINT_URL": proxy.endpoint}
    )
    try:
        assert proxy.stalled.wait(60)
        assert contents(url) == {}
    finally:
        process.kill()
        process.wait()
        proxy.close()
    time.sleep(0.5)
    assert contents(url) == {}
    open_storage(url).remove_temporary_files()
    assert read_part(url, UNIT) is None


# --- a dataset --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("storage")
    write_images(folder / "source", 7)
    prepare(config(folder, layers=["text"]))
    return folder


def test_a_dataset_in_an_object_store_is_the_local_one(source, url, capsys):
    settings = config(source, layers=["text"]).model_copy(update={"output": url})
    assert len(prepare(settings).missing) == 9
    assert contents(url) == contents(source / "out")
    assert make_plan(settings).missing == {}
    verify(url)
    assert "0 damaged, 0 leaks, 0 orphans" in capsys.readouterr().out
    here, there = Dataset(source / "out"), Dataset(url)
    assert there.fingerprint == here.fingerprint
    assert there.root == url
    for row in here.rows():
        assert np.array_equal(there.pixels(row), here.pixels(row))
        assert np.array_equal(there.t5(row), here.t5(row))
    unit = next(iter(make_plan(settings).parts))
    storage = open_storage(url)
    storage.write(unit.tar, storage.read(unit.tar)[:-1] + b"1")
    with pytest.raises(DataError, match="1 units"):
        verify(url, repair=True)
    assert set(prepare(settings).missing) == {unit}
    assert contents(url) == contents(source / "out")


def test_training_reads_an_object_store(source, url):
    from train.data.samples import TrainingSet, load_pixels

    storage = open_storage(url)
    for name, data in contents(source / "out").items():
        storage.write(name, data)
    there, here = Dataset(url), Dataset(source / "out")
    sets = [TrainingSet(dataset, cache_gb=0) for dataset in (there, here)]
    assert sets[0].rows == sets[1].rows
    rows = next(iter(sets[0].rows.values()))
    assert np.array_equal(load_pixels(there, rows).numpy(), load_pixels(here, rows).numpy())
    storage.delete("dataset.json")
    with pytest.raises(DataError, match=rf"{url}/dataset.json does not exist: {url} is not a finished dataset"):
        Dataset(url)


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.1)
    monkeypatch.setattr(lock, "WATCH", 1.0)


@pytest.mark.slow
def test_prep_run_writes_an_object_store(source, url, fast, capsys):
    """Through the command line, Ray and its workers, which find the store by their environment.

    What comes to no Ray is run in this process.
    """
    command = ["run", f"source={source / 'source'}", f"output={url}"]
    command += ["base=64", "encoders=demo", "layers=[text]", "shard_size=3"]
    first = subprocess.run(
        [sys.executable, "-m", "prep", *command, "workers=1"], cwd=PROJECT, capture_output=True, text=True, timeout=300
    )
    assert first.returncode == 0, first.stderr
    assert contents(url) == contents(source / "out")
    assert main(command) == 0
    assert "wrote nothing (already complete)" in capsys.readouterr().out
    storage = open_storage(url)
    assert not storage.exists(LOCK)
    logs = [storage.read(f"runs/{number}/log.jsonl").decode().splitlines() for number in ("0001", "0002")]
    assert [json.loads(log[-1])["event"] for log in logs] == ["done", "done"]
    another = rf"{url} is being written by another prep run \(process {os.getpid()} on "
    with locked(url), pytest.raises(ConfigError, match=another) as error:
        main(command)
    assert error.value.exit_code == 2


# --- the lock ---------------------------------------------------------------------------------------------------------


def test_a_second_run_is_refused_while_the_first_shows_signs_of_life(storage, fast):
    with locked(storage) as held:
        with (
            pytest.raises(ConfigError, match=rf"another prep run \(process {os.getpid()} on ") as error,
            locked(storage),
        ):
            pass
        assert error.value.exit_code == 2
        held.check()
    with locked(storage):  # released, and only then free
        pass


def test_the_lock_of_a_dead_run_is_taken_over(url, fast, capsys):
    code = (
        "import sys, time\nfrom nanodit import lock\nlock.BEAT = .1\n"
        "with lock.locked(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, url], cwd=PROJECT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=f"process {process.pid} on "), locked(url):
        pass
    process.kill()
    process.wait()
    with locked(url):
        assert f"taking over the lock of process {process.pid} on " in capsys.readouterr().out
    assert not open_storage(url).exists(LOCK)


def test_a_run_whose_lock_was_taken_over_does_not_publish(url, fast):
    storage = open_storage(url)
    with locked(url) as held:
        storage.write(LOCK, json.dumps({"owner": "process 1 on elsewhere", "token": "2", "beat": 0}))
        with pytest.raises(ConfigError, match=r"taken over by another prep run \(process 1 on elsewhere"):
            held.check()
        time.sleep(0.3)  # the owner of before has stopped renewing it
        assert json.loads(storage.read(LOCK))["token"] == "2"
    assert storage.exists(LOCK)  # nor does it remove what is not its own


def test_of_many_runs_at_once_one_wins(url, fast):
    outcomes, barrier = [], threading.Barrier(4)

    def attempt() -> None:
        barrier.wait()
        try:
            with locked(url):
                outcomes.append("held")
                time.sleep(2)
        except ConfigError:
            outcomes.append("refused")

    threads = [threading.Thread(target=attempt) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["held", "refused", "refused", "refused"]
