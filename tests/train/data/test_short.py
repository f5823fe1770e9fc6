"""Short captions in training: who is given one, what it changes, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nanodit.errors import ConfigError
from prep.dataset.reader import Dataset
from tests.train.data.test_flip import make
from tests.train.tiny import write_dataset
from train.data.samples import TrainingSet, load_conditions
from train.data.short import draw_short
from train.loop.tracking import read_metrics

IMAGES = 4000


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_the_rate_is_the_configured_one_and_a_draw_depends_on_its_name_alone(share):
    drawn = [draw_short(1, step, image, share) for step in range(IMAGES // 8) for image in range(8)]
    assert np.mean(drawn) == pytest.approx(share, abs=4 * (share * (1 - share) / IMAGES) ** 0.5)
    assert drawn[17] == draw_short(1, 2, 1, share)
    assert not draw_short(1, 2, 1, 0.0)


def test_only_the_text_of_those_that_are_drawn_changes(tiny_dataset, tmp_path):
    trainer = make(tiny_dataset, tmp_path / "run", "data.short_captions=0.5", "data.cache_gb=0")
    plain = make(tiny_dataset, tmp_path / "plain")
    dataset = Dataset(tiny_dataset)
    rows = {row["key"]: row for row in dataset.rows()}
    given, shorter = 0, 0
    for number in range(30):
        batch, before = trainer.batches.make(number), plain.batches.make(number)
        assert (batch.keys, batch.subsets, before.short) == (before.keys, before.subsets, 0)
        for name in ("x", "noise", "t"):
            assert torch.equal(getattr(batch, name), getattr(before, name))
        step, position = divmod(number, 2)
        drawn = trainer.batches.shorts(step, trainer.batches.plan.of_step(step)[position].images)
        assert batch.short == sum(drawn)
        given += batch.short
        for ours, theirs in zip(batch.groups, before.groups):
            for name, tensor in theirs.conditions.tensors.items():
                if not name.startswith("text"):
                    assert torch.equal(ours.conditions.tensors[name], tensor)
            if "text" not in theirs.conditions.tensors:
                continue
            lengths = [group.conditions.tensors["text_mask"].sum(1).tolist() for group in (ours, theirs)]
            named = zip(batch.keys[ours.images], batch.subsets[ours.images], drawn[ours.images], *lengths)
            for key, subset, short, mine, long in named:
                row = rows[key]
                if "text" not in subset:  # trimmed with the others
                    continue
                wanted = row["t5_short_tokens"] or row["t5_tokens"]
                assert mine == (wanted if short else row["t5_tokens"])
                assert long == row["t5_tokens"]
                shorter += mine < long
    assert given == pytest.approx(30 * 3.5 * 0.5, rel=0.35)
    assert shorter


def test_the_features_are_those_of_the_short_caption_also_of_a_mirror_image_and_from_memory(tiny_dataset):
    dataset = Dataset(tiny_dataset)
    data = TrainingSet(dataset, cache_gb=1.0)
    rows = list(dataset.rows("train").by("bucket")["64x64"])
    for shorts in ([True] * len(rows), [False, True] * len(rows)):
        for flips in (None, [dataset.flippable(row) for row in rows]):
            for _ in range(2):
                features = data.features(rows, flips, shorts[: len(rows)])
                for row, short, flip, text in zip(rows, shorts, flips or [False] * len(rows), features["text"]):
                    read = dataset.t5_short if short else dataset.t5
                    assert np.array_equal(text, read(row, flipped=flip))
    assert load_conditions(dataset, rows, shorts=[True] * len(rows)).tensors["text"].shape[0] == len(rows)


def test_a_run_logs_its_share(tiny_dataset, tmp_path):
    steps = ["train.steps=4", "checkpoint.every_steps=9"]
    trainer = make(tiny_dataset, tmp_path / "run", "data.short_captions=0.4", *steps)
    expected = [sum(trainer.batches.make(2 * step + i).short for i in range(2)) / 8 for step in range(4)]
    trainer.run()
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [record["train/short_share"] for record in records] == expected
    assert any(expected)


def test_a_dataset_without_short_captions_is_refused(tmp_path):
    dataset = write_dataset(tmp_path / "dataset", short=False)
    message = r"data\.short_captions asks for short captions, but .*prep run on it with captions\.short=true"
    with pytest.raises(ConfigError, match=message):
        make(dataset, tmp_path / "run", "data.short_captions=0.1")
    make(dataset, tmp_path / "run")
    without = write_dataset(tmp_path / "pose", layers=("px", "pose"))
    with pytest.raises(ConfigError, match=message):
        make(without, tmp_path / "other", "data.short_captions=0.1")
