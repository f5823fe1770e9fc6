"""DINO swap: a model that ignores the features is at chance, one that draws the donor's truth is right."""

import json
from dataclasses import replace

import numpy as np
import pytest

from evaluate.drawing.pictures import batches, once
from evaluate.records import ATTRIBUTES, MODEL, REAL
from evaluate.suite import swap
from evaluate.suite.swap import choose_donor
from tests.evaluate.conftest import FiguresInMemory, Judged
from train.method.dropout import ConditioningConfig

MODES = {"swap/both": "text+dino", "swap/cls": "text+cls", "swap/patches": "text+patches"}


@pytest.fixture(scope="module")
def gallery():
    """50 holdout figures: enough for a choice of donors in most buckets."""
    return Judged(FiguresInMemory(12, 50))


def make_context(judged, preset="default", **config):
    context = judged.context(**config)
    context.subject = replace(context.subject, table=ConditioningConfig(preset=preset).resolve())
    return context


@pytest.fixture(scope="module")
def asked(gallery):
    context = make_context(gallery)
    return swap.pictures(context, context.config.swap)[0]


@pytest.fixture(scope="module")
def models(gallery, asked):
    """What known models draw: ``deaf`` to features, ``perfect``; given both, also ``half`` right and a ``blend``."""
    truth = {row["key"]: gallery.figures.pixels(row) for row in gallery.figures.rows("holdout")}
    labels = {"deaf": [*MODES], "perfect": [*MODES], "half": ["swap/both"], "blend": ["swap/both"]}
    found = {name: {(MODES[label], 0): truth for label in own} for name, own in labels.items()}
    for number, picture in enumerate(one for one in asked if one.donor and one.condition in MODES):
        own, other = truth[picture.key], truth[picture.donor]
        drawn = {
            "deaf": own,
            "perfect": other,
            "half": other if number % 2 else own,
            "blend": np.uint8((own.astype(int) + 2 * other.astype(int)) // 3),
        }
        for name, image in drawn.items():
            if picture.condition in labels[name]:
                found[name].setdefault((picture.condition, 0), {})[picture.key] = image
    return found


@pytest.fixture(scope="module")
def verdicts(gallery, models):
    found = {}
    for name, drawn in models.items():
        context = make_context(gallery)
        if ("swap/cls", 0) not in drawn:  # given both alone
            context.subject = replace(context.subject, table={frozenset({"text", "cls", "patches"}): 1.0})
        metrics, _ = swap.summarise(gallery.rows(drawn, detected=True), context, context.config.swap)
        found[name] = {metric.name: metric for metric in metrics}, context
    return found


def test_donors_are_others_of_the_bucket_drawn_blindly(gallery, asked):
    rows = {row["key"]: row for row in gallery.figures.rows()}
    context = make_context(gallery)
    pairs = swap._pairs(context, context.config.swap)
    assert len(pairs) > 35
    assert pairs == swap._pairs(make_context(gallery), context.config.swap)
    place = []
    for pair in pairs:
        assert pair.key not in pair.candidates
        assert pair.donor in pair.candidates
        assert {rows[key]["bucket"] for key in pair.candidates} == {rows[pair.key]["bucket"]}
        place.append(pair.candidates.index(pair.donor) / (len(pair.candidates) - 1))
    assert np.mean(place) == pytest.approx(0.5, abs=0.2)  # no more often one that is early or late
    donors = {one.key: one.donor for one in asked if one.condition == "swap/both"}
    assert donors == {pair.key: pair.donor for pair in pairs}


def test_candidates_look_different_and_the_donor_is_one_of_them():
    others, likeness = [f"{number:02d}" for number in range(20)], np.linspace(1, -1, 20)
    pairs = [choose_donor(f"sample {number}", others, likeness, 4) for number in range(400)]
    assert {key for pair in pairs for key in pair.candidates} == set(others[10:])
    assert {len(set(pair.candidates)) for pair in pairs} == {4}
    share = np.bincount([pair.candidates.index(pair.donor) for pair in pairs]) / len(pairs)
    assert share == pytest.approx(0.25, abs=0.07)
    assert len(choose_donor("a", others[:3], likeness[:3], 8).candidates) == 3


def test_near_duplicates_are_no_candidates(gallery):
    context = make_context(gallery)
    rows = {key: {**row, "duplicate_group": "twins"} for key, row in context.rows.items()}
    context.rows = rows
    assert swap._pairs(context, context.config.swap) == []
    pictures, (skipped,) = swap.pictures(context, context.config.swap)
    assert (pictures, skipped.name) == ([], "swap")
    assert "8 more samples" in skipped.reason


def test_pictures_are_paired_by_noise_and_given_the_same_but_for_the_donor(gallery, asked):
    context = make_context(gallery)
    named = {one.name: one for one in once(asked)}
    for one in asked:
        if one.condition in MODES:
            own = named[MODES[one.condition], one.key, one.seed]
            assert (own.subset, own.guidance, own.donors) == (one.subset, one.guidance, {})
            assert set(one.donors) == set(swap.SWAPPED[one.condition.partition("/")[2]])
            assert "pose" not in one.subset
    buckets = {key: row["bucket"] for key, row in context.rows.items()}
    assert list(batches(once(asked), buckets, 7))  # no two of a batch differ in what is kept


@pytest.mark.parametrize("space", ["", "_pixels"])
@pytest.mark.parametrize("mode", ["", "/cls", "/patches"])
def test_a_model_that_ignores_the_features_is_at_chance(verdicts, space, mode):  # E08
    metrics, context = verdicts["deaf"]
    identified = metrics[f"swap/identified{space}{mode}"]
    pairs = swap._pairs(context, context.config.swap)
    assert identified.baselines["chance"] == pytest.approx(np.mean([1 / len(pair.candidates) for pair in pairs]))
    assert identified.low <= identified.baselines["chance"] <= identified.high
    assert identified.value == identified.baselines["unswapped"]
    gain = metrics[f"swap/gain{space}{mode}"]
    assert (gain.value, gain.low, gain.high) == pytest.approx((0, 0, 0), abs=1e-12)


@pytest.mark.parametrize("space", ["", "_pixels"])
@pytest.mark.parametrize("mode", ["", "/cls", "/patches"])
def test_a_model_that_draws_the_donors_truth_is_always_right(verdicts, space, mode):  # E08
    metrics, _ = verdicts["perfect"]
    identified, gain = metrics[f"swap/identified{space}{mode}"], metrics[f"swap/gain{space}{mode}"]
    assert (identified.value, identified.high) == (1.0, 1.0)
    assert identified.low == pytest.approx(0.025 ** (1 / identified.n))
    assert gain.value == pytest.approx(gain.baselines["donor_itself"], abs=1e-6)
    assert gain.low > 0


@pytest.mark.parametrize("space", ["", "_pixels"])
def test_models_in_between_are_in_between(verdicts, space):  # E08
    perfect, half, blend = (verdicts[name][0] for name in ("perfect", "half", "blend"))
    assert 0.5 <= half[f"swap/identified{space}"].value < 0.9
    for other in (half, blend):
        assert 0 < other[f"swap/gain{space}"].value < perfect[f"swap/gain{space}"].value


def test_the_gain_is_that_in_cosine_to_the_donors_image(gallery, models, verdicts):
    rows, context = gallery.rows(models["blend"], detected=True), make_context(gallery)
    pairs = swap._pairs(context, context.config.swap)
    gains = []
    for pair in pairs:
        (own,) = (row for row in rows.select(MODEL, "text+dino") if row["key"] == pair.key)
        (swapped,) = (row for row in rows.select(MODEL, "swap/both") if row["key"] == pair.key)
        donor = rows.real[pair.donor]["feature"]
        cosines = [
            row["feature"] @ donor / np.linalg.norm(row["feature"]) / np.linalg.norm(donor) for row in (own, swapped)
        ]
        gains.append(cosines[1] - cosines[0])
    metric = verdicts["blend"][0]["swap/gain"]
    assert metric.value == pytest.approx(np.mean(gains), rel=1e-4)
    assert metric.n == len(pairs)
    assert metric.settings["judge"]
    assert metric.settings["swapped"] == "cls+patches"
    assert metric.settings["conditions"] == "text+dino"
    assert metric.settings["guidance"] == 1


def test_what_is_kept_of_the_text(gallery, models, verdicts):
    """The pictures are judged at the joints of the sample, so only those that show the sample itself are right."""
    deaf, perfect = (verdicts[name][0]["swap/text_kept"] for name in ("deaf", "perfect"))
    assert deaf.value == deaf.baselines["unswapped"] > 0.9
    assert deaf.value == pytest.approx(deaf.baselines["judge_on_real"], abs=0.05)
    assert deaf.baselines["donor"] < 0.4 > deaf.baselines["chance"]
    assert perfect.high < deaf.low
    rows = gallery.rows(models["perfect"], detected=True)
    for row in rows.select(MODEL, "swap/both"):
        row |= {f"{name}_judged": row[f"{name}_true"] for name in ATTRIBUTES}
    metrics, _ = swap.summarise(rows, context := make_context(gallery), context.config.swap)
    (metric,) = (one for one in metrics if one.name == "swap/text_kept")
    assert metric.value == 1


def test_without_figures_likeness_to_the_sample_stands_for_the_text(gallery, models):
    context = make_context(gallery)
    context.examiner = type("Photographs", (), {"figures": False, "lpips_label": None, "no_lpips": None})()
    found = {}
    for name in ("deaf", "perfect"):
        metrics, _ = swap.summarise(gallery.rows(models[name]), context, context.config.swap)
        found[name] = {metric.name: metric for metric in metrics}
        assert "swap/text_kept" not in found[name]
    deaf, perfect = (one["swap/similarity_kept"] for one in found.values())
    assert deaf.value == pytest.approx(1)
    assert perfect.value < 0.9
    assert perfect.baselines["unswapped"] == pytest.approx(1)


def test_the_matrix_has_each_text_with_each_features(gallery, asked, verdicts):
    extras = verdicts["perfect"][1].extras["swap"]
    assert json.loads(json.dumps(extras)) == extras
    keys = extras["matrix"]["keys"]
    assert len(keys) == 4
    named = {one.name: one for one in asked}
    for row, cells in zip(keys, extras["matrix"]["cells"]):
        for column, cell in zip(keys, cells):
            picture = named[cell["condition"], cell["key"], cell["seed"]]
            assert picture.key == row
            assert picture.giver("cls") == picture.giver("patches") == column
            assert (MODEL, cell["condition"], row, 0) in verdicts["perfect"][1].shown
    assert {mode["mode"]: mode["unswapped"] for mode in extras["modes"]} == {
        "both": "text+dino", "cls": "text+cls", "patches": "text+patches",
    }  # fmt: skip


def test_examples_say_whose_image_each_was_taken_for(verdicts):
    _, context = verdicts["perfect"]
    for example in context.extras["swap"]["examples"]:
        taken = {key for found in example["nearest"].values() for key in found.values()}
        assert taken == {example["donor"]}
        assert set(example["nearest"]) == set(example["pictures"]) == {"both", "cls", "patches"}
        assert (REAL, "real", example["donor"], 0) in context.shown
    assert len(context.extras["swap"]["examples"]) == 4


def test_what_was_never_trained_is_skipped(gallery):
    context = make_context(gallery, "quickstart")
    pictures, skipped = swap.pictures(context, context.config.swap)
    assert {one.condition.split("/")[1] for one in pictures if one.donor} == {"both"}
    assert {one.subset for one in pictures} == {frozenset({"text", "cls", "patches", "pose"})}  # the pose stays
    assert {one.name: one.reason for one in skipped} == {
        "swap/text+cls": "subset text+cls never trained",
        "swap/text+patches": "subset text+patches never trained",
    }
    context.subject = replace(context.subject, table={frozenset({"text"}): 1.0})
    pictures, (skipped,) = swap.pictures(context, context.config.swap)
    assert pictures == []
    assert "never trained" in skipped.reason
    assert swap.summarise(gallery.rows({}), context, context.config.swap) == ([], [])


def test_degenerate_pictures_are_null_with_a_reason(gallery, models):  # E02
    rows = gallery.rows(models["perfect"], detected=True)
    row = rows.select(MODEL, "swap/cls")[0]
    row |= {"degenerate": "constant", "feature": None, "feature_pixels": None}
    metrics, _ = swap.summarise(rows, context := make_context(gallery), context.config.swap)
    found = {metric.name: metric for metric in metrics}
    for name in ("gain", "identified", "gain_pixels", "text_kept"):
        assert found[f"swap/{name}/cls"].value is None
        assert "constant" in found[f"swap/{name}/cls"].reason
        assert found[f"swap/{name}"].value is not None


def test_without_a_judge_or_a_detector_the_rest_is_measured(gallery, models):  # E04
    context = make_context(gallery)
    context.judge, context.no_judge = None, "no judge: none here"
    context.no_detector = "no detector: none here"
    metrics, skipped = swap.summarise(gallery.rows(models["perfect"]), context, context.config.swap)
    assert {metric.name for metric in metrics} == {
        f"swap/{name}_pixels{mode}" for name in ("gain", "identified") for mode in ("", "/cls", "/patches")
    }
    assert {one.name: one.reason for one in skipped} == {
        "swap/gain": "no judge: none here", "swap/identified": "no judge: none here",
        "swap/text_kept": "no detector: none here",
    }  # fmt: skip
