"""Text manipulation: edits that are followed exactly, ignored, or followed by more than was asked for."""

import json
from copy import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from evaluate.drawing.edits import choose
from evaluate.metrics.colours import PALETTES
from evaluate.metrics.garments import garment, unchanged
from evaluate.metrics.likeness import pixel_features
from evaluate.records import MODEL
from evaluate.suite import edit
from nanodit.files import sha256_bytes
from prep.dataset.buckets import choose_bucket, crop_to_bucket
from prep.figures.drawing import render
from prep.figures.pose import sample_scene

LABELS = ("text", "edit/attribute", "edit/opposite", "edit/paraphrase")
INDEX = {sha256_bytes(f"figure {index}".encode())[:32]: index for index in range(200)}


def picture(key, **changes):
    """The figure of a sample in memory with other attributes, cropped as it was."""
    scene = replace(sample_scene(5, INDEX[key]), **changes)
    image = render(scene, round(64 * scene.aspect**0.5), round(64 / scene.aspect**0.5))
    return np.asarray(crop_to_bucket(image, choose_bucket(*image.size, 64)))


@pytest.fixture(scope="module")
def edits(figures):
    """type -> key -> edit."""
    rows = figures.rows("holdout")
    types = ("attribute", "opposite", "paraphrase")
    return {type: {row["key"]: choose(row["caption"], type, row["key"]) for row in rows} for type in types}


@pytest.fixture(scope="module")
def models(figures, edits, known_pictures):
    """What known models draw.

    ``perfect``: the figure with the new colour, or mirrored; ``deaf``: the same whatever the text; ``restless``:
    another figure for any other text; ``wrong``: another colour than the new one.
    """
    truth, shuffled = known_pictures["truth"], known_pictures["shuffled"]

    def edited(key):
        change = edits["attribute"][key]
        return picture(key, **{change.attribute: change.words[0][1]})

    def wrong(key):
        change = edits["attribute"][key]
        taken = {change.words[0][0], change.words[0][1]}
        other = next(colour for colour in PALETTES[change.attribute] if colour not in taken)
        return picture(key, **{change.attribute: other})

    found = {
        "perfect": [truth, {key: edited(key) for key in truth}, {key: truth[key][:, ::-1] for key in truth}, truth],
        "deaf": [truth] * 4,
        "restless": [truth, shuffled, shuffled, shuffled],
        "wrong": [truth, {key: wrong(key) for key in truth}, truth, truth],
    }
    return {name: {(label, 0): own for label, own in zip(LABELS, pictures)} for name, pictures in found.items()}


def make_context(judged, **config):
    context = judged.context(**config)
    context.texts = SimpleNamespace(unavailable=None)
    return context


@pytest.fixture(scope="module")
def verdicts(judged, models):
    found = {}
    for name, drawn in models.items():
        context = make_context(judged)
        metrics, skipped = edit.summarise(judged.rows(drawn, detected=True), context, context.config.edit)
        assert skipped == []
        found[name] = {metric.name: metric for metric in metrics}, context
    return found


def test_the_drawings_are_those_of_the_dataset(figures):
    for row in figures.rows("holdout")[:3]:
        assert np.array_equal(picture(row["key"]), figures.pixels(row))


def test_pictures_share_the_noise_and_differ_in_the_text(judged, edits):
    context = make_context(judged, seeds=2, edit={"prompts": 12})
    pictures, skipped = edit.pictures(context, context.config.edit)
    assert skipped == []
    assert len(pictures) == 2 * 12 * 4
    named = {one.name: one for one in pictures}
    for one in pictures:
        unedited = named["text", one.key, one.seed]
        assert (one.subset, one.guidance, one.donors) == (unedited.subset, unedited.guidance, {})
        if one is not unedited:
            type = one.condition.partition("/")[2]
            assert one.text == edits[type][one.key].text != context.rows[one.key]["caption"]
    assert {one.key for one in pictures} == set(context.keys[:12])
    assert {one.guidance.value for one in pictures} == {2.0}  # as configured for text
    shared = {one.name for one in context.configured()[0]} & set(named)
    assert shared == {("text", key, seed) for key in context.keys[:12] for seed in (0, 1)}


def test_a_model_that_follows_the_text_exactly(verdicts):  # E08
    metrics, _ = verdicts["perfect"]
    for name in ("effect", "effect_pixels", "effect/opposite", "effect_pixels/opposite"):
        assert metrics[f"edit/{name}"].low > 0
    direction = metrics["edit/direction"]
    assert direction.value > 0.9
    assert direction.low > direction.baselines["chance"]
    assert direction.baselines["unedited"] == 0
    assert direction.baselines["judge_on_real"] > 0.9
    assert metrics["edit/direction_gain"].low > 0.5
    assert metrics["edit/preserved"].value > 0.98
    assert metrics["edit/preserved"].baselines["null_edit"] == 1
    assert metrics["edit/pose_kept"].value == 1


