"""What the making of micro-batches is measured on."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from nanodit.config import load_config
from prep.config import PrepConfig
from prep.dataset.layout import Unit
from prep.verify.units import check_unit
from tests.train.tiny import write_config
from train.config import TrainConfig
from train.data.samples import TrainingSet
from train.plan.feed import Feed, made_up_like, measure_feed
from train.plan.plan import lines, look_ahead
from train.plan.rehearsal import StandIn


@pytest.mark.parametrize("format_", ["webp", "jpeg"])
def test_a_made_up_dataset_is_one_of_the_configs_size(tmp_path, format_):
    prep = load_config(PrepConfig, "configs/prep/figures-256.yaml", [f"image.format={format_}"])
    dataset = made_up_like(StandIn(prep), tmp_path / "dataset", 3)
    row = dataset.rows("train")[0]
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


def test_the_slower_of_card_and_loader_decides(tiny_dataset, tmp_path):
    file = write_config(tmp_path / "c.yaml", tiny_dataset, tmp_path / "run")
    report = look_ahead(file, ["train.steps=1000", "data.workers=3"], memory=None, fed=True)
    assert report.feed.threads == 3
    assert report.feed.of_one > 0
    assert "in memory" in report.feed.samples
    card = "GeForce RTX 4090"
    images = 8 * 1000
    for rate, expected in ((images / report.seconds(card) / 2, 2 * report.seconds(card)), (1e12, report.seconds(card))):
        known = replace(report, feed=Feed(rate / 3, 3, "made up"))
        assert known.expected(card) == pytest.approx(expected)
        assert json.loads(known.as_json())["seconds"][card] == pytest.approx(expected)
        (line,) = [line for line in lines(known) if f"  {card}:" in line]
        assert ("waiting for the loader" in line) == (rate < 1e12)
        assert f"{1000 * rate / 3000:.0f} images/s a thread" in "\n".join(lines(known))


def test_samples_that_do_not_exist_yet_are_made_up(tmp_path):
    feed = measure_feed(load_config(TrainConfig, "configs/train/figures-256.yaml"), _stand_in())
    assert "made up" in feed.samples
    assert feed.of_one > 0


def _stand_in() -> StandIn:
    return StandIn(load_config(PrepConfig, "configs/prep/figures-256.yaml"))
