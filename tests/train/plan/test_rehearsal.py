"""What stands for a dataset before it is read: where it is looked for, and what of it stays in memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanodit.config import load_config
from nanodit.errors import ConfigError, DataError
from nanodit.storage import open_storage
from prep.dataset.reader import Dataset
from tests.train import tiny
from tests.train.tiny import tiny_config, write_config, write_dataset
from train.config import DataSection, TrainConfig
from train.data.samples import TrainingSet
from train.plan.plan import look_ahead
from train.plan.rehearsal import StandIn, cache_bytes, open_dataset


def test_a_dataset_in_an_object_store_is_found(tiny_dataset, tmp_path):
    place = open_storage("memory://rehearsal/dataset")
    for path in tiny_dataset.rglob("*"):
        if path.is_file():
            place.write(path.relative_to(tiny_dataset).as_posix(), path.read_bytes())
    dataset, what = open_dataset(tiny_config("memory://rehearsal/dataset", tmp_path / "run"), Path("a/b.yaml"), None)
    assert isinstance(dataset, Dataset)
    assert what.startswith("memory://rehearsal/dataset: base 64")


def test_a_base_of_0_is_refused_and_not_taken_for_none(tiny_dataset, tmp_path):
    with pytest.raises(ConfigError, match="base"):
        open_dataset(tiny_config(tiny_dataset, tmp_path / "run"), Path("a/b.yaml"), 0)


def test_a_dataset_without_training_samples_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "BUCKETS", {"64x64": (0, 3)})
    dataset = write_dataset(tmp_path / "dataset")
    with pytest.raises(DataError, match="training split is empty"):
        look_ahead(write_config(tmp_path / "tiny.yaml", dataset, tmp_path / "run"), memory="8GB")


def test_what_stays_in_memory_is_what_the_trainer_keeps(tiny_dataset):
    dataset = Dataset(tiny_dataset)
    data = TrainingSet(dataset, 1.0)
    budget = data._budget
    for rows in data.rows.values():
        data.load(rows)
    assert budget - data._budget == cache_bytes(dataset, DataSection())


def test_a_stand_in_has_sizes_too():
    config = load_config(TrainConfig, "configs/train/production.yaml")
    dataset, _ = open_dataset(config, Path("configs/train/production.yaml"), None)
    assert isinstance(dataset, StandIn)
    each = cache_bytes(dataset, DataSection()) / len(dataset.rows("train"))
    pixels, text, patches = 3 * 1024 * 1024, 2 * 262 * 1024, (1 + 2 / 64) * 1024 * 1024
    assert each == pytest.approx(pixels + text + patches, rel=0.06)
    assert cache_bytes(dataset, DataSection(flip=0.5)) / len(dataset.rows("train")) == pytest.approx(
        pixels + 2 * (text + patches), rel=0.06
    )
    short = cache_bytes(dataset, DataSection(short_captions=0.5)) - cache_bytes(dataset, DataSection())
    assert short == len(dataset.rows("train")) * 2 * 32 * 1024
