"""Evaluating with short captions in place of the long ones."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from evaluate.config import EvaluateConfig
from evaluate.report.compare import differing
from evaluate.report.report import drawn_with
from evaluate.run import evaluate
from evaluate.subject import Subject, dataset_modalities
from nanodit.errors import DataError
from prep.dataset.reader import Dataset
from tests.train.tiny import write_dataset
from train.method.dropout import ConditioningConfig
from train.method.flow import FlowConfig
from train.model.config import ModelConfig
from train.model.modalities import Features
from train.model.network import build_model

LAYERS = ("px", "text", "t5")


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> Subject:
    dataset = Dataset(write_dataset(tmp_path_factory.mktemp("short") / "dataset", layers=LAYERS))
    torch.manual_seed(0)
    model = build_model(
        ModelConfig(hidden_size=32, depth=1, num_heads=2, patch_size=8), Features.from_dataset(dataset.info)
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    table = ConditioningConfig(preset="quickstart").resolve(dataset_modalities(dataset))
    return Subject(model.eval(), FlowConfig(), table, dataset, tuple(dataset.rows("holdout"))[:4])


def test_a_view_has_the_short_captions_and_their_features(subject):
    dataset, short = subject.dataset, subject.dataset.with_short_captions()
    for long, row in zip(dataset.rows(), short.rows(), strict=True):
        assert row["key"] == long["key"]
        assert row["caption"] == long["caption_short"]
        assert np.array_equal(short.t5(row), dataset.t5_short(long))
        assert np.array_equal(short.t5(row), dataset.t5(long)) == (row["caption"] == long["caption"])
    assert short.table["caption"].equals(dataset.table["caption_short"])
    assert dataset.rows()[0]["caption"] != dataset.rows()[0]["caption_short"]
    assert short.fingerprint == dataset.fingerprint


def test_all_tests_are_given_them_and_every_metric_says_so(subject, tmp_path):
    found = {}
    for captions in ("long", "short"):
        config = EvaluateConfig.model_validate(
            {
                "tests": ["heldout_loss", "reconstruction"], "conditions": {"text": 1.0}, "captions": captions,
                "sampler": {"method": "euler", "steps": 1}, "grid_images": 0,
                "heldout_loss": {"bins": 1, "conditions": ["text"], "gap": []},
                "reconstruction": {"conditions": ["text"]}, "training_features": 4,
            }
        )  # fmt: skip
        found[captions] = evaluate(subject, config, Path(tmp_path / captions))
    texts = {captions: {row["key"]: row["caption"] for row in one.samples} for captions, one in found.items()}
    rows = {row["key"]: row for row in subject.rows}
    assert texts["long"] == {key: row["caption"] for key, row in rows.items()}
    assert texts["short"] == {key: row["caption_short"] for key, row in rows.items()}
    for long, short in zip(found["long"].metrics, found["short"].metrics, strict=True):
        assert long.name == short.name
        assert short.settings == long.settings | {"given_captions": "short"}
        assert differing([{"n": one.n, "settings": one.settings} for one in (long, short)]) == [
            "given_captions unknown, short"
        ]
    seen = {captions: SimpleNamespace(metrics=[vars(one) for one in found[captions].metrics]) for captions in found}
    said = {captions: drawn_with(SimpleNamespace(files=files)) for captions, files in seen.items()}
    assert said["short"] == said["long"].replace(", given ", ", given short captions: ") != said["long"]
    changed = {
        long.name for long, short in zip(found["long"].metrics, found["short"].metrics) if long.value != short.value
    }
    assert {"heldout_loss", "reconstruction/psnr"} & {name.partition("/text")[0] for name in changed} == {
        "heldout_loss", "reconstruction/psnr"
    }  # fmt: skip


def test_a_dataset_without_them_is_refused(subject, tmp_path):
    dataset = Dataset(write_dataset(tmp_path / "dataset", layers=LAYERS, short=False))
    with pytest.raises(DataError, match=r"prepared without short captions.*captions\.short=true"):
        dataset.with_short_captions()
