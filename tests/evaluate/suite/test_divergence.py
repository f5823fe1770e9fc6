"""Divergence: what the noise changes, and alarms that need two spaces and an interval without zero."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest

from evaluate.records import ATTRIBUTES, MODEL
from evaluate.run import Evidence, write
from evaluate.statistics.intervals import Interval
from evaluate.suite import divergence
from evaluate.suite.divergence import DrawnPoints, trend

NOISES = 3
CONFIG = {"conditions": {"all": 1.0, "text": 2.0}, "divergence": {"noises": NOISES}}
LABELS = [("text", 0), ("noises/text", 1), ("noises/text", 2)]


@pytest.fixture(scope="module")
def ring(known_pictures):
    """``ring(steps)``: for each holdout figure another one of its shape, so many places further."""
    truth = known_pictures["truth"]

    def turned(steps):
        found = {}
        for shape in {image.shape for image in truth.values()}:
            keys = sorted(key for key, image in truth.items() if image.shape == shape)
            found |= {key: truth[keys[(place + steps) % len(keys)]] for place, key in enumerate(keys)}
        return found

    return turned


@pytest.fixture(scope="module")
def models(known_pictures, ring):
    """Condition and noise to pictures: ``varied`` draws another figure from each noise, ``deaf`` always the truth."""
    varied = {label: ring(place) for place, label in enumerate(LABELS)}
    half = {
        label: {
            key: np.uint8((image.astype(int) + 3 * known_pictures["truth"][key]) // 4) for key, image in own.items()
        }
        for label, own in varied.items()
    }
    noisy = {
        label: {key: np.uint8((image.astype(int) + known_pictures["noise"][key]) // 2) for key, image in own.items()}
        for label, own in varied.items()
    }
    return {
        "varied": varied,
        "half": half,
        "noisy": noisy,
        "deaf": dict.fromkeys(LABELS, known_pictures["truth"]),
        "one picture": dict.fromkeys(LABELS, known_pictures["mean_image"]),
    }


@pytest.fixture(scope="module")
def rows(judged, models):
    return {name: judged.rows(pictures) for name, pictures in models.items()}


def summarise(rows, context):
    metrics, skipped = divergence.summarise(rows, context, context.config.divergence)
    fired = {alarm["name"]: alarm["fired"] for alarm in context.extras["divergence"]["alarms"]}
    return {metric.name: metric for metric in metrics}, skipped, fired


def test_several_pictures_of_some_prompts_are_asked_for(judged):
    context = judged.context(**CONFIG | {"divergence": {"prompts": 12, "noises": NOISES}})
    pictures, skipped = divergence.pictures(context, context.config.divergence)
    assert skipped == []
    assert [(one.key, one.condition, one.seed) for one in pictures] == [
        (key, label, seed) for key in context.keys[:12] for label, seed in LABELS
    ]
    assert {(one.subset, one.guidance.value) for one in pictures} == {(frozenset({"text"}), 2.0)}
    # the noises that other tests take, too, are the same pictures
    shared = {one.name for one in context.configured()[0]} & {one.name for one in pictures}
    assert shared == {("text", key, 0) for key in context.keys[:12]}


def test_diversity_is_the_mean_distance_over_pairs_of_noises(judged, rows):
    context = judged.context(**CONFIG)
    metrics, _, _ = summarise(rows["varied"], context)
    expected = []
    for key in context.keys:
        own = [row["feature"] for row in rows["varied"] if row["kind"] == MODEL and row["key"] == key]
        unit = [feature / np.linalg.norm(feature) for feature in own]
        expected.append(np.mean([np.linalg.norm(a - b) for a, b in itertools.combinations(unit, 2)]))
    metric = metrics["divergence/diversity/text"]
    assert metric.value == pytest.approx(np.mean(expected), rel=1e-5)
    half = 2.069 * np.std(expected, ddof=1) / np.sqrt(24)  # Student's t, 23 degrees of freedom
    assert (metric.low, metric.high) == pytest.approx((metric.value - half, metric.value + half), rel=1e-3)
    assert metric.n == 24
    assert metric.settings["noises"] == 3
    assert metric.settings["judge"] == context.judge.label
    assert metric.baselines["round_trip"] < 0.5 * metric.baselines["real_pairs"]


def test_known_models_come_out_in_order(judged, rows):  # E08
    found = {name: summarise(own, judged.context(**CONFIG)) for name, own in rows.items()}
    for end in ("/text", "_pixels/text"):
        ratio = {name: metrics[f"divergence/ratio{end}"] for name, (metrics, _, _) in found.items()}
        assert ratio["deaf"].value == pytest.approx(0, abs=1e-4)
        assert ratio["deaf"].high < ratio["half"].value < ratio["varied"].value
        assert ratio["varied"].low < 1.1
        assert ratio["varied"].high > 0.7
        variety = {name: metrics[f"divergence/variety{end}"] for name, (metrics, _, _) in found.items()}
        assert variety["varied"].value == pytest.approx(1)  # the real images, in their order
        assert variety["one picture"].high < variety["varied"].value
        assert variety["one picture"].value == pytest.approx(variety["varied"].baselines["mean_image"], rel=0.3)
    assert {name: fired["collapse"] for name, (_, _, fired) in found.items()} == {
        "varied": False, "half": False, "noisy": False, "deaf": True, "one picture": True,
    }  # fmt: skip
    assert all(fired["drift"] is None and fired["collapsing"] is None for _, _, fired in found.values())


def past(judged, rows, run_folder, step, **config):
    """Evaluate and write one checkpoint as ``evaluate run`` does."""
    context = judged.context(run_folder, step, **CONFIG | config)
    metrics, skipped = divergence.summarise(rows, context, context.config.divergence)
    evidence = Evidence(rows.all, [], metrics, skipped, context.extras)
    write(run_folder / "validation_outputs" / f"step-{step:06d}", context.config, evidence, {"step": step}, [])


def test_diversity_that_falls_from_checkpoint_to_checkpoint_raises_the_alarm(judged, rows, tmp_path):
    past(judged, rows["varied"], tmp_path, 100)
    past(judged, rows["half"], tmp_path, 200)
    metrics, skipped, fired = summarise(rows["deaf"], judged.context(tmp_path, 300, **CONFIG))
    assert skipped == []
    assert fired == {"collapse": True, "collapsing": True, "drift": False}
    first, _, _ = summarise(rows["varied"], judged.context(**CONFIG))
    for end in ("/text", "_pixels/text"):
        change = metrics[f"divergence/diversity_change{end}"]
        assert change.high < 0
        assert change.value == pytest.approx(-first[f"divergence/diversity{end}"].value, rel=1e-4)  # at equal steps
        assert (change.settings["from_step"], change.settings["to_step"]) == (100, 300)
        assert metrics[f"divergence/error_change{end}"].high < 0  # the truth is nearer to the truth
    again = judged.context(tmp_path, 300, **CONFIG)
    divergence.summarise(rows["deaf"], again, again.config.divergence)
    assert [one["step"] for one in again.extras["divergence"]["checkpoints"]] == [100, 200]
    assert json.loads(json.dumps(again.extras["divergence"])) == again.extras["divergence"]


def test_pictures_that_move_away_from_the_real_ones_raise_the_alarm(judged, rows, tmp_path):
    past(judged, rows["deaf"], tmp_path, 100)
    metrics, _, fired = summarise(rows["noisy"], judged.context(tmp_path, 200, **CONFIG))
    assert metrics["divergence/error_change/text"].low > 0
    drawn = [row for row in rows["noisy"] if row["kind"] == MODEL]
    real = rows["noisy"].real
    errors = [np.linalg.norm(row["feature_pixels"] - real[row["key"]]["feature_pixels"]) for row in drawn]
    assert metrics["divergence/error_change_pixels/text"].value == pytest.approx(
        np.mean(errors) / np.sqrt(768), rel=1e-4
    )
    assert (fired["drift"], fired["collapsing"]) == (True, False)


def test_equal_checkpoints_raise_none(judged, rows, tmp_path):
    past(judged, rows["varied"], tmp_path, 100)
    metrics, _, fired = summarise(rows["varied"], judged.context(tmp_path, 200, **CONFIG))
    assert fired == {"collapse": False, "collapsing": False, "drift": False}
    assert metrics["divergence/diversity_change/text"].value == pytest.approx(0, abs=1e-9)


def test_nothing_is_compared_across_settings_or_with_later_checkpoints(judged, rows, tmp_path):
    past(judged, rows["half"], tmp_path, 100, sampler={"steps": 3})
    past(judged, rows["half"], tmp_path, 400)
    broken = tmp_path / "validation_outputs" / "step-000050"
    broken.mkdir()
    (broken / "report.json").write_text("{")
    metrics, (skipped,), fired = summarise(rows["deaf"], judged.context(tmp_path, 300, **CONFIG))
    assert not any("change" in name for name in metrics)
    assert skipped.name == "divergence/diversity_change"
    assert "no earlier evaluation with these settings" in skipped.reason
    assert fired["collapsing"] is None


def test_the_last_five_checkpoints_make_the_trend(judged, rows, tmp_path):
    for step in range(100, 800, 100):
        past(judged, rows["varied"], tmp_path, step)
    metrics, _, _ = summarise(rows["varied"], judged.context(tmp_path, 800, **CONFIG))
    settings = metrics["divergence/error_change/text"].settings
    assert (settings["from_step"], settings["to_step"], settings["checkpoints"]) == (400, 800, 5)


def test_a_trend_is_the_change_along_the_fitted_line():
    values = np.array([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]])
    assert trend([0, 100, 200], values) == pytest.approx([2, 0])
    assert trend([0, 300], values[:2]) == pytest.approx([1, 0])
    assert trend([0, 100, 200], np.array([[0.0], [3.0], [0.0]])) == pytest.approx([0])


def test_alarms_need_both_spaces():
    low, none = Interval(-1.0, -2.0, -0.5, 20), Interval(-0.1, -2.0, 0.5, 20)

    def fired(first, second):
        alarms = divergence._alarms({"feature": {"collapse": first}, "feature_pixels": {"collapse": second}})
        return alarms[0]["fired"]

    assert fired(low, low) is True
    assert fired(low, none) is False
    assert fired(low, Interval(-1.0, None, None, 5)) is None
    assert divergence._alarms({"feature_pixels": {"collapse": low}})[0]["fired"] is None


def test_error_and_diversity_of_a_prompt():
    points = np.array([[[0.0, 0], [0, 2], [0, 4]], [[1, 1], [1, 1], [1, 1]]])
    drawn = DrawnPoints(points, np.array([[0.0, 1], [1, 0]]))
    assert drawn.diversity == pytest.approx([8 / 3, 0])
    assert drawn.error == pytest.approx([5 / 3, 1])


def test_real_figures_that_are_alike_are_a_baseline(judged, rows, models):
    own = judged.rows(models["deaf"])
    for place, row in enumerate(own.real.values()):
        row |= {f"{name}_true": str(place // 6) if index < 3 else "same" for index, name in enumerate(ATTRIBUTES)}
    metrics, _, _ = summarise(own, judged.context(**CONFIG))
    points = {row["key"]: row["feature_pixels"] / np.sqrt(768) for row in own.real.values()}
    groups = [sorted(points)[start : start + 6] for start in range(0, 24, 6)]
    pairs = [np.linalg.norm(points[a] - points[b]) for group in groups for a, b in itertools.combinations(group, 2)]
    assert metrics["divergence/diversity_pixels/text"].baselines["real_alike"] == pytest.approx(np.mean(pairs))


def test_degenerate_pictures_are_null_with_a_reason(judged, models):  # E02
    own = judged.rows(models["varied"])
    next(row for row in own if row["condition"] == "noises/text")["degenerate"] = "constant"
    metrics, _, fired = summarise(own, judged.context(**CONFIG))
    assert {metric.value for metric in metrics.values()} == {None}
    assert all("constant" in metric.reason for metric in metrics.values())
    assert set(fired.values()) == {None}


def test_what_was_never_trained_or_is_too_small_is_skipped(judged):
    context = judged.context(**CONFIG | {"divergence": {"prompts": 7, "noises": 2}})
    pictures, (skipped,) = divergence.pictures(context, context.config.divergence)
    assert (pictures, skipped.reason) == ([], "inconclusive, about 1 more samples")
    assert divergence.summarise(judged.rows({}), context, context.config.divergence) == ([], [])
    context.config = judged.context(**CONFIG).config
    context.subject = replace(context.subject, table={frozenset(): 1.0})
    assert {one.condition for one in divergence.pictures(context, context.config.divergence)[0]} == {
        "nothing",
        "noises/nothing",
    }
    context.subject = replace(context.subject, table={frozenset({"text", "pose"}): 1.0})
    pictures, (skipped,) = divergence.pictures(context, context.config.divergence)
    assert pictures == []
    assert skipped.name == "divergence/text"
    assert "never trained" in skipped.reason


def test_without_a_judge_pixels_alone_are_measured(judged, rows):  # E04
    context = judged.context(**CONFIG)
    context.judge, context.no_judge = None, "no judge: none here"
    metrics, skipped, fired = summarise(rows["deaf"], context)
    assert all("_pixels" in name for name in metrics)
    assert "no judge: none here" in {one.reason for one in skipped}
    assert fired["collapse"] is None
