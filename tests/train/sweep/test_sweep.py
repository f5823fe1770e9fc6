"""A small sweep on the tests' Ray: what it writes, prints and refuses, and one trial by hand."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from evaluate import trial as measuring
from nanodit.errors import ConfigError, DataError, ResourceError
from prep.dataset.reader import Dataset
from tests.train.sweeps import tiny_sweep, write_sweep
from tests.train.tiny import tiny_config, write_dataset
from train.__main__ import main
from train.checkpoint.checkpoint import load_checkpoint
from train.sweep import process as sweep_process
from train.sweep.config import load_sweep
from train.sweep.plan import capacity, check_folder, write_plan
from train.sweep.process import TrialProcess, ending, gpu_users, secrets, wait_for_gpu, without
from train.sweep.record import read_record, write_record
from train.sweep.table import table
from train.sweep.trial import Work, cohort, measured, reason_of

ARMS = {
    "A": {"overrides": {"optimizer.type": "adamw"}},
    "B": {"on": "A", "factor": "tread", "overrides": {"tread.enabled": True}},
    "fine": {"on": "A", "factor": "grid", "evaluate": {"heldout_loss.bins": 4}},
}
FACTORS = {"tread": ["tread"], "grid": ["evaluate.heldout_loss"]}


@pytest.fixture(scope="module")
def tiny_dataset(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("sweeps") / "dataset", encoders="production")


class Grown(NamedTuple):
    """A sweep of three arms that was first asked for one, then for another: its YAML, and what was there after each."""

    file: Path
    printed: list[str]
    plans: list[dict]
    trials: list[list[str]]
    pages: list[str]
    records: list[dict]  # of the arm that was asked for first


@pytest.fixture(scope="module")
def grown(tiny_dataset, tmp_path_factory, ray_session) -> Grown:
    from evaluate.__main__ import main as evaluate

    file = write_sweep(
        tmp_path_factory.mktemp("sweep"), tiny_dataset, arms=ARMS, factors=FACTORS, primary={"metric": "heldout_loss"}
    )
    found, folder = Grown(file, [], [], [], [], []), load_sweep(file).folder
    for more in (["--arms", "B"], ["--resume", "--arms", "fine"]):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert main(["sweep", "--config", str(file), *more]) == 0
            assert evaluate(["report", str(folder)]) == 0
        found.printed.append(printed.getvalue())
        found.plans.append(json.loads((folder / "sweep.json").read_text()))
        found.trials.append(sorted(path.name for path in (folder / "trials").iterdir()))
        found.pages.append((folder / "report.html").read_text(encoding="utf-8"))
        found.records.append(record_of(file, "B-seed0"))
    return found


@pytest.fixture(scope="module")
def finished(grown) -> Path:
    """The YAML of a sweep that is finished; one of its arms measures another one's weights."""
    return grown.file


def record_of(file: Path, name: str) -> dict:
    return read_record(load_sweep(file).trials_folder / name)


@pytest.mark.slow
def test_a_sweep_leaves_run_folders_with_a_record_and_a_report(finished):
    sweep = load_sweep(finished)
    plan = json.loads((sweep.folder / "sweep.json").read_text())
    assert plan["arms"]["B"]["differences"] == {"tread.enabled": [False, True]}
    assert plan["trials"]["fine-seed0"] == {
        "arm": "fine", "seed": 0, "trained_by": "A-seed0", "evaluation": "fine.yaml",
    }  # fmt: skip
    for trial in sweep.trials:
        folder = sweep.trials_folder / trial.name
        record = read_record(folder)
        assert (record["schema"], record["arm"], record["seed"]) == (1, trial.arm.name, 0)
        assert (record["status"], record["reason"]) == ("finished", None)
        assert (record["steps"], record["images"], record["attempts"]) == (12, 48, 1)
        assert record["measured_in"] == "step-000012-dev"
        assert record["seconds"] > 0
        assert record["peak_memory_gb"] > 0
        assert record["ended"] > record["started"]
        assert set(record["cohort"]) == {"code", "dataset", "torch", "device", "threads"}
        report = json.loads((folder / "validation_outputs" / "step-000012-dev" / "report.json").read_text())
        assert "heldout_loss" in {metric["name"] for metric in report["metrics"]}
        assert load_checkpoint(folder / "checkpoints" / "step-000012").state["step"] == 12
    fine = sweep.trials_folder / "fine-seed0"
    assert os.readlink(fine / "checkpoints") == "../A-seed0/checkpoints"
    assert record_of(finished, "fine-seed0")["seconds"] == record_of(finished, "A-seed0")["seconds"]


