"""A checkpoint or export that asks for a network which its own tensors are not of: named, and never allocated."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from nanodit.errors import DataError
from nanodit.files import sha256_file
from tests.train.tiny import write_config
from train.__main__ import main
from train.checkpoint.open import load_model
from train.checkpoint.state import checked_state

CHANGES = [
    (("model", "hidden_size"), 49_152),
    (("model", "depth"), 1_000_000_000),
    (("model", "bottleneck"), 1 << 40),
    (("model", "patch_size"), 1 << 20),
]


@pytest.fixture(scope="module")
def folder(tiny_dataset, tmp_path_factory) -> Path:
    """A folder with a run of two steps and its export."""
    folder = tmp_path_factory.mktemp("hostile")
    config = write_config(folder / "c.yaml", tiny_dataset, folder / "run")
    assert main(["run", "--config", str(config), "train.steps=2"]) == 0
    assert main(["export", "--checkpoint", str(folder / "run"), "--output", str(folder / "export")]) == 0
    return folder


@pytest.mark.parametrize(("name", "value"), [("noise", None), ("noise", {"kind": "host"}), ("parent", {"step": 3})])
def test_a_state_without_what_a_run_goes_on_with(folder, name, value):
    step = folder / "run" / "checkpoints" / "step-000002"
    state = json.loads((step / "state.json").read_text())
    assert checked_state(state, step) is state
    with pytest.raises(DataError, match=rf"step-000002/state\.json: not the state .*: {name}"):
        checked_state(state | {name: value}, step)
    del state["noise"], state["parent"]  # as a version before wrote it
    checked_state(state, step)


def refused(path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(DataError, match=r"safetensors: its tensors are not those of the network"):
        load_model(path)
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(("key", "value"), CHANGES)
def test_a_state_that_asks_for_too_much(folder, key, value):
    step = folder / "run" / "checkpoints" / "step-000002"
    files = {name: (step / name).read_text() for name in ("state.json", "manifest.json")}
    state, manifest = (json.loads(text) for text in files.values())
    state["config"][key[0]][key[1]] = value
    try:
        (step / "state.json").write_text(json.dumps(state))
        manifest["files"]["state.json"] = {
            "sha256": sha256_file(step / "state.json"), "bytes": (step / "state.json").stat().st_size,
        }  # fmt: skip
        (step / "manifest.json").write_text(json.dumps(manifest))
        refused(step)
    finally:
        for name, text in files.items():
            (step / name).write_text(text)
    load_model(step)


@pytest.mark.parametrize(("key", "value"), CHANGES)
def test_an_export_that_asks_for_too_much(folder, key, value):
    file = folder / "export" / "transformer" / "config.json"
    text = file.read_text()
    described = json.loads(text)
    described[key[0]][key[1]] = value
    try:
        file.write_text(json.dumps(described))
        refused(folder / "export")
    finally:
        file.write_text(text)
    load_model(folder / "export")
