"""Unpaired: sets of pictures from text alone, of painters whose place is known, against both splits."""

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from evaluate.config import EvaluateConfig
from evaluate.drawing import draw
from evaluate.drawing.finished import FinishedBatches
from evaluate.metrics.clip import NO_PROBE
from evaluate.metrics.distances import frechet, kid
from evaluate.metrics.manifolds import Balls, fidelity
from evaluate.report.report import EvaluationFiles, render
from evaluate.run import evaluate, write
from evaluate.subject import Subject
from evaluate.suite import unpaired
from evaluate.suite.unpaired import BALLS, UnpairedConfig
from nanodit.config import load_config
from tests.evaluate.conftest import Constant
from tests.evaluate.metrics.test_clip import folder, probe  # noqa: F401
from train.method.dropout import ConditioningConfig
from train.method.flow import FlowConfig

CONFIG = UnpairedConfig(samples=40)


def painted(judged, pictures, keys):
    """Return the rows of a painter, who gives each sample one of ``pictures`` in turn."""
    features = [judged.judge.features(picture[None])[0] for picture in pictures]
    return [
        {"key": key, "degenerate": None, "feature": features[place % len(features)]} for place, key in enumerate(keys)
    ]


@pytest.fixture(scope="module")
def painters(judged, figures):
    """What painters give who never draw."""
    images = {split: [figures.pixels(row) for row in figures.rows(split)] for split in ("train", "holdout")}
    buckets = {image.shape: [one for one in images["train"] if one.shape == image.shape] for image in images["train"]}
    random = np.random.default_rng(0)
    return {
        "training": images["train"],
        "holdout": images["holdout"],
        "one": images["train"][:1],
        "mean image": [np.uint8(np.mean(max(buckets.values(), key=len), axis=0))],
        "noise": [np.uint8(random.integers(0, 256, image.shape)) for image in images["train"]],
    }


@pytest.fixture(scope="module")
def verdicts(judged, painters):
    """Metrics by name of each painter."""
    found = {}
    for name, pictures in painters.items():
        context = judged.context()
        context.unpaired = painted(judged, pictures, unpaired.prompts(context, CONFIG))
        metrics, skipped = unpaired.summarise(judged.rows({}), context, CONFIG)
        assert [one.name for one in skipped] == ["unpaired/fd"]
        found[name] = {metric.name: metric for metric in metrics}
    return found


def test_captions_are_of_both_splits_and_chosen_by_the_seed(judged, figures):
    context = judged.context()
    splits = {row["key"]: row["split"] for row in figures.rows()}

    def counts(samples, seed=0):
        keys = unpaired.prompts(context, UnpairedConfig(samples=samples, seed=seed))
        assert keys == sorted(set(keys))
        return [sum(splits[key] == split for key in keys) for split in ("holdout", "train")]

    assert counts(30) == [15, 15]
    assert counts(60) == [24, 36]  # all of the holdout
    assert counts(63) == [24, 39]
    assert counts(10_000) == [24, 40]  # each once
    few = [unpaired.prompts(context, UnpairedConfig(samples=10, seed=seed)) for seed in (0, 0, 1)]
    assert few[0] == few[1] != few[2]


def test_of_near_duplicates_one_is_given_and_one_counts(judged, figures, painters):
    context = judged.context()
    rows = {key: dict(row) for key, row in context.rows.items()}
    twins = [row["key"] for row in figures.rows("train")][:10]
    for key in twins:
        rows[key]["duplicate_group"] = "alike"
    dataset = type("Twins", (), {"rows": lambda self, split=None: [r for r in rows.values() if r["split"] == split]})()
    context.rows, context.subject = rows, replace(context.subject, dataset=dataset)
    keys = unpaired.prompts(context, UnpairedConfig(samples=64))
    assert len(set(keys) & set(twins)) == 1
    context.subject = judged.context().subject  # whose settings have what the index above lacks
    context.unpaired = painted(judged, painters["training"], keys)
    metrics, _ = unpaired.summarise(judged.rows({}), context, CONFIG)
    assert {one.settings["reference"] for one in metrics} == {"31 training images", "24 holdout images"}


