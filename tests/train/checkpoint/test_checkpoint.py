"""Checkpoints: whole or absent, hashed, never pickled, and one path back to a model."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from nanodit.errors import ConfigError, DataError
from nanodit.files import canonical_json, sha256_file
from prep.dataset.reader import Dataset
from tests.train.tiny import tiny_config
from train.checkpoint.checkpoint import (
    checkpoint_steps,
    find_latest,
    load_checkpoint,
    load_weights,
    resolve_checkpoint,
    save_checkpoint,
    verify,
)
from train.checkpoint.open import load_model
from train.loop.trainer import Trainer

TENSORS = {
    "model": {"w": torch.arange(6.0).view(2, 3)},
    "ema": {"w": torch.ones(2, 3)},
    "optimizer": {"adamw/step/w": torch.tensor(3.0)},
}


@pytest.fixture(scope="module")
def run(tiny_dataset, tmp_path_factory) -> Path:
    """A finished run of four steps with checkpoints at 2 and 4."""
    config = tiny_config(
        tiny_dataset, tmp_path_factory.mktemp("checkpoint") / "run", "train.steps=4", "checkpoint.every_steps=2"
    )
    config.run_folder.mkdir()
    Trainer(config, Dataset(tiny_dataset), torch.device("cpu")).run()
    return config.run_folder


def copy_of(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def test_what_is_saved_is_what_is_loaded(tmp_path):
    path = save_checkpoint(tmp_path, 7, TENSORS, {"note": "x"})
    assert path == tmp_path / "checkpoints" / "step-000007"
    loaded = load_checkpoint(path)
    assert torch.equal(loaded.model["w"], TENSORS["model"]["w"])
    assert torch.equal(loaded.ema["w"], TENSORS["ema"]["w"])
    assert loaded.optimizer["adamw/step/w"].shape == ()
    assert loaded.state == {"schema": 1, "step": 7, "note": "x"}
    manifest = json.loads((path / "manifest.json").read_text())
    assert {name: entry["sha256"] for name, entry in manifest["files"].items()} == {
        file.name: sha256_file(file) for file in path.iterdir() if file.name != "manifest.json"
    }


def test_equal_states_give_equal_bytes_and_no_metadata(tmp_path):
    first, second = (save_checkpoint(tmp_path / name, 1, TENSORS, {"a": 1}) for name in "ab")
    assert {f.name: f.read_bytes() for f in first.iterdir()} == {f.name: f.read_bytes() for f in second.iterdir()}
    header = (first / "model.safetensors").read_bytes()
    assert b"__metadata__" not in header


def test_trap_31_a_save_replaces_atomically_and_prunes(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, TENSORS, {}, keep_last=2)
    assert [path.name for path in checkpoint_steps(tmp_path)] == ["step-000003", "step-000002"]  # trap 31: pruned
    other = {**TENSORS, "model": {"w": torch.zeros(2, 3)}}
    path = save_checkpoint(tmp_path, 3, other, {}, keep_last=2)
    assert torch.equal(load_checkpoint(path).model["w"], torch.zeros(2, 3))
    assert not list((tmp_path / "checkpoints").glob(".*")), "nothing temporary stays"  # trap 31


def test_the_newest_valid_one_is_found(tmp_path, capsys):
    assert find_latest(tmp_path) is None
    for step in (5, 10, 100):
        save_checkpoint(tmp_path, step, TENSORS, {})
    assert find_latest(tmp_path).name == "step-000100"
    (tmp_path / "checkpoints" / "step-000100" / "ema.safetensors").write_bytes(b"")
    assert find_latest(tmp_path).name == "step-000010"
    assert "step-000100/ema.safetensors: 0 bytes" in capsys.readouterr().out
    for step in (5, 10):
        (tmp_path / "checkpoints" / f"step-{step:06d}" / "manifest.json").unlink()
    with pytest.raises(DataError, match="all 3 checkpoints are damaged"):
        find_latest(tmp_path)


def test_a_checkpoint_is_a_folder(tmp_path, run):
    assert resolve_checkpoint(run).name == "step-000004"
    assert resolve_checkpoint(run / "checkpoints").name == "step-000004"
    assert resolve_checkpoint(run / "checkpoints" / "step-000002").name == "step-000002"
    with pytest.raises(ConfigError, match="neither a checkpoint"):
        resolve_checkpoint(tmp_path / "nowhere")


def test_trap_26_one_path_rebuilds_the_model_without_the_dataset(tiny_dataset, run):
    trained = Trainer(
        tiny_config(tiny_dataset, run, "train.steps=4", "checkpoint.every_steps=2"),
        Dataset(tiny_dataset),
        torch.device("cpu"),
    )
    trained.load(load_checkpoint(run / "checkpoints" / "step-000004"))
    batch = trained.batches.make(0)
    _, conditions = trained.data.load(trained.data.select(trained.batches.order[0]))
    assert conditions.keep.all()
    for weights, expected in (("model", trained.model.eval()), ("ema", trained.ema_model())):
        model, config, state = load_model(run, weights)
        assert config.model.depth == 2
        assert state["step"] == 4
        with torch.no_grad():
            ours, theirs = (m(batch.x, batch.t, conditions) for m in (model, expected))
        assert torch.equal(ours, theirs)  # trap 26


def test_tensors_that_do_not_fit_are_named():
    module = torch.nn.Linear(3, 2)
    with pytest.raises(DataError, match="bias is missing; extra is not in the model; weight is"):
        load_weights(module, {"weight": torch.zeros(3, 3), "extra": torch.zeros(1)}, Path("model.safetensors"))


@pytest.mark.parametrize("part", ["model", "ema", "optimizer"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "missing"])
def test_every_damage_is_found_before_a_tensor_is_used(tmp_path, part, damage):
    path = save_checkpoint(tmp_path, 1, TENSORS, {})
    file = path / f"{part}.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        file.write_bytes(data)
    elif damage == "truncate":
        file.write_bytes(data[:-1])
    else:
        file.unlink()
    with pytest.raises(DataError, match=rf"{part}\.safetensors"):
        load_checkpoint(path)


def test_a_manifest_that_vouches_for_a_pickle_does_not_help(tmp_path):
    class Canary:
        def __reduce__(self):
            return (open, (str(tmp_path / "canary"), "w"))

    path = save_checkpoint(tmp_path, 1, TENSORS, {})
    file = path / "model.safetensors"
    file.write_bytes(pickle.dumps(Canary()))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][file.name] = {"sha256": sha256_file(file), "bytes": file.stat().st_size}
    (path / "manifest.json").write_text(canonical_json(manifest))
    verify(path)
    with pytest.raises(DataError, match="cannot be read as safetensors"):
        load_checkpoint(path)
    assert not (tmp_path / "canary").exists()


def test_a_config_of_another_version_is_named(run, tmp_path):
    copy = copy_of(run, tmp_path) / "checkpoints" / "step-000004"
    state = json.loads((copy / "state.json").read_text())
    state["config"]["model"]["no_such_key"] = 1
    (copy / "state.json").write_text(canonical_json(state))
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"]["state.json"] = {
        "sha256": sha256_file(copy / "state.json"),
        "bytes": (copy / "state.json").stat().st_size,
    }
    (copy / "manifest.json").write_text(canonical_json(manifest))
    with pytest.raises(DataError, match=r"state\.json: its config does not fit this version.*\n?.*no_such_key"):
        load_model(copy)
