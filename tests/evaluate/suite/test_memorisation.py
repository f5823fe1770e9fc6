"""Memorisation: the alarm is for copies of training images, and for nothing that is merely near or merely bad."""

import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from evaluate.drawing.draw import show
from evaluate.records import MODEL, REAL
from evaluate.statistics import intervals
from evaluate.suite import memorisation
from evaluate.suite.memorisation import (
    QUANTILE,
    MemorisationTestConfig,
    Nearness,
    detectable_share,
    nearness,
    share_of_copies,
)  # fmt: skip


@pytest.fixture(scope="module")
def verdicts(judged, known_pictures):
    """Metrics by name and context of each known model."""
    found = {}
    for name, pictures in known_pictures.items():
        context = judged.context(conditions={"all": 1.0})
        metrics, skipped = memorisation.summarise(judged.rows({("all", 0): pictures}), context)
        assert skipped == []
        found[name] = {metric.name: metric for metric in metrics}, context
    return found


def alarm(context):
    (one,) = context.extras["memorisation"]["alarms"]
    assert (one["name"], one["condition"]) == ("memorisation", "all")
    return one["fired"]


@pytest.mark.parametrize(
    ("model", "fires"),
    [("truth", False), ("shuffled", False), ("mean_image", False), ("noise", False), ("copycat", True), ("half", True)],
)
def test_the_alarm_fires_on_copies_alone(verdicts, model, fires):  # E08
    assert alarm(verdicts[model][1]) is fires


def shifted(picture: np.ndarray, by: int) -> np.ndarray:
    return np.pad(picture, ((0, 0), (by, 0), (0, 0)), mode="edge")[:, : picture.shape[1]]


@pytest.mark.parametrize("form", ["mirrored", "shifted", "brighter", "an eighth", "a single one"])
def test_altered_and_rare_copies_raise_the_alarm_too(judged, known_pictures, form):
    truth, copies = known_pictures["truth"], known_pictures["copycat"]
    change = {
        "mirrored": lambda picture: picture[:, ::-1],
        "shifted": lambda picture: shifted(picture, 3),
        "brighter": lambda picture: np.uint8(np.clip(picture * 1.1, 0, 255)),
    }.get(form, lambda picture: picture)
    every = {"an eighth": 8, "a single one": len(truth)}.get(form, 1)
    drawn = {key: change(copies[key]) if place % every == 0 else truth[key] for place, key in enumerate(truth)}
    context = judged.context(conditions={"all": 1.0})
    metrics, _ = memorisation.summarise(judged.rows({("all", 0): drawn}), context)
    (matches,) = [metric for metric in metrics if metric.name == "memorisation/matches"]
    count = sum(place % every == 0 for place in range(len(truth)))
    least = 0.4 if form == "shifted" else 1  # a shift by one of 16 cells is no crop of the same shape
    assert least * count <= matches.settings["images_with_a_match"] <= count
    assert matches.value == pytest.approx(matches.settings["images_with_a_match"] / len(truth))
    assert matches.baselines["real"] == 0
    assert alarm(context) is (form != "a single one")


def test_training_images_are_asked_for_by_their_own_words(judged, known_pictures, figures):
    context = judged.context(conditions={"all": 1.0, "text+pose": 2.0, "text": 2.0})
    wanted, _ = memorisation.pictures(context, MemorisationTestConfig(training=20))
    asked = [picture for picture in wanted if picture.condition == "text/training"]
    assert len(asked) == 20
    assert len(wanted) == 20 + 3 * len(context.keys) * context.config.seeds
    rows = {row["key"]: row for row in figures.rows()}
    for picture in asked:
        (donor,) = set(picture.donors.values())
        assert picture.donors.keys() == picture.subset == {"text"}
        assert rows[donor]["split"] == "train"
        assert rows[donor]["bucket"] == rows[picture.key]["bucket"]
    assert len({picture.donors["text"] for picture in asked}) > 15  # one bucket has few
    assert memorisation.pictures(context, MemorisationTestConfig(training=0))[0] == wanted[:-20]

    context = judged.context(conditions={"text": 2.0})
    copied = {key: known_pictures["copycat"][key] for key in list(known_pictures["copycat"])[:20]}
    rows = judged.rows({("text", 0): known_pictures["truth"], ("text/training", 0): copied})
    metrics, _ = memorisation.summarise(rows, context)
    found = {metric.name: metric for metric in metrics}
    assert found["memorisation/matches/text"].value == 0
    assert found["memorisation/matches/text/training"].value == 1
    fired = {one["condition"]: one for one in context.extras["memorisation"]["alarms"]}
    assert (fired["text"]["fired"], fired["text/training"]["fired"]) == (False, True)
    assert fired["text/training"]["detectable"] == detectable_share(20)
    rows = judged.rows({("text", 0): known_pictures["truth"], ("text/training", 0): known_pictures["truth"]})
    memorisation.summarise(rows, context)
    assert [one["fired"] for one in context.extras["memorisation"]["alarms"]] == [False, False]


