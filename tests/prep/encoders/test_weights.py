"""The identity of model weights: content for folders, name and revision for the hub, and never a path."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers.utils import logging

from prep.encoders.weights import cannot_load, compute_dtype, folder_hash, model_identity, quiet_transformers


def test_a_folder_is_its_content(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
    assert model_identity(tmp_path / "one", None) == model_identity(tmp_path / "two", "ignored")
    assert str(tmp_path) not in str(model_identity(tmp_path / "one", None))
    before = folder_hash(tmp_path / "two")
    (tmp_path / "two" / ".cache").write_text("not part of the model")
    assert folder_hash(tmp_path / "two") == before
    (tmp_path / "two" / "model.safetensors").write_bytes(b"weighty")
    assert folder_hash(tmp_path / "two") != before
    (tmp_path / "one" / "config.json").rename(tmp_path / "one" / "other.json")
    assert folder_hash(tmp_path / "one") != before


def test_a_hub_model_is_its_name_and_revision() -> None:
    assert model_identity("google-t5/t5-large", "150ebc2") == {"model": "google-t5/t5-large", "revision": "150ebc2"}
    assert model_identity("google-t5/t5-large", None)["revision"] == "main"


def test_gpus_compute_in_bfloat16_where_they_can_and_never_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compute_dtype(torch.device("cpu")) == torch.float32
    for capability, dtype in (((6, 1), torch.float32), ((7, 5), torch.float32), ((8, 6), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, answer=capability: answer)
        assert compute_dtype(torch.device("cuda:0")) == dtype


def test_progress_bars_come_back() -> None:
    logging.enable_progress_bar()
    with quiet_transformers():
        assert not logging.is_progress_bar_enabled()
    assert logging.is_progress_bar_enabled()


def test_errors_name_the_model_and_a_way_out() -> None:
    message = str(cannot_load("T5 encoder", "no/such", OSError("no/such is not a local folder\nand more")))
    assert "T5 encoder 'no/such': no/such is not a local folder. " in message
    assert "save_pretrained" in message
    assert "OSError" in str(cannot_load("T5 encoder", "no/such", OSError()))