def test_a_model_that_ignores_the_text_shows_no_effect(verdicts):  # E08
    metrics, _ = verdicts["deaf"]
    for name in ("effect", "effect_pixels", "effect/opposite", "direction_gain"):
        metric = metrics[f"edit/{name}"]
        assert metric.low <= 0 <= metric.high
        assert metric.value == pytest.approx(0, abs=1e-6)
    assert metrics["edit/direction"].value == metrics["edit/direction"].baselines["unedited"] == 0
    assert metrics["edit/preserved"].value == 1


def test_a_model_that_changes_with_any_words_shows_none_either(verdicts):  # E08
    metrics, _ = verdicts["restless"]
    for name in ("effect", "effect_pixels", "effect/opposite"):
        metric = metrics[f"edit/{name}"]
        assert metric.low <= 0 <= metric.high
        assert metric.baselines["null_edit"] == 0
    assert metrics["edit/preserved"].value < 0.5
    assert metrics["edit/direction"].value < 0.4


def test_another_colour_than_the_one_asked_for_has_an_effect_and_no_direction(verdicts):
    metrics, _ = verdicts["wrong"]
    assert metrics["edit/effect_pixels"].low > 0
    assert metrics["edit/direction"].value == 0
    assert metrics["edit/preserved"].value > 0.98


def test_the_effect_is_the_distance_beyond_that_of_the_paraphrase(judged, models, verdicts):
    drawn = dict(models["perfect"])
    drawn["edit/paraphrase", 0] = models["wrong"]["edit/attribute", 0]
    metrics, _ = edit.summarise(judged.rows(drawn, detected=True), context := make_context(judged), context.config.edit)
    effect = next(metric for metric in metrics if metric.name == "edit/effect_pixels")
    rows = judged.rows(drawn)
    points = {label: {row["key"]: row["feature_pixels"] for row in rows.select(MODEL, label)} for label, _ in drawn}
    moved, null = (
        [np.sqrt(np.mean((points[label][key] - points["text"][key]) ** 2)) for key in points["text"]]
        for label in ("edit/attribute", "edit/paraphrase")
    )
    assert effect.value == pytest.approx(np.mean(moved) - np.mean(null), abs=1e-6)
    assert effect.n == 24
    assert effect.settings["space"] == "feature_pixels"
    assert (effect.settings["edited"], effect.settings["captions"]) == (24, 24)
    assert effect.value < verdicts["perfect"][0]["edit/effect_pixels"].value


def test_what_moves_is_not_preserved(judged, models):
    drawn = dict(models["perfect"])
    drawn["edit/attribute", 0] = drawn["edit/opposite", 0]  # mirrored
    rows = judged.rows(drawn, detected=True)
    for row in rows.select(MODEL, "edit/attribute"):
        row["joints"] = None  # and nobody is found
    metrics, _ = edit.summarise(rows, context := make_context(judged), context.config.edit)
    found = {metric.name: metric for metric in metrics}
    assert found["edit/pose_kept"].value == 0
    assert found["edit/pose_kept"].baselines["null_edit"] == 1
    assert found["edit/preserved"].value < 0.9


def test_pictures_without_a_figure_have_no_place_to_leave_out(judged, models):
    rows = judged.rows(models["perfect"], detected=True)
    for row in rows.select(MODEL, "text")[:4]:
        row["joints"] = None
    metrics, _ = edit.summarise(rows, context := make_context(judged), context.config.edit)
    found = {metric.name: metric for metric in metrics}
    assert (found["edit/pose_kept"].n, found["edit/direction"].n) == (20, 24)
    assert found["edit/preserved"].n <= 20


def test_the_report_is_told_which_words_changed(verdicts, edits):
    extras = verdicts["perfect"][1].extras["edit"]
    assert json.loads(json.dumps(extras)) == extras
    assert extras["condition"] == "text"
    assert extras["counts"] == {type: {"edited": 24, "none": 0} for type in edits}
    assert len(extras["pairs"]) == 8 * 3
    for pair in extras["pairs"]:
        own = edits[pair["type"]][pair["key"]]
        assert (pair["text"], pair["attribute"]) == (own.text, own.attribute)
        assert "".join(part for kind, part in pair["diff"] if kind != "removed") == own.text
        assert pair["null_distance"]["feature_pixels"] == 0
        assert (MODEL, pair["condition"], pair["key"], 0) in verdicts["perfect"][1].shown
        assert (MODEL, "text", pair["key"], 0) in verdicts["perfect"][1].shown
        assert (pair["judged"] is None) == (pair["type"] != "attribute")
    assert extras["distances"]["feature_pixels"]["paraphrase"] == 0


def test_captions_without_an_edit_are_counted(judged, models):
    context = make_context(judged)
    plain = context.keys[:5]
    context.rows = {
        key: row | {"caption": "Nobody is here."} if key in plain else row for key, row in context.rows.items()
    }
    pictures, skipped = edit.pictures(context, context.config.edit)
    assert {one.key for one in pictures} == set(context.keys[5:])
    assert skipped == []
    kept = {name: {key: image for key, image in own.items() if key not in plain or name[0] == "text"}
            for name, own in models["perfect"].items()}  # fmt: skip
    metrics, _ = edit.summarise(judged.rows(kept, detected=True), context, context.config.edit)
    found = {metric.name: metric for metric in metrics}
    assert found["edit/effect"].n == found["edit/direction"].n == 19
    assert found["edit/effect"].settings["edited"] == 19
    assert context.extras["edit"]["counts"]["attribute"] == {"edited": 19, "none": 5}


