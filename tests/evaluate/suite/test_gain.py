"""What a condition adds: which pair of arms says it, and how much it is."""

from copy import copy
from dataclasses import replace

import numpy as np
import pytest

from evaluate.metrics.colours import CHANCE
from evaluate.records import ATTRIBUTES, MODEL
from evaluate.report.metrics import against_floor
from evaluate.report.obedience import obedience
from evaluate.suite import attributes
from evaluate.suite.gain import CEILING, gain, isolating
from train.method.dropout import ConditioningConfig
from train.model.tread import TreadConfig

CONFIG = {"conditions": {"all": 1.0, "text+pose": 2.0, "text": 2.0}}


def rows_of(judged, known_pictures, **drawn):
    """``drawn`` maps conditions, + written as _and_, to the model that drew them."""
    pictures = {(name.replace("_and_", "+"), 0): known_pictures[model] for name, model in drawn.items()}
    return judged.rows(pictures, detected=True)


@pytest.mark.parametrize(
    ("drawn", "text", "pose"),
    [
        (("all", "text_and_pose", "text", "nothing"), ("text", "nothing"), ("text+pose", "text")),
        (("all", "text", "nothing"), ("text", "nothing"), None),
        (("all", "text_and_pose"), None, None),
        (("all", "nothing"), None, None),  # image features say it too
    ],
)
def test_the_pair_is_the_fullest_without_image_features_that_was_drawn(judged, known_pictures, drawn, text, pose):
    context, rows = judged.context(**CONFIG), rows_of(judged, known_pictures, **dict.fromkeys(drawn, "truth"))
    for condition, expected in (("text", text), ("pose", pose)):
        pair = isolating(condition, context, rows)
        assert (pair and tuple(arm.name for arm in pair)) == expected


@pytest.mark.parametrize(
    ("configured", "drawn", "expected"),
    [
        ({"text+pose": 2.0, "text": 2.0}, ("text_and_pose", "pose", "text", "nothing"), ("text", "nothing")),
        ({"text+pose": 2.0}, ("text_and_pose", "pose"), None),
        ({"text+pose": 2.0}, ("text_and_pose", "text_and_pose@1", "pose"), ("text+pose@1", "pose")),
        ({"text+pose": 2.0, "pose": 2.0}, ("text_and_pose", "pose"), ("text+pose", "pose")),
        ({"text+pose": {"text": 3.0}}, ("text_and_pose", "pose"), ("text+pose", "pose")),
        ({"text": {"self": 3.0}}, ("text", "nothing"), None),
    ],
)
def test_no_pair_differs_in_the_guidance_of_what_both_are_given(judged, known_pictures, configured, drawn, expected):
    """Guidance alone makes a pose clearer, and with it the colours of whoever is found."""
    context = judged.context(conditions={"all": 1.0, **configured})
    table, tread = ConditioningConfig().resolve(), TreadConfig(enabled=True)
    context.subject = replace(context.subject, table=table, tread=tread)
    pair = isolating("text", context, rows_of(judged, known_pictures, **dict.fromkeys(drawn, "truth")))
    assert (pair and tuple(arm.name for arm in pair)) == expected


def test_of_two_names_of_the_same_conditions_the_first_one_says_the_guidance(judged, figures):
    """Without image features ``text+pose`` is ``all``; the pictures that there are were drawn as ``all`` says."""
    bare = copy(figures)
    layers = {name: layer for name, layer in figures.info["layers"].items() if name != "dino"}
    bare.info = {**figures.info, "layers": layers}
    context = judged.context(**CONFIG)
    context.subject = replace(context.subject, dataset=bare, table=ConditioningConfig().resolve(("text", "pose")))
    assert [(arm.name, arm.guidance.value) for arm in context.arms] == [("all", 1), ("text", 2)]
    assert context.arm("text+pose") == context.arms[0] == context.arm("all", 1.0)
    assert context.arm("text+pose", 2.0).name == "all@2"


def test_the_gain_is_paired_and_ends_at_what_the_judge_finds_in_real_images(judged, known_pictures):
    context = judged.context(**CONFIG)
    found = {}
    for model in ("truth", "shuffled"):
        rows = rows_of(judged, known_pictures, text=model, nothing="shuffled")
        (found[model],) = gain("attribute_gain", "text", context, rows, attributes._score, {CEILING: 1.0})
        right = {
            name: [attributes._score(row)[0] / 4 for row in rows.select(MODEL, name)] for name in ("text", "nothing")
        }
        assert found[model].value == pytest.approx((sum(right["text"]) - sum(right["nothing"])) / len(right["text"]))
        assert found[model].baselines["ceiling_on_real"] == pytest.approx(
            1 - sum(right["nothing"]) / len(right["nothing"])
        )
        assert (found[model].name, found[model].settings["without"]) == ("attribute_gain/text", "nothing")
    assert found["truth"].low > 0.3
    assert (found["shuffled"].low, found["shuffled"].value, found["shuffled"].high) == (0, 0, 0)


def test_drawing_a_figure_at_all_is_no_gain(judged, known_pictures):
    context = judged.context(**CONFIG)
    others = {"all": "truth", "text_and_pose": "truth"}
    rows = rows_of(judged, known_pictures, text="shuffled", nothing="noise", **others)
    for row in rows.select(MODEL, "nothing"):
        row.update({f"{name}_judged": None for name in ATTRIBUTES})  # nobody is found
    found, _ = attributes.summarise(rows, context)
    metric = next(one for one in found if one.name == "attribute_gain/text")
    assert metric.baselines["chance"] == pytest.approx(np.mean([CHANCE[name] for name in ATTRIBUTES]))
    assert metric.low > 0
    assert against_floor(metric.to_dict())["verdict"] != "better"
    assert obedience([metric.to_dict()])[0].word == "not obeyed"


def test_a_picture_that_cannot_be_scored_leaves_no_gain_and_says_why(judged, known_pictures):
    context = judged.context(**CONFIG)
    rows = rows_of(judged, known_pictures, text="truth", nothing="truth")
    rows.select(MODEL, "nothing")[0]["degenerate"] = "blank"
    (metric,) = gain("attribute_gain", "text", context, rows, attributes._score, {CEILING: 1.0})
    assert metric.value is None
    assert "blank" in metric.reason
    assert gain("pose_gain", "pose", context, rows, attributes._score, {CEILING: 1.0}) == []  # no pair was drawn


def test_a_gain_that_was_not_drawn_is_named(judged, known_pictures):
    context = judged.context(**CONFIG)
    arms = {"all": "truth", "text_and_pose": "truth", "text": "truth"}
    _, skipped = attributes.summarise(rows_of(judged, known_pictures, **arms), context)
    assert [one.name for one in skipped] == ["attribute_gain"]
    assert "no arm that isolates the text was drawn beside the same one without it" in skipped[0].reason
    _, skipped = attributes.summarise(rows_of(judged, known_pictures, **arms, nothing="truth"), context)
    assert skipped == []
