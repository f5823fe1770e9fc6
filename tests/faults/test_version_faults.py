"""A training that runs for long while its dataset is changed under it: prep and train at once, both as commands."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from prep.config import PrepConfig
from prep.dataset.reader import Dataset
from prep.figures.figures import write_figures
from prep.run import run
from prep.verify.verify import verify
from tests.forked import FORK, ForkedPopen
from tests.prep.runs import PROJECT
from tests.train.tiny import write_config
from train.__main__ import main
from train.checkpoint.checkpoint import find_latest, load_checkpoint
from train.loop.tracking import read_metrics

BEFORE, ADDED, MENDED, PRUNED = 80, 100, 20, 20
STEPS, EVERY = 240, 10
SLOWLY = "train.step@run:delay"  # a tenth of a second a step, so that the change falls into the training
PATIENCE = 240.0  # seconds


@pytest.fixture
def figures(tmp_path, without_ray) -> Path:
    """Eighty figures and their dataset of pixels and captions, and a hundred figures beside them."""
    write_figures(tmp_path / "all", BEFORE + ADDED, size=96, seed=3, short_captions=True, workers=1)
    (tmp_path / "source").mkdir()
    for image in sorted((tmp_path / "all").glob("*.png"))[:BEFORE]:
        take(tmp_path, image)
    run(settings_of(tmp_path))
    shutil.copytree(tmp_path / "out", tmp_path / "untouched")
    return tmp_path


def take(folder: Path, image: Path) -> None:
    for file in (image, image.with_suffix(".txt")):
        file.rename(folder / "source" / file.name)


def settings_of(folder: Path) -> PrepConfig:
    places = {"source": str(folder / "source"), "output": str(folder / "out")}
    return PrepConfig(**places, base=64, encoders="demo", layers=["text"], shard_size=16)


def change(folder: Path) -> None:
    """Add a hundred images, mend twenty captions, take twenty images away."""
    old = sorted((folder / "source").glob("*.png"))
    chosen = random.Random(0).sample(old, MENDED + PRUNED)
    for image in chosen[:MENDED]:
        image.with_suffix(".txt").write_text(f"A mended caption of {image.stem}, who wears a green top.")
    for image in chosen[MENDED:]:
        image.unlink()
    for image in sorted((folder / "all").glob("*.png")):
        take(folder, image)


def training(config: Path) -> subprocess.Popen:
    environment = os.environ | {"NANODIT_FAULT": SLOWLY}
    arguments = [sys.executable, "-m", "train", "run", "--config", str(config), *LONG]
    return ForkedPopen(arguments, cwd=PROJECT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


LONG = [f"train.steps={STEPS}", f"checkpoint.every_steps={EVERY}", "checkpoint.keep_last=2", "data.cache_gb=0"]


def wait_for(ready: Callable[[], object], training: subprocess.Popen) -> None:
    deadline = time.monotonic() + PATIENCE
    while not ready():
        assert time.monotonic() < deadline
        assert training.poll() is None, training.communicate()[0]
        time.sleep(0.02)


def kill(process: subprocess.Popen) -> str:
    process.send_signal(signal.SIGKILL)
    output = process.communicate()[0].decode()
    assert process.returncode == -signal.SIGKILL, output
    return output


def step_of(run_folder: Path) -> int:
    latest = find_latest(run_folder)
    return int(latest.name[5:]) if latest else 0


def tensors(run_folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in find_latest(run_folder).glob("*.safetensors")}


def logged(run_folder: Path) -> list[dict[str, float]]:
    records = read_metrics(run_folder / "metrics.jsonl")
    return [{key: record[key] for key in record if not key.startswith(("sys/", "memory/"))} for record in records]


@pytest.mark.slow
def test_d1_a_training_sees_one_version_while_prep_adds_mends_and_prunes(figures, capsys):
    began, run_folder = Dataset(figures / "out").fingerprint, figures / "disturbed" / "run"
    run_folder.parent.mkdir()
    config = write_config(figures / "c.yaml", figures / "out", run_folder)
    first = training(config)
    wait_for(lambda: step_of(run_folder) >= EVERY, first)
    change(figures)
    preparing = FORK.Process(target=run, args=(settings_of(figures),), kwargs={"prune": True})
    preparing.start()
    wait_for(lambda: [*(figures / "out" / "kept").glob("*.tar")], first)
    kill(first)  # while units are replaced
    second = training(config)
    preparing.join(PATIENCE)
    assert preparing.exitcode == 0
    newest = Dataset(figures / "out")
    assert newest.fingerprint != began
    done = max(step_of(run_folder), EVERY)
    wait_for(lambda: step_of(run_folder) >= done + EVERY, second)  # it went on after all was replaced
    kill(second)
    assert step_of(run_folder) < STEPS
    assert main(["run", "--config", str(config), *LONG]) == 0
    assert f"going on with version {began}" in capsys.readouterr().out

    straight = write_config(figures / "s.yaml", figures / "untouched", figures / "straight" / "run")
    assert main(["run", "--config", str(straight), *LONG]) == 0
    assert step_of(run_folder) == step_of(figures / "straight" / "run") == STEPS
    assert tensors(run_folder) == tensors(figures / "straight" / "run")
    assert logged(run_folder) == logged(figures / "straight" / "run")

    assert newest.info["counts"]["samples"] == BEFORE + ADDED - PRUNED
    mended = re.compile("A mended caption")
    assert sum(bool(mended.match(row["caption"])) for row in newest.rows()) == MENDED
    following = write_config(figures / "n.yaml", figures / "out", figures / "next" / "run")
    assert main(["run", "--config", str(following), "train.steps=2"]) == 0
    state = load_checkpoint(find_latest(figures / "next" / "run")).state
    assert state["dataset"]["fingerprint"] == newest.fingerprint
    verify(figures / "out")
