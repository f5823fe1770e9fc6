"""A rented machine: taken away at any moment, its storage stalls, and the same command goes on elsewhere."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from prep.dataset.reader import Dataset
from tests.faults.test_train_faults import STEPS, assert_same_run, deterministic, train, train_process, weights
from tests.train.tiny import write_config, write_dataset
from train.__main__ import main
from train.checkpoint import checkpoint as checkpoints
from train.checkpoint.checkpoint import checkpoint_steps, find_latest, save_checkpoint, set_aside_after, verify
from train.checkpoint.resume import choose_checkpoint
from train.data import prefetch as prefetching
from train.loop import trainer
from train.loop.tracking import read_metrics
from train.loop.trainer import Trainer
from train.loop.visual import VisualDebug


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("machines") / "dataset")


@pytest.fixture(scope="module")
def straight(dataset, tmp_path_factory) -> Path:
    """The run folder of the run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("straight")
    assert main(["run", "--config", str(write_config(folder / "c.yaml", dataset, folder / "run"))]) == 0
    return folder / "run"


@pytest.fixture
def config(dataset, tmp_path) -> Path:
    return write_config(tmp_path / "c.yaml", dataset, tmp_path / "run")


def saved(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in checkpoint_steps(run))


def terminate(*ignored: object, **also: object) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


# Checkpoints by time, and how many stay


def test_T05_saving_by_time_changes_no_weight(config, straight, tmp_path):
    assert train(config, "checkpoint.every_minutes=1e-9", "checkpoint.every_steps=1000") == 0
    assert_same_run(tmp_path / "run", straight)
    assert saved(tmp_path / "run") == list(range(1, STEPS + 1))


def test_minutes_count_from_the_last_checkpoint(config, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(trainer.time, "monotonic", lambda: now[0])
    real = Trainer.update
    monkeypatch.setattr(Trainer, "update", lambda *arguments: now.__setitem__(0, now[0] + 60) or real(*arguments))
    assert train(config, "checkpoint.every_minutes=3", "checkpoint.every_steps=5") == 0
    assert saved(tmp_path / "run") == [3, 5, 8, 10, 12]


def test_T02_retention_keeps_the_newest_and_every_nth(config, tmp_path):
    kept = ["checkpoint.every_steps=1", "checkpoint.keep_last=2", "checkpoint.keep_every=4"]
    assert train(config, *kept) == 0
    assert saved(tmp_path / "run") == [4, 8, 11, 12]
    assert train(config, *kept[:1], *kept[2:], f"output={tmp_path / 'other'}") == 2


def test_T02_a_damaged_newest_one_does_not_cost_a_good_one(tmp_path):
    tensors = {part: {"w": torch.ones(2)} for part in checkpoints.PARTS}
    state = {"config": {"train": {"steps": 12}}, "dataset": {"fingerprint": "f", "base": 64, "layers": {}}}
    for step in (3, 6, 9):
        save_checkpoint(tmp_path, step, tensors, state)
    for step in (6, 9):
        (tmp_path / "checkpoints" / f"step-{step:06d}" / "model.safetensors").write_bytes(b"")
    assert choose_checkpoint(tmp_path, "auto").state["step"] == 3
    assert saved(tmp_path) == [3, 6, 9], "nothing is moved before it is clear that the run goes on"
    set_aside_after(tmp_path, 3)
    save_checkpoint(tmp_path, 4, tensors, state, keep_last=1)  # by time, or as the machine was taken away
    assert saved(tmp_path) == [4]
    assert not list((tmp_path / "checkpoints").glob(".*"))
    verify(find_latest(tmp_path))


def test_T06_a_refused_start_leaves_a_checkpoint_that_cannot_be_read_just_now(config, straight, tmp_path):
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    newest = run / "checkpoints" / "step-000012" / "model.safetensors"
    newest.rename(aside := tmp_path / "aside")
    for arguments, code in ((["train.lr=1e-5"], 2), ([], 0)):
        assert train(config, *arguments) == code
        assert newest.exists() == (code == 0)
        assert 12 in saved(run)
    assert newest.read_bytes() == aside.read_bytes()
    assert saved(run) == saved(straight)


def test_T02_a_volume_that_keeps_what_is_still_read_does_not_end_the_run(config, straight, tmp_path, monkeypatch):
    """NFS renames a removed file that somebody has open, so that its folder is not empty."""
    real, kept = os.rmdir, []

    def rmdir(path, *arguments, **options):
        if len(kept) < 3:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", kept.append(path))
        real(path, *arguments, **options)

    monkeypatch.setattr(os, "rmdir", rmdir)
    assert train(config, "checkpoint.keep_last=1") == 0
    assert len(kept) == 3
    assert saved(tmp_path / "run") == [12]
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
    assert_same_run(tmp_path / "run", straight)


def test_T02_a_checkpoint_that_the_disk_cannot_read_is_passed_over(tmp_path, monkeypatch, capsys):
    tensors = {part: {"w": torch.ones(2)} for part in checkpoints.PARTS}
    for step in (3, 6):
        save_checkpoint(tmp_path, step, tensors, {})
    real = checkpoints.sha256_file

    def read(path):
        if "step-000006" in str(path):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path)

    monkeypatch.setattr(checkpoints, "sha256_file", read)
    assert find_latest(tmp_path).name == "step-000003"
    assert "Input/output error" in capsys.readouterr().out


