"""Validation while a run trains: the numbers are those of the evaluation, and nothing of the run notices it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from evaluate import validation as pulse
from evaluate.config import EvaluateConfig
from evaluate.drawing.baselines import load_training_images
from evaluate.run import run as evaluate_run
from evaluate.suite import heldout_loss
from nanodit.errors import ConfigError, DataError
from prep.dataset.reader import Dataset
from tests.train.tiny import tiny_config, write_config, write_dataset
from train.__main__ import main
from train.checkpoint.open import load_model
from train.loop.tracking import read_metrics
from train.model.modalities import Features
from train.model.network import build_model

ON = ["train.steps=6", "validation.every_steps=2"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("pulse") / "dataset")


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory) -> Path:
    """A run that was validated three times."""
    folder = tmp_path_factory.mktemp("validated")
    config = write_config(folder / "c.yaml", dataset, folder / "run")
    assert main(["run", "--config", str(config), *ON]) == 0
    return folder / "run"


def test_values_join_the_record_of_their_step(run):
    records = read_metrics(run / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 7))
    with_values = [record for record in records if "validation/heldout_loss" in record]
    assert [record["step"] for record in with_values] == [2, 4, 6]
    assert all("train/loss" in record and "validation/heldout_loss/text" in record for record in with_values)
    losses = [record["validation/heldout_loss"] for record in with_values]
    assert losses == sorted(losses, reverse=True), "it learns"


def test_they_are_those_of_the_evaluation(run, dataset):
    model, config, _ = load_model(run)
    subject = pulse._subject(model, config, Dataset(dataset))
    training = load_training_images(subject.dataset, {row["bucket"] for row in subject.rows}, 8)
    subsets = [frozenset(subject.modalities), frozenset({"text"})]
    rows = heldout_loss.measure(subject, subsets, training, pulse.GRID)
    metrics = {metric.name: metric.value for metric in heldout_loss.losses(rows, pulse.GRID, {}, subject.flow.t_min)}
    last = read_metrics(run / "metrics.jsonl")[-1]
    assert last["validation/heldout_loss"] == pytest.approx(metrics["heldout_loss"], rel=1e-6)
    assert last["validation/heldout_loss/text"] == pytest.approx(metrics["heldout_loss/text"], rel=1e-6)
    assert last["validation/heldout_error"] == pytest.approx(metrics["heldout_error"], rel=1e-6)
    assert last["validation/heldout_error/text"] == pytest.approx(metrics["heldout_error/text"], rel=1e-6)
    record = json.loads((run / "validation_outputs" / "step-000006" / "heldout.json").read_text())
    assert record["samples"] == len(Dataset(dataset).rows("dev")) == 3
    assert record["conditions"]["all"]["mse"][3] == pytest.approx(metrics["heldout_mse/all/0.3-0.4"], rel=1e-6)


def test_trap_27_28_on_or_off_the_run_is_the_same(run, dataset, tmp_path):
    config = write_config(tmp_path / "c.yaml", dataset, tmp_path / "run")
    assert main(["run", "--config", str(config), "train.steps=6"]) == 0
    for part in ("model", "ema", "optimizer"):
        ours, theirs = (folder / "checkpoints" / "step-000006" for folder in (run, tmp_path / "run"))
        assert (ours / f"{part}.safetensors").read_bytes() == (theirs / f"{part}.safetensors").read_bytes()
    ours, theirs = (
        [{k: v for k, v in record.items() if k.startswith(("train/", "grad_norm/"))} for record in records]
        for records in (read_metrics(folder / "metrics.jsonl") for folder in (run, tmp_path / "run"))
    )
    assert ours == theirs


def test_a_run_that_was_validated_on_all_of_the_holdout_says_that_its_curves_jump(run, dataset, tmp_path, capsys):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    config, data = tiny_config(dataset, folder, *ON), Dataset(dataset)
    pulse.build_validation(config, data)
    assert "jump" not in capsys.readouterr().out
    last = folder / "validation_outputs" / "step-000006" / "heldout.json"
    record = json.loads(last.read_text())
    assert record.pop("holdout") == "dev"
    last.write_text(json.dumps(record))  # as before there were parts
    pulse.build_validation(config, data)
    assert f"warning: {last}: until then validation read all of the holdout" in capsys.readouterr().out


def test_batches_and_the_number_of_samples(dataset, tmp_path):
    config = tiny_config(dataset, tmp_path / "run", "validation.samples=2", "validation.conditions=[all]")
    torch.manual_seed(0)
    model = build_model(config.model, Features.from_dataset(Dataset(dataset).info))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.05)
    values = [
        pulse.validate(model.eval(), config.model_copy(update={"train": train}), Dataset(dataset), 1, tmp_path)
        for train in (config.train, config.train.model_copy(update={"batch_size": 1}))
    ]
    assert values[0].keys() == {"validation/heldout_error", "validation/heldout_loss"}
    assert values[0] == pytest.approx(values[1], rel=1e-4)
    assert json.loads((tmp_path / "heldout.json").read_text())["samples"] == 2


def test_what_can_never_be_measured_is_refused_before_the_run(dataset, tmp_path, capsys):
    config = write_config(tmp_path / "c.yaml", dataset, tmp_path / "run")
    assert main(["run", "--config", str(config), *ON, "validation.conditions=[pose, cls]"]) == 2
    assert "validation.conditions: nothing to measure: subset pose never trained; subset cls" in capsys.readouterr().err
    assert main(["run", "--config", str(config), *ON, "validation.conditions=[hair]"]) == 2
    assert "unknown hair" in capsys.readouterr().err


def test_a_model_that_predicts_no_numbers_is_a_warning(dataset, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        heldout_loss, "_model_errors", lambda subject, batch, *_: np.full((10, 2, len(batch.rows)), np.nan)
    )
    config = write_config(tmp_path / "c.yaml", dataset, tmp_path / "run")
    assert main(["run", "--config", str(config), *ON]) == 0
    assert "warning: validation at step 2 failed, but training goes on: given all, the model predicts" in (
        capsys.readouterr().out
    )
    assert len((tmp_path / "run" / "warnings.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(("budget", "images"), [("null", 3), ("300", 4), ("70", 1)])
def test_with_a_token_budget_as_many_images_as_it_allows_are_measured_together(dataset, tmp_path, budget, images):
    """Of this dataset an image has 64 to 70 tokens."""
    config = tiny_config(dataset, tmp_path / "run", "train.batch_size=3", f"train.token_budget={budget}")
    assert pulse._subject(torch.nn.Identity(), config, Dataset(dataset)).batch_size == images


def test_without_baselines_the_model_is_scored_the_same(make_subject):
    subject = make_subject("mean_image")
    subject = replace(subject, rows=subject.rows[:3])
    training = load_training_images(subject.dataset, {row["bucket"] for row in subject.rows}, 8)
    everything = [frozenset(subject.modalities)]
    alone, beside = (heldout_loss.measure(subject, everything, images, pulse.GRID) for images in (None, training))
    assert [row["mse"] for row in alone] == [row["mse"] for row in beside]
    assert alone[0].keys() == {"key", "cluster", "condition", "bin", "mse", "loss"}


def test_further_tests_write_what_a_report_is_made_of(dataset, tmp_path):
    config = write_config(tmp_path / "c.yaml", dataset, tmp_path / "run")
    tests = "validation.tests=[heldout_loss, reconstruction]"
    assert main(["run", "--config", str(config), "train.steps=2", "validation.every_steps=2", tests]) == 0
    folder = tmp_path / "run" / "validation_outputs" / "step-000002-dev"
    report = json.loads((folder / "report.json").read_text())
    metrics = {metric["name"]: metric["value"] for metric in report["metrics"]}
    (_, last) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert last["validation/reconstruction/psnr"] == metrics["reconstruction/psnr"]
    assert last["validation/heldout_loss"] == pytest.approx(metrics["heldout_loss"], rel=1e-6)
    assert report["provenance"]["step"] == 2
    assert report["provenance"]["holdout"] == "dev"
    assert {row["key"] for row in pq.read_table(folder / "samples.parquet", columns=["key"]).to_pylist()} <= {
        row["key"] for row in Dataset(dataset).rows("dev")
    }
    assert not (folder / "parts").exists()


def test_a_fuller_report_of_the_same_weights_stays(dataset, tmp_path):
    config = write_config(tmp_path / "c.yaml", dataset, tmp_path / "run")
    on = ["validation.every_steps=2", "validation.tests=[reconstruction]"]
    assert main(["run", "--config", str(config), "train.steps=2", *on]) == 0
    given = tmp_path / "run" / "validation_outputs" / "step-000002"
    folder = given.with_name("step-000002-dev")  # not where `evaluate run` reads test
    report = json.loads((folder / "report.json").read_text())
    fuller = json.dumps(report | {"skipped": [{"name": "from `evaluate run`", "reason": "of this test"}]})
    (folder / "report.json").write_text(fuller)
    short = fuller.replace('"captions": "long"', '"captions": "short"')
    others = fuller.replace(report["provenance"]["weights_sha256"], "other"), short
    for changed, kept in ((fuller, True), *((other, False) for other in others)):
        (folder / "report.json").write_text(changed)
        (given / "heldout.json").unlink()  # as where a kill came before the validation's end
        model, trained, _ = load_model(tmp_path / "run")
        values = pulse.validate(model, trained, Dataset(dataset), 2, given)
        assert values["validation/reconstruction/psnr"] is not None
        assert ((folder / "report.json").read_text() == changed) == kept


def test_missing_short_captions_are_noticed_before_the_run_and_before_anything_is_deleted(tmp_path):
    dataset = write_dataset(tmp_path / "dataset", short=False)
    given = ["validation.tests=[reconstruction]", "validation.evaluate_overrides={captions: short}"]
    with pytest.raises(ConfigError, match=r"captions=short of validation\.evaluate_overrides asks for short"):
        pulse.build_validation(tiny_config(dataset, tmp_path / "run", *ON, *given), Dataset(dataset))
    config = write_config(tmp_path / "c.yaml", dataset, tmp_path / "run")
    assert main(["run", "--config", str(config), "train.steps=1", "checkpoint.every_steps=1"]) == 0
    folder = tmp_path / "run" / "validation_outputs" / "step-000001"
    (folder / "images").mkdir(parents=True)
    (folder / "report.json").write_text("of long captions")
    with pytest.raises(DataError, match="prepared without short captions"):
        evaluate_run(tmp_path / "run", EvaluateConfig(captions="short"))
    assert (folder / "report.json").read_text() == "of long captions"
    assert (folder / "images").is_dir()


def test_unknown_tests_are_refused_before_the_run(dataset, tmp_path, capsys):
    config = write_config(tmp_path / "c.yaml", dataset, tmp_path / "run")
    assert main(["run", "--config", str(config), *ON, "validation.tests=[beauty]"]) == 2
    assert "validation.tests: unknown beauty; known: heldout_loss" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("{samples: 8}", "validation.evaluate_overrides: samples is validation.samples; remove it there"),
        ("{seed: 8}", "validation.evaluate_overrides: seed is validation.seed; remove it there"),
        ("{tests: [pose]}", "validation.evaluate_overrides: tests is validation.tests; remove it there"),
        ("{batch_size: 8}", "validation.evaluate_overrides: batch_size follows the batches of training; remove it"),
        ("{edit.edits: none.yaml}", "edit.edits: none.yaml: No such file or directory"),
        ("{sampler.stepz: 8}", "validation.evaluate_overrides: unknown key `sampler.stepz`; did you mean"),
    ],
)
def test_overrides_that_would_be_ignored_or_fail_are_refused_before_the_run(dataset, tmp_path, overrides, message):
    given = ["validation.tests=[edit]", f"validation.evaluate_overrides={overrides}"]
    config = tiny_config(dataset, tmp_path / "run", *ON, *given)
    with pytest.raises(ConfigError) as refused:
        pulse.build_validation(config, Dataset(dataset))
    assert str(refused.value).startswith(message)


def test_a_record_says_which_samples_a_seed_chose(run, dataset, tmp_path):
    model, config, _ = load_model(run)
    seeds = {}
    for seed in (None, 5):
        chosen = config.model_copy(update={"validation": config.validation.model_copy(update={"seed": seed})})
        pulse.validate(model, chosen, Dataset(dataset), 6, tmp_path)
        seeds[seed] = json.loads((tmp_path / "heldout.json").read_bytes()).get("holdout_seed")
    assert seeds == {None: None, 5: 5}