def test_captions_that_no_edit_applies_to_are_skipped(judged, known_pictures):
    context = make_context(judged)
    context.rows = {key: row | {"caption": "Nobody is here."} for key, row in context.rows.items()}
    pictures, skipped = edit.pictures(context, context.config.edit)
    assert pictures == []
    assert {one.name for one in skipped} == {"edit/attribute", "edit/opposite", "edit/paraphrase"}
    assert "none of 24 captions" in skipped[0].reason
    metrics, _ = edit.summarise(judged.rows({("text", 0): known_pictures["truth"]}), context, context.config.edit)
    assert metrics == []


def test_settings_tell_short_captions_from_long_ones(judged, models):
    context = make_context(judged, captions="short")
    for metric in edit.summarise(judged.rows(models["perfect"], detected=True), context, context.config.edit)[0]:
        assert (metric.settings["given_captions"], metric.settings["captions"]) == ("short", 24)


def test_photographs_are_judged_as_a_whole(judged, models):
    """Not at a garment, of which nobody knows where it is: the share of all that stays."""
    context = make_context(judged)
    context.examiner = SimpleNamespace(figures=False, lpips_label=None, no_lpips=None)
    context.no_probe = "no probe: name a CLIP model in probe"
    metrics, skipped = edit.summarise(judged.rows(models["perfect"], detected=True), context, context.config.edit)
    found = {metric.name: metric for metric in metrics}
    assert {one.name: one.reason for one in skipped}["edit/direction_probe"] == context.no_probe
    assert "edit/direction" in {one.name for one in skipped}
    assert "edit/direction" not in found
    assert found["edit/preserved"].settings["cells"] == "the whole picture"
    assert found["edit/preserved"].value < 0.98


def test_degenerate_pictures_are_null_with_a_reason(judged, models):  # E02
    rows = judged.rows(models["perfect"], detected=True)
    row = rows.select(MODEL, "edit/attribute")[0]
    row |= {"degenerate": "constant", "feature": None, "feature_pixels": None, "joints": None}
    context = make_context(judged)
    metrics, _ = edit.summarise(rows, context, context.config.edit)
    for metric in metrics:
        assert (metric.value is None) == ("opposite" not in metric.name)
        assert metric.value is not None or "constant" in metric.reason
    assert context.extras["edit"]["pairs"]


def test_what_cannot_be_drawn_is_skipped(judged, figures):
    context = make_context(judged)
    context.texts = SimpleNamespace(unavailable="no text encoder: none here")
    pictures, (skipped,) = edit.pictures(context, context.config.edit)
    assert (pictures, skipped.name, skipped.reason) == ([], "edit", "no text encoder: none here")
    assert edit.summarise(judged.rows({}), context, context.config.edit) == ([], [])
    context = make_context(judged)
    context.subject = replace(context.subject, table={frozenset({"text", "pose"}): 0.9, frozenset(): 0.1})
    assert {one.condition for one in edit.pictures(context, context.config.edit)[0]} == {"text+pose", *LABELS[1:]}
    context.subject = replace(context.subject, table={frozenset({"cls"}): 1.0})
    pictures, (skipped,) = edit.pictures(context, context.config.edit)
    assert (pictures, skipped.reason) == ([], "subset text never trained")
    smaller = copy(figures)
    smaller.info = {**figures.info, "layers": {"px": {}, "pose": {}}}
    context.subject = replace(context.subject, dataset=smaller)
    assert edit.pictures(context, context.config.edit)[1][0].reason == "the dataset has no text"


@pytest.mark.parametrize("attribute", ["top", "trousers", "background", "hair"])
def test_only_the_garments_cells_change_with_it(figures, attribute):
    outside = 0
    for row in figures.rows("holdout"):
        key = row["key"]
        joints = np.reshape(figures.truth()[key]["keypoints"], (-1, 3))[:17]
        for colour in PALETTES[attribute]:
            before, after = figures.pixels(row), picture(key, **{attribute: colour})
            height, width = before.shape[:2]
            inside = garment(joints, attribute, width, height, 16)
            same = unchanged(*pixel_features(np.stack([before, after])))
            assert same[~inside].sum() >= 0.99 * (~inside).sum(), (key, colour)
            outside += (~inside).any()
    assert outside > (40 if attribute == "background" else 90)  # of 96 or more


def test_a_garment_of_joints_that_were_not_found_is_nowhere():
    assert garment(np.zeros((17, 3)), "top", 64, 64, 16) is None
    joints = np.ones((17, 3))
    joints[:, :2] = np.random.default_rng(0).uniform(10, 50, (17, 2))
    joints[:5, 2] = 0
    assert garment(joints, "hair", 64, 64, 16) is None
    assert garment(joints, "top", 64, 64, 16).any()