def test_the_share_that_would_have_been_found_is_said(verdicts):
    (one,) = verdicts["truth"][1].extras["memorisation"]["alarms"]
    assert one["detectable"] == pytest.approx(detectable_share(24))
    for count in (8, 24, 64, 512):
        share = detectable_share(count)
        missed = (1 - share) ** count + count * share * (1 - share) ** (count - 1)
        assert missed == pytest.approx(0.2)
    assert detectable_share(64) == pytest.approx(0.046, abs=0.001)


def test_copies_are_at_distance_zero(verdicts):
    metrics, _ = verdicts["copycat"]
    for name in ("memorisation/copies", "memorisation/copies_pixels"):
        assert (metrics[name].value, metrics[name].high) == (1.0, 1.0)
        assert metrics[name].low == pytest.approx(0.025 ** (1 / 24))  # 24 of 24 is not certainty
        assert metrics[name].baselines["chance"] == QUANTILE
        assert metrics[name].baselines["real"] <= QUANTILE
    assert metrics["memorisation/distance_ratio"].value == pytest.approx(0, abs=1e-6)
    assert verdicts["half"][0]["memorisation/copies"].value == pytest.approx(0.5, abs=0.05)


def test_the_truth_is_as_far_from_training_images_as_the_holdout(verdicts):
    metrics, _ = verdicts["truth"]
    ratio = metrics["memorisation/distance_ratio"]
    assert (ratio.value, ratio.low, ratio.high, ratio.n) == pytest.approx((1, 1, 1, 24))
    assert metrics["memorisation/copies"].value == metrics["memorisation/copies"].baselines["real"]


def test_a_mean_image_is_near_to_everything_and_a_copy_of_nothing(verdicts):
    """In pixels it is nearer to training images than any holdout image is: distance alone would call it a copy."""
    metrics, _ = verdicts["mean_image"]
    assert metrics["memorisation/distance_ratio_pixels"].high < 1
    assert metrics["memorisation/copies_pixels"].value == 0


def test_the_closest_pairs_name_what_was_copied(verdicts, known_pictures, figures):
    _, context = verdicts["copycat"]
    extras = context.extras["memorisation"]
    assert "indicator" in extras["wording"]
    assert len(extras["closest"]) == 16
    assert json.loads(json.dumps(extras)) == extras
    by_key = {row["key"]: row for row in figures.rows()}
    for pair in extras["closest"]:
        copied = figures.pixels(by_key[pair["training_key"]])
        assert np.array_equal(copied, known_pictures["copycat"][pair["key"]])
        assert pair["distance"]["feature_pixels"] == pytest.approx(0, abs=1e-6)
        assert context.shown_training[pair["training_key"]] == pair["training_image"]
        assert (MODEL, "all", pair["key"], 0) in context.shown


def test_the_holdout_nearest_to_training_is_shown_beside_trainings_own_distances(verdicts, judged, figures):
    _, context = verdicts["truth"]
    found = context.extras["memorisation"]["holdout"]
    features = context.train_features.feature / np.linalg.norm(context.train_features.feature, axis=1, keepdims=True)
    apart = np.sqrt(np.maximum(2 - 2 * features.astype(float) @ features.T.astype(float), 0))
    np.fill_diagonal(apart, np.inf)
    own = apart.min(1)
    assert found["own"] == pytest.approx(np.quantile(own, (0.05, 0.5, 0.95)), abs=1e-5)
    distances = [pair["distance"] for pair in found["pairs"]]
    assert distances == sorted(distances)
    for pair in found["pairs"]:
        assert pair["rank"] == pytest.approx(np.mean(own <= pair["distance"]), abs=0.02)
        assert (REAL, "real", pair["key"], 0) in context.shown
        assert pair["training_key"] in context.shown_training


def test_training_images_are_kept_for_the_report(judged, figures, tmp_path):
    context = judged.context()
    row = figures.rows("train")[3]
    path = context.show_training(row["key"])
    show(context, [], [], tmp_path)
    assert np.array_equal(np.asarray(Image.open(tmp_path / path)), figures.pixels(row))


def test_pairs_are_listed_once_nearest_first(judged, known_pictures):
    context = judged.context(conditions={"all": 1.0})
    both = {("all", 0): known_pictures["truth"], ("edit/opposite/0", 0): known_pictures["half"]}
    memorisation.summarise(judged.rows(both), context)
    pairs = context.extras["memorisation"]["closest"]
    assert len({(pair["key"], pair["training_key"]) for pair in pairs}) == 16
    assert [pair["distance"]["feature"] for pair in pairs] == sorted(pair["distance"]["feature"] for pair in pairs)
    assert {pair["condition"] for pair in pairs[:10]} == {"edit/opposite/0"}  # every picture is searched


def test_degenerate_pictures_are_null_with_a_reason(judged, known_pictures):  # E02
    rows = judged.rows({("all", 0): known_pictures["truth"]})
    bad = next(row for row in rows if row["kind"] == MODEL)
    bad["degenerate"] = "constant"
    context = judged.context(conditions={"all": 1.0})
    for metric in memorisation.summarise(rows, context)[0]:
        assert metric.value is None
        assert "constant" in metric.reason
    assert alarm(context) is None


