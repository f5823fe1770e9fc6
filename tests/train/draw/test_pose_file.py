"""Poses as JSON: both formats, and the crop that they follow."""

from __future__ import annotations

import json

import numpy as np
import pytest

from nanodit.errors import DataError
from prep.dataset.buckets import Bucket
from train.draw.pose_file import crop_skeleton, read_skeleton

COCO = (
    "nose", "left eye", "right eye", "left ear", "right ear", "left shoulder", "right shoulder", "left elbow",
    "right elbow", "left wrist", "right wrist", "left hip", "right hip", "left knee", "right knee", "left ankle",
    "right ankle",
)  # fmt: skip
FEET = tuple(f"{side} {part}" for side in ("left", "right") for part in ("big toe", "small toe", "heel"))
# as OpenPose's documentation lists them
OPENPOSE_18 = (
    "nose", "neck", "right shoulder", "right elbow", "right wrist", "left shoulder", "left elbow", "left wrist",
    "right hip", "right knee", "right ankle", "left hip", "left knee", "left ankle", "right eye", "left eye",
    "right ear", "left ear",
)  # fmt: skip
BODY_25 = (*OPENPOSE_18[:8], "mid hip", *OPENPOSE_18[8:], *FEET)
RNG = np.random.default_rng(5)


def person(scale=100.0) -> np.ndarray:
    """133 joints inside a square of that many pixels."""
    places = RNG.uniform(0.1, 0.9, (133, 2)) * scale
    return np.concatenate([places, RNG.uniform(0.3, 1, (133, 1))], 1)


def ours(keypoints: np.ndarray, width=120, height=100) -> bytes:
    return json.dumps({"width": width, "height": height, "keypoints": keypoints.tolist()}).encode()


def openpose(people: list[np.ndarray], names=OPENPOSE_18, divide=(1, 1), **more) -> bytes:
    """What an exporter writes for people given as COCO-WholeBody: centres of pixels are whole numbers."""
    written = []
    for keypoints in people:
        index = np.where(keypoints[:, 2:] > 0, (keypoints - (0.5, 0.5, 0)) / (*divide, 1), 0)
        known = dict(zip((*COCO, *FEET), index[:23].tolist()))
        body = [known.get(name, [7.0, 7.0, 1.0]) for name in names]  # the neck and the middle of the hips
        face = np.concatenate([index[23:91], index[:2]])  # two pupils more
        parts = {"pose": np.array(body), "face": face, "hand_left": index[91:112], "hand_right": index[112:]}
        written.append({f"{part}_keypoints_2d": values.ravel().tolist() for part, values in parts.items()})
    return json.dumps({"people": written, **(more or {"canvas_width": 120, "canvas_height": 100})}).encode()


def test_our_own_format_is_read_as_it_stands():
    keypoints = person()
    keypoints[7] = (3, 4, 0)
    skeleton = read_skeleton(ours(keypoints), "pose.json")
    assert skeleton.size == (120, 100)
    assert np.array_equal(skeleton.keypoints[7], [0, 0, 0])  # not found is not at (3, 4)
    found = np.arange(133) != 7
    np.testing.assert_allclose(skeleton.keypoints[found], keypoints[found], rtol=1e-6)


@pytest.mark.parametrize(("names", "joints"), [(OPENPOSE_18, 17), (BODY_25, 23)])
def test_openposes_joints_are_found_by_their_names(names, joints):
    keypoints = person()
    skeleton = read_skeleton(openpose([keypoints], names), "pose.json")
    known = [*range(joints), *range(23, 133)]
    np.testing.assert_allclose(skeleton.keypoints[known], keypoints[known], rtol=1e-5)
    assert not skeleton.keypoints[joints:23].any(), "the 18 joints have no feet"


def test_fractions_of_the_canvas_are_no_pixels():
    keypoints = person()
    keypoints[16, :2] = (60, 119)  # a foot below the picture
    skeleton = read_skeleton(openpose([keypoints], divide=(120, 100)), "pose.json")
    known = [*range(17), *range(23, 133)]
    np.testing.assert_allclose(skeleton.keypoints[known], keypoints[known], rtol=1e-4)


def test_the_largest_person_counts():
    small, large = person(40), person(90)
    skeleton = read_skeleton(openpose([small, large, small]), "pose.json")
    np.testing.assert_allclose(skeleton.keypoints[0], large[0], rtol=1e-5)


def test_comfyuis_list_of_one_frame_and_parts_left_out_are_read():
    content = json.loads(openpose([person()]))
    for part in ("face", "hand_left"):
        content["people"][0][f"{part}_keypoints_2d"] = None
    del content["people"][0]["hand_right_keypoints_2d"]
    skeleton = read_skeleton(json.dumps([content]).encode(), "pose.json")
    assert (skeleton.keypoints[:17, 2] > 0).all()
    assert not skeleton.keypoints[23:].any()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not a pose: Expecting property name"),
        (b"\xff\xfe\x00", "not a pose"),
        (b"[" * 100_000, "not a pose"),
        (b"[1, 2]", "neither `keypoints` nor `people`"),
        (b'{"keypoints": []}', "does not say the width of its picture"),
        (b'{"width": 5, "height": 0, "keypoints": []}', "does not say the height"),
        (b'{"width": 5, "height": 5, "keypoints": [[1, 2, 3]]}', "holds 3 numbers, expected 3 for each of 133"),
        (b'{"width": 5, "height": 5, "keypoints": [["a", 2, 3]]}', "not a pose"),
        (b'{"width": 5, "height": 5, "keypoints": [[1%s, 2, 3]]}' % (b"0" * 400), "not a pose: int too large"),
        (b'{"width": 5, "height": 5, "people": [[%s]]}' % (b"1," * 9_000_000 + b"1"), "not a pose: it has 18 MB"),
        (b'{"width": 5, "height": 5, "people": [{"pose_keypoints_2d": [1, 2]}]}', "expected 3 for each of 18 or 25"),
        (b'{"width": 5, "height": 5, "people": 3}', "not a pose"),
        (b'{"width": 5, "height": 5, "people": []}', "holds no joint"),
        (openpose([person()], camera=1), "does not say the width"),
    ],
)  # fmt: skip
def test_what_is_no_pose_is_refused(content, message):
    with pytest.raises(DataError) as raised:
        read_skeleton(content, "--pose legs.json")
    assert str(raised.value).startswith("--pose legs.json: ")
    assert message in str(raised.value)


def test_numbers_that_are_not_finite_are_refused():
    keypoints = person()
    keypoints[3, 0] = np.nan
    with pytest.raises(DataError, match="not finite"):
        read_skeleton(ours(keypoints), "pose.json")


def test_the_joints_follow_the_crop():
    keypoints = np.zeros((133, 3))
    # of 200 x 100 pixels a square crop keeps columns 50 to 150
    keypoints[:4] = [(100, 50, 0.9), (50, 0, 1), (150, 100, 1), (40, 50, 1)]
    skeleton = read_skeleton(ours(keypoints, 200, 100), "pose.json")
    joints = crop_skeleton(skeleton, Bucket(64, 64), "pose.json")
    np.testing.assert_allclose(joints[:4], [(0, 0, 0.9), (-1, -1, 1), (1, 1, 1), (0, 0, 0)], atol=1e-6)
    assert joints.dtype == np.float32
    keypoints[:3] = 0
    with pytest.raises(DataError, match="the crop to 64x64 leaves no joint"):
        crop_skeleton(read_skeleton(ours(keypoints, 200, 100), "p"), Bucket(64, 64), "p")
