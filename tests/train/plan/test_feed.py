"""What the making of micro-batches is measured on."""

from __future__ import annotations

import pytest

from nanodit.config import load_config
from prep.config import PrepConfig
from prep.dataset.layout import Unit
from prep.verify.units import check_unit
from train.data.samples import TrainingSet
from train.plan.feed import write_made_up
from train.plan.rehearsal import StandIn


@pytest.mark.parametrize("format_", ["webp", "jpeg"])
def test_a_made_up_dataset_is_one_of_the_configs_size(tmp_path, format_):
    prep = load_config(PrepConfig, "configs/prep/figures-256.yaml", [f"image.format={format_}"])
    dataset = write_made_up(prep, tmp_path / "dataset", 3)
    row = StandIn(prep).rows("train")[1]
    for layer in dataset.layers:
        assert not check_unit(dataset.storage, Unit(row["bucket"], 0, layer)).findings
    data = TrainingSet(dataset, 0)
    assert data.sizes == {row["bucket"]: 3}
    x, conditions = data.load(data.rows[row["bucket"]])
    assert x.shape[2:] == (int(row["bucket"].split("x")[1]), int(row["bucket"].split("x")[0]))
    assert conditions.patches.shape == (3, row["dino_h"], row["dino_w"], 96)
    assert conditions.text.shape[2] == 128
    assert int(conditions.text_mask.sum(1)[0]) == row["t5_tokens"]
    assert conditions.pose is not None
