"""Every option of the trainer at once: stopped, resumed or watched, the run is the same to the byte."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest
import torch

from nanodit.config import walk_keys
from tests.faults.test_train_faults import assert_same_run, train_process, weights
from tests.train.everything import EVERYTHING, NOT_IN_IT, everything
from tests.train.loop.test_trainer import logged, make
from tests.train.tiny import tiny_config, write_config
from train.checkpoint.checkpoint import OPTIONAL_PARTS, PARTS, load_checkpoint
from train.config import TrainConfig


def test_every_key_is_on(tiny_dataset, tmp_path):
    assert not EVERYTHING.keys() & NOT_IN_IT.keys()
    assert set(walk_keys(TrainConfig)) == set(EVERYTHING) | set(NOT_IN_IT), "add new keys to everything.py"
    values = tiny_config(tiny_dataset, tmp_path / "run", *everything()).model_dump()
    defaults = TrainConfig(dataset="", output="").model_dump()
    off = [key for key in EVERYTHING if _value(values, key) == _value(defaults, key)]
    assert off == [], "no option is left at its default"


@pytest.mark.slow
def test_T05_killed_twice_and_resumed_is_byte_equal(tiny_dataset, tmp_path, vgg_home, dinov2_home):
    config = write_config(tmp_path / "c.yaml", tiny_dataset, tmp_path / "run")
    for fault, output in (
        ("train.step:kill:2", "run"),
        ("train.step:kill:8", "run"),  # resumed before the last phase, killed in it
        (None, "run"),
        (None, "straight"),
    ):
        process = train_process(config, *everything(), f"output={tmp_path / output}", fault=fault)
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == (-signal.SIGKILL if fault else 0), printed
    assert_same_run(tmp_path / "run", tmp_path / "straight")  # trap 30
    assert {"power.safetensors", "step-000012.safetensors"} <= weights(tmp_path / "run").keys()
    assert json.loads((tmp_path / "run" / "provenance.json").read_text())["started_at_steps"] == [0, 0, 6]


def test_trap_27_what_looks_on_changes_nothing(tiny_dataset, tmp_path, vgg_home, dinov2_home):
    alone = make(tiny_dataset, tmp_path / "alone", *everything(visual_debug__every_steps=0))
    alone.run()
    looks = {"visual_debug__every_steps": 1, "checkpoint__every_steps": 1, "data__prefetch": 0, "data__cache_gb": 0}
    watched = make(tiny_dataset, tmp_path / "watched", *everything(**looks))
    watched.run()
    ours, theirs = (load_checkpoint(tmp_path / name / "checkpoints" / "step-000012") for name in ("watched", "alone"))
    for part in (*PARTS, *OPTIONAL_PARTS):
        one, two = getattr(ours, part), getattr(theirs, part)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one), part
    assert logged(tmp_path / "watched") == logged(tmp_path / "alone")


def _value(values: dict[str, Any], key: str) -> Any:
    for name in key.split("."):
        values = values[name]
    return values