@pytest.mark.slow
def test_the_folder_of_a_sweep_is_continued_only_when_asked(finished, capsys):
    sweep = load_sweep(finished)
    before = list(table(sweep))
    attempts = {trial.name: record_of(finished, trial.name) for trial in sweep.trials}
    assert main(["sweep", "--config", str(finished)]) == 2
    assert "already holds a sweep; continue it with --resume" in capsys.readouterr().err
    assert main(["sweep", "--config", str(finished), "--resume"]) == 0
    printed = capsys.readouterr().out
    assert "\n".join(before) in printed
    assert attempts == {trial.name: record_of(finished, trial.name) for trial in sweep.trials}
    assert f"Next: nanodit evaluate report {sweep.folder}" in printed
    assert "3 of 3 trials finished" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("budget.steps=13", "budget.steps: 12 -> 13"),
        ("primary.metric=heldout_loss/text", "primary.metric"),
        ("overrides.train.batch_size=3", "A-seed0: train.batch_size: 2 -> 3"),
        ('evaluate_overrides={"samples": 3}', "evaluation of arm A"),
    ],
)
def test_another_sweep_is_refused(finished, capsys, override, said):
    assert main(["sweep", "--config", str(finished), "--resume", override]) == 2
    assert said in capsys.readouterr().err


def test_a_sweep_begun_before_evaluations_had_a_key_is_the_same_sweep(tiny_dataset, tmp_path):
    sweep = load_sweep(write_sweep(tmp_path, tiny_dataset, arms=ARMS, factors=FACTORS))
    work = Work(lambda *_: None, measuring.measure, measuring.resolve, measuring.check)
    write_plan(sweep, work, 1, False)
    file = sweep.folder / "evaluate" / "A.yaml"
    text = file.read_text(encoding="utf-8")
    assert "\nseed: null\n" in text
    file.write_text(text.replace("\nseed: null\n", "\n"), encoding="utf-8")
    check_folder(sweep, work, resume=True)
    file.write_text(text.replace("\nseed: null\n", "\nseed: 3\n"), encoding="utf-8")
    with pytest.raises(ConfigError, match="evaluation of arm A: seed: 3 -> None"):
        check_folder(sweep, work, resume=True)
    file.write_text(text.replace("\nholdout: dev\n", "\n"), encoding="utf-8")  # all of it was measured then
    with pytest.raises(ConfigError, match=r"evaluation of arm A: holdout: 'all of it, .* two parts' -> 'dev'"):
        check_folder(sweep, work, resume=True)


@pytest.mark.slow
def test_S05_code_that_changed_is_refused_or_a_cohort_of_its_own(finished, tmp_path, monkeypatch, capsys):
    sweep = load_sweep(finished)
    folder = sweep.trials_folder / "B-seed0"
    whole = read_record(folder)
    try:
        write_record(folder, whole | {"cohort": whole["cohort"] | {"code": "older"}})
        assert main(["sweep", "--config", str(finished), "--resume", "seeds=[0, 1]"]) == 2
        assert "code: older -> " in capsys.readouterr().err
        assert any("cohorts, as code" in line for line in table(sweep))
    finally:
        write_record(folder, whole)


