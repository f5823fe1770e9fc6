"""The built-in figures: same seed, same set; truth that the pixels and the words agree with."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from nanodit.errors import ConfigError
from prep.figures.captions import scene_caption
from prep.figures.figures import VOCABULARY, draw_figure, write_figures
from prep.figures.keypoints import BODY, HIDDEN, VISIBLE, scene_keypoints
from prep.figures.pose import SHAPES, sample_scene
from prep.figures.scene import (
    BACKGROUND_COLOURS,
    HAIR_COLOURS,
    OBJECTS,
    SKIN_COLOURS,
    TOP_COLOURS,
    TROUSERS_COLOURS,
    Dice,
    ball_centre,
)
from tests.processes import below

BUCKETS_64 = [(64, 64), (80, 56), (56, 80), (80, 48), (48, 80), (88, 48), (48, 88)]
JOINT = {name: i for i, name in enumerate(BODY)}


@pytest.fixture(scope="module")
def scenes():
    return [sample_scene(1, index) for index in range(600)]


@pytest.fixture(scope="module")
def figures():
    return [draw_figure(1, index, 64) for index in range(120)]


def captions(scenes, short: bool) -> list[str]:
    return [scene_caption(scene, Dice("caption", 1, index), short) for index, scene in enumerate(scenes)]


# --- determinism ------------------------------------------------------------------------------------------------------


def test_a_figure_is_a_pure_function_of_seed_index_and_size():
    first, second = draw_figure(3, 5, 96), draw_figure(3, 5, 96)
    assert first.image.tobytes() == second.image.tobytes()
    assert first.caption == second.caption
    assert first.attributes == second.attributes
    assert first.keypoints.tobytes() == second.keypoints.tobytes()
    assert draw_figure(3, 6, 96).image.tobytes() != first.image.tobytes()
    assert draw_figure(4, 5, 96).image.tobytes() != first.image.tobytes()


def test_truth_is_golden():
    """A set that people name by its seed stays that set: raise DRAWING_VERSION when this must change."""
    truth = []
    for index in range(4):
        figure = draw_figure(0, index, 256)
        joints = np.rint(figure.keypoints).astype(int).tolist()
        truth.append([figure.image.size, figure.attributes, joints, figure.caption])
    digest = hashlib.sha256(json.dumps(truth, sort_keys=True).encode()).hexdigest()
    assert digest == "38b0d03689b6b33c9c8622b5f3b1b54e18e34063ce5e51f0208f56b54d21168a"


@pytest.mark.parametrize("index", range(6))
def test_every_size_shows_the_same_picture(index):
    small, large = draw_figure(2, index, 64), draw_figure(2, index, 192)
    assert small.caption == large.caption
    assert small.attributes == large.attributes
    scale = np.array(large.image.size) / small.image.size
    np.testing.assert_allclose(small.keypoints[:, :2] * scale, large.keypoints[:, :2], atol=1e-3)
    reduced = np.asarray(large.image.resize(small.image.size, Image.Resampling.BOX), np.float32)
    assert np.abs(reduced - np.asarray(small.image, np.float32)).mean() < 3


# --- shapes and places ------------------------------------------------------------------------------------------------


def nearest_bucket(aspect: float, buckets) -> tuple[int, int]:
    return min(buckets, key=lambda bucket: abs(math.log(aspect * bucket[1] / bucket[0])))


def test_all_seven_shapes_are_reached_evenly(scenes):
    for buckets in (list(SHAPES), BUCKETS_64):
        chosen = [nearest_bucket(scene.aspect, buckets) for scene in scenes]
        shares = {bucket: chosen.count(bucket) / len(chosen) for bucket in buckets}
        assert min(shares.values()) >= 0.08, shares
    deviation = [scene.aspect * b[1] / b[0] for scene in scenes for b in [nearest_bucket(scene.aspect, list(SHAPES))]]
    assert max(abs(d - 1) for d in deviation) <= 0.021
    assert len(set(np.round(deviation, 4))) > 100  # jittered: the crop to a bucket is never the identity


@pytest.mark.parametrize("size", [64, 512])
def test_area_follows_the_size(size):
    for index in range(4):
        width, height = draw_figure(1, index, size).image.size
        assert width * height == pytest.approx(size * size, rel=0.02)


def test_visible_joints_survive_the_crop_to_any_bucket(scenes):
    for scene in scenes:
        positions, _ = scene_keypoints(scene)
        x, y = (positions[:17] / (scene.aspect, 1)).T
        inside = (x >= 0) & (x <= 1) & (y >= 0) & (y <= 1)
        for buckets in (list(SHAPES), BUCKETS_64):
            width, height = nearest_bucket(scene.aspect, buckets)
            kept_x, kept_y = min(1, width / height / scene.aspect), min(1, scene.aspect * height / width)
            kept = (abs(x - 0.5) <= kept_x / 2) & (abs(y - 0.5) <= kept_y / 2)
            assert (kept == inside).all(), (scene.framing, scene.legs)
        upper = [i for name, i in JOINT.items() if "ankle" not in name]
        assert inside[upper].all()
        assert inside[[JOINT["left_ankle"], JOINT["right_ankle"]]].all() or scene.framing == "closer"


def test_the_figure_fills_the_picture(figures):
    for figure in figures:
        x0, y0, x1, y1 = figure.box
        width, height = figure.image.size
        assert 0 <= x0 < x1 <= width
        assert 0 <= y0 < y1 <= height
        assert (y1 - y0) / height > 0.6
        body = figure.keypoints[:17]
        seen = body[body[:, 2] > 0]
        assert (seen[:, 0] >= x0).all()
        assert (seen[:, 0] <= x1).all()
        assert (seen[:, 1] >= y0).all()
        assert (seen[:, 1] <= y1).all()


# --- keypoints --------------------------------------------------------------------------------------------------------


def test_left_is_the_figures_own_left(scenes):
    for scene in scenes:
        positions, _ = scene_keypoints(scene)
        for part in ("shoulder", "hip", "eye", "ear"):  # a frontal figure's left is on the picture's right
            assert positions[JOINT[f"left_{part}"], 0] > positions[JOINT[f"right_{part}"], 0]
        if scene.left_arm in ("down", "low") and scene.right_arm in ("down", "low"):
            assert positions[JOINT["left_wrist"], 0] > positions[JOINT["right_wrist"], 0]
        left, right = positions[JOINT["left_wrist"]], positions[JOINT["right_wrist"]]
        # wholebody order: body 17, feet 6, face 68, then the left hand's 21 points and the right hand's
        np.testing.assert_array_equal(positions[[91, 112]], [left, right])
        toes = positions[[17, 20]]
        assert np.hypot(*(toes[0] - positions[JOINT["left_ankle"]])) < 0.1 * scene.unit
        assert np.hypot(*(toes[1] - positions[JOINT["right_ankle"]])) < 0.1 * scene.unit


def test_face_points_are_in_ibug_order(scenes):
    for scene in scenes[:50]:
        positions, _ = scene_keypoints(scene)
        face = positions[23:91]
        assert face[0, 0] < face[8, 0] < face[16, 0]  # the jaw from the picture's left over the chin to its right
        np.testing.assert_allclose(face[36:42].mean(0), positions[JOINT["right_eye"]])
        np.testing.assert_allclose(face[42:48].mean(0), positions[JOINT["left_eye"]])
        np.testing.assert_allclose(face[30], positions[JOINT["nose"]])
        down = face[8] - face[27]  # from between the eyes to the chin
        depth = [(face[group].mean(0) - face[27]) @ down for group in (slice(17, 27), slice(31, 36), slice(48, 68))]
        assert depth == sorted(depth)
        assert face[48, 0] < face[54, 0]


def test_visibility(figures):
    seen = np.concatenate([figure.keypoints for figure in figures])
    assert set(np.unique(seen[:, 2])) == {0, HIDDEN, VISIBLE}
    for figure in figures:
        (x, y, visibility), (width, height) = figure.keypoints.T, figure.image.size
        outside = (x < 0) | (x > width) | (y < 0) | (y > height)
        np.testing.assert_array_equal(visibility == 0, outside)
        ears = visibility[[JOINT["left_ear"], JOINT["right_ear"]]]
        assert (ears == (HIDDEN if figure.attributes["hair_style"] in ("long", "curly") else VISIBLE)).all()
        assert (visibility[:3] == VISIBLE).all()  # nothing is ever held before the face


# --- pixels -----------------------------------------------------------------------------------------------------------


def nearest_name(pixels: np.ndarray, palette: dict) -> str:
    """The palette colour nearest to the median pixel, each under the range of lights that figures are drawn in."""
    colours = np.array(list(palette.values()), float)[:, None] * np.linspace(0.74, 1.04, 13)[:, None]
    distance = np.abs(np.minimum(colours, 255) - np.median(pixels, 0)).sum(-1).min(1)
    return list(palette)[int(distance.argmin())]


def pixels_at(figure, points) -> np.ndarray:
    x, y = np.floor(np.asarray(points)).astype(int).T
    return np.asarray(figure.image)[y, x]


def test_pixels_have_the_colours_that_the_caption_names(figures):
    """A trivial judge at the true joints of 64 px pictures: what a learned one has to live up to."""
    right = {"top": [], "trousers": [], "hair": [], "background": []}
    for figure in figures:
        joints = {name: figure.keypoints[i, :2] for name, i in JOINT.items()}
        shoulders = (joints["left_shoulder"] + joints["right_shoulder"]) / 2
        hips = (joints["left_hip"] + joints["right_hip"]) / 2
        thighs = [
            (joints[f"{s}_hip"] * (1 - t) + joints[f"{s}_knee"] * t) for s in ("left", "right") for t in (0.5, 0.7)
        ]
        eyes, ears = (joints["left_eye"] + joints["right_eye"]) / 2, joints["left_ear"] - joints["right_ear"]
        above = np.array([ears[1], -ears[0]])  # as long as the head is wide, towards its top
        wall = [(x, y) for x in (1.5, figure.image.width - 1.5) for y in range(2, figure.image.height // 2)]
        judged = {
            "top": nearest_name(
                pixels_at(figure, [shoulders * (1 - t) + hips * t for t in (0.4, 0.5, 0.6)]), TOP_COLOURS
            ),
            "trousers": nearest_name(pixels_at(figure, thighs), TROUSERS_COLOURS),
            "hair": nearest_name(pixels_at(figure, [eyes + above * 0.44]), HAIR_COLOURS),
            "background": nearest_name(pixels_at(figure, wall), BACKGROUND_COLOURS),
        }
        for name, colour in judged.items():
            right[name].append(colour == figure.attributes[name])
    accuracy = {name: np.mean(values) for name, values in right.items()}
    assert min(accuracy.values()) >= 0.97, accuracy


def test_the_held_object_is_in_the_named_hand():
    found = 0
    for index in range(60):
        scene = sample_scene(1, index)
        if scene.held_object != "ball":
            continue
        figure = draw_figure(1, index, 64)
        scale = np.array([figure.image.width / scene.aspect, figure.image.height])
        centre = ball_centre(scene) * scale
        assert nearest_name(pixels_at(figure, [centre]), TOP_COLOURS) == scene.held_colour
        wrists = figure.keypoints[[JOINT["left_wrist"], JOINT["right_wrist"]], :2]
        distances = np.hypot(*(wrists - centre).T)
        assert ("left", "right")[int(distances.argmin())] == scene.held_hand
        assert f"{scene.held_hand} hand" in figure.caption
        found += 1
    assert found >= 5


# --- captions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("short", "low", "high"), [(False, 40, 200), (True, 48, 60)])
def test_captions_are_as_long_as_promised_and_varied(scenes, short, low, high):
    texts = captions(scenes, short)
    assert all(low <= len(text.split()) <= high for text in texts)
    assert len(set(texts)) == len(texts)
    assert len({text.split(".")[0][:24] for text in texts}) > 10


@pytest.mark.parametrize("short", [False, True])
def test_captions_name_every_colour_before_its_noun(scenes, short):
    for scene, text in zip(scenes, captions(scenes, short)):
        low = text.lower()
        assert re.search(rf"\b{scene.top} (jumper|sweater|shirt|top|tee)\b", low)
        assert re.search(rf"\b{scene.trousers} (trousers|pants)\b", low)
        assert re.search(rf"\b{scene.hair} hair\b", low)
        assert re.search(rf"\b{scene.background} (wall|background|backdrop)\b", low)
        assert f"a {scene.held_colour} {scene.held_object}" in low
        free = {"left": "right", "right": "left"}[scene.held_hand]
        assert re.search(rf"\b{scene.held_hand} hand\b", low)
        assert re.search(rf"\b{free} (hand|arm)\b", low)
        if not short:
            assert f"{scene.skin} skin" in low
            assert f"{scene.build} build" in low


@pytest.mark.parametrize("short", [False, True])
def test_captions_are_sentences_from_a_closed_vocabulary(scenes, short):
    words = set()
    for text in captions(scenes, short):
        assert re.fullmatch(r"(?:[A-Z][a-z]*(?:,? [a-z]+)*\.)(?: [A-Z][a-z]*(?:,? [a-z]+)*\.)*", text), text
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text.lower()), text
        words |= set(re.findall("[a-z]+", text.lower()))
    assert words <= set(VOCABULARY)
    if not short:
        assert words == set(VOCABULARY)  # and every word of it is in use
    assert list(VOCABULARY) == sorted(set(VOCABULARY))
    assert len(VOCABULARY) < 400
    for palette in (TOP_COLOURS, TROUSERS_COLOURS, HAIR_COLOURS, BACKGROUND_COLOURS, SKIN_COLOURS, OBJECTS):
        assert set(palette) <= set(VOCABULARY)


def test_attributes_are_balanced(scenes):
    for name, options in (
        ("top", 8),
        ("trousers", 8),
        ("hair", 4),
        ("background", 4),
        ("held_object", 6),
        ("held_hand", 2),
    ):
        values = [scene.attributes[name] for scene in scenes]
        shares = [values.count(value) / len(values) for value in set(values)]
        assert len(shares) == options
        assert min(shares) > 0.4 / options, (name, shares)


# --- files ------------------------------------------------------------------------------------------------------------


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_written_set(tmp_path):
    write_figures(tmp_path / "one", 40, 48, 9, short_captions=True, workers=2)
    write_figures(tmp_path / "two", 40, 48, 9, short_captions=True, workers=1)
    files = folder_bytes(tmp_path / "one")
    assert files == folder_bytes(tmp_path / "two")
    assert len(files) == 40 * 2 + 2
    table = pq.read_table(tmp_path / "one" / "truth.parquet")
    rows = table.to_pylist()
    assert [row["file"] for row in rows] == [f"figure-{i:06d}.png" for i in range(40)]
    expected = {"file", "width", "height", "top", "trousers", "background", "hair", "skin", "held_object", "held_hand"}
    assert expected | {"light", "keypoints", "box"} <= set(table.column_names)
    figure = draw_figure(9, 7, 48, short_caption=True)
    row = rows[7]
    np.testing.assert_array_equal(np.float32(row["keypoints"]).reshape(133, 3), figure.keypoints)
    assert {name: row[name] for name in figure.attributes} == figure.attributes
    assert files["figure-000007.txt"].decode() == figure.caption + "\n"
    with Image.open(tmp_path / "one" / "figure-000007.png") as image:
        assert image.size == (row["width"], row["height"]) == figure.image.size
        assert image.mode == "RGB"
        assert image.tobytes() == figure.image.tobytes()


def test_the_same_call_again_does_nothing_or_finishes(tmp_path):
    write_figures(tmp_path, 3, 48, 0)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    write_figures(tmp_path, 3, 48, 0)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    content = folder_bytes(tmp_path)
    (tmp_path / "truth.parquet").unlink()  # as if killed before the end
    (tmp_path / "figure-000002.png").unlink()
    write_figures(tmp_path, 3, 48, 0)
    assert folder_bytes(tmp_path) == content


def test_other_folders_are_refused(tmp_path):
    ours, theirs, file = tmp_path / "ours", tmp_path / "theirs", tmp_path / "file"
    write_figures(ours, 2, 48, 0)
    with pytest.raises(ConfigError, match="name another folder"):
        write_figures(ours, 2, 48, 1)
    theirs.mkdir()
    (theirs / "holiday.jpg").write_bytes(b"precious")
    with pytest.raises(ConfigError, match="not empty"):
        write_figures(theirs, 2, 48, 0)
    assert folder_bytes(theirs) == {"holiday.jpg": b"precious"}
    file.touch()
    with pytest.raises(ConfigError, match="is a file"):
        write_figures(file, 2, 48, 0)


@pytest.mark.parametrize(("count", "size", "seed"), [(0, 64, 0), (1, 16, 0), (1, 64, -1)])
def test_parameters_out_of_range_are_refused(tmp_path, count, size, seed):
    with pytest.raises(ConfigError, match="at least"):
        write_figures(tmp_path / "out", count, size, seed)
    assert not (tmp_path / "out").exists()


def test_a_killed_process_that_draws_is_said(tmp_path):
    command = [sys.executable, "-m", "prep", "figures", str(tmp_path / "out"), "--count", "3000", "--size", "256"]
    drawing = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not any((tmp_path / "out").glob("*.png")):
        assert drawing.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(next(pid for pid, one in below(drawing.pid).items() if "spawn_main" in one.command), signal.SIGKILL)
    _, said = drawing.communicate(timeout=60)
    assert (drawing.returncode, said.count("\n")) == (4, 1), said
    assert said.startswith("error: prep figures: a process that draws has ended, killed from outside")
