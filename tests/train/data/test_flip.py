"""Mirrored samples: every modality goes along, twice is the identity, and the mirror of a figure is known exactly."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nanodit.errors import ConfigError
from prep.captions.mirror import flip_caption
from prep.dataset.codecs import load_npy
from prep.dataset.reader import Dataset
from prep.encoders.dwpose import normalise
from prep.figures.figures import draw_figure
from prep.figures.keypoints import BODY, FEET
from tests.train.tiny import tiny_config, write_dataset
from train.data.flip import draw_flip
from train.data.samples import TrainingSet, load_conditions, load_pixels
from train.loop.tracking import read_metrics
from train.loop.trainer import Trainer
from train.model.mirror import MIRRORED_JOINTS, flip_pixels, flip_pose

COORDINATES = st.floats(-1.5, 1.5, width=32)


def make(dataset: Path, output: Path, *overrides: str) -> Trainer:
    config = tiny_config(dataset, output, *overrides)
    config.run_folder.mkdir(exist_ok=True)
    return Trainer(config, Dataset(dataset), torch.device("cpu"))


# The functions


@settings(max_examples=30)
@given(arrays(np.float32, (133, 3), elements=COORDINATES))
def test_flipping_a_pose_twice_is_the_identity(pose):
    np.testing.assert_array_equal(flip_pose(flip_pose(pose)), pose)
    np.testing.assert_array_equal(flip_pose(pose)[:, 0], -pose[MIRRORED_JOINTS, 0])
    np.testing.assert_array_equal(flip_pose(pose)[:, 1:], pose[MIRRORED_JOINTS, 1:])


@given(arrays(np.uint8, st.tuples(st.integers(1, 5), st.integers(1, 6), st.just(3))))
def test_flipping_pixels_or_a_grid_twice_is_the_identity(pixels):
    assert np.array_equal(flip_pixels(flip_pixels(pixels)), pixels)
    assert np.array_equal(flip_pixels(pixels)[:, 0], pixels[:, -1])


def test_every_joint_has_its_mirror_image():
    assert sorted(MIRRORED_JOINTS) == list(range(133))
    assert np.array_equal(MIRRORED_JOINTS[MIRRORED_JOINTS], np.arange(133))
    names = [*BODY, *FEET]
    for name, other in zip(names, MIRRORED_JOINTS):
        swapped = name.replace("left", "*").replace("right", "left").replace("*", "right")
        assert names[other] == swapped
    # by themselves: the nose (of the body, and its bridge and tip), the chin, the middles of the lips
    assert np.flatnonzero(np.arange(133) == MIRRORED_JOINTS).tolist() == [0, 31, 50, 51, 52, 53, 56, 74, 80, 85, 89]
    assert np.array_equal(MIRRORED_JOINTS[91:112], np.arange(112, 133))


def test_joints_that_were_not_found_stay_zero():
    flipped = flip_pose(np.zeros((133, 3), np.float32))
    assert flipped.tobytes() == bytes(flipped.nbytes)  # no negative zero either
    one = np.zeros((133, 3), np.float32)
    one[9] = 0.25, -0.5, 0.75  # the left wrist
    assert flip_pose(one)[10].tolist() == [-0.25, -0.5, 0.75]
    assert not flip_pose(one)[9].any()


@pytest.mark.parametrize("index", range(12))
def test_a_figure_rendered_mirrored_is_the_flipped_sample(index):
    """Pixels and words exactly; joints, which the mirrored scene computes from its own body, but for rounding."""
    figure, mirrored = (draw_figure(5, index, 64, mirrored=mirrored) for mirrored in (False, True))
    assert np.array_equal(flip_pixels(np.asarray(figure.image)), np.asarray(mirrored.image))
    assert flip_caption(figure.caption) == mirrored.caption != figure.caption
    joints, others = (normalise(f.keypoints, *f.image.size) for f in (figure, mirrored))
    np.testing.assert_allclose(flip_pose(joints), others, rtol=0, atol=5e-7)
    assert np.array_equal(flip_pose(joints)[:, 2], others[:, 2])  # what hides a joint is on the other side, too
    width = figure.image.width
    x0, y0, x1, y1 = figure.box
    np.testing.assert_allclose(mirrored.box, (width - x1, y0, width - x0, y1), atol=1e-9)


def test_the_share_is_drawn_and_depends_on_the_name_alone():
    drawn = [draw_flip(3, step, image, 0.3) for step in range(50) for image in range(40)]
    assert drawn == [draw_flip(3, step, image, 0.3) for step in range(50) for image in range(40)]
    assert np.mean(drawn) == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / 2000) ** 0.5)
    assert not any(draw_flip(3, 0, image, 0.0) for image in range(40))


# The samples


def test_all_conditions_are_those_of_the_mirror_image(tiny_dataset):
    dataset = Dataset(tiny_dataset)
    rows = [row for row in dataset.rows("train") if row["bucket"] == "64x64"]
    flips = [dataset.flippable(row) and number % 3 != 0 for number, row in enumerate(rows)]
    assert 0 < sum(flips) < len(flips)
    for data in (dataset, TrainingSet(dataset, cache_gb=1), TrainingSet(dataset, cache_gb=0)):
        read = partial(load_conditions, data) if data is dataset else data.conditions
        for _ in range(2):  # a cache answers the second time
            x, mirrored = load_pixels(data, rows, flips=flips), read(rows, flips)
            plain_x, plain = load_pixels(data, rows), read(rows)
            for i, (row, flip) in enumerate(zip(rows, flips)):
                assert torch.equal(x[i], plain_x[i].flip(-1) if flip else plain_x[i])
                text = mirrored.text[i][mirrored.text_mask[i]].numpy()
                other = flip and row["caption_flip"] != row["caption"]
                stored = load_npy(dataset.read(row, "t5/t5_flip.npy" if other else "t5/t5.npy"))
                np.testing.assert_array_equal(text, stored.astype(np.float32))
                np.testing.assert_array_equal(mirrored.cls[i], dataset.cls(row, flip))
                np.testing.assert_array_equal(mirrored.patches[i], dataset.patches(row, flip))
                assert torch.equal(mirrored.cls[i], plain.cls[i]) == (not flip)
                assert torch.equal(mirrored.patches[i], plain.patches[i]) == (not flip)
                pose = plain.pose[i].numpy()
                np.testing.assert_array_equal(mirrored.pose[i], flip_pose(pose) if flip else pose)


def test_a_symmetric_caption_has_the_same_features_and_an_unsure_one_none(tiny_dataset):
    dataset = Dataset(tiny_dataset)
    rows = dataset.rows()
    symmetric = [row for row in rows if row["caption_flip"] == row["caption"]]
    unsure = [row for row in rows if row["caption_flip"] is None]
    assert symmetric
    assert unsure
    for row in symmetric:
        assert np.array_equal(dataset.t5(row, flipped=True), dataset.t5(row))
    assert not any(map(dataset.flippable, unsure))
    assert all(dataset.flippable(row) for row in rows if row not in unsure)


# The trainer


def test_what_cannot_be_flipped_safely_never_is(tiny_dataset, tmp_path):
    trainer = make(tiny_dataset, tmp_path / "run", "data.flip=0.5", "data.cache_gb=0")
    plain = make(tiny_dataset, tmp_path / "plain")
    sure = {row["key"]: row["caption_flip"] is not None for row in Dataset(tiny_dataset).rows()}
    mirrored = possible = 0
    for number in range(40):
        batch, before = trainer.batches.make(number), plain.batches.make(number)
        assert batch.keys == before.keys
        assert batch.subsets == before.subsets
        assert torch.equal(batch.noise, before.noise)
        assert torch.equal(batch.t, before.t)
        flips = [not torch.equal(ours, theirs) for ours, theirs in zip(batch.x, before.x)]
        assert sum(flips) == batch.flipped
        assert before.flipped == 0
        for key, flip in zip(batch.keys, flips):
            possible += sure[key]
            assert sure[key] or not flip
        mirrored += sum(flips)
        for ours, theirs, flip in zip(batch.x, before.x, flips):
            assert not flip or torch.equal(ours, theirs.flip(-1))
    assert mirrored / possible == pytest.approx(0.5, abs=0.2)


def test_a_run_logs_its_share(tiny_dataset, tmp_path):
    steps = ["train.steps=4", "checkpoint.every_steps=9"]
    trainer = make(tiny_dataset, tmp_path / "run", "data.flip=0.4", *steps)
    expected = [sum(trainer.batches.make(2 * step + i).flipped for i in range(2)) / 8 for step in range(4)]
    trainer.run()
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [record["train/flip_share"] for record in records] == expected
    assert any(expected)
    make(tiny_dataset, tmp_path / "plain", *steps).run()
    assert not any("train/flip_share" in record for record in read_metrics(tmp_path / "plain" / "metrics.jsonl"))


def test_a_dataset_without_flips_is_refused(tmp_path):
    dataset = write_dataset(tmp_path / "dataset", flips=False)
    with pytest.raises(ConfigError, match=r"prepared without flips.*prep run on it with flips=true"):
        make(dataset, tmp_path / "run", "data.flip=0.1")
    make(dataset, tmp_path / "run")


@pytest.mark.parametrize("layers", [("px", "pose"), ("px", "text", "t5"), ("px", "dino")])
def test_datasets_without_some_layers(tmp_path, layers):
    dataset = write_dataset(tmp_path / "dataset", layers=layers)
    trainer = make(dataset, tmp_path / "run", "data.flip=0.5")
    assert sum(trainer.batches.make(number).flipped for number in range(8)) > 0
    if "text" not in layers:
        data = Dataset(dataset)
        assert all(map(data.flippable, data.rows()))
