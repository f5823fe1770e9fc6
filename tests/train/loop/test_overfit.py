"""The whole trainer learns: 64 figures by heart, from the real shards."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nanodit.config import load_config
from prep.dataset.reader import Dataset
from train.config import TrainConfig
from train.loop.tracking import read_metrics
from train.loop.trainer import Trainer

STEPS = 180
LOSS = 0.20  # mean of the last 40 steps; predicting the mean image gives about 0.5 under this law of times


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_trap_12_sixty_four_images_are_overfitted(figures_dataset, tmp_path):
    dataset = Dataset(figures_dataset)
    assert len(dataset.rows("train")) == 64
    config = load_config(
        TrainConfig,
        "configs/train/quickstart.yaml",
        [
            f"dataset={figures_dataset}",
            f"output={tmp_path}",
            "model.hidden_size=96",
            "model.depth=3",
            f"train.steps={STEPS}",
            "train.batch_size=8",
            "train.lr=8e-3",
            "train.schedule=cosine",
            "flow.t_min=0.05",
            "train.compile=false",
            "train.precision=fp32",
            "conditioning.preset=null",
            "conditioning.table={all: 1.0}",
            f"checkpoint.every_steps={STEPS}",
            "visual_debug.every_steps=0",
        ],
    )
    Trainer(config, dataset, torch.device("cpu")).run()
    losses = [record["train/loss"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert losses[0] > 3 * LOSS
    assert np.mean(losses[-40:]) < LOSS
