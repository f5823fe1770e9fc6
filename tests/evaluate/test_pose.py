"""Pose accuracy counts joints that were asked for, and nothing that was not."""

from copy import copy

import numpy as np
import pytest

from evaluate.examine import Examiner
from evaluate.records import BASELINE, MODEL, REAL
from evaluate.subject import read_batches
from evaluate.suite import pose
from prep.dwpose import denormalise


def skeletons(count, seed=0):
    """Random people in a picture of 64 pixels: float32 (count, 17, 3)."""
    random = np.random.default_rng(seed)
    points = random.uniform(5, 59, size=(count, 17, 2))
    return np.concatenate([points, np.ones((count, 17, 1))], axis=2).astype(np.float32)


def rows(found, targets, kind=MODEL, condition="text+pose", side=50.0):
    scored = pose.score(found, targets, [side] * len(targets))
    return [
        {"key": f"{index:02d}", "kind": kind, "condition": condition, "degenerate": None, **row}
        for index, row in enumerate(scored)
    ]


def pck(samples):
    (metric,) = pose.pck(samples, ["text+pose"], {"text+pose": {"guidance": 2.0}}, pose.TRUE_BOX)
    return metric


def test_the_asked_pose_scores_one_and_its_mirror_image_less():
    targets = skeletons(30)
    mirrored = targets.copy()
    mirrored[:, :, 0] = 64 - mirrored[:, :, 0]
    assert pck(rows(list(targets), targets)).value == 1.0
    assert pck(rows(list(mirrored), targets)).value < 0.4
    assert pck(rows(list(skeletons(30, seed=1)), targets)).value < 0.2


def test_the_allowance_is_a_tenth_of_the_box():
    targets = skeletons(20)
    moved = targets.copy()
    moved[:, :, 0] += 4.9
    assert pck(rows(list(moved), targets, side=50.0)).value == 1.0
    assert pck(rows(list(moved), targets, side=48.0)).value == 0.0


def test_a_missed_figure_misses_every_joint_asked_for():
    targets = skeletons(20)
    targets[:, 9:, 2] = 0.1  # not asked for
    metric = pck(rows([None] * 10 + list(targets[10:]), targets))
    assert metric.value == 0.5
    assert metric.n == 20


def test_samples_without_a_person_do_not_count():
    targets = skeletons(24)
    targets[:12] = 0
    metric = pck(rows([None] * 12 + list(targets[12:]), targets))
    assert (metric.value, metric.n) == (1.0, 12)
    nobody = pck(rows([None] * 12, targets[:12]))
    assert nobody.value is None
    assert nobody.reason == "no sample has a pose to ask for"


def test_floor_and_ceiling_are_printed():
    targets = skeletons(20)
    samples = rows(list(targets), targets)
    samples += rows(list(skeletons(20, seed=1)), targets, BASELINE, "random_pair")
    samples += rows([None] * 2 + list(targets[2:]), targets, REAL, "real")
    metric = pck(samples)
    assert metric.baselines["random_pair"] < 0.2
    assert metric.baselines["detector_on_real"] == pytest.approx(0.9)
    assert metric.settings["alpha"] == 0.1
    assert metric.settings["of"] == "longer side of the true box"


def test_the_settings_say_whose_box_the_allowance_is_part_of(figures):
    """On figures the true box; without a truth the one around the confident joints that prep found."""
    unknown = copy(figures)
    unknown.truth = lambda: None
    (batch, *_) = read_batches(figures, figures.rows("holdout")[:1], 1)
    joints = denormalise(figures.pose(batch.rows[0]), batch.width, batch.height)
    sides = {}
    for dataset, box in ((figures, pose.TRUE_BOX), (unknown, pose.JOINTS_BOX)):
        examiner = Examiner(dataset, lpips=None, detector=None)
        assert examiner.box == box
        (row,) = examiner.rows(batch, batch.pixels, kind=MODEL, condition="all", joints=[joints])
        sides[box] = row["box_side"]
    corners = np.reshape(figures.truth()[batch.keys[0]]["box"], (2, 2))
    assert sides[pose.TRUE_BOX] == pytest.approx(float(np.ptp(corners, axis=0).max()))
    confident = joints[joints[:, 2] >= pose.CONFIDENCE, :2]
    assert sides[pose.JOINTS_BOX] == pytest.approx(float(np.ptp(confident, axis=0).max()))