def test_values_are_those_of_their_formulas_on_both_references(verdicts, judged, painters):
    context = judged.context()
    keys = unpaired.prompts(context, CONFIG)
    pictures = np.stack([row["feature"] for row in painted(judged, painters["noise"], keys)])
    held = np.stack([judged.rows({}).real[key]["feature"] for key in context.keys])
    train = context.train_features.feature
    found = verdicts["noise"]

    def balls(points):
        return Balls.of(points, [f"{index:03d}" for index in range(len(points))])

    for end, reference, real in (("", train, held), ("/holdout", held, train)):
        metric = found[f"unpaired/kid{end}"]
        assert metric.value == pytest.approx(kid(pictures, reference).value)
        assert metric.baselines["real"] == pytest.approx(kid(real, reference).value)
        equal = min(len(pictures), len(real))
        of_all, of_equal, floor = (
            fidelity(balls(own), balls(reference)) for own in (pictures, pictures[:equal], real[:equal])
        )
        for name, neighbours in BALLS.items():
            metric = found[f"unpaired/{name}{end}"]
            by_size = name in ("recall", "coverage")
            assert metric.value == (of_equal if by_size else of_all)[name].value
            assert metric.baselines["real"] == floor[name].value
            assert metric.settings["images"] == (equal if by_size else 40)
            assert metric.settings["neighbours"] == neighbours == (3 if name in ("precision", "recall") else 5)


def test_settings_name_the_captions_and_the_sets(verdicts):
    settings = verdicts["noise"]["unpaired/precision"].settings
    assert settings["prompts"] == "20 holdout and 20 training captions"
    assert (settings["reference"], settings["seeds"], settings["conditions"]) == ("40 training images", 1, "text")
    assert "clusters" in settings["interval_by"]
    assert verdicts["noise"]["unpaired/kid/holdout"].settings["reference"] == "24 holdout images"
    assert {"judge", "sampler", "guidance", "weights"} <= settings.keys()


@pytest.mark.parametrize("end", ["", "/holdout"])
def test_real_pictures_are_at_the_floor(verdicts, end):
    """Training images drawn again, held against the holdout, are what real images are there; and the other way."""
    found = verdicts["training" if end else "holdout"]
    for name in ("precision", "recall", "coverage"):
        metric = found[f"unpaired/{name}{end}"]
        assert metric.value == pytest.approx(metric.baselines["real"], abs=0.1), name
        assert metric.low <= metric.baselines["real"] <= metric.high
    near = found[f"unpaired/kid{end}"]
    assert near.low <= near.baselines["real"] <= near.high


def test_a_copy_of_the_training_images_is_above_what_is_possible_there(verdicts):
    found = verdicts["training"]
    assert found["unpaired/precision"].value == 1
    assert found["unpaired/kid"].value < found["unpaired/kid"].baselines["real"]
    assert found["unpaired/precision"].low < 1  # 40 of 40 are not certainty


@pytest.mark.parametrize("end", ["", "/holdout"])
@pytest.mark.parametrize("painter", ["one", "mean image"])
def test_few_kinds_of_picture_lack_recall_and_coverage(verdicts, painter, end):
    """One training image over and over is precise against training, and shows none of its variety."""
    found = verdicts[painter]
    for name in ("recall", "coverage"):
        metric = found[f"unpaired/{name}{end}"]
        assert metric.high < metric.baselines["real"] - 0.2, (name, metric)
    assert found[f"unpaired/kid{end}"].value > found[f"unpaired/kid{end}"].baselines["real"]
    if (painter, end) == ("one", ""):
        assert found["unpaired/precision"].value == 1


def test_the_frechet_distance_is_taken_at_one_n_which_is_in_its_settings(judged, painters):
    """Four of the judge's numbers are few enough for 12 images."""
    context = judged.context()
    context.train_features = replace(context.train_features, feature=context.train_features.feature[:, :4])
    context.unpaired = painted(judged, painters["noise"], unpaired.prompts(context, CONFIG))
    for row in context.unpaired:
        row["feature"] = row["feature"][:4]
    rows = judged.rows({})
    rows.all = [row | {"feature": row["feature"][:4]} for row in rows]
    metrics, skipped = unpaired.summarise(rows, context, CONFIG)
    found = {metric.name: metric for metric in metrics}
    assert skipped == []
    held = np.stack([rows.real[key]["feature"] for key in context.keys])
    pictures, train = np.stack([row["feature"] for row in context.unpaired])[:24], context.train_features.feature[:24]
    for end, reference in (("", train), ("/holdout", held)):
        metric = found[f"unpaired/fd{end}"]
        assert metric.value == pytest.approx(frechet(pictures, reference).value)
        assert metric.baselines["real"] == pytest.approx(frechet(held, train).value)
        assert (metric.n, metric.settings["images"]) == (24, 24)
        assert metric.settings["reference"].startswith("24 ")


