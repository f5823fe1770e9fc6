"""Reconstruction: scores against the sample, baselines in its place, and a paired gain."""

import numpy as np
import pytest

from evaluate.metrics.pixels import score_pixels
from evaluate.records import BASELINE, MODEL
from evaluate.suite import reconstruction

SETTINGS = {"all": {"conditions": "all", "guidance": 1.0}}


def row(key, kind, condition, psnr, degenerate=None):
    return {"key": key, "kind": kind, "condition": condition, "psnr": psnr, "ssim": 0.5, "degenerate": degenerate}


def test_a_copy_scores_the_ceiling_that_eight_bits_leave(figures):
    images = np.stack([figures.pixels(r) for r in figures.rows() if r["bucket"] == "64x64"][:2])
    scores = score_pixels(images, images, None)
    assert [s["psnr"] for s in scores] == pytest.approx([58.92, 58.92], abs=0.01)
    assert [s["mse"] for s in scores] == [0, 0]
    assert [s["ssim"] for s in scores] == pytest.approx([1, 1])
    assert [s["lpips"] for s in scores] == [None, None]


def test_the_gain_is_paired_and_leaves_out_lone_samples():
    samples = []
    for index in range(20):
        key = f"{index:02d}"
        samples.append(row(key, MODEL, "all", 10 + index + 8))
        if index:  # the first has no partner
            samples.append(row(key, BASELINE, "random_pair", 10 + index))
    metrics = {m.name: m for m in reconstruction.likeness(samples, ["all"], SETTINGS, ["psnr"])}
    gain = metrics["reconstruction/psnr_gain"]
    assert (gain.value, gain.low, gain.high, gain.n) == (8, 8, 8, 19)  # the spread over images cancels
    psnr = metrics["reconstruction/psnr"]
    assert psnr.n == 20
    assert psnr.high - psnr.low > 2
    assert psnr.baselines == {"random_pair": pytest.approx(20)}
    assert psnr.settings == SETTINGS["all"]


def test_one_degenerate_picture_makes_the_metric_null_with_a_reason():
    samples = [row(f"{index:02d}", MODEL, "all", 20.0) for index in range(19)]
    samples.append(row("19", MODEL, "all", None, degenerate="constant"))
    for metric in reconstruction.likeness(samples, ["all"], SETTINGS, ["psnr"]):
        assert metric.value is None
        assert "1 of 20 pictures are constant, the first for sample 19" in metric.reason


def test_no_partners_at_all_is_a_reason_not_a_number():
    samples = [row(f"{index:02d}", MODEL, "all", 20.0) for index in range(19)]
    metrics = {m.name: m for m in reconstruction.likeness(samples, ["all"], SETTINGS, ["psnr"])}
    assert metrics["reconstruction/psnr_gain"].value is None
    assert "paired" in metrics["reconstruction/psnr_gain"].reason
    assert metrics["reconstruction/psnr"].value == 20


def test_skill_is_the_share_of_the_way_from_a_random_pair_to_a_round_trip():
    """On the squared error for PSNR: 20 dB and 10 dB are .01 and .1, and the mean image lies between."""
    samples = []
    for index in range(20):
        levels = {"random_pair": 0.1, "round_trip": 0.0001, "mean_image": 0.05, "nearest_train": 0.04}
        rows = [(BASELINE, name, mse) for name, mse in levels.items()] + [(MODEL, "all", 0.01 + 0.0001 * index)]
        samples += [row(f"{index:02d}", kind, name, -10 * np.log10(mse)) | {"mse": mse} for kind, name, mse in rows]
    (skill,) = reconstruction.skills(samples, ["all"], SETTINGS, ["psnr"])
    assert skill.name == "reconstruction/skill_mse"
    assert skill.value == pytest.approx((0.1 - 0.01095) / (0.1 - 0.0001))
    assert skill.low < skill.value < skill.high
    assert skill.baselines["mean_image"] == pytest.approx(0.05 / 0.0999)
    assert skill.baselines["nearest_train"] == pytest.approx(0.06 / 0.0999)
    assert (skill.baselines["random_pair"], skill.baselines["round_trip"]) == (0, 1)
    better_is_higher = [{**one, "ssim": 1 - one["mse"]} for one in samples]
    (other,) = reconstruction.skills(better_is_higher, ["all"], SETTINGS, ["ssim"])
    assert other.value == pytest.approx(skill.value)


def test_degenerate_pictures_have_no_skill():
    samples = [row(f"{index:02d}", MODEL, "all", None, degenerate="constant") for index in range(12)]
    (skill,) = reconstruction.skills(samples, ["all"], SETTINGS, ["ssim"])
    assert skill.value is None
    assert "constant" in skill.reason


def test_conditions_are_compared_without_guidance_and_untrained_ones_are_named(judged):
    context = judged.context(conditions={"all": 1.0, "text": 2.0})
    pictures, skipped = reconstruction.pictures(context, context.config.reconstruction)
    drawn = {picture.condition: picture.guidance.value for picture in pictures}
    assert drawn == {"all": 1.0, "text": 2.0, "text@1": 1.0, "nothing": 1.0}
    reasons = {one.name: one.reason for one in skipped}
    assert reasons == {
        "reconstruction/dino": "subset dino never trained",
        "reconstruction/pose": "subset pose never trained",
    }
    assert {picture.subset for picture in pictures if picture.condition == "text@1"} == {frozenset({"text"})}


def test_the_judge_orders_known_pictures(judged, known_pictures):  # fault E08
    values = {}
    alone = {"conditions": {"all": 1.0}, "reconstruction": {"conditions": ["all"]}}
    for name in ("truth", "shuffled", "noise"):
        rows = judged.rows({("all", 0): known_pictures[name]})
        metrics, _ = reconstruction.summarise(rows, context := judged.context(**alone), context.config.reconstruction)
        values[name] = {metric.name: metric for metric in metrics}
    for name in ("reconstruction/psnr", "reconstruction/ssim", "reconstruction/dino_similarity"):
        assert values["truth"][name].value > values["shuffled"][name].value > values["noise"][name].value, name
    similarity = values["truth"]["reconstruction/dino_similarity"]
    assert similarity.value == pytest.approx(1)
    assert "not a quality claim" in similarity.settings["judge"]