@pytest.mark.slow
def test_a_sweep_of_chosen_arms_takes_in_others_later(grown, capsys):
    assert main(["sweep", "--config", str(grown.file), "--arms", "B,fin"]) == 2
    assert "--arms fin: there is no such arm; did you mean fine?" in capsys.readouterr().err
    printed, later = grown.printed
    assert "warning: B is not compared: no arm A" in printed
    assert "1 of 1 trials finished" in printed
    assert "of these, A, fine run now" in later
    assert "2 of 2 trials finished" in later
    assert [list(plan["arms"]) for plan in grown.plans] == [["B"], ["A", "B", "fine"]]
    assert grown.trials == [["B-seed0"], ["A-seed0", "B-seed0", "fine-seed0"]]
    page, page_later = grown.pages
    assert "B is not compared: A was not asked for" in page
    assert "not finished" not in page
    assert "is not compared" not in page_later
    first, record = grown.records
    assert first["status"] == "finished"
    assert record == first


def test_a_trial_that_goes_on_elsewhere_belongs_to_neither_cohort(tiny_dataset, tmp_path):
    config = tiny_config(tiny_dataset, tmp_path / "run")
    now = cohort(config)
    assert now["dataset"] == Dataset(tiny_dataset).fingerprint
    assert cohort(config, now) == now
    assert cohort(config, now | {"torch": "2.0"})["torch"] == f"2.0, then {now['torch']}"


@pytest.mark.slow
def test_one_trial_by_hand_is_the_same_trial(finished, tiny_dataset, tmp_path, capsys):
    file = write_sweep(tmp_path, tiny_dataset, arms=ARMS, factors=FACTORS)
    assert main(["sweep", "--config", str(file), "--trial", "A-seed0"]) == 0
    ours, theirs = (load_sweep(one).trials_folder / "A-seed0" / "checkpoints/step-000012" for one in (file, finished))
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert main(["sweep", "--config", str(file), "--trial", "Z-seed0"]) == 2
    assert "has no such trial; there: A-seed0, B-seed0, fine-seed0" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_that_was_moved_or_copied_trains_where_it_lies(tiny_dataset, tmp_path, capsys):
    file = write_sweep(tmp_path / "first", tiny_dataset, budget={"steps": 2})
    assert main(["sweep", "--config", str(file), "--trial", "A-seed0"]) == 0
    here, there = tmp_path / "first" / "sweep", tmp_path / "second"
    shutil.copytree(here, there)
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    assert main(["sweep", "--config", str(file), f"output={there}", "--trial", "B-seed0"]) == 0
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before
    assert read_record(there / "trials" / "B-seed0")["status"] == "finished"
    assert (there / "trials" / "B-seed0" / "checkpoints" / "step-000002").is_dir()
    capsys.readouterr()
    trial = there / "trials" / "A-seed0" / "config.yaml"
    assert main(["run", "--config", str(trial)]) == 2
    assert f"output={trial.parent}" in capsys.readouterr().err
    assert main(["run", "--config", str(trial), f"output={trial.parent}"]) == 0
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.slow
def test_a_budget_of_hours_becomes_steps_at_the_measured_pace(tiny_dataset, tmp_path):
    file = write_sweep(tmp_path, tiny_dataset, budget={"hours": 0.0003})
    assert main(["sweep", "--config", str(file), "--trial", "A-seed0"]) == 0
    record = record_of(file, "A-seed0")
    assert record["steps"] == record["planned_steps"] > 1
    assert 0.3 < record["seconds"] / (0.0003 * 3600) < 3
    assert not (load_sweep(file).trials_folder / "A-seed0" / "pace").exists()


