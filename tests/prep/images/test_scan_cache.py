"""Looking again at files that have not changed costs no read; anything else is read."""

import builtins
import os
import shutil
import time
from pathlib import Path

import pytest

from nanodit.lock import LOCK
from nanodit.storage import open_storage
from prep.images import scan_cache
from prep.images.scan_cache import ScanCache
from prep.passes.plan import make_plan
from tests.prep.passes.test_plan import config, write_images


@pytest.fixture
def opened(tmp_path, monkeypatch) -> list[str]:
    """The names of the source files that are opened from now on; files count as settled at once."""
    monkeypatch.setattr(scan_cache, "SETTLED", -3600.0)
    open_storage(tmp_path / "out").write(LOCK, "")  # as if a run had begun
    names, source, real = [], tmp_path / "source", builtins.open

    def counting(file, *arguments, **options):
        if isinstance(file, str | os.PathLike) and Path(file).is_relative_to(source):
            names.append(Path(file).name)
        return real(file, *arguments, **options)

    monkeypatch.setattr(builtins, "open", counting)
    return names


def test_a_second_plan_reads_nothing_but_stat(tmp_path, opened):
    write_images(tmp_path / "source", 6)
    (tmp_path / "source" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    del opened[:]
    first = make_plan(config(tmp_path))
    assert len(opened) == 6 + 1 + 6  # images, the broken one, sidecars
    del opened[:]
    second = make_plan(config(tmp_path))
    assert opened == []
    assert (second.sources, second.rejects, second.recipes) == (first.sources, first.rejects, first.recipes)
    assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == [".lock", "runs", "scan.parquet"]


def test_a_plan_for_a_place_that_is_no_dataset_writes_nothing(tmp_path, opened):
    write_images(tmp_path / "source", 2)
    (tmp_path / "out" / LOCK).unlink()
    (tmp_path / "out" / "holiday.txt").write_text("A folder that was named by mistake.")
    make_plan(config(tmp_path))
    assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == ["holiday.txt", "runs"]


@pytest.mark.parametrize("change", ["size", "mtime", "same size and mtime", "restored"])
def test_any_change_of_a_file_is_seen(tmp_path, opened, change):
    source = tmp_path / "source"
    write_images(source, 3)
    shutil.copy2(source / "image-001.png", tmp_path / "copy.png")
    first = make_plan(config(tmp_path))
    path = source / "image-001.png"
    data, times = bytearray(path.read_bytes()), path.stat()
    time.sleep(0.02)  # more than a tick of the clock of the file system
    if change == "size":
        path.write_bytes(data + b"\0")
    elif change == "mtime":
        data[-1] ^= 1
        path.write_bytes(data)
    elif change == "same size and mtime":
        data[-1] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    else:
        shutil.copy2(tmp_path / "copy.png", path)
    del opened[:]
    second = make_plan(config(tmp_path))
    assert opened == ["image-001.png"]
    assert (set(second.sources) == set(first.sources)) == (change == "restored")


def test_a_file_that_may_change_within_the_same_tick_is_not_remembered(tmp_path):
    (tmp_path / "young").write_bytes(b"1")
    (tmp_path / "future").write_bytes(b"1")
    os.utime(tmp_path / "future", (time.time() + 1e6, time.time() + 1e6))
    for _ in range(2):
        with ScanCache(open_storage(tmp_path / "out"), tmp_path, {}) as cache:
            assert list(cache.look_all(["young", "future"], lambda name: {"key": name})) == [
                {"key": "young"},
                {"key": "future"},
            ]
    assert not (tmp_path / "out").exists()


def test_other_settings_forget_and_what_was_not_looked_at_is_dropped(tmp_path, opened):
    storage = open_storage(tmp_path / "out")
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"1")

    def remembered(settings: dict, *names: str) -> list[str]:
        read = []
        with ScanCache(storage, tmp_path, settings) as cache:
            list(cache.look_all(names, lambda name: read.append(name) or {"key": name}))
        return read

    assert remembered({"max_pixels": 1}, "a", "b") == ["a", "b"]
    assert remembered({"max_pixels": 1}, "a", "b") == []
    assert remembered({"max_pixels": 2}, "a", "b") == ["a", "b"]
    assert remembered({"max_pixels": 2}, "a") == []
    assert remembered({"max_pixels": 2}, "b") == ["b"]