def test_T02_what_a_kill_left_half_written_is_swept_up(config, tmp_path):
    run = tmp_path / "run"
    assert train(config, "train.steps=3") == 0
    (run / ".config.yaml.tmp-77").write_text("dataset: ")
    shutil.copytree(run / "checkpoints" / "step-000003", run / "checkpoints" / ".step-000004.tmp")
    assert train(config, "train.steps=3") == 0
    assert not [path for path in run.rglob(".*") if path.name.startswith(".")]


# A limit of hours


def test_T11_a_limit_of_hours_saves_and_the_same_command_ends_the_run(config, straight, tmp_path, capsys):
    codes = []
    while not codes or codes[-1] == 75:
        codes.append(train(config, "--max-hours", "1e-9"))
        assert len(codes) <= STEPS
    assert codes == [75] * (STEPS - 1) + [0], "one step at least a start, so that it comes to an end"
    assert "stopped at step 3; the same command continues" in capsys.readouterr().err
    assert_same_run(tmp_path / "run", straight)
    assert train(config, "--max-hours", "1e-9") == 0, "nothing to do"


@pytest.mark.parametrize("hours", ["0", "-1", "nan"])
def test_a_limit_of_no_hours_is_refused(config, tmp_path, hours, capsys):
    assert train(config, "--max-hours", hours) == 2
    assert f"--max-hours {hours}: must be more than 0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# Signals at bad moments


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["_multiarray_umath", "libtorch_cpu", "run.lock"])
def test_T11_a_signal_while_the_program_starts_gives_75(config, tmp_path, moment):
    """The moments: while NumPy is imported, while torch is, and when the run folder has just been locked."""
    process = train_process(config, start=subprocess.Popen)
    reached = (
        (tmp_path / "run" / "run.lock").exists
        if moment == "run.lock"
        else lambda: moment in Path(f"/proc/{process.pid}/maps").read_text()
    )
    while not reached():
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "the same command continues" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("stage", ["after_model", "after_state", "before_rename"])
def test_T11_a_signal_while_a_checkpoint_is_written_waits_for_it(config, straight, tmp_path, monkeypatch, stage):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "fault", lambda point: point == f"checkpoint.{stage}" and terminate())
        assert train(config) == 75
    assert saved(tmp_path / "run") == [3]
    verify(find_latest(tmp_path / "run"))
    assert train(config) == 0
    assert_same_run(tmp_path / "run", straight)


def test_T11_a_signal_while_averages_are_stored_waits_for_them(config, tmp_path, monkeypatch):
    on = "ema.snapshots=8"
    assert train(config, on, f"output={tmp_path / 'straight'}") == 0
    real = trainer.save_snapshot
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save_snapshot", lambda *arguments: terminate() or real(*arguments))
        assert train(config, on) == 75
    assert train(config, on) == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "straight")


def test_T11_a_signal_does_not_wait_for_a_picture(config, straight, tmp_path, monkeypatch):
    started = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(VisualDebug, "draw", lambda *arguments: terminate() or time.sleep(60))
        assert train(config, "visual_debug.every_steps=5") == 75
    assert time.monotonic() - started < 30
    assert saved(tmp_path / "run") == [3, 5]
    assert train(config, "visual_debug.every_steps=5") == 0
    assert_same_run(tmp_path / "run", straight)
    pictures = sorted(path.parent.name for path in (tmp_path / "run").glob("visual_debug/*/grid.png"))
    assert pictures == ["step-000005", "step-000010", "step-000012"], "the one that was given up, and of the end"


