"""The verdict on text and pose in words, and the conditions whose metrics stand for the others."""

import pytest

from evaluate.report.metrics import metric_groups
from evaluate.report.obedience import obedience


def entry(name, low, value, high, conditions="text+pose", **changes):
    known = {"name": name, "low": low, "value": value, "high": high, "n": 64, "better": "higher", "unit": ""}
    settings = {"conditions": conditions, "without": "pose"}
    rest = {"baselines": {"no_gain": 0.0, "ceiling_on_real": 0.8}, "settings": settings, "needed": None, "reason": None}
    return {**known, **rest, "verdict": None, **changes}


@pytest.mark.parametrize(
    ("low", "value", "high", "word"),
    [
        (0.6, 0.7, 0.8, "obeyed"),
        (0.1, 0.45, 0.8, "obeyed"),  # surely something, and most likely most of it
        (0.1, 0.2, 0.3, "partly obeyed"),
        (-0.1, 0.0, 0.1, "not obeyed"),
        (-0.3, -0.2, -0.1, "not obeyed"),
        (0.01, 0.03, 0.05, "not obeyed"),  # above zero, and next to nothing
        (-0.1, 0.3, 0.7, "undecided"),
        (None, 0.7, None, "undecided"),
        (None, None, None, "undecided"),
    ],
)
def test_the_word_follows_from_what_a_condition_adds_of_what_it_could(low, value, high, word):
    for condition, family in (("text", "attribute_gain"), ("pose", "pose_gain")):
        reason = "too few" if low is None else None
        (one,) = obedience([entry(f"{family}/text+pose", low, value, high, reason=reason)])
        assert (one.condition, one.word) == (condition, word)
        said = (
            f"Whether the {condition} is obeyed is undecided" if word == "undecided" else f"The {condition} is {word}"
        )
        assert one.words.startswith(f"{said}: ")
        assert ("too few" if low is None else "given text + pose") in one.words


@pytest.mark.parametrize(
    ("low", "value", "high", "word"),
    [
        (0.1, 0.2, 0.3, "not obeyed"),
        (0.15, 0.4, 0.7, "undecided"),
        (0.25, 0.4, 0.45, "partly obeyed"),
        (0.25, 0.7, 0.8, "obeyed"),
    ],
)
def test_what_anybody_would_add_is_luck(low, value, high, word):
    baselines = {"no_gain": 0.0, "chance": 0.2, "ceiling_on_real": 1.0}
    (one,) = obedience([entry("attribute_gain/text", low, value, high, baselines=baselines)])
    assert one.word == word
    assert one.words.endswith("; 1.00 is possible, 0.20 is luck.")
    assert "luck" not in obedience([entry("attribute_gain/text", low, value, high)])[0].words


def test_where_nothing_is_left_to_add_nothing_is_decided():
    most = {"no_gain": 0.0, "ceiling_on_real": 0.0}
    assert obedience([entry("pose_gain/text+pose", 0.0, 0.0, 0.0, baselines=most)])[0].word == "undecided"


@pytest.mark.parametrize(
    ("low", "value", "high", "word"),
    [
        (0.0, 0.0, 0.0, "not obeyed"),
        (-0.2, -0.1, -0.05, "not obeyed"),
        (-0.1, 0.1, 0.3, "undecided"),
        (0.1, 0.2, 0.3, "undecided"),
    ],
)
def test_edits_can_only_deny_that_a_text_of_unknown_truth_is_obeyed(low, value, high, word):
    (one,) = obedience([entry("edit/effect", low, value, high, "text")])
    assert (one.condition, one.word) == ("text", word)
    assert (
        obedience([entry("edit/effect", 0.0, 0.0, 0.0), entry("attribute_gain/text", 0.6, 0.7, 0.8)])[0].word
        == "obeyed"
    )
    assert obedience([entry("reconstruction/psnr", 0.0, 0.0, 0.0)]) == []


def headlines(metrics):
    return {row["title"]: row["part"] for group in metric_groups(metrics) for row in group["headline"]}


def test_each_family_is_headed_by_the_arm_that_isolates_its_subject():
    names = ("attribute_accuracy", "pose_pck", "distribution/kid", "distribution/fd", "reconstruction/psnr")
    given = ("all", "text+pose", "text", "pose")
    metrics = [entry(f"{name}/{one}", 0.1, 0.2, 0.3, one, baselines={}) for name in names for one in given]
    assert headlines(metrics) == {
        "PSNR": "all conditions", "Attribute accuracy": "text + pose", "Pose, PCK at 0.1": "text + pose", "FD": "text",
        "KID": "text",
    }  # fmt: skip
    gains = [entry("attribute_gain/text", 0.1, 0.2, 0.3, "text"), entry("pose_gain/pose", 0.1, 0.2, 0.3, "pose")]
    found = headlines(metrics + gains)
    assert (found["Attribute accuracy"], found["Pose, PCK at 0.1"]) == ("text", "pose")
    only = [one for one in metrics if one["settings"]["conditions"] == "all"]
    assert set(headlines(only).values()) == {"all conditions"}  # nothing else was drawn