def test_the_frechet_distance_says_what_it_lacks(judged, painters):
    context = judged.context()
    context.unpaired = painted(judged, painters["noise"], unpaired.prompts(context, CONFIG))
    _, (skipped,) = unpaired.summarise(judged.rows({}), context, CONFIG)
    needed = 2 * judged.judge.width
    assert skipped.reason.startswith(f"inconclusive, about {needed - 40} more pictures and {needed - 24} more holdout")


@pytest.mark.parametrize("samples", [1, 7])
def test_too_few_pictures_are_skipped_with_their_number(judged, painters, samples):
    context = judged.context()
    few = UnpairedConfig(samples=samples)
    context.unpaired = painted(judged, painters["noise"], unpaired.prompts(context, few))
    metrics, (skipped,) = unpaired.summarise(judged.rows({}), context, few)
    assert (metrics, skipped.name) == ([], "unpaired")
    assert skipped.reason == f"inconclusive, about {8 - samples} more pictures"


def test_a_single_training_image_is_skipped_too(judged, painters):
    context = judged.context()
    features = context.train_features
    context.train_features = type(features)(*(part[:1] for part in vars(features).values()))
    context.unpaired = painted(judged, painters["noise"], unpaired.prompts(context, CONFIG))
    metrics, (skipped,) = unpaired.summarise(judged.rows({}), context, CONFIG)
    assert (metrics, skipped.reason) == ([], "inconclusive, about 7 more training images")


def test_degenerate_pictures_are_null_with_a_reason(judged, painters):  # E02
    context = judged.context()
    context.unpaired = painted(judged, painters["noise"], unpaired.prompts(context, CONFIG))
    context.unpaired[3]["degenerate"] = "non-finite"
    metrics, _ = unpaired.summarise(judged.rows({}), context, CONFIG)
    assert {"unpaired/fd", "unpaired/coverage/holdout"} < {metric.name for metric in metrics}
    for metric in metrics:
        assert metric.value is None
        assert "degenerate: 1 of 40 pictures are non-finite" in metric.reason


def test_without_a_judge_or_a_training_on_text_it_is_skipped(judged):  # E04
    context = judged.context()
    context.judge, context.no_judge = None, "no judge: none here"
    unpaired.measure(context, CONFIG, FinishedBatches(None))  # for nobody
    assert context.unpaired == []
    metrics, (skipped,) = unpaired.summarise(judged.rows({}), context, CONFIG)
    assert (metrics, skipped.name, skipped.reason) == ([], "unpaired", "no judge: none here")
    context = judged.context()
    context.subject = replace(context.subject, table={})
    assert unpaired.pictures(context, CONFIG)[1][0].name == "unpaired/text"
    unpaired.measure(context, CONFIG, FinishedBatches(None))
    assert (context.unpaired, unpaired.summarise(judged.rows({}), context, CONFIG)) == ([], ([], []))


def test_without_clip_the_score_is_skipped_but_for_figures_of_which_nobody_asked_it(judged, monkeypatch):
    context = judged.context()
    context.judge, context.no_judge = None, "no judge: none here"

    def skipped():
        return [one.name for one in unpaired.summarise(judged.rows({}), context, CONFIG)[1]]

    context.no_probe = "no probe: a folder that is not here"
    assert skipped() == ["unpaired/clip_score/text", "unpaired"]
    context.no_probe = NO_PROBE
    assert skipped() == ["unpaired"]
    monkeypatch.setattr(context.examiner, "figures", False)
    assert skipped() == ["unpaired/clip_score/text", "unpaired"]


