"""evaluate compare: both checkpoints draw the same prompts from the same noise, and the page hides which is which."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluate.__main__ import main
from evaluate.votes.ballots import page_id
from nanodit.files import sha256_file
from prep.dataset.reader import Dataset
from tests.train.tiny import write_config, write_dataset
from train.__main__ import main as train

FAST = ["sampler.steps=2", "sampler.method=euler"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A run with two checkpoints, and one on another dataset."""
    folder = tmp_path_factory.mktemp("blind")
    for name, seed in (("run", 0), ("foreign", 1)):
        dataset = write_dataset(folder / f"dataset-{seed}", seed, encoders="production")
        config = write_config(folder / f"{name}.yaml", dataset, folder / name)
        assert train(["run", "--config", str(config), "train.steps=4", "checkpoint.every_steps=2"]) == 0
    return folder


@pytest.fixture(scope="module")
def steps(place) -> list[str]:
    return [str(place / "run" / "checkpoints" / f"step-00000{step}") for step in (2, 4)]


def made(page: Path) -> tuple[dict, list[dict]]:
    """What the page's JSON will hold, and what it shows."""
    found = json.loads(re.search(r'id="page">(.*?)</script>', page.read_text(), re.S)[1])
    return json.loads(base64.b64decode(found["sealed"])), found["trials"]


def pixels(picture: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture["data"].partition(",")[2]))))


@pytest.fixture(scope="module")
def page(place, steps) -> Path:
    assert main(["compare", *steps, "--page", str(place / "page.html"), "--prompts", "3", *FAST]) == 0
    return place / "page.html"


def test_the_page_shows_what_it_says(page, place, steps, tmp_path):
    sealed, trials = made(page)
    assert page_id(sealed) == sealed["page"]
    dataset = Dataset(place / "dataset-0")
    assert sealed["dataset"] == dataset.fingerprint
    assert sealed["drawn"]["conditions"] == "text"
    assert sealed["drawn"]["guidance"] == 2.0  # that of the config for text
    assert sealed["drawn"]["sampler"]["steps"] == 2
    for run, step in zip(("A", "B"), steps):
        assert sealed["runs"][run] == {
            "run": str(place / "run"), "step": int(step[-1]), "weights": "ema",
            "weights_sha256": sha256_file(Path(step) / "ema.safetensors"),
        }  # fmt: skip
    rows = {row["key"]: row for row in dataset.rows("holdout")}
    assert len(trials) == 5
    for trial, shown in zip(sealed["trials"], trials):
        assert shown["prompt"] == rows[trial["key"]]["caption"]
        for side, picture in zip(("left", "right"), shown["pictures"]):
            if trial[side] == "real":
                assert np.array_equal(pixels(picture), dataset.pixels(rows[trial["key"]]))
            else:
                key = trial["donor"] or trial["key"]
                step = steps["AB".index(trial[side])]
                out = tmp_path / f"{key}-{trial[side]}.png"
                given = [
                    "--conditions", "text", "--guidance", "2", "--guidance-interval", "0", "1", "--steps", "2",
                    "--sampler", "euler",
                ]  # fmt: skip
                command = ["sample", "--checkpoint", step, "--key", key, *given, "--output", str(out)]
                assert train(command) == 0
                off = np.abs(pixels(picture).astype(int) - np.asarray(Image.open(out).convert("RGB")))
                assert off.max() <= 1  # another batch, other last bits


def test_the_same_command_makes_the_same_bytes(page, steps, tmp_path):
    again = [*steps, *FAST, "--prompts", "3", "--page", str(tmp_path / "again.html")]
    assert main(["compare", *again]) == 0
    assert (tmp_path / "again.html").read_bytes() == page.read_bytes()


def test_short_captions_are_shown_where_they_are_given(place, steps, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["compare", *steps, "captions=short", "--page", str(page), "--prompts", "3", *FAST]) == 0
    said = capsys.readouterr().out
    assert "warning: 3 independent prompts: below 8, votes have no interval and no verdict" in said
    assert f"wrote {page}: 3 pairs and 2 catch trials" in said
    sealed, trials = made(page)
    short = {row["key"]: row["caption"] for row in Dataset(place / "dataset-0").with_short_captions().rows("holdout")}
    assert [shown["prompt"] for shown in trials] == [short[trial["key"]] for trial in sealed["trials"]]
    assert sealed["drawn"]["captions"] == "short"
    assert sealed["drawn"]["holdout"] == "test"


def test_the_page_does_not_name_the_runs(page, place):
    text = re.sub(r'"(data|sealed)": "[^"]*"', "", page.read_text())
    assert str(place) not in text
    assert "step-0" not in text


@pytest.mark.parametrize(
    ("given", "code", "says"),
    [
        (["--prompts", "3", "samples=5"], 2, "samples=5: the number of prompts is --prompts"),
        (["--conditions", "nothing"], 2, "text must be among them"),
        (["--conditions", "text+nose"], 2, "nose"),
        (["--weights", "posthoc:0.05"], 2, "ema.snapshots"),
        (["captions=medium"], 2, "captions"),
        ([f"seed={2**53 + 3}"], 2, "a page of votes holds no number above 9007199254740992"),
        (["--page", "PLACE"], 2, "is a folder; name a file"),
    ],
)
def test_what_cannot_be_compared_says_why(place, steps, tmp_path, capsys, given, code, says):
    given = [str(place) if one == "PLACE" else one for one in given]
    page = [] if "--page" in given else ["--page", str(tmp_path / "page.html")]
    assert main(["compare", *steps, *page, *given]) == code
    assert says in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_only_two_checkpoints_of_one_dataset_are_compared(place, steps, tmp_path, capsys):
    page = ["--page", str(tmp_path / "page.html")]
    assert main(["compare", steps[0], str(place / "foreign"), *page]) == 3
    assert "one version of one dataset" in capsys.readouterr().err
    assert main(["compare", steps[1], str(place / "run"), *page]) == 2
    assert "have the same ema weights" in capsys.readouterr().err
    assert main(["compare", steps[0], str(place), *page]) == 2
    assert "neither a checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given", [["a", "b"], ["a", "--page", "x"], ["a", "b", "--page", "x", "--prompts", "1"], ["a", "b", "--pag", "x"]]
)
def test_usage_errors_end_with_2(given, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["compare", *given])
    assert "usage" in capsys.readouterr().err
