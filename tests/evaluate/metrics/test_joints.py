"""Joints found against joints asked for: PCK by its definition, OKS against COCO's own code."""

import hashlib

import numpy as np
import pytest
from pycocotools.cocoeval import COCOeval

from evaluate.metrics.joints import AREA_OF_BOX, PARTS, SIGMAS, Box, Joints, hits, inside, mirror, oks, similarity
from prep.encoders.dwpose import denormalise, normalise
from train.model.mirror import flip_pose


def people(count, seed=0, width=200, height=150):
    """Random people within a picture of this size, all joints certain: float32 (count, 133, 3)."""
    random = np.random.default_rng(seed)
    places = random.uniform(0, 1, size=(count, 133, 2)) * (width, height)
    return np.concatenate([places, np.ones((count, 133, 1))], axis=2).astype(np.float32)


def joints(*rows):
    return np.array(rows, np.float32)


def test_the_sigmas_are_those_of_coco_and_of_coco_wholebody():
    """COCO's from its code; those of all joints by the digest of the list in COCO-WholeBody's repository."""
    evaluation = COCOeval(iouType="keypoints")
    assert SIGMAS[PARTS["body"]] == pytest.approx(evaluation.params.kpt_oks_sigmas, abs=1e-12)
    text = " ".join(f"{sigma:.3f}" for sigma in SIGMAS)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "babb32fe605aeec5"


def test_the_parts_share_out_all_joints():
    parts = [np.arange(133)[part] for name, part in PARTS.items() if name != "whole"]
    assert np.concatenate(parts).tolist() == list(range(133))
    assert [len(part) for part in parts] == [17, 6, 68, 42]


@pytest.mark.parametrize("part", PARTS)
def test_oks_equals_cocos_code(part):
    """COCOeval.computeOks with the same sigmas, on targets some of whose joints are not asked for."""
    random = np.random.default_rng(3)
    targets, area = people(40), 5000.0
    found = targets.copy()
    found[:, :, :2] += random.normal(0, 4, size=(40, 133, 2))
    targets[random.random((40, 133)) < 0.3] = 0
    asked = targets[:, :, 2] > 0
    ours = oks(similarity(found, targets, np.full(40, area))[:, PARTS[part]], asked[:, PARTS[part]])
    evaluation = COCOeval(iouType="keypoints")
    evaluation.params.kpt_oks_sigmas = SIGMAS[PARTS[part]]
    for index in range(40):
        truth, answer = (each[index, PARTS[part]].astype(np.float64).ravel().tolist() for each in (targets, found))
        box = [0.0, 0.0, 200.0, 150.0]
        evaluation._gts[index, 1] = [{"keypoints": truth, "area": area, "bbox": box}]
        evaluation._dts[index, 1] = [{"keypoints": answer, "score": 1.0}]
    theirs = [evaluation.computeOks(index, 1)[0, 0] for index in range(40)]
    assert ours == pytest.approx(theirs, abs=1e-12)
    assert 0.05 < np.mean(theirs) < 0.95


def test_a_joint_that_was_not_detected_is_not_similar_wherever_it_lies():
    target = people(1)
    found = target.copy()
    found[:, 100:, 2] = 0.29
    near = similarity(found, target, np.array([500.0]))
    assert (near[:, :100] == 1).all()
    assert (near[:, 100:] == 0).all()


def test_oks_of_nothing_is_no_number_and_an_empty_box_divides_by_nothing():
    target = people(2)
    with np.errstate(all="raise"):
        near = similarity(target, target, np.zeros(2))
        assert (near == 1).all()
        asked = np.zeros((2, 133), bool)
        asked[1, :3] = True
        values = oks(near, asked)
    assert np.isnan(values[0])
    assert values[1] == 1
    assert Box.around(np.zeros((0, 2))).area == 0
    assert Box.around(np.array([[10.0, 5.0], [30.0, 8.0]])) == Box(20.0, 3.0)
    assert Box(20.0, 10.0).area == pytest.approx(AREA_OF_BOX * 200)
    assert Box(20.0, 10.0).longer_side == 20


def test_hits_follow_the_definition():
    target = joints((10, 10, 1), (50, 50, 0.9), (70, 20, 0.3))
    found = joints((13, 14, 1), (50, 50, 0.1), (79, 20, 0.5))  # 5 pixels off, undetected, 9 pixels off
    assert hits(found, target, 50).tolist() == [True, False, False]  # a tenth: 5 pixels
    assert hits(found, target, 49).tolist() == [False, False, False]
    assert hits(found, target, 90).tolist() == [True, False, True]
    both = hits(np.stack([found, found]), np.stack([target, target]), np.array([50, 90]))
    assert both.tolist() == [[True, False, False], [True, False, True]]


def test_the_mirror_image_is_the_flip_of_training_and_undoes_itself():
    given = people(3)
    given[:, 5] = 0
    width, height = 200, 150
    flipped = denormalise(flip_pose(normalise(given, width, height)), width, height)
    assert mirror(given, width) == pytest.approx(flipped, abs=1e-3)
    assert mirror(mirror(given, np.full(3, width)), np.full(3, width)) == pytest.approx(given, abs=1e-4)
    assert (mirror(given, width)[:, 6] == 0).all()  # the other shoulder


def row(found, target, width=200, height=150):
    return {
        **{"key": "a", "width": width, "height": height, "box_side": 100.0, "box_area": 5000.0},
        **{"joints": None if found is None else found.ravel().tolist(), "target_joints": target.ravel().tolist()},
    }


def test_joints_beyond_the_edge_are_not_asked_for_and_counted():
    target = people(1)[0]
    target[0, :2] = (-1, 20)
    target[1, :2] = (20, 151)
    target[2, :2] = (200, 150)  # on the edge
    target[3, :2], target[3, 2] = (300, 20), 0.2
    assert inside(target, 200, 150)[:4].tolist() == [False, False, True, False]
    read = Joints.read([row(target, target)])
    assert read.asked[0, :4].tolist() == [False, False, True, False]
    assert read.outside.sum() == 2
    assert read.hit.sum() == read.asked.sum() == 130
    assert read.oks(PARTS["whole"]) == 1


def test_against_the_mirror_image_the_same_joints_are_asked_for_on_the_other_side():
    target = people(1)[0]
    target[9] = 0  # the left wrist
    read = Joints.read([row(target, target)], mirrored=True)
    assert read.asked.sum() == 132
    assert not read.asked[0, 10]
    assert Joints.read([row(mirror(target, 200), target)], mirrored=True).hit.sum() == 132


def test_who_was_not_found_has_no_joint():
    read = Joints.read([row(None, people(1)[0])])
    assert read.hit.sum() == 0
    assert read.oks(PARTS["body"]) == 0