def test_without_a_judge_likely_copies_alone_raise_no_alarm(judged, known_pictures, monkeypatch):
    context = judged.context(conditions={"all": 1.0})
    context.judge, context.no_judge = None, "no judge: none here"
    features = context.train_features
    context.train_features = replace(features, feature=None)
    metrics, skipped = memorisation.summarise(judged.rows({("all", 0): known_pictures["copycat"]}), context)
    names = {metric.name.removeprefix("memorisation/") for metric in metrics}
    assert names == {"copies_pixels", "distance_ratio_pixels", "matches"}
    assert {one.reason for one in skipped} == {"no judge: none here"}
    assert alarm(context) is True  # of matches, which need no judge
    memorisation.summarise(judged.rows({("all", 0): known_pictures["truth"]}), context)
    assert alarm(context) is None
    monkeypatch.setattr(memorisation, "matched", lambda rows, training: np.ones(len(rows), bool))
    memorisation.summarise(judged.rows({("all", 0): known_pictures["truth"]}), context)
    assert alarm(context) is None  # the holdout matches as often, so nobody can tell


def test_too_few_samples_say_how_many_are_missing(judged, known_pictures):
    context = judged.context(conditions={"all": 1.0})
    context.subject = replace(context.subject, rows=context.subject.rows[:13])
    metrics, (skipped,) = memorisation.summarise(judged.rows({}), context)
    assert metrics == []
    assert skipped.reason == "inconclusive, about 7 more samples"


def test_isolation_tells_a_copy_from_a_blur():
    training = np.eye(60)
    found = nearness(np.stack([training[7] + 0.01, np.full(60, 1 / 60)]), training)
    assert found.index[0] == 7
    assert found.isolation[0] < 0.1
    assert found.isolation[1] == pytest.approx(1)
    assert nearness(np.zeros((1, 3)), np.zeros((5, 3))).isolation.tolist() == [1]  # nothing to divide by


def test_without_copying_the_share_is_rarely_above_chance(monkeypatch):
    """Pictures like the holdout's, and the interval with the quantile's own uncertainty: few false alarms."""
    monkeypatch.setattr(intervals, "RESAMPLES", 500)
    random = np.random.default_rng(0)
    keys, false = [f"{index:03d}" for index in range(64)], 0
    for _ in range(300):
        holdout, drawn = (Nearness(np.zeros(64), *random.gamma(5, size=(2, 64))) for _ in range(2))
        holdout, drawn = (Nearness(one.index, one.distance, one.distance) for one in (holdout, drawn))
        interval = share_of_copies(drawn, keys, holdout, keys)
        false += interval.low > QUANTILE
    assert false / 300 < 0.05
    few = Nearness(np.zeros(64), *np.full((2, 64), 5.0))
    few.distance[:16] = few.isolation[:16] = 0.01  # a quarter is copied
    assert share_of_copies(few, keys, holdout, keys).low > QUANTILE


def test_all_noises_of_an_image_are_one_observation():
    random = np.random.default_rng(1)
    keys = [f"{index:03d}" for index in range(40)]
    holdout = Nearness(np.zeros(40), *np.repeat(random.gamma(5, size=(1, 40)), 2, axis=0))
    copied = np.where(np.arange(40) % 2, 0.0, 9.0)
    once = share_of_copies(Nearness(np.zeros(40), copied, copied), keys, holdout, keys)
    thrice = share_of_copies(Nearness(np.zeros(120), *[np.tile(copied, 3)] * 2), keys * 3, holdout, keys)
    assert (once.value, once.low, once.high) == (thrice.value, thrice.low, thrice.high)
    assert (once.low, once.high) == pytest.approx((0.5 - 0.16, 0.5 + 0.16), abs=0.02)  # of 40 images


def test_a_likely_copy_is_both_near_and_alone_in_it():
    """What stands out among training images but is far from them is no copy, and what is near to many is none."""
    keys = [f"{index:03d}" for index in range(40)]
    holdout = Nearness(np.zeros(40), np.linspace(1, 2, 40), np.linspace(0.5, 1, 40))
    near, far = np.full(40, 0.1), np.full(40, 3.0)
    assert share_of_copies(Nearness(np.zeros(40), near, near), keys, holdout, keys).value == 1
    assert share_of_copies(Nearness(np.zeros(40), far, near), keys, holdout, keys).value == 0
    assert share_of_copies(Nearness(np.zeros(40), near, far), keys, holdout, keys).value == 0


def test_few_clusters_of_many_images_fit_into_memory():
    """Eight groups of 500: resamples of all images at once, as it was, took 0.4 GB."""
    random = np.random.default_rng(0)
    keys = [f"{index:04d}" for index in range(4000)]
    near = Nearness(np.zeros(4000), random.random(4000), random.random(4000))
    tracemalloc.start()
    try:
        interval = share_of_copies(near, keys, near, keys, {key: key[0] + str(int(key[1]) // 5) for key in keys})
        assert tracemalloc.get_traced_memory()[1] < 250e6
    finally:
        tracemalloc.stop()
    assert interval.n == 8
