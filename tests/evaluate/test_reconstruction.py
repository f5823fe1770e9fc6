"""Reconstruction: scores against the sample, baselines in its place, and a paired gain."""

import numpy as np
import pytest

from evaluate.records import BASELINE, MODEL
from evaluate.suite import reconstruction

SETTINGS = {"all": {"conditions": "all", "guidance": 1.0}}


def row(key, kind, condition, psnr, degenerate=None):
    return {"key": key, "kind": kind, "condition": condition, "psnr": psnr, "ssim": 0.5, "degenerate": degenerate}


def test_a_copy_scores_the_ceiling_that_eight_bits_leave(figures):
    images = np.stack([figures.pixels(r) for r in figures.rows() if r["bucket"] == "64x64"][:2])
    scores = reconstruction.score(images, images, None)
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
