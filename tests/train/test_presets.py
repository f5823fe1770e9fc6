"""The presets: each loads, says what it is for, and fits the GPU that its name promises."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from nanodit.config import load_config
from train.config import TrainConfig
from train.plan.memory import estimate_memory, meta_trainer
from train.plan.plan import look_ahead
from train.plan.rehearsal import Shapes, changed, open_dataset

FOLDER = Path("configs/train")
PRESETS = ("figures-256", "baseline", "production", "production-p16")
OTHERS = ("quickstart", "figures-64-long", "emoji-64", "crops-64", "seed", "seed-baseline")  # one file for all GPUs
SIZES = (8, 12, 16, 24)
WHOLE = {"figures-256": 8, "baseline": 8, "production": 24, "production-p16": 24} | dict.fromkeys(OTHERS, 8)
DESKTOP = 1e9  # bytes of a card that a desktop holds
SIZED = [(preset, size) for preset in PRESETS for size in SIZES]


def file_of(preset: str, size: int | None = None) -> Path:
    return FOLDER / (f"{preset}-{size}gb.yaml" if size else f"{preset}.yaml")


@cache
def peak(preset: str, size: int | None = None, **overrides: object) -> int:
    config = load_config(TrainConfig, file_of(preset, size))
    dataset, _ = open_dataset(config, file_of(preset), None)
    shapes = Shapes.of(dataset.info, dataset.rows("train"))
    changes = {key.replace("__", "."): value for key, value in overrides.items()}
    return estimate_memory(meta_trainer(changed(config, changes), dataset), shapes).peak


def test_every_preset_is_listed_here():
    named = {file_of(preset).name for preset in PRESETS} | {file_of(*sized).name for sized in SIZED}
    assert named | {f"{name}.yaml" for name in ("base", *OTHERS)} == {p.name for p in FOLDER.glob("*.yaml")}


@pytest.mark.parametrize("preset", [*PRESETS, *OTHERS])
def test_the_first_comment_says_what_for_what_with_and_how_long(preset):
    text = file_of(preset).read_text(encoding="utf-8")
    comment = " ".join(line.removeprefix("# ") for line in text.split("\nextends")[0].splitlines())
    assert re.search(r"\b(minutes|hours|days)\b", comment), "how long"
    assert "estimate" in comment or "CPU cores" in comment, "measured on CPU cores, or an estimate"
    if preset in PRESETS or preset.startswith("seed"):
        assert re.search(r"Needs .*configs/prep/[\w-]+\.yaml", comment)
        assert re.search(r"\d+ GB", comment)


@pytest.mark.parametrize(("preset", "size"), SIZED)
def test_the_sized_ones_differ_in_one_line_that_leaves_the_images_of_a_step(preset, size):
    comment, *lines = file_of(preset, size).read_text(encoding="utf-8").splitlines()
    assert comment.startswith("# ")
    assert f"{size} GB" in comment
    assert len(lines) == 2
    assert lines[0] == f"extends: {preset}.yaml"
    config, whole = (load_config(TrainConfig, file_of(preset, one)) for one in (size, None))
    memory = {"token_budget": whole.train.token_budget, "gradient_checkpointing": whole.train.gradient_checkpointing}
    assert config.model_copy(update={"train": config.train.model_copy(update=memory)}) == whole


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "size"), SIZED)
def test_the_sized_ones_fit_their_size_beside_a_desktop_and_use_it(preset, size):
    assert peak(preset, size) <= size * 1e9 - DESKTOP
    config = load_config(TrainConfig, file_of(preset, size)).train
    twice = 2 * config.token_budget
    if preset != "figures-256" or size < 24:  # where a step is one micro-batch
        assert peak(preset, size, train__token_budget=twice) > size * 1e9, "half of the card would lie idle"


@pytest.mark.slow
@pytest.mark.parametrize("preset", [*PRESETS, "seed", "seed-baseline"])
def test_what_the_presets_say_of_time_is_what_plan_says(preset):
    report = look_ahead(file_of(preset), memory="80GB")
    comment = file_of(preset).read_text(encoding="utf-8").split("\nextends")[0].replace("\n# ", " ")
    said = re.findall(r"(?:about )?([\d.]+) (minutes|hours|days) on an RTX 4090", comment)
    assert said, comment
    named = re.findall(rf"^\| \[{preset}\]\(.*\| ([\d.]+) (\w+) \|$", Path("README.md").read_text(), re.MULTILINE)
    assert bool(named) == (preset in PRESETS)
    for number, unit in (said[0], *named):
        seconds = float(number) * {"minutes": 60, "hours": 3600, "days": 86400}[unit]
        assert report.seconds("GeForce RTX 4090") == pytest.approx(seconds, rel=0.04)
    assert not report.problems


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "size"), WHOLE.items())
def test_the_others_fit_the_card_that_they_name_beside_a_desktop(preset, size):
    text = file_of(preset).read_text(encoding="utf-8").split("\nextends")[0]
    named = re.search(r"GPU of (\d+) GB", text.replace("\n# ", " "))
    assert named is None or int(named[1]) == size
    assert peak(preset) <= size * 1e9 - DESKTOP