@pytest.mark.slow
def test_S04_asha_stops_the_worse_and_marks_it(tiny_dataset, tmp_path, ray_session, monkeypatch, capsys):
    # so slow that they do not finish before they are looked at
    monkeypatch.setenv("NANODIT_FAULT", ",".join([f"train.step@slow{n}-seed0:delay" for n in (1, 2)] * 2))
    arms = {"A": {}, **{f"slow{n}": {"overrides": {"train.lr": 1e-9 * n}} for n in (1, 2)}}
    overrides = {
        "validation.every_steps": 3, "validation.samples": 2, "validation.conditions": ["all"],
        "checkpoint.every_steps": 100, "train.batch_size": 2,
    }  # fmt: skip
    file = write_sweep(
        tmp_path, tiny_dataset, arms=arms, overrides=overrides, early_stopping="asha", budget={"steps": 36},
        concurrent=1,
    )  # fmt: skip
    assert main(["sweep", "--config", str(file)]) == 0
    assert record_of(file, "A-seed0")["status"] == "finished"
    stopped = [record_of(file, f"slow{n}-seed0") for n in (1, 2)]
    assert {record["status"] for record in stopped} == {"stopped"}
    assert {record["reason"] for record in stopped} == {"stopped early by asha"}
    assert "slow1-seed0: stopped: stopped early by asha" in capsys.readouterr().out


# What is decided without a trial


def test_an_arm_of_two_factors_is_said_before_it_starts(tiny_dataset, tmp_path):
    from train.sweep.plan import describe

    arms = {"A": {}, "B": {"factor": "tread", "overrides": {"tread.enabled": True, "train.lr": 1e-3}}}
    lines = "\n".join(describe(tiny_sweep(tmp_path, tiny_dataset, arms=arms), 1))
    assert "warning: arm B differs from A in more than its factor tread: train.lr" in lines


@pytest.mark.parametrize(
    ("resources", "cluster", "expected"),
    [
        ({"gpu": 0, "cpu": 1}, {"CPU": 2.0}, (2, False)),
        ({"cpu": 1}, {"CPU": 16.0, "GPU": 2.0}, (2, False)),
        ({"gpu": 0.5, "cpu": 4}, {"CPU": 16.0, "GPU": 1.0}, (2, True)),
        ({"gpu": None, "cpu": 2}, {"CPU": 2.0}, (1, False)),
    ],
)
def test_S10_how_many_fit_and_whether_they_share(tiny_dataset, tmp_path, resources, cluster, expected):
    sweep = tiny_sweep(tmp_path, tiny_dataset, resources=resources)
    assert capacity(sweep.config, cluster) == expected
    claims = sweep.record(*expected)["time_claims"]
    assert claims == (expected == (1, False))
    assert capacity(tiny_sweep(tmp_path, tiny_dataset, resources=resources, concurrent=1).config, cluster)[0] == 1


def test_a_trial_that_asks_for_too_much_is_refused(tiny_dataset, tmp_path):
    sweep = tiny_sweep(tmp_path, tiny_dataset, resources={"gpu": 1, "cpu": 1})
    with pytest.raises(ResourceError, match=r"asks for 1 GPU and there are 0; set resources\.gpu"):
        capacity(sweep.config, {"CPU": 2.0})


@pytest.mark.parametrize(
    ("metric", "mode", "said"),
    [
        ("heldout_lose", "min", "did you mean heldout_loss"),
        ("heldout_loss/pose", "min", "holds no such metric"),
        ("heldout_loss", "max", "better lower; set it to min"),
    ],
)
def test_S09_a_wrong_primary_metric_fails_before_launch(tiny_dataset, tmp_path, capsys, metric, mode, said):
    file = write_sweep(tmp_path, tiny_dataset, primary={"metric": metric, "mode": mode})
    assert main(["sweep", "--config", str(file)]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("sweep/trials/*"))


