"""Folders and files that cannot be read just now: each is said, nothing of it counts as gone, and none is pruned."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from nanodit.errors import DataError, ResourceError
from nanodit.storage import open_storage
from prep.dataset.layout import read_part
from prep.doctor.places import source_checks
from prep.images import scan_cache
from prep.images.scan import find_files
from prep.passes.plan import make_plan, read_manifest
from tests.prep.passes.test_missing_sources import image, poses, prepare, rejects_of, sources_of, text_only
from tests.prep.passes.test_plan import config, write_images
from tests.unprivileged import permissions_count

SUB = "sub/deep"


@pytest.fixture
def tree(tmp_path) -> Path:
    """Three images at the top and three two folders below."""
    source = tmp_path / "source"
    write_images(source, 6)
    (source / SUB).mkdir(parents=True)
    for number in range(3, 6):
        for path in source.glob(f"image-{number:03d}.*"):
            path.rename(source / SUB / path.name)
    return source


ALL = {*(image(number) for number in range(3)), *(f"{SUB}/{image(number)}" for number in range(3, 6))}


@pytest.fixture(params=["mode", "EIO", "ESTALE"])
def closed(request, tree, monkeypatch):
    """Close ``sub`` to everybody: by its mode, where permissions bind, or by a disk that fails."""
    if request.param == "mode":
        with permissions_count():
            (tree / "sub").chmod(0)
            yield os.strerror(errno.EACCES)
            (tree / "sub").chmod(0o755)
        return
    number, real = getattr(errno, request.param), os.scandir

    def failing(path="."):
        if Path(path) == tree / "sub":
            raise OSError(number, os.strerror(number), str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", failing)
    yield os.strerror(number)
    monkeypatch.undo()


@pytest.fixture
def published(tree, tmp_path):
    return prepare(poses(tmp_path))


def test_a_folder_that_cannot_be_listed_is_a_row_and_nothing_below_it_is_gone(published, closed, tmp_path):
    plan = make_plan(poses(tmp_path))
    assert (plan.missing, len(plan.sources)) == ({}, 6)
    assert [(reject.source, reject.reason) for reject in plan.rejects] == [("sub", "unreadable_folder")]
    assert plan.rejects[0].detail.startswith(closed)
    assert plan.notes == [
        "refused before anything is computed: 1 of 7 sources (1 unreadable_folder)",
        f"warning: folders that cannot be listed: sub ({closed}). Images in them are missing",
        "warning: 3 prepared sources cannot be read now: their samples stay",
    ]
    after = prepare(poses(tmp_path))
    assert sources_of(after) == ALL
    assert rejects_of(tmp_path / "out") == {"sub": ("source", "unreadable_folder")}
    assert {row["key"]: row["split"] for row in after.rows()} == {row["key"]: row["split"] for row in published.rows()}


def test_prune_refuses_and_names_the_folder(published, closed, tree, tmp_path):
    (tree / image(0)).unlink()  # or moved to where nobody can look
    with pytest.raises(ResourceError, match=rf"--prune .* cannot be listed: sub \({closed}\)\. Nothing was dropped"):
        make_plan(poses(tmp_path), prune=True)
    assert len(read_manifest(tmp_path / "out")) == 6
    assert make_plan(poses(tmp_path)).notes[-1] == "1 sources are gone; --prune drops their samples"


def test_it_is_as_before_when_the_folder_can_be_read_again(published, tree, tmp_path):
    with permissions_count():
        (tree / "sub").chmod(0)
        prepare(poses(tmp_path))
        (tree / "sub").chmod(0o755)
        after = prepare(poses(tmp_path))
    assert after.fingerprint == published.fingerprint
    assert make_plan(poses(tmp_path), prune=True).notes == []


def test_a_new_dataset_is_made_of_what_can_be_read(tree, closed, tmp_path):
    assert len(prepare(poses(tmp_path))) == 3
    assert rejects_of(tmp_path / "out") == {"sub": ("source", "unreadable_folder")}


def test_a_folder_that_can_be_listed_and_not_entered(published, tree, tmp_path, monkeypatch):
    """Mode r--: names are known and nothing can be opened."""
    with permissions_count():
        (tree / SUB).chmod(0o444)
        plans = [make_plan(poses(tmp_path)), make_plan(poses(tmp_path), prune=True)]
        (tree / SUB).chmod(0o755)
    for plan in plans:  # what is there is not gone, and no other content either
        assert (plan.missing, len(plan.sources), plan.seen) == ({}, 6, 6)
        assert {reject.reason for reject in plan.rejects} == {"unreadable"}
        assert plan.notes[-1] == "warning: 3 prepared sources cannot be read now: their samples stay"


def test_a_file_that_cannot_be_read_keeps_its_sample(published, tree, tmp_path):
    os.utime(tree / image(1))  # it has to be read again
    with permissions_count():
        (tree / image(1)).chmod(0)
        after = prepare(poses(tmp_path))
        (tree / image(1)).chmod(0o644)
    assert sources_of(after) == ALL
    assert rejects_of(tmp_path / "out") == {image(1): ("source", "unreadable")}


def test_a_link_into_a_folder_that_cannot_be_entered_is_a_row(tree, tmp_path):
    (tree / "link.png").symlink_to(tree / SUB / image(3))
    with permissions_count():
        (tree / "sub").chmod(0)
        found = find_files(tree)
        (tree / "sub").chmod(0o755)
    assert len(found.names) == 3
    assert [(item.source, item.reason) for item in found.rejects] == [
        ("link.png", "unreadable"),
        ("sub", "unreadable_folder"),
    ]


def test_a_listing_that_breaks_off_is_no_listing(published, tree, tmp_path, monkeypatch):
    real = os.scandir

    class Broken:
        def __init__(self, path):
            self.entries = real(path)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.entries.close()

        def __iter__(self):
            yield next(entry for entry in self.entries if entry.name.endswith(".png"))
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "scandir", lambda path: Broken(path) if Path(path) == tree / SUB else real(path))
    plan = make_plan(poses(tmp_path))
    assert (plan.missing, len(plan.sources)) == ({}, 6)
    assert [(reject.source, reject.reason) for reject in plan.rejects] == [(SUB, "unreadable_folder")]


def test_a_folder_that_is_deleted_while_the_source_is_listed_is_gone(published, tree, tmp_path, monkeypatch):
    real = os.scandir

    def vanishing(path="."):
        if str(path) == str(tree / "sub"):
            shutil.move(path, tmp_path / "elsewhere")
        return real(path)

    monkeypatch.setattr(os, "scandir", vanishing)
    plan = make_plan(poses(tmp_path))
    assert plan.notes == ["3 sources are gone; --prune drops their samples"]


def test_a_source_that_cannot_be_listed_itself_ends_with_a_sentence(published, tree, tmp_path):
    with permissions_count():
        tree.chmod(0)
        with pytest.raises(ResourceError, match=r"source .* cannot be listed: Permission denied"):
            make_plan(poses(tmp_path))
        (check,), _ = source_checks(poses(tmp_path))
        tree.chmod(0o755)
    assert (check.status, check.code) == ("FAIL", 4)


def test_doctor_names_the_folder(tree, closed, tmp_path):
    checks, images = source_checks(poses(tmp_path))
    check = checks[-1]
    assert (check.name, check.status, images) == ("refused", "WARN", 3)
    assert "1 unreadable_folder" in check.found
    assert f"sub: {closed}" in check.fix


def test_captions_that_cannot_be_read_stay_as_they_were(tree, tmp_path):
    settings = config(tmp_path, captions={"on_missing": "reject"})
    text_only(make_plan(settings))
    before = make_plan(settings)
    sidecar = tree / "image-001.txt"
    os.utime(sidecar)
    with permissions_count():
        sidecar.chmod(0)
        plan = make_plan(settings)
        for other in {*tree.rglob("*.txt")} - {sidecar}:
            other.write_text(f"Another caption of {other.name}.")
        changed = make_plan(settings)  # and its unit can be made again
        text_only(changed)
        sidecar.chmod(0o644)
    assert plan.recipes == before.recipes
    assert "warning: 1 captions cannot be read now: those made before stay" in plan.notes
    assert plan.expected == changed.expected == []
    parts = [read_part(tmp_path / "out", unit) for unit in changed.recipes if unit.layer == "text"]
    captions = [text for part in parts for text in part.table["caption"].to_pylist()]
    assert sorted(captions)[-1] == "Picture number 1."
    assert sum(text.startswith("Another caption") for text in captions) == 5


def test_a_caption_that_was_never_read_is_refused_with_its_reason(tree, tmp_path):
    with permissions_count():
        (tree / "image-001.txt").chmod(0)
        (reject,) = make_plan(config(tmp_path, captions={"on_missing": "reject"})).expected
        with pytest.raises(DataError, match=r"1 caption_unreadable\): image-001.txt: Permission denied"):
            make_plan(config(tmp_path))
        (tree / "image-001.txt").chmod(0o644)
    assert (reject.source, reject.reason) == (image(1), "caption_unreadable")


def test_a_bucket_folder_of_a_dataset_that_cannot_be_listed_is_not_taken_for_empty(published, tmp_path):
    (bucket,) = (tmp_path / "out").glob("bucket_*")
    (tmp_path / "out" / "lost+found").mkdir()
    with permissions_count():
        (tmp_path / "out" / "lost+found").chmod(0)
        assert open_storage(tmp_path / "out").names("bucket_")
        bucket.chmod(0)
        with pytest.raises(ResourceError, match=f"{bucket.name} cannot be read: Permission denied"):
            open_storage(tmp_path / "out").names("bucket_")
        bucket.chmod(0o755)


def test_what_cannot_be_read_is_not_remembered(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(scan_cache, "SETTLED", -3600.0)
    prepare(poses(tmp_path))
    real = scan_cache.os.stat

    def failing(path, *arguments, **options):
        if str(path).endswith(image(1)):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(scan_cache.os, "stat", failing)
        plan = make_plan(poses(tmp_path))
        assert [(reject.source, reject.reason) for reject in plan.rejects] == [(image(1), "unreadable")]
        assert len(plan.sources) == 6
    assert make_plan(poses(tmp_path)).notes == []


def test_doctor_knows_that_a_caption_which_cannot_be_read_now_stays(tmp_path):
    write_images(tmp_path / "source", 3)
    settings = config(tmp_path)
    prepare(settings)
    closed = tmp_path / "source" / "image-001.txt"
    closed.unlink()
    closed.mkdir()
    assert make_plan(settings).missing == {}
    checks = {check.name: (check.status, check.found) for check in source_checks(settings)[0]}
    assert checks["captions"] == ("WARN", "1 captions cannot be read now: those made before stay")