def test_the_clip_score_is_between_those_of_other_pictures_and_of_the_real_ones(judged, probe):  # noqa: F811
    """Pictures that are their captions score most; the real ones, here half as much; others' next to nothing."""
    context = judged.context()
    context.probe = probe
    rows = {key: dict(row) for key, row in context.rows.items()}
    for place, row in enumerate(rows.values()):
        row["caption"] = f"{'abdeg'[place % 5] * 3}. Blue. " + "Red shirt " * (40 if place % 2 else 1)
    context.rows = rows
    keys = unpaired.prompts(context, CONFIG)
    texts = probe.captions([rows[key]["caption"] for key in keys])
    own = texts / np.linalg.norm(texts, axis=1, keepdims=True)
    feature = np.random.default_rng(0).normal(size=(len(keys), judged.judge.width)).astype(np.float32)
    context.unpaired = [
        {"key": key, "degenerate": None, "feature": feature[place], "probe": own[place], "probe_real": own[place] / 2}
        for place, key in enumerate(keys)
    ]
    found = {metric.name: metric for metric in unpaired.summarise(judged.rows({}), context, CONFIG)[0]}
    score = found["unpaired/clip_score/text"]
    assert score.value == pytest.approx(np.mean(np.linalg.norm(texts, axis=1)), abs=1e-6)
    assert score.low <= score.value <= score.high
    assert score.baselines["real"] == pytest.approx(score.value / 2, abs=1e-6)
    assert score.baselines["random_pair"] < score.value
    long = sum("shirt Red" in rows[key]["caption"] for key in keys)
    assert (score.settings["sentences"], score.settings["sentences_cut"]) == (120, long)
    assert long > 10


@pytest.fixture(scope="module")
def quick():
    return load_config(
        EvaluateConfig,
        None,
        ["tests=[unpaired]", "unpaired.samples=40", "sampler.method=euler", "sampler.steps=2", "baseline_images=12",
         "batch_size=7", "grid_images=0"],
    )  # fmt: skip


def make_subject(figures, model):
    table = ConditioningConfig(preset="quickstart").resolve()
    return Subject(model, FlowConfig(), table, figures, tuple(figures.rows("holdout")), batch_size=7)


def test_pictures_are_drawn_once_and_leave_nothing_but_features(figures, quick, tmp_path, monkeypatch, folder):  # noqa: F811
    """Killed and continued: nothing is drawn again; no row, no image; and the page has them in their place."""
    quick = quick.model_copy(update={"probe": str(folder)})
    subject = make_subject(figures, Constant(lambda z: z))
    first = evaluate(subject, quick, tmp_path, identity={"weights": "same"})
    parts = sorted((tmp_path / "parts").glob("unpaired-*.parquet"))
    tables = [pq.read_table(path) for path in parts]
    assert sum(map(len, tables)) == 40
    assert {name for table in tables for name in table.column_names} == {
        "key", "degenerate", "feature", "probe", "probe_real"
    }  # fmt: skip
    assert not (tmp_path / "images").exists()
    assert {row["kind"] for row in first.samples} == {"real", "baseline"}
    assert {row["key"] for row in first.samples} == {row["key"] for row in figures.rows("holdout")}

    def refuse(*_):
        raise AssertionError("drawn again")

    monkeypatch.setattr(draw, "draw", refuse)
    again = evaluate(subject, quick, tmp_path, identity={"weights": "same"})
    assert again.metrics == first.metrics
    write(tmp_path, quick, again, {"step": 1, "evaluation": quick.model_dump()}, [])
    page = render(EvaluationFiles.read(tmp_path))
    for words in ("Pictures from text alone", "against the holdout", "KID from text alone", "Naeem et al. 2020"):
        assert words in page


def test_a_broken_model_is_null_with_a_reason(figures, quick, tmp_path):
    found = evaluate(make_subject(figures, Constant(lambda z: z * float("nan"))), quick, tmp_path).metrics
    assert len(found) == 12
    assert {metric.reason.partition(",")[0] for metric in found} == {"degenerate: 40 of 40 pictures are non-finite"}


def test_it_runs_where_it_is_named_and_in_the_full_tier_alone():
    tiers = {name: load_config(EvaluateConfig, f"configs/evaluate/{name}.yaml") for name in ("base", "pulse", "full")}
    assert {name: "unpaired" in config.tests for name, config in tiers.items()} == {
        "base": False, "pulse": False, "full": True
    }  # fmt: skip
    assert sorted(tiers["full"].tests) == sorted(["unpaired", *EvaluateConfig().tests])


def test_real_images_are_no_bound_for_pictures_of_the_captions_they_are_held_against():
    """A perfect model: what a caption says is the image's, the rest is drawn anew."""
    random = np.random.default_rng(0)
    said, others = random.normal(size=(2, 256, 16))
    holdout, training, drawn = (what + 0.4 * random.normal(size=what.shape) for what in (said, others, said))
    assert kid(drawn, holdout).interval().high < 0 < kid(training, holdout).interval().high
