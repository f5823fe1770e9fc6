"""Metrics, their truncation on resume, provenance and rates."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nanodit.errors import DataError
from prep.dataset.reader import Dataset
from tests.train.tiny import tiny_config
from train.checkpoint.provenance import git_state, write_provenance
from train.loop import tracking
from train.loop.tracking import (
    Rates,
    Tracker,
    WaitingAdvice,
    gpu_memory,
    quiet_event_writer,
    read_metrics,
    truncate_metrics,
)
from train.loop.trainer import Trainer


def test_a_record_goes_to_both_places(tmp_path):
    tracker = Tracker(tmp_path)
    tracker.log(1, {"train/loss": 0.5, "sys/iter_per_sec": 2.0})
    tracker.log(2, {"train/loss": 0.25})
    tracker.sync()
    tracker.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "train/loss": 0.5, "sys/iter_per_sec": 2.0},
        {"step": 2, "train/loss": 0.25},
    ]
    assert _board(tmp_path, "train/loss") == [(1, 0.5), (2, 0.25)]


def test_a_folder_that_is_moved_costs_the_events_alone(tmp_path, capfd):
    run = tmp_path / "run"
    run.mkdir()
    with quiet_event_writer():
        tracker = Tracker(run)
        tracker.log(1, {"train/loss": 1.0})
        tracker.sync()
        run.rename(tmp_path / "moved")
        for step in range(2, 5):
            tracker.log(step, {"train/loss": float(step)})
            tracker.sync()
        tracker.image(4, "picture", np.zeros((8, 8, 3), np.uint8))
        tracker.text(4, "text", "more")
        tracker.close()
    assert [record["step"] for record in read_metrics(tmp_path / "moved" / "metrics.jsonl")] == [1, 2, 3, 4]
    told, errors = capfd.readouterr()
    assert told.count("TensorBoard's events are not written any more (") == 1
    assert "run/tensorboard" in told
    assert "Traceback" not in errors


def test_what_is_not_a_number_is_not_recorded(tmp_path):
    tracker = Tracker(tmp_path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        tracker.log(1, {"train/loss": float("nan")})
    tracker.close()


def test_a_resume_drops_what_was_logged_after_the_checkpoint(tmp_path):
    first = Tracker(tmp_path)
    for step in range(1, 6):
        first.log(step, {"train/loss": float(step)})
    first.close()
    time.sleep(1.1)  # TensorBoard reads the files of one second in the order of their names
    second = Tracker(tmp_path, step=3)
    second.log(4, {"train/loss": 40.0})
    second.close()
    assert [r["train/loss"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1.0, 2.0, 3.0, 40.0]
    assert _board(tmp_path, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


def test_what_a_resumed_run_adds_to_a_step_joins_its_line(tmp_path):
    for values in ({"train/loss": 1.0}, {"validation/heldout_loss": 0.5}):
        tracker = Tracker(tmp_path, 3)
        tracker.log(3, values)
        tracker.close()
    tracker = Tracker(tmp_path, 3)
    tracker.log(4, {"train/loss": 0.9})
    tracker.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 3, "train/loss": 1.0, "validation/heldout_loss": 0.5},
        {"step": 4, "train/loss": 0.9},
    ]


def test_only_a_torn_last_line_is_tolerated(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n{"step": 3, "a"')
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    path.write_bytes(b'{"step": 1, "a": 1}\n\x00\x00\x00\n')  # what a power cut leaves of a last block
    assert [record["step"] for record in read_metrics(path)] == [1]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2"):
        read_metrics(path)
    path.write_text('{"step": 1}\n')
    truncate_metrics(path, 0)
    assert path.read_text() == ""


def test_trap_32_provenance_fails_closed(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state(tmp_path) == {"commit": "unknown", "dirty": "unknown"}  # trap 32: no repository is not "clean"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path) == {"commit": "unknown", "dirty": "unknown"}  # trap 32: nor is no git


def test_trap_32_a_repository_that_does_not_track_us_says_nothing_about_us(tmp_path, monkeypatch):
    for name in ("GIT_DIR", "GIT_WORK_TREE"):
        monkeypatch.delenv(name, raising=False)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    assert git_state(tmp_path)["commit"] == "unknown"
    (tmp_path / "tracking.py").write_text("# tracked\n")
    subprocess.run([*git, "add", "tracking.py"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "y"], check=True)
    state = git_state(tmp_path)
    assert len(state["commit"]) == 40
    assert state["dirty"] is False
    (tmp_path / "tracking.py").write_text("# changed\n")
    assert git_state(tmp_path)["dirty"] is True


def test_provenance_lists_every_start_and_no_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_token")
    for step in (0, 40):
        write_provenance(tmp_path, torch.device("cpu"), {"fingerprint": "abc"}, step)
    text = (tmp_path / "provenance.json").read_text()
    record = json.loads(text)
    assert record["started_at_steps"] == [0, 40]
    assert record["environment"]["threads"] == torch.get_num_threads()
    assert record["dataset"] == {"fingerprint": "abc"}
    assert "hf_secret_token" not in text
    assert sys.executable not in text


def test_trap_33_rates_leave_out_warm_up_and_compilation(monkeypatch):
    rates = Rates()
    rates.add(8, 100.0)
    rates.add(8, 50.0)  # trap 33: the first steps
    assert rates.take() == {}
    rates.add(8, 2.0)
    rates.add(8, 2.0)
    assert rates.take() == {"sys/iter_per_sec": 0.5, "sys/images_per_sec": 4.0, "sys/data_wait": 0.0}
    assert rates.take() == {}
    stats = torch._dynamo.utils.counters["stats"]
    monkeypatch.setitem(stats, "unique_graphs", stats["unique_graphs"] + 5)
    rates.add(8, 60.0)  # trap 33: this one compiled
    rates.add(8, 1.0)
    assert rates.take()["sys/iter_per_sec"] == 1.0
    assert tracking.Rates.WARM_UP_STEPS == 2


def test_trap_33_a_step_takes_the_time_of_training_alone(tiny_dataset, tmp_path, monkeypatch):
    now = [0.0]

    def taking(seconds, function=lambda *_: {}):
        return lambda *arguments: (now.__setitem__(0, now[0] + seconds), function(*arguments))[1]

    others = ("visual_debug.every_steps=1", "validation.every_steps=1", "checkpoint.every_steps=1")
    config = tiny_config(tiny_dataset, tmp_path / "run", "train.steps=4", *others)
    config.run_folder.mkdir()
    trainer = Trainer(config, Dataset(tiny_dataset), torch.device("cpu"), validate=taking(100))
    trainer.update = taking(2, trainer.update)
    trainer.saver.save, trainer.visual.draw = taking(100), taking(100, lambda *_: None)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    trainer.run()
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert now[0] == 4 * (2 + 3 * 100)
    assert [record.get("sys/iter_per_sec") for record in records] == [None, None, 0.5, 0.5]  # trap 33
    assert [record.get("sys/images_per_sec") for record in records] == [None, None, 4.0, 4.0]


def test_mfu_is_of_the_time_that_is_counted():
    rates = Rates(peak_flops=1e12)
    for _ in range(2):
        rates.add(8, 100.0, flops=10**15)  # trap 33: neither the time nor the work of the first steps
    rates.add(8, 2.0, flops=10**11)
    rates.add(8, 3.0, flops=4 * 10**11)
    assert rates.take()["sys/mfu"] == pytest.approx(0.1)


def test_the_peak_of_memory_is_of_the_interval(monkeypatch):
    peak, now = [5e9], 2e9
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak[0])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: now)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 6e9)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peak.__setitem__(0, now))
    values = [gpu_memory(torch.device("cuda")) for _ in range(2)]
    assert [value["memory/peak_vram_gb"] for value in values] == [5.0, 2.0]
    assert values[0]["memory/vram_reserved_gb"] == 6.0
    assert gpu_memory(torch.device("cpu")) == {}


def _board(folder, tag):
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars(tag)]


def test_the_share_of_waiting_for_data_is_that_of_the_counted_steps():
    rates = Rates()
    for waited in (9.0, 9.0, 0.5, 1.5):  # two of the warm-up
        rates.add(8, 10.0, waited=waited)
    assert rates.take()["sys/data_wait"] == 0.1
    assert rates.shown()["data wait"] == "10%"
    rates.add(8, 10.0, waited=5.0)
    assert rates.take()["sys/data_wait"] == 0.5


def test_a_run_that_waits_for_its_data_is_told_once_what_helps(capsys, monkeypatch):
    monkeypatch.setattr(tracking, "processors", lambda: 8)

    def said(advice: WaitingAdvice, *shares: float | None) -> str:
        for share in shares:
            advice.consider(share)
        return capsys.readouterr().out

    assert said(WaitingAdvice(2, 1), None, 0.5, 0.5, 0.1, 0.5, 0.5) == "", "of a few records"
    advice = WaitingAdvice(2, 1)
    assert "20% of the time goes into waiting for data" in (line := said(advice, 0.5, None, 0.4, 0.2))
    assert line.count("\n") == 1
    assert "data.workers=7 makes" in line
    assert said(advice, *[0.9] * 9) == "", "it was said"
    assert "data.prefetch=2 makes" in said(WaitingAdvice(0, 1), *[0.9] * 9)
    assert "a larger data.cache_gb" in said(WaitingAdvice(2, 7), *[0.9] * 9)


def test_a_slow_loader_is_seen_and_said(tiny_dataset, tmp_path, monkeypatch, capsys):
    config = tiny_config(tiny_dataset, tmp_path / "run", "train.steps=6", "data.workers=1")
    config.run_folder.mkdir(parents=True)
    trainer = Trainer(config, Dataset(tiny_dataset), torch.device("cpu"))
    real = trainer.batches.pack
    monkeypatch.setattr(trainer.batches, "pack", lambda *arguments: time.sleep(0.5) or real(*arguments))
    trainer.run()
    printed = capsys.readouterr().out
    shares = [record.get("sys/data_wait") for record in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert shares[:2] == [None, None], "the warm-up"
    assert all(0.1 < share < 1 for share in shares[2:])
    assert printed.count("waiting for data (sys/data_wait)") == 1
    assert f"data wait {shares[-1]:.0%}" in printed
