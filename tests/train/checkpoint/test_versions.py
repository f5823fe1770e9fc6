"""A run and the versions of its dataset: it goes on with the one it began on, or with the newest where asked to."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from nanodit.errors import DataError
from prep.__main__ import main as prep
from prep.dataset.reader import Dataset
from prep.dataset.rows import Rows
from prep.run import run
from tests.prep.passes.test_plan import config, write_images
from tests.prep.test_run import LocalPipeline
from tests.train.tiny import write_config
from train.__main__ import main
from train.checkpoint.checkpoint import load_checkpoint
from train.checkpoint.resume import changed_versions
from train.loop.tracking import read_metrics

IMAGES, STEPS = 24, 12


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Images, the dataset of their captions, and a run on it that nothing disturbed. Read only."""
    folder = tmp_path_factory.mktemp("versions")
    write_images(folder / "source", IMAGES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "prep.passes.ray_passes", LocalPipeline())
        run(config(folder))
    assert train(folder) == 0
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch) -> Path:
    """A copy, in which everything of the run after step 6 is lost."""
    monkeypatch.setitem(sys.modules, "prep.passes.ray_passes", LocalPipeline())
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    lose(tmp_path, 9, 12)
    return tmp_path


def train(folder: Path, *arguments: str) -> int:
    settings = write_config(folder / "c.yaml", folder / "out", folder / "run")
    return main(["run", "--config", str(settings), "data.cache_gb=0", *arguments])


def lose(folder: Path, *steps: int) -> None:
    for step in steps:
        shutil.rmtree(folder / "run" / "checkpoints" / f"step-{step:06d}")


def change(folder: Path) -> None:
    """Prune two images, mend a caption, add six images, and publish that."""
    train_rows = [row["source"] for row in Dataset(folder / "out").rows("train")]
    for source in train_rows[:2]:
        (folder / "source" / source).unlink()
    (folder / "source" / train_rows[2]).with_suffix(".txt").write_text("A caption that was mended.")
    write_images(folder / "source", 6, first=50)
    run(config(folder), prune=True)


def outcome(folder: Path) -> tuple[dict[str, bytes], list[dict[str, float]]]:
    """The last weights, averages and optimiser state, and what was logged of the training itself."""
    last = folder / "run" / "checkpoints" / f"step-{STEPS:06d}"
    logged = [
        {name: value for name, value in record.items() if not name.startswith(("sys/", "memory/"))}
        for record in read_metrics(folder / "run" / "metrics.jsonl")
    ]
    return {file.name: file.read_bytes() for file in last.glob("*.safetensors")}, logged


def test_t07_a_run_goes_on_with_the_version_it_began_on(place, made, capsys):
    began = Dataset(place / "out").fingerprint
    change(place)
    assert train(place) == 0
    assert f"going on with version {began}" in capsys.readouterr().out
    assert outcome(place) == outcome(made)
    assert train(place) == 0
    assert "already trained to step 12" in capsys.readouterr().out


def test_t07_also_before_its_first_checkpoint(place, made):
    lose(place, 3, 6)
    change(place)
    assert train(place) == 0
    assert outcome(place) == outcome(made)


def test_a_new_run_takes_the_newest_version(place):
    shutil.rmtree(place / "run")
    change(place)
    assert train(place) == 0
    state = load_checkpoint(place / "run" / "checkpoints" / "step-000012").state
    assert state["dataset"]["fingerprint"] == Dataset(place / "out").fingerprint
    assert state["earlier_datasets"] == []


def test_a_run_may_go_on_with_the_newest_version_exactly_however_often_it_is_killed(place, made, capsys):
    began = Dataset(place / "out").fingerprint
    change(place)
    newest = Dataset(place / "out").fingerprint
    assert train(place, "--dataset-version", "new") == 0
    said = f"version {began} -> {newest}: 6 images added, 2 gone, 1 captions changed"
    assert said in capsys.readouterr().out
    expected = outcome(place)
    assert expected != outcome(made)
    state = load_checkpoint(place / "run" / "checkpoints" / "step-000012").state
    assert state["dataset"]["fingerprint"] == newest
    assert state["earlier_datasets"] == [{"fingerprint": began, "until_step": 6}]
    lose(place, 12)
    assert train(place) == 0  # from step 9, which was trained on the new one
    assert outcome(place) == expected
    lose(place, 9, 12)
    assert train(place) == 0  # from step 6, which was not
    assert outcome(place) == outcome(made)


@pytest.mark.parametrize("arguments", [[], ["--dataset-version", "new"]])
def test_t07_a_dropped_version_ends_the_run_with_3_and_is_named(place, capsys, arguments):
    began = Dataset(place / "out").fingerprint
    change(place)
    assert prep(["versions", str(place / "out"), "--drop", began, "--yes"]) == 0
    assert train(place, *arguments) == 3
    error = capsys.readouterr().err
    assert f"was trained on {began}, which is no version that is kept there" in error
    lose(place, 3, 6)
    assert train(place, *arguments) == 0  # nothing of it was saved
    assert f"version {began} is not kept; beginning anew" in capsys.readouterr().out


def test_e01_a_newer_version_that_holds_out_what_the_run_was_trained_on_is_refused(place, capsys):
    before = Dataset(place / "out")
    change(place)
    after = Dataset(place / "out")
    assert changed_versions(before, after).endswith("6 images added, 2 gone, 1 captions changed")
    known = {row["key"] for row in before.rows()}
    rows = [dict(row) for row in after.rows()]
    leaked = next(row for row in rows if row["split"] == "train" and row["key"] in known)
    leaked["split"] = "holdout"
    after._rows = Rows.of(rows)
    with pytest.raises(DataError, match=f"1 images that the run was trained on are in the holdout.*{leaked['key']}"):
        changed_versions(before, after)


def test_pictures_and_evaluations_are_of_the_version_of_the_checkpoint(place):
    from evaluate.__main__ import main as evaluate

    held_out = Dataset(place / "out").rows("holdout")
    began = Dataset(place / "out").fingerprint
    for row in held_out[1:]:
        (place / "source" / row["source"]).unlink()
    change(place)
    assert not {row["key"] for row in held_out[1:]} & {row["key"] for row in Dataset(place / "out").rows()}
    checkpoint = ["--checkpoint", str(place / "run" / "checkpoints" / "step-000006"), "--dataset", str(place / "out")]
    arguments = ["--key", held_out[1]["key"], "--steps", "2", "--output", str(place / "picture.png")]
    assert main(["sample", *checkpoint, *arguments]) == 0
    assert evaluate(["run", *checkpoint, "--tier", "pulse", "--tests", "heldout_loss"]) == 0
    (report,) = (place / "run").rglob("report.json")
    assert json.loads(report.read_text())["provenance"]["dataset"]["fingerprint"] == began
