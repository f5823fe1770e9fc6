"""What a sweep meets: trials that die in every way, a driver that is killed, and what stays on the disk."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.train.sweeps import write_sweep
from tests.train.tiny import write_dataset
from train.__main__ import main
from train.sweep.config import load_sweep
from train.sweep.record import read_record
from train.sweep.table import table

SECRET = "hf_secret_of_the_tests"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("sweeps") / "dataset", encoders="production")


def records(file: Path) -> dict[str, dict]:
    sweep = load_sweep(file)
    return {trial.name: read_record(sweep.trials_folder / trial.name) for trial in sweep.trials}


def weights(file: Path, name: str) -> bytes:
    return (load_sweep(file).trials_folder / name / "checkpoints/step-000012/model.safetensors").read_bytes()


@pytest.mark.slow
def test_S01_a_trial_that_dies_harms_no_other(dataset, tmp_path, ray_session, monkeypatch, capsys):
    arms = {name: {"overrides": {"train.grad_clip": 1.0 + number}} for number, name in enumerate("ABCDEF")}
    arms["nan"] = {"overrides": {"train.lr": 1e30}}
    file = write_sweep(tmp_path / "a sweep", dataset, arms=arms, retries=0)  # a space in the path: S06
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv(
        "NANODIT_FAULT",
        "sweep.trial@B-seed0:raise,sweep.trial@C-seed0:kill,sweep.evaluate@D-seed0:memory,sweep.trial@E-seed0:segfault",
    )
    assert main(["sweep", "--config", str(file)]) == 0
    found = records(file)
    statuses = {name: record["status"] for name, record in found.items()}
    died = dict.fromkeys(("B-seed0", "C-seed0", "D-seed0", "E-seed0", "nan-seed0"), "failed")
    assert statuses == {"A-seed0": "finished", "F-seed0": "finished", **died}
    assert found["B-seed0"]["reason"] == "RuntimeError: a fault was asked for"
    assert found["C-seed0"]["reason"].startswith("killed (SIGKILL)")
    assert found["D-seed0"]["reason"] == "out of memory: MemoryError: a fault was asked for"
    assert found["E-seed0"]["reason"].startswith("segmentation fault (SIGSEGV)")
    assert found["nan-seed0"]["reason"].startswith("NonFiniteError: ")
    printed = capsys.readouterr().out
    following = re.search(r"2 of 7 trials finished\. Next: (.+)", printed)[1]
    place = str(tmp_path / "a sweep" / "sweep")
    assert shlex.split(following)[1:] == ["evaluate", "report", place, "--output", f"{place}/report.html"]
    for name, record in found.items():
        assert record["status"] == "finished" or f"{name}: failed: {record['reason']}" in printed
    rows = {line.split()[0]: line.split()[1:] for line in table(load_sweep(file))}
    assert rows["A"][:2] == ["1/1", "0"]
    assert rows["nan"][:3] == ["0/1", "1", "-"], "never ranked"
    for path in (tmp_path / "a sweep").rglob("*"):  # S08
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


@pytest.mark.slow
def test_S01_a_trial_that_was_killed_goes_on_from_its_checkpoint(dataset, tmp_path, ray_session, monkeypatch):
    straight = write_sweep(tmp_path / "straight", dataset, arms={"A": {}})
    assert main(["sweep", "--config", str(straight), "--trial", "A-seed0"]) == 0
    file = write_sweep(tmp_path / "killed", dataset, arms={"A": {}})
    monkeypatch.setenv("NANODIT_FAULT", "train.step:kill:8")  # of 12: the second process takes six
    assert main(["sweep", "--config", str(file)]) == 0
    record = records(file)["A-seed0"]
    assert (record["status"], record["attempts"], record["failures"]) == ("finished", 2, 1)
    provenance = json.loads((load_sweep(file).trials_folder / "A-seed0/provenance.json").read_text())
    assert provenance["started_at_steps"] == [0, 6]
    assert weights(file, "A-seed0") == weights(straight, "A-seed0")


@pytest.mark.slow
def test_S02_a_sweep_whose_driver_is_killed_goes_on(dataset, tmp_path, ray_session):
    """Its final table is that of a sweep that nothing disturbed, and no trial is trained twice."""
    arms = {"A": {"overrides": {"optimizer.type": "adamw"}}, "B": {}, "C": {"overrides": {"train.lr": 1e-3}}}
    overrides = {"checkpoint.every_steps": 4, "train.batch_size": 2}
    changes = {"arms": arms, "overrides": overrides, "concurrent": 1, "budget": {"steps": 40}}
    straight = write_sweep(tmp_path / "straight", dataset, **changes)
    for name in arms:  # one by one in this process: the same trials, as tests/train/sweep/test_sweep.py holds
        assert main(["sweep", "--config", str(straight), "--trial", f"{name}-seed0"]) == 0
    file = write_sweep(tmp_path / "killed", dataset, **changes)
    command = [sys.executable, "-m", "train", "sweep", "--config", str(file)]
    # so slow that it cannot finish while the driver's death spreads
    environment = os.environ | {"NANODIT_FAULT": ",".join(["train.step@B-seed0:delay"] * 2)}
    driver = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    second = load_sweep(file).trials_folder / "B-seed0" / "checkpoints"
    deadline = time.monotonic() + 180
    while not list(second.glob("step-*")):
        assert driver.poll() is None, "the driver ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    before = records(file)
    assert before["A-seed0"]["status"] == "finished"
    assert before["B-seed0"]["status"] == "running"
    assert before["C-seed0"] == {}
    assert main(["sweep", "--config", str(file), "--resume"]) == 0
    after = records(file)
    assert after["A-seed0"] == before["A-seed0"]
    assert (after["B-seed0"]["attempts"], after["B-seed0"]["failures"]) == (2, 0)
    assert after["C-seed0"]["attempts"] == 1
    starts = json.loads((second.parent / "provenance.json").read_text())["started_at_steps"]
    assert starts[0] == 0 < starts[1]
    assert list(table(load_sweep(file))) == list(table(load_sweep(straight)))


@pytest.mark.slow
def test_failed_trials_stay_until_they_are_asked_for(dataset, tmp_path, ray_session, monkeypatch, capsys):
    file = write_sweep(tmp_path, dataset, retries=0)
    monkeypatch.setenv("NANODIT_FAULT", "sweep.trial@B-seed0:raise")
    assert main(["sweep", "--config", str(file)]) == 0
    assert "1 of 2 trials failed: B-seed0." in capsys.readouterr().out.splitlines()[-1]
    monkeypatch.delenv("NANODIT_FAULT")
    assert main(["sweep", "--config", str(file), "--resume"]) == 0
    assert records(file)["B-seed0"]["status"] == "failed"
    assert main(["sweep", "--config", str(file), "--resume", "--retry-failed"]) == 0
    assert {record["status"] for record in records(file).values()} == {"finished"}


@pytest.mark.slow
def test_a_sweep_without_a_finished_trial_ends_with_three(dataset, tmp_path, ray_session, monkeypatch, capsys):
    file = write_sweep(tmp_path, dataset, retries=0, arms={"A": {}})
    monkeypatch.setenv("NANODIT_FAULT", "sweep.trial@*:raise")
    assert main(["sweep", "--config", str(file)]) == 3
    assert "no trial finished" in capsys.readouterr().err
