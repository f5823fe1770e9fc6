"""``--init-from``: a new run from the weights of another, which it is continued without."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.train import tiny
from tests.train.tiny import write_config, write_dataset
from train.__main__ import main
from train.checkpoint.checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def config(tiny_dataset, tmp_path_factory) -> Path:
    """The config of the run whose weights are taken; it is finished, at step 6."""
    folder = tmp_path_factory.mktemp("parent")
    path = write_config(folder / "tiny.yaml", tiny_dataset, folder / "run")
    assert main(["run", "--config", str(path), "train.steps=6"]) == 0
    return path


@pytest.fixture
def parent(config) -> Path:
    return config.parent / "run" / "checkpoints" / "step-000006"


def begin(config: Path, output: Path, *arguments: str) -> int:
    overrides = [argument for argument in arguments if "=" in argument and not argument.startswith("--")]
    flags = [argument for argument in arguments if argument not in overrides]
    return main(["run", "--config", str(config), *flags, f"output={output}", *overrides])


def at(run: Path, step: int):
    return load_checkpoint(run / "checkpoints" / f"step-{step:06d}")


def test_the_average_becomes_model_and_average(config, parent, tmp_path, capsys):
    assert begin(config, tmp_path / "run", "--init-from", str(parent), "train.steps=3", "train.lr=1e-4") == 0
    assert f"beginning with the EMA weights of {parent}" in capsys.readouterr().out
    first, theirs = at(tmp_path / "run", 0), load_checkpoint(parent)
    for name, value in theirs.ema.items():
        assert torch.equal(first.model[name], value)
        assert torch.equal(first.ema[name], value)
    assert not any(value.any() for value in first.optimizer.values()), "nothing of the optimiser is taken"
    assert first.state["parent"]["step"] == 6
    assert (
        first.state["parent"]["sha256"]
        == json.loads((parent / "manifest.json").read_text())["files"]["ema.safetensors"]["sha256"]
    )
    assert at(tmp_path / "run", 3).state["parent"] == first.state["parent"]
    provenance = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert provenance["parent"] == first.state["parent"]
    assert str(parent) not in json.dumps(provenance), "no places"


def test_it_is_continued_without_its_parent_and_byte_equal(config, parent, tmp_path, capsys):
    copy = Path(shutil.copytree(parent, tmp_path / "copy"))
    straight = ["train.steps=6", "--init-from", str(copy)]
    assert begin(config, tmp_path / "straight", *straight) == 0
    shutil.copytree(tmp_path / "straight", tmp_path / "run")
    for step in (3, 6):  # killed before the first checkpoint of its own
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:06d}")
    shutil.rmtree(copy)
    assert begin(config, tmp_path / "run", "train.steps=6") == 0
    for part in ("model", "ema", "optimizer"):
        ours, theirs = (tmp_path / name / "checkpoints" / "step-000006" for name in ("run", "straight"))
        assert (ours / f"{part}.safetensors").read_bytes() == (theirs / f"{part}.safetensors").read_bytes()
    assert at(tmp_path / "run", 6).state["parent"] == at(tmp_path / "straight", 6).state["parent"]
    capsys.readouterr()
    # the command of a container: the same again
    assert begin(config, tmp_path / "run", "train.steps=6", "--init-from", str(parent)) == 0
    assert begin(config, tmp_path / "run", "train.steps=6", "--init-from", str(parent.parent.parent)) == 0
    assert "nothing to do" in capsys.readouterr().out
    other = parent.with_name("step-000003")
    for path in (other, tmp_path / "nowhere"):
        assert begin(config, tmp_path / "run", "train.steps=6", "--init-from", str(path)) == 2
        assert f"began with the weights of another checkpoint (step 6, SHA-256 {at_hash(parent)}" in (
            capsys.readouterr().err
        )


def test_a_run_of_its_own_takes_no_parent_later(config, parent, capsys):
    assert begin(config, parent.parent.parent, "train.steps=6", "--init-from", str(parent)) == 2
    assert "holds a run that began without --init-from" in capsys.readouterr().err
    assert begin(config, parent, "--init-from", str(parent), "--resume", str(parent)) == 2
    assert "give one of the two" in capsys.readouterr().err


def test_another_network_is_named_key_by_key(config, parent, tmp_path, capsys):
    overrides = ["model.hidden_size=48", "model.patch_size=4", "flow.prediction=v", "model.bottleneck=8"]
    assert begin(config, tmp_path / "run", "--init-from", str(parent), *overrides) == 2
    error = capsys.readouterr().err
    for line in (
        "model.hidden_size: 32 there, 48 here", "model.patch_size: 8 there, 4 here", "model.bottleneck: 16 there, 8",
        "flow.prediction: 'x' there, 'v' here", "Set these keys to their values there",
    ):  # fmt: skip
        assert line in error
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_features_of_another_width_are_named(config, parent, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tiny, "TEXT_WIDTH", 32)
    dataset = write_dataset(tmp_path / "dataset")
    assert begin(config, tmp_path / "run", f"dataset={dataset}", "--init-from", str(parent)) == 2
    assert "t5 features: 24 wide there, 32 here" in capsys.readouterr().err


def test_new_conditions_begin_afresh_and_absent_ones_are_left_out(config, tmp_path, capsys):
    text = write_dataset(tmp_path / "text", layers=("px", "text", "t5"))
    assert begin(config, tmp_path / "a", f"dataset={text}", "train.steps=2") == 0
    begun = [f"--init-from={tmp_path / 'a'}", "train.steps=1"]
    capsys.readouterr()
    assert begin(config, tmp_path / "b", *begun) == 0
    assert "begun afresh: cls, patches, pose" in capsys.readouterr().out
    theirs, first = at(tmp_path / "a", 2), at(tmp_path / "b", 0)
    assert torch.equal(first.model["context.text.weight"], theirs.ema["context.text.weight"])
    assert first.model["context.patches.weight"].any()
    assert begin(config, tmp_path / "c", f"dataset={text}", "--init-from", str(tmp_path / "b"), "train.steps=1") == 0
    assert "not in this dataset, so left out: cls, patches, pose" in capsys.readouterr().out
    nested = at(tmp_path / "c", 0).state["parent"]["parent"]
    assert nested == at(tmp_path / "b", 0).state["parent"], "the whole line of descent"


def test_another_resolution_and_encoder_are_said(config, parent, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tiny, "BUCKETS", {"128x128": (6, 2)})
    monkeypatch.setattr(tiny, "TEXT_ENCODER", {"encoder": "t5", "content": "another"})
    monkeypatch.setattr(tiny, "BASE", 128)
    dataset = write_dataset(tmp_path / "dataset")
    assert begin(config, tmp_path / "run", f"dataset={dataset}", "--init-from", str(parent), "train.steps=1") == 0
    printed = capsys.readouterr().out
    assert "trained at base 64, now 128 pixels" in printed
    assert "warning: t5 features come from another encoder here" in printed


def at_hash(step_folder: Path) -> str:
    manifest = json.loads((step_folder / "manifest.json").read_text())
    return manifest["files"]["ema.safetensors"]["sha256"][:12]