def test_a_limit_of_hours_does_not_wait_for_pictures_either(config, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(VisualDebug, "draw", lambda self, model, step, folder: drawn.append(step))
    arguments = ["visual_debug.every_steps=1", "train.steps=3"]
    assert train(config, "--max-hours", "1e-9", *arguments) == 75
    assert drawn == [], "of step 1"
    assert train(config, *arguments) == 0
    assert drawn == [1, 2, 3]


# The storage


def test_T12_a_stalled_storage_is_said_and_a_signal_does_not_wait_for_it(dataset, tmp_path, monkeypatch, capsys):
    """A named pipe in place of a shard: to open it takes until somebody writes to it."""
    copy = Path(shutil.copytree(dataset, tmp_path / "dataset"))
    shard = copy / "bucket_64x64" / "shard-000000.px.tar"
    shard.unlink()
    os.mkfifo(shard)
    monkeypatch.setattr(prefetching, "STALL_SECONDS", 0.4)
    monkeypatch.setattr(prefetching, "ABANDON_SECONDS", 0.2)
    said, say = [], prefetching.say

    def heard(line):
        say(line)
        said.append(line)
        if len(said) == 2:
            terminate()

    monkeypatch.setattr(prefetching, "say", heard)
    try:
        assert train(write_config(tmp_path / "c.yaml", copy, tmp_path / "run")) == 75
    finally:
        os.close(os.open(shard, os.O_RDWR))  # lets the thread go that reads ahead
    printed = capsys.readouterr()
    assert printed.out.count("waiting for the storage: ") >= 2
    assert len(said) >= 2
    assert "bucket_64x64/shard-000000.px.tar, sample " in said[0]
    assert said[0].endswith("s")
    assert "stopped at step 0" in printed.err


def test_T12_a_storage_that_comes_back_costs_time_alone(config, straight, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prefetching, "STALL_SECONDS", 0.2)
    real, slept = Dataset.pixels, []

    def slow(self, row):
        if len(slept) < 2:
            slept.append(time.sleep(0.7))
        return real(self, row)

    monkeypatch.setattr(Dataset, "pixels", slow)
    assert train(config) == 0
    assert "waiting for the storage: bucket_" in capsys.readouterr().out
    assert_same_run(tmp_path / "run", straight)


def test_T12_a_shard_that_goes_in_mid_epoch_costs_no_finished_step(dataset, straight, tmp_path, capsys):
    copy = Path(shutil.copytree(dataset, tmp_path / "dataset"))
    config = write_config(tmp_path / "c.yaml", copy, tmp_path / "run")
    shard, aside = copy / "bucket_80x56" / "shard-000000.t5.tar", tmp_path / "aside.tar"
    real = Trainer.update

    def update(self, accumulated):
        values = real(self, accumulated)
        if self.step == 4:
            shard.rename(aside)
        return values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "update", update)
        assert train(config, "data.prefetch=0", "data.cache_gb=0", "checkpoint.every_steps=1000") == 3  # trap 35
    assert "bucket_80x56/shard-000000.t5.tar, sample " in capsys.readouterr().err
    reached = len(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert saved(tmp_path / "run") == [reached]
    assert reached >= 4
    aside.rename(shard)
    assert train(config) == 0
    assert weights(tmp_path / "run") == weights(straight)


# The entry point of a container


def test_T15_a_finished_run_is_finished_on_every_machine(config, straight, tmp_path, monkeypatch, capsys):
    shutil.copytree(straight, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "checkpoints").rglob("*")}
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "Z80")
    assert train(config) == 0
    assert "already trained to step 12; nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "checkpoints").rglob("*")} == before


def test_T15_a_storage_without_locks_is_said(config, tmp_path, monkeypatch, capsys):
    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert train(config, "train.steps=1") == 0
    assert "run.lock: No locks available; make sure that no second trainer writes here" in capsys.readouterr().out


# What looks on


def test_T16_what_looks_on_may_fail_and_training_is_the_same(dataset, config, straight, tmp_path, capsys, monkeypatch):
    from tests.train.loop.test_observers import turn_everything_over

    steps = []

    def validate(model, step, folder):
        steps.append(step)
        turn_everything_over()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
        if step % 2:
            raise OSError("We couldn't connect to 'https://huggingface.co' to load this file")
        return {"validation/number": torch.rand(()).item()}

    def draw(*arguments):
        turn_everything_over()
        raise RuntimeError("preview")

    monkeypatch.setattr("evaluate.validation.build_validation", lambda config, dataset: validate)
    monkeypatch.setattr(VisualDebug, "draw", draw)
    assert train(config, "validation.every_steps=1", "visual_debug.every_steps=4") == 0
    printed = capsys.readouterr().out
    assert "warning: validation at step 3 failed, but training goes on: OSError: We couldn't connect" in printed
    assert "warning: visual_debug at step 8 failed, but training goes on: RuntimeError: preview" in printed
    assert steps == list(range(1, STEPS + 1))
    run = tmp_path / "run"
    assert weights(run) == weights(straight)
    records = deterministic(run)
    seen = [record.pop("validation/number", None) for record in records]
    assert records == deterministic(straight)
    assert [value is None for value in seen] == [step % 2 == 1 for step in steps]
    failed = [json.loads(line) for line in (run / "warnings.jsonl").read_text().splitlines()]
    assert [record["step"] for record in failed if record["what"] == "validation"] == [1, 3, 5, 7, 9, 11]


def test_T10_a_disk_that_is_full_at_a_picture_stops_the_run_after_its_last_step(config, straight, tmp_path, capsys):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.loop.visual.write_atomic", full)
        assert train(config, "visual_debug.every_steps=5") == 4
    assert "visual_debug at step 5: " in (error := capsys.readouterr().err)
    assert "No space left on device" in error
    assert saved(tmp_path / "run") == [3, 5]
    assert train(config) == 0
    assert_same_run(tmp_path / "run", straight)


def test_T09_too_little_memory_to_validate_costs_no_step(config, straight, tmp_path, capsys, monkeypatch):
    def validate(model, step, folder):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    with monkeypatch.context() as patch:
        patch.setattr("evaluate.validation.build_validation", lambda config, dataset: validate)
        assert train(config, "validation.every_steps=5") == 0
    said = capsys.readouterr().out
    assert "validation at step 5 failed, but training goes on: out of memory: CUDA out of memory. Tried" in said
    assert_same_run(tmp_path / "run", straight)
