"""Distribution: a perfect model is at the floor of real images, at one stated n."""

from dataclasses import replace

import numpy as np
import pytest

from evaluate.metrics.distances import cmmd, kid
from evaluate.records import MODEL
from evaluate.suite import distribution

KNOWN = ("truth", "shuffled", "mean_image", "noise", "copycat")


@pytest.fixture(scope="module")
def verdicts(judged, known_pictures):
    """Metrics by name of each known model."""
    found = {}
    for name in KNOWN:
        context = judged.context(conditions={"all": 1.0})
        metrics, skipped = distribution.summarise(judged.rows({("all", 0): known_pictures[name]}), context)
        found[name] = {metric.name: metric for metric in metrics}, skipped, context
    return found


@pytest.mark.parametrize("name", ["kid", "cmmd"])
def test_known_models_come_out_in_order(verdicts, name):  # E08
    value = {model: verdicts[model][0][f"distribution/{name}"] for model in KNOWN}
    floor = value["truth"].baselines["real"]
    assert value["truth"].value == pytest.approx(floor)
    assert value["shuffled"].value == pytest.approx(floor)  # the same set
    assert value["copycat"].value < floor < value["mean_image"].value < value["noise"].value
    assert value["mean_image"].value == pytest.approx(value["truth"].baselines["mean_image"], rel=0.1, abs=1e-4)
    above = {model: verdicts[model][0][f"distribution/{name}_above_real"] for model in KNOWN}
    assert (above["truth"].value, above["truth"].low) == pytest.approx((0, 0), abs=1e-9)
    assert above["noise"].low > 0
    assert above["noise"].value == pytest.approx(value["noise"].value - floor)


def test_what_the_numbers_are_is_stated(verdicts):
    metrics, _, context = verdicts["truth"]
    settings = metrics["distribution/kid"].settings
    assert settings["images"] == metrics["distribution/kid"].n == 24
    assert settings["reference"] == "40 training images"
    assert "may be negative" in settings["estimator"]
    assert "jackknife" in settings["interval_by"]
    assert settings["judge"] == context.judge.label
    assert {"sampler", "steps", "guidance", "base"} <= settings.keys()


def test_values_are_those_of_the_distances_against_as_many_training_images(verdicts, judged, known_pictures):
    metrics, _, context = verdicts["noise"]
    rows = judged.rows({("all", 0): known_pictures["noise"]}).select(MODEL, "all")
    features = np.stack([row["feature"] for row in rows])
    reference = context.train_features.feature
    assert len(reference) > 24  # all of them, as many as there are
    assert metrics["distribution/kid"].value == pytest.approx(kid(features, reference).value)
    assert metrics["distribution/cmmd"].value == pytest.approx(cmmd(features, reference).value)


def test_the_frechet_distance_says_how_many_samples_it_lacks(verdicts):
    _, (skipped,), context = verdicts["truth"]
    width = context.judge.width
    assert skipped.name == "distribution/fd"
    assert skipped.reason.startswith(f"inconclusive, about {2 * width - 24} more samples: 24 pictures")


def test_the_frechet_distance_is_taken_where_there_are_enough(judged, known_pictures):
    """Eight of the judge's numbers are few enough for 24 pictures."""
    context = judged.context(conditions={"all": 1.0})
    context.train_features = replace(context.train_features, feature=context.train_features.feature[:, :8])
    rows = judged.rows({("all", 0): known_pictures["noise"]})
    rows.all = [row | {"feature": row["feature"][:8]} for row in rows]
    metrics, skipped = distribution.summarise(rows, context)
    fd = next(metric for metric in metrics if metric.name == "distribution/fd")
    assert skipped == []
    assert 0 < fd.baselines["real"] < fd.low


def test_several_noises_are_averaged_at_the_n_of_each(judged, known_pictures, verdicts):
    context = judged.context(conditions={"all": 1.0}, seeds=2)
    rows = judged.rows({("all", 0): known_pictures["truth"], ("all", 1): known_pictures["noise"]})
    metrics = {metric.name: metric for metric in distribution.summarise(rows, context)[0]}
    both = [verdicts[model][0]["distribution/kid"].value for model in ("truth", "noise")]
    assert metrics["distribution/kid"].value == pytest.approx(np.mean(both))
    assert metrics["distribution/kid"].n == 24


def test_few_training_images_limit_n(judged, known_pictures):
    context = judged.context(conditions={"all": 1.0})
    features = context.train_features
    context.train_features = type(features)(*(part[:12] for part in vars(features).values()))
    metrics, _ = distribution.summarise(judged.rows({("all", 0): known_pictures["truth"]}), context)
    assert {metric.n for metric in metrics} == {12}
    context.train_features = type(features)(*(part[:4] for part in vars(features).values()))
    metrics, skipped = distribution.summarise(judged.rows({("all", 0): known_pictures["truth"]}), context)
    assert metrics == []
    assert {one.reason for one in skipped if "kid" in one.name} == {
        "inconclusive, about 4 more samples: 4 pictures, and 8 are needed for an interval"
    }


def test_an_interval_that_holds_zero_says_how_many_samples_would_tell(judged, known_pictures):
    context = judged.context(conditions={"all": 1.0})
    keys = context.keys
    nearly = {**known_pictures["truth"], keys[0]: known_pictures["mean_image"][keys[0]]}
    metrics = {m.name: m for m in distribution.summarise(judged.rows({("all", 0): nearly}), context)[0]}
    above = metrics["distribution/kid_above_real"]
    assert above.low < 0 < above.high
    assert above.value < 0 or "more samples" in above.reason


def test_degenerate_pictures_are_null_with_a_reason(judged, known_pictures):  # E02
    rows = judged.rows({("all", 0): known_pictures["truth"]})
    next(row for row in rows if row["kind"] == MODEL)["degenerate"] = "non-finite"
    for metric in distribution.summarise(rows, judged.context(conditions={"all": 1.0}))[0]:
        assert metric.value is None
        assert "non-finite" in metric.reason


def test_without_a_judge_it_is_skipped(judged):  # E04
    context = judged.context(conditions={"all": 1.0})
    context.judge, context.no_judge = None, "no judge: none here"
    metrics, (skipped,) = distribution.summarise(judged.rows({}), context)
    assert (metrics, skipped.name, skipped.reason) == ([], "distribution", "no judge: none here")
