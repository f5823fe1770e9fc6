"""A run goes on in the types that it began with, whatever later versions know of its processor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nanodit.files import canonical_json, sha256_file
from tests.train.checkpoint.test_continued import files, forget_after, train
from tests.train.tiny import write_config
from train import hardware

FLAGS = {"amx": "_is_amx_tile_supported", "avx512_bf16": "_is_avx512_bf16_supported"}
AUTO = "train.precision=auto"


@pytest.fixture
def config(tiny_dataset, tmp_path) -> Path:
    return write_config(tmp_path / "c.yaml", tiny_dataset, tmp_path / "run")


@pytest.fixture
def processor(monkeypatch) -> Callable[[str], None]:
    """Makes torch's flags those of a processor with one of the instructions, or of another."""

    def become(name: str) -> None:
        for one, flag in FLAGS.items():
            monkeypatch.setattr(f"torch.cpu.{flag}", lambda one=one: one == name)
        hardware.cpu_bf16.cache_clear()

    yield become
    monkeypatch.undo()
    hardware.cpu_bf16.cache_clear()


def tensors(run: Path) -> dict[str, bytes]:
    return {name: content for name, content in files(run, 6).items() if name != "state"}


def state_of(run: Path, step: int) -> dict:
    return json.loads((run / "checkpoints" / f"step-{step:06d}" / "state.json").read_text())


def make_older(run: Path) -> None:
    """Make the states those of a version that asked for AMX alone."""
    for folder in (run / "checkpoints").iterdir():
        state = json.loads((folder / "state.json").read_text())
        state["environment"]["fast_bf16"] = state["environment"].pop("cpu_bf16") == "amx"
        del state["fast_bf16"]
        (folder / "state.json").write_text(canonical_json(state))
        manifest = json.loads((folder / "manifest.json").read_text())
        size, digest = (folder / "state.json").stat().st_size, sha256_file(folder / "state.json")
        manifest["files"]["state.json"] = {"bytes": size, "sha256": digest}
        (folder / "manifest.json").write_text(canonical_json(manifest))


def test_a_run_of_an_older_version_goes_on_in_float32_to_the_bit(config, tmp_path, processor, capsys):
    processor("none")  # which is what older versions took this one for
    assert train(config, tmp_path / "straight", 6, AUTO) == 0
    assert train(config, tmp_path / "run", 6, AUTO) == 0
    forget_after(tmp_path / "run", 3)
    make_older(tmp_path / "run")
    processor("avx512_bf16")
    assert train(config, tmp_path / "run", 6, AUTO) == 0
    assert "fast at bfloat16 (avx512_bf16), but the run began without" in capsys.readouterr().out
    assert tensors(tmp_path / "run") == tensors(tmp_path / "straight")
    assert state_of(tmp_path / "run", 6)["fast_bf16"] is False
    assert train(config, tmp_path / "new", 6, AUTO) == 0
    assert state_of(tmp_path / "new", 6)["fast_bf16"] is True
    assert tensors(tmp_path / "new") != tensors(tmp_path / "straight"), "a run begun now computes in bfloat16"


def test_a_run_in_bfloat16_goes_on_to_the_bit(config, tmp_path, processor):
    processor("avx512_bf16")
    assert train(config, tmp_path / "straight", 6, AUTO) == 0
    assert train(config, tmp_path / "run", 6, AUTO) == 0
    forget_after(tmp_path / "run", 3)
    assert train(config, tmp_path / "run", 6, AUTO) == 0
    assert files(tmp_path / "run", 6) == files(tmp_path / "straight", 6)


@pytest.mark.parametrize(("began", "older", "here"), [
    ("amx", True, "avx512_bf16"), ("amx", False, "avx512_bf16"), ("avx512_bf16", False, "none"), ("none", True, "amx"),
])  # fmt: skip
def test_other_instructions_are_refused_unless_allowed(config, tmp_path, processor, capsys, began, older, here):
    processor(began)
    assert train(config, tmp_path / "run", 3, AUTO) == 0
    if older:
        make_older(tmp_path / "run")
    processor(here)
    assert train(config, tmp_path / "run", 4, AUTO) == 2
    assert f"cpu_bf16: '{began}' -> '{here}'" in capsys.readouterr().err
    assert train(config, tmp_path / "run", 4, AUTO, flags=("--allow-environment-change",)) == 0
    assert state_of(tmp_path / "run", 4)["fast_bf16"] is (began != "none" and here != "none")
