"""More ``train.steps``: at the end a further part, before it only where nothing so far would have been different."""

from __future__ import annotations

import os
import shutil
import signal
from itertools import chain
from pathlib import Path

import pytest

from tests.train.loop.test_trainer import logged
from tests.train.tiny import write_config
from train.__main__ import main
from train.checkpoint.checkpoint import load_checkpoint
from train.loop.trainer import Trainer
from train.method.schedule import learning_rate

FULL = [
    "train.warmup=2", "repa.enabled=true", "tread.enabled=true", "tread.start=0", "tread.end=-1",
    "tread.dense_tail=0.5", "tread.tail_routed=0", "ema.snapshots=8", "conditioning.preset=default",
]  # fmt: skip
WSD = ["train.schedule=wsd", "train.warmup=2", "train.ema_decay=0.9"]


@pytest.fixture
def config(tiny_dataset, tmp_path) -> Path:
    return write_config(tmp_path / "c.yaml", tiny_dataset, tmp_path / "run")


def train(config: Path, run: Path, steps: int, *overrides: str, flags: tuple[str, ...] = ()) -> int:
    return main(["run", "--config", str(config), *flags, f"output={run}", f"train.steps={steps}", *overrides])


def files(run: Path, step: int) -> dict[str, bytes]:
    """Every tensor file and the state of a step, and the snapshots on the way to it."""
    folder = run / "checkpoints" / f"step-{step:06d}"
    state = {key: value for key, value in load_checkpoint(folder).state.items() if key != "config"}
    tensors = [*folder.glob("*.safetensors"), *run.glob("ema_snapshots/*")]
    return {file.name: file.read_bytes() for file in tensors} | {"state": repr(state).encode()}


def forget_after(run: Path, step: int) -> None:
    """Leave a run as a kill after ``step`` would."""
    for folder in (run / "checkpoints").iterdir():
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    real = Trainer.update

    def update(self, accumulated):
        values = real(self, accumulated)
        if self.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return values

    monkeypatch.setattr(Trainer, "update", update)


@pytest.mark.parametrize("overrides", [[], FULL], ids=["plain", "with what depends on the length"])
def test_T05_killed_and_stopped_within_the_extension_is_byte_equal(config, tmp_path, monkeypatch, capsys, overrides):
    straight, run = tmp_path / "straight", tmp_path / "run"
    assert train(config, straight, 6, *overrides) == 0
    shutil.copytree(straight, run)
    assert train(config, straight, 14, *overrides) == 0
    printed = capsys.readouterr().out
    assert "continuing a run of 6 steps to 14: after step 6 the learning rate is warmed up again" in printed
    assert printed.count("falling to 0 at step 3\n") == (2 if overrides else 0), "REPA is of the first part alone"
    assert load_checkpoint(straight / "checkpoints" / "step-000014").state["totals"] == [6, 14]

    with monkeypatch.context() as patch:
        stop_after(patch, 8)
        assert train(config, run, 14, *overrides) == 75
    with monkeypatch.context() as patch:
        stop_after(patch, 11)
        assert train(config, run, 14, *overrides) == 75
    forget_after(run, 9)  # a kill
    assert train(config, run, 14, *overrides) == 0
    assert files(run, 14) == files(straight, 14)
    assert logged(run) == logged(straight)
    forget_after(run, 6)  # killed before the first checkpoint of the extension
    assert train(config, run, 14, *overrides) == 0
    assert files(run, 14) == files(straight, 14)
    assert train(config, run, 14, *overrides) == 0
    assert "already trained to step 14; nothing to do" in capsys.readouterr().out


def test_a_part_is_a_schedule_of_its_own(config, tmp_path):
    run = tmp_path / "run"
    for steps in (6, 10, 12):
        assert train(config, run, steps, "train.warmup=1") == 0
    rates = [record["train/learning_rate"] for record in logged(run)]
    parts = [[learning_rate(step, length, 3e-3, 1e-6, 1) for step in range(length)] for length in (6, 4, 2)]
    assert rates == [*chain(*parts)]
    assert load_checkpoint(run / "checkpoints" / "step-000012").state["totals"] == [6, 10, 12]


def test_in_the_middle_of_a_cosine_more_steps_are_refused(config, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(config, run, 6) == 0
    forget_after(run, 3)
    assert train(config, run, 9) == 2
    error = capsys.readouterr().err
    assert "train.steps: 6 -> 9" in error
    assert "train.steps may be raised only at a run's end, or before wsd decays" in error
    assert train(config, run, 5) == 2, "nor fewer"
    assert train(config, run, 9, flags=("--allow-change", "train.steps")) == 0
    assert load_checkpoint(run / "checkpoints" / "step-000009").state["totals"] == [9]


def test_before_wsd_decays_the_run_is_that_of_the_greater_length(config, tmp_path):
    straight, run = tmp_path / "straight", tmp_path / "run"
    assert train(config, straight, 14, *WSD) == 0
    assert train(config, run, 8, *WSD) == 0  # decays from step 6 on
    forget_after(run, 6)
    assert train(config, run, 14, *WSD) == 0
    assert files(run, 14) == files(straight, 14)
    assert logged(run) == logged(straight)


@pytest.mark.parametrize(
    "depends",
    ["train.warmup=null", "train.ema_decay=null", "repa.enabled=true", "ema.snapshots=8", "tread.enabled=true"],
)
def test_what_depended_on_the_length_forbids_to_change_it(config, tmp_path, depends, capsys):
    overrides = [*WSD, "conditioning.preset=default", "tread.start=0", "tread.end=-1", "tread.dense_tail=0.7", depends]
    steps = 40 if "warmup" in depends or "ema_decay" in depends else 9
    overrides += ["checkpoint.every_steps=6", "train.batch_size=1"]
    run = tmp_path / "run"
    assert train(config, run, steps, *overrides) == 0
    forget_after(run, 30 if steps == 40 else 6)
    assert train(config, run, 4 * steps, *overrides) == 2
    assert "train.steps: " in capsys.readouterr().err