def test_S09_a_metric_without_a_value_is_never_best(tiny_dataset, tmp_path):
    sweep = tiny_sweep(tmp_path, tiny_dataset, seeds=[0, 1])
    for trial, value in zip(sweep.trials, (3.0, None, 5.0, 1.0)):
        folder = sweep.trials_folder / trial.name
        own, other = ("step-000012", "step-000012-dev") if trial.arm.name == "B" else ("step-000012-dev", "step-000012")
        for name, found in ((own, value), (other, 99.0)):
            report = folder / "validation_outputs" / name / "report.json"
            report.parent.mkdir(parents=True)
            report.write_text(json.dumps({"metrics": [{"name": "heldout_loss", "value": found}]}))
        record = {"arm": trial.arm.name, "seed": trial.config.seed, "status": "finished", "steps": 12, "cohort": {}}
        record |= {"measured_in": own}
        write_record(folder, record)
    failed = sweep.trials_folder / "B-seed1"
    write_record(failed, read_record(failed) | {"status": "failed", "reason": "NonFiniteError: loss"})
    lines = [line.split() for line in table(sweep)]
    assert lines[:3] == [
        ["arm", "finished", "failed", "heldout_loss", "per", "seed"],
        ["A", "2/2", "0", "4", "3", "5"],
        ["B", "1/2", "1", "-", "null"],
    ]
    assert "B-seed1: failed: NonFiniteError: loss" in list(table(sweep))


def test_seconds_count_steps_at_their_pace(tiny_dataset, tmp_path):
    config = tiny_config(tiny_dataset, tmp_path / "run")
    (tmp_path / "run").mkdir()
    lines = [{"step": 1}, {"step": 2}, {"step": 3, "sys/iter_per_sec": 2.0}, {"step": 5, "sys/iter_per_sec": 4.0}]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = measured(tmp_path / "run", config)
    assert found["seconds"] == pytest.approx(12 * (0.5 + 0.5) / 3)
    assert (found["steps"], found["images"]) == (12, 96)


# Secrets, and GPUs that others use


def test_S08_values_of_secret_variables_are_hidden(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    found = secrets({"HF_TOKEN": "hf_abcdefgh", "WANDB_API_KEY": "0123456789", "KEYBOARD": "qwertz", "TOKEN": "1"})
    assert found == ["hf_abcdefgh", "0123456789"]
    assert without(found, "403 for hf_abcdefgh") == "403 for ***"
    assert reason_of(DataError("403 for hf_abcdefgh\nmore")) == "DataError: 403 for ***"
    assert reason_of(MemoryError()) == "out of memory: MemoryError"


def test_S08_what_a_trial_prints_is_logged_without_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    (tmp_path / "hf_abcdefgh.yaml").write_text("nonsense: 1")
    process = TrialProcess(tmp_path / "hf_abcdefgh.yaml", "A-seed0", tmp_path / "trial.log", Path.cwd(), 1)
    assert process.wait(60) == 2
    log = (tmp_path / "trial.log").read_text()
    assert "***.yaml: unknown key `nonsense`" in log
    assert "hf_abcdefgh" not in log + process.last_words


def test_how_a_process_ended_in_words():
    assert ending(-9).startswith("killed (SIGKILL)")
    assert ending(-11) == "segmentation fault (SIGSEGV)"
    assert ending(-15) == "ended by SIGTERM"
    assert ending(1) == "ended with exit code 1"


def test_S03_a_gpu_that_is_still_used_is_waited_for_and_its_user_named(tmp_path, monkeypatch):
    answer = tmp_path / "answer"
    (tmp_path / "nvidia-smi").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\ncat {answer}\n')
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    answer.write_text("4711, python, 3100 MiB\n")
    assert gpu_users("1") == ["process 4711 (python, 3100 MiB)"]
    with pytest.raises(ResourceError, match=r"GPU 1 is still in use.*process 4711 \(python, 3100 MiB\)"):
        wait_for_gpu("1", limit=0)
    assert "-i 1" in (tmp_path / "asked").read_text()
    monkeypatch.setattr(sweep_process.time, "sleep", lambda seconds: answer.write_text(""))
    wait_for_gpu("1", limit=30)


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "trial.json").write_text("{")
    with pytest.raises(DataError, match=r"trial\.json: not JSON"):
        read_record(tmp_path)


def test_an_unknown_folder_of_a_sweep_is_a_config_error(tiny_dataset, tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_sweep(tmp_path / "nowhere.yaml")