def test_a_scan_that_is_killed_had_kept_what_it_had_seen(tmp_path, opened, monkeypatch):
    monkeypatch.setattr(scan_cache, "SAVED_EVERY", 0.0)
    monkeypatch.setattr(scan_cache, "COUNTED", 2)
    names = [f"{number}" for number in range(6)]
    for name in names:
        (tmp_path / name).write_bytes(b"1")
    storage = open_storage(tmp_path / "out")
    looking = ScanCache(storage, tmp_path, {}).look_all(names, lambda name: {"key": name})
    for _ in range(5):  # of which two times two are through
        next(looking)
    again = []
    list(ScanCache(storage, tmp_path, {}).look_all(names, lambda name: again.append(name) or {}))
    assert sorted(again) == ["4", "5"]


def test_a_file_that_is_gone_or_fails_is_not_remembered(tmp_path, opened):
    storage = open_storage(tmp_path / "out")
    (tmp_path / "a").write_bytes(b"1")
    for _ in range(2):
        with ScanCache(storage, tmp_path, {}) as cache:
            gone, failed = cache.look_all(["gone", "a"], lambda name: ValueError(name))
            assert gone is None
            assert isinstance(failed, ValueError)


def test_an_interrupted_scan_keeps_what_it_has_seen_and_damage_is_forgotten(tmp_path, opened):
    storage = open_storage(tmp_path / "out")
    (tmp_path / "a").write_bytes(b"1")
    cache = ScanCache(storage, tmp_path, {})
    list(cache.look_all(["a"], lambda name: {"key": "1"}))
    cache.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    with ScanCache(storage, tmp_path, {}) as cache:
        assert list(cache.look_all(["a"], lambda name: pytest.fail("read again"))) == [{"key": "1"}]
    (tmp_path / "out" / scan_cache.NAME).write_bytes(b"PAR1")
    with ScanCache(storage, tmp_path, {}) as cache:
        assert list(cache.look_all(["a"], lambda name: {"key": "2"})) == [{"key": "2"}]


def test_many_new_files_are_read_ahead_and_no_unchanged_one_again(tmp_path, monkeypatch):
    monkeypatch.setattr(scan_cache, "MANY", 3)
    monkeypatch.setattr(scan_cache, "SETTLED", -3600.0)
    folder, storage = tmp_path / "source", open_storage(tmp_path / "out")
    folder.mkdir()
    names = [f"{number}.png" for number in range(6)]
    for name in names:
        (folder / name).write_text(name)
    storage.write("dataset.json", "{}")
    asked: list[str] = []
    here: list[str] = []

    def ahead(unknown):
        asked.extend(unknown)
        sizes = {name: (folder / name).stat().st_size + (name == "3.png") for name in unknown}  # of another folder
        yield from ((name, {"key": f"far {name}", "size_bytes": sizes[name]}) for name in unknown if name != "4.png")

    def look(**options) -> list:
        asked.clear()
        here.clear()
        with ScanCache(storage, folder, {"code": 1}) as cache:
            return [*cache.look_all(names, lambda name: here.append(name) or {"key": f"here {name}"}, **options)]

    first = look(ahead=ahead)
    local = ["3.png", "4.png"]
    assert [value["key"] for value in first] == [f"{'here' if name in local else 'far'} {name}" for name in names]
    assert (asked, sorted(here)) == (names, local)
    assert look(ahead=ahead) == first
    assert (asked, here) == ([], [])
    for name in names[:2]:  # fewer than are worth a pass
        (folder / name).write_text("other content")
    assert [value["key"] for value in look(ahead=ahead)][:3] == ["here 0.png", "here 1.png", "far 2.png"]
    assert asked == []
    assert sorted(here) == names[:2]


def test_what_was_read_ahead_is_kept_when_the_scan_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(scan_cache, "MANY", 1)
    monkeypatch.setattr(scan_cache, "SETTLED", -3600.0)
    monkeypatch.setattr(scan_cache, "SAVED_EVERY", -1.0)
    folder, storage = tmp_path / "source", open_storage(tmp_path / "out")
    folder.mkdir()
    names = ["a.png", "b.png"]
    for name in names:
        (folder / name).write_text(name)
    storage.write("dataset.json", "{}")

    def ahead(unknown):
        yield "a.png", {"key": "far", "size_bytes": 5}
        raise SystemExit  # as if the process were killed: nothing is written at the end

    cache = ScanCache(storage, folder, {"code": 1})
    with pytest.raises(SystemExit):
        [*cache.look_all(names, lambda name: pytest.fail("read here"), ahead)]
    again = ScanCache(storage, folder, {"code": 1})
    assert [*again.look_all(names, lambda name: {"key": "here"})] == [
        {"key": "far", "size_bytes": 5},
        {"key": "here"},
    ]
