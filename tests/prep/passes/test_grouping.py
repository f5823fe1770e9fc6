"""``split.group_by``: what a person wants on one side is on one side, and what cannot be so is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from nanodit.errors import ConfigError
from prep.config import PrepConfig
from prep.passes.advice import warn
from prep.passes.grouping import join_named, name_groups
from prep.passes.plan import make_plan
from prep.verify.verify import verify
from tests.prep.images.test_altered import settings
from tests.prep.images.test_duplicates import photograph, prepare

FOLDERS, EACH = 8, 3


@pytest.fixture
def source(tmp_path) -> Path:
    """Three pictures in each of eight folders, taken within minutes by one of two cameras, and one without a folder."""
    for number in range(FOLDERS * EACH):
        folder, index = divmod(number, EACH)
        exif = Image.Exif()
        exif[272] = ("one", "other")[folder % 2]
        exif.get_ifd(34665)[36867] = f"2024:05:01 {8 + folder // 2:02d}:{index * 4:02d}:30"
        path = tmp_path / "source" / f"shoot {folder}" / f"model{folder:02d}-{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph(number, 128)).save(path, exif=exif)
    Image.fromarray(photograph(99, 128)).save(tmp_path / "source" / "alone.png")
    rows = [f"shoot {number // EACH}/model{number // EACH:02d}-{number}.png,{number // EACH}" for number in range(24)]
    (tmp_path / "people.csv").write_text("\n".join(["file_name,person", *rows, "gone.png,8"]))
    return tmp_path


def rules(folder: Path) -> dict[str, dict[str, object]]:
    return {
        "folder": {"group_by": "folder"},
        "name": {"group_by": "name", "pattern": r"/(model\d\d)-"},
        "csv": {"group_by": "csv", "csv": str(folder / "people.csv"), "column": "person"},
        "date": {"group_by": "date", "minutes": 5},
    }


@pytest.mark.parametrize("rule", ["folder", "name", "csv", "date"])
def test_a_group_stays_on_one_side(source, rule):
    dataset = prepare(settings(source, split=rules(source)[rule]))
    sides: dict[str, set[str]] = {}
    groups: dict[str, set[str]] = {}
    for row in dataset.rows():
        shoot = row["source"].rpartition("/")[0]
        sides.setdefault(shoot, set()).add(row["split"])
        groups.setdefault(shoot, set()).add(row["split_group"])
        assert row["duplicate_group"] == row["key"]  # nothing is a near duplicate of anything
    assert len(sides) == FOLDERS + 1
    assert all(len(side) == 1 for side in sides.values())
    assert all(len(group) == 1 for group in groups.values())
    assert len(set().union(*groups.values())) == FOLDERS + 1
    assert sum(side == {"holdout"} for side in sides.values()) >= 2
    described = json.loads((source / "out" / "dataset.json").read_text())["stages"]["split"]
    assert described["group_by"] == rule
    assert str(source) not in json.dumps(described)
    verify(source / "out")


def test_published_samples_stay_and_a_torn_group_refuses_nothing(source, capsys):
    before = {row["key"]: row["split"] for row in prepare(settings(source)).rows()}
    for folder in range(FOLDERS):
        Image.fromarray(photograph(1000 + folder, 128)).save(source / "source" / f"shoot {folder}" / "new.png")
    after = {row["key"]: row for row in prepare(settings(source, split=rules(source)["folder"])).rows()}
    assert len(after) == len(before) + FOLDERS
    assert {key: after[key]["split"] for key in before} == before
    shoots: dict[str, set[str]] = {}
    for key, side in before.items():
        shoots.setdefault(after[key]["source"].rpartition("/")[0], set()).add(side)
    torn = [shoot for shoot, both in shoots.items() if shoot and len(both) == 2]
    assert torn
    assert f"warning: {len(torn)} groups by split.group_by lie on both sides" in capsys.readouterr().out
    for row in after.values():
        shoot = row["source"].rpartition("/")[0]
        if row["key"] not in before and shoot not in torn:
            assert {row["split"]} == shoots[shoot]


def test_images_without_a_group_are_counted_before_anything_is_computed(source, capsys):
    plan = make_plan(settings(source, split=rules(source)["csv"]))
    said = "split.group_by is csv: 1 of 25 images have no group and are split one by one, the first is alone.png"
    assert said in plan.notes
    with pytest.raises(ConfigError, match="none of 25 images has a group"):
        make_plan(settings(source, split={"group_by": "name", "pattern": "nothing like it"}))
    (source / "source" / "shoot 0" / "model00-0.png").unlink()
    prepare(settings(source, split=rules(source)["date"]))
    assert "1 of 24 images have no date (or their file is gone) and are split one by one" in capsys.readouterr().out


def test_a_first_publication_that_was_killed_does_not_keep_a_split_without_groups(source):
    prepare(settings(source))
    (source / "out" / "dataset.json").unlink()  # it comes last: nobody has read this version
    (source / "out" / "runs" / "published.json").unlink()
    sides: dict[str, set[str]] = {}
    for row in prepare(settings(source, split=rules(source)["csv"])).rows():
        sides.setdefault(row["source"].rpartition("/")[0], set()).add(row["split"])
    assert all(len(side) == 1 for side in sides.values())


@pytest.mark.parametrize("copied", [ImageOps.mirror, lambda image: image.resize((64, 64))])
def test_a_copy_of_a_training_image_in_a_published_group_leaves_the_others_of_it_together(source, copied, capsys):
    config = settings(source, split=rules(source)["folder"])
    rows = list(prepare(config).rows())
    shoot = next(row["source"].rpartition("/")[0] for row in rows if row["split"] == "holdout" and "/" in row["source"])
    trained = next(row["source"] for row in rows if row["split"] == "train")
    copied(Image.open(source / "source" / trained)).save(source / "source" / shoot / "copy.png")
    for number in range(6):
        Image.fromarray(photograph(1000 + number, 128)).save(source / "source" / shoot / f"new{number}.png")
    capsys.readouterr()
    after = {row["source"]: row for row in prepare(config).rows()}
    assert after[f"{shoot}/copy.png"]["split"] == "train"
    held = [row for name, row in after.items() if name.startswith(f"{shoot}/") and name != f"{shoot}/copy.png"]
    assert [row["split"] for row in held] == ["holdout"] * (EACH + 6)
    assert len({row["split_group"] for row in held}) == 1  # of intervals they are one all the same
    assert "warning: 1 groups by split.group_by lie on both sides" in capsys.readouterr().out
    verify(source / "out")


def test_groups_larger_than_the_holdout_are_said(source):
    config = settings(source, split={"group_by": "name", "pattern": "model"})
    dataset = prepare(config)
    assert {row["source"] for row in dataset.rows("holdout")} == {"alone.png"}
    table = dataset.table.filter(np.asarray(dataset.table["source"]) != "alone.png")
    said = "24 samples in 1 groups by split.group_by: none is small enough for a holdout. Nothing can be validated"
    assert any(said in line for line in warn(table, {}))


def test_joining_leaves_torn_groups_and_those_they_are_connected_with_alone():
    groups = {key: key for key in "abcdef"} | {"b": "a"}
    named = {"a": "x", "c": "x", "d": "y", "e": "y", "f": "z"}
    joined, torn = join_named(groups, named, {"a": "train", "d": "train", "e": "holdout"})
    assert (joined, torn) == ({"a": "a", "b": "a", "c": "a", "d": "d", "e": "e", "f": "f"}, 1)


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ({"group_by": "name"}, "split.group_by name needs split.pattern"),
        ({"group_by": "csv", "column": "person"}, "needs split.csv"),
        ({"group_by": "date"}, "needs split.minutes"),
        ({"pattern": "x"}, "split.pattern is not for split.group_by null"),
        ({"group_by": "folder", "minutes": 3}, "split.minutes is not for split.group_by folder"),
        ({"group_by": "name", "pattern": "("}, "is no regular expression"),
        ({"group_by": "date", "minutes": 1e13}, "less than or equal to"),
    ],
)
def test_what_does_not_go_together_is_an_error(split, words):
    with pytest.raises(ValueError, match="split") as caught:
        PrepConfig(source="s", output="o", split=split)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (None, "cannot be read"),
        ("name,person\na.png,1\n", "has no column file_name; it has name, person"),
        ("file_name,who\na.png,1\n", "has no column person"),
        ("file_name,person\na.png,1\na.png,2\n", "row 3: a.png is of 2, but before of 1"),
        ("file_name,person\na.png,\na.png,2\n", "row 3: a.png is of 2, but before of nothing"),
        (b"file_name,person\n\xff.png,1\n", "cannot be read"),
        ("", "has no column file_name and no column person; it has nothing"),
        ("file_name,person\nother.png,1\n", "none of 1 images has a group, not even a.png"),
    ],
)
def test_a_table_that_cannot_be_used_is_an_error(tmp_path, table, words):
    path = tmp_path / "people.csv"
    if table is not None:
        path.write_bytes(table if isinstance(table, bytes) else table.encode())
    config = settings(tmp_path, split={"group_by": "csv", "csv": str(path), "column": "person"})
    with pytest.raises(ConfigError) as caught:
        name_groups(config, {"k": "a.png"})
    assert words in str(caught.value)
