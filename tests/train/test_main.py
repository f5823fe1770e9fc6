"""The command line of ``train run``: run, continue, refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.train.tiny import write_config, write_dataset
from train.__main__ import main


@pytest.fixture(scope="module")
def config(tiny_dataset, tmp_path_factory) -> Path:
    """The config of a run that is finished."""
    folder = tmp_path_factory.mktemp("main")
    path = write_config(folder / "tiny.yaml", tiny_dataset, folder / "run")
    assert main(["run", "--config", str(path), "train.steps=6"]) == 0
    return path


@pytest.fixture
def run(config) -> Path:
    """Its run folder."""
    return config.parent / "run"


def test_a_run_folder_holds_what_was_promised(run, capsys):
    assert {path.name for path in run.iterdir()} == {
        "config.yaml", "provenance.json", "metrics.jsonl", "tensorboard", "checkpoints", "run.lock",
    }  # fmt: skip
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-000003", "step-000006"]
    provenance = json.loads((run / "provenance.json").read_text())
    assert provenance["dataset"]["encoders"] == "demo"
    assert str(run) not in json.dumps(provenance)


def test_a_finished_run_says_so(config, capsys):
    assert main(["run", "--config", str(config), "train.steps=6"]) == 0
    assert "already trained to step 6; nothing to do" in capsys.readouterr().out


def test_the_resolved_config_is_a_config(config, run, capsys):
    assert main(["run", "--config", str(run / "config.yaml")]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_never_refuses_a_folder_with_a_run(config, capsys):
    assert main(["run", "--config", str(config), "--resume", "never", "train.steps=6"]) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_a_branch_continues_another_run_elsewhere(config, run, tmp_path, capsys):
    arguments = ["run", "--config", str(config), f"output={tmp_path / 'branch'}", "train.steps=6"]
    assert main([*arguments, "--resume", str(run / "checkpoints" / "step-000003")]) == 0
    for name in ("model", "ema", "optimizer"):
        ours, theirs = (f / "checkpoints" / "step-000006" / f"{name}.safetensors" for f in (tmp_path / "branch", run))
        assert ours.read_bytes() == theirs.read_bytes()
    assert json.loads((tmp_path / "branch" / "provenance.json").read_text())["started_at_steps"] == [3]
    assert main([*arguments, "--resume", str(run / "checkpoints" / "step-000003")]) == 2
    error = capsys.readouterr().err
    assert "has checkpoints after step 3 (step-000006 to step-000006); leave out --resume to continue from" in error


def test_a_listed_change_is_allowed(config, run, tmp_path, capsys):
    arguments = ["run", "--config", str(config), f"output={tmp_path / 'longer'}", "train.steps=8", "train.lr=1e-3"]
    resume = ["--resume", str(run)]
    assert main([*arguments, *resume, "--allow-change", "train.steps"]) == 2
    assert "train.lr: 0.003 -> 0.001" in capsys.readouterr().err
    assert main([*arguments, *resume, "--allow-change", "train.steps", "--allow-change", "train.lr"]) == 0


def test_another_environment_is_refused_unless_allowed(config, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "Z80")
    arguments = ["run", "--config", str(config), f"output={tmp_path / 'moved'}", "train.steps=6"]
    arguments += ["--resume", str(run / "checkpoints" / "step-000003")]
    assert main(arguments) == 2
    assert "cpu_capability: '" in capsys.readouterr().err
    assert main([*arguments, "--allow-environment-change"]) == 0


def test_no_gpu_is_said(config, capsys):
    assert main(["run", "--config", str(config), "train.device=cuda"]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err


def test_a_dataset_without_conditions_is_refused(tmp_path, capsys):
    dataset = write_dataset(tmp_path / "dataset", layers=("px", "text"))
    path = write_config(tmp_path / "c.yaml", dataset, tmp_path / "run")
    assert main(["run", "--config", str(path)]) == 3
    assert "has no conditions to train on" in capsys.readouterr().err


def test_guided_pictures_need_the_unconditional_model(tiny_dataset, tmp_path, capsys):
    path = write_config(tmp_path / "c.yaml", tiny_dataset, tmp_path / "run")
    overrides = ["conditioning.preset=null", "conditioning.table={text: 0.5, all: 0.5}", "train.steps=1"]
    arguments = ["run", "--config", str(path), *overrides, "visual_debug.guidance=2"]
    assert main([*arguments, "visual_debug.every_steps=1"]) == 2
    assert "visual_debug.guidance 2: the dropout table never trains `nothing`" in capsys.readouterr().err
    assert main(arguments) == 0, "no pictures are drawn"


@pytest.mark.slow
def test_figures_from_end_to_end(figures_dataset, tmp_path, capsys):
    path = write_config(tmp_path / "c.yaml", figures_dataset, tmp_path / "run")
    assert main(["run", "--config", str(path), "train.steps=4", "visual_debug.every_steps=4"]) == 0
    assert (tmp_path / "run" / "visual_debug" / "step-000004" / "grid.png").exists()
    arguments = ["--checkpoint", str(tmp_path / "run"), "--prompt", "A woman in a red top.", "--steps", "2"]
    assert main(["sample", *arguments, "--output", str(tmp_path / "a.png")]) == 0
    assert Image.open(tmp_path / "a.png").size == (64, 64)
