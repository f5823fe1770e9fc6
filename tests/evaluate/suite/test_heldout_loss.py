"""The held-out loss sits on a grid that never moves, and trivial models score what trivial predictors score."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from evaluate.drawing.arms import choose_subsets
from evaluate.drawing.baselines import load_training_images
from evaluate.report import compare
from evaluate.subject import Batch
from evaluate.suite import heldout_loss
from evaluate.suite.heldout_loss import HeldoutLossConfig, grid_times
from train.method.flow import FlowConfig

ALL = frozenset({"text", "cls", "patches", "pose"})
CONFIG = HeldoutLossConfig(bins=10, conditions=["all"])
T_MIN = FlowConfig().t_min


@pytest.fixture
def training(figures):
    return load_training_images(figures, {row["bucket"] for row in figures.rows("holdout")}, 40)


def measured(subject, training, config=CONFIG):
    rows = heldout_loss.measure(subject, [ALL], training, config)
    return rows, {metric.name: metric for metric in heldout_loss.losses(rows, config, {}, subject.flow.t_min)}


def test_times_lie_in_their_strata_and_belong_to_the_sample():
    times = grid_times("abc", bins=10, times_per_bin=3)
    assert times.shape == (10, 3)
    assert np.array_equal(np.floor(times.ravel() * 30), np.arange(30))  # one in each thirtieth of [0, 1]
    assert np.array_equal(times, grid_times("abc", 10, 3))
    assert not np.array_equal(times, grid_times("abd", 10, 3))


def test_images_of_one_split_group_are_one_observation(make_subject, figures, training):
    groups = [{"split_group": f"{place // 6}"} for place in range(24)]
    shoots = [row | group for row, group in zip(figures.rows("holdout"), groups)]
    rows, metrics = measured(make_subject("noise", shoots), training)
    assert {row["key"]: row["cluster"] for row in rows} == {row["key"]: row["split_group"] for row in shoots}
    assert metrics["heldout_loss"].n == 4


def test_a_perfect_model_has_no_loss(make_subject, training):
    _, metrics = measured(make_subject("truth"), training)
    assert metrics["heldout_loss"].value == pytest.approx(0, abs=1e-9)
    assert metrics["heldout_ratio/all"].value == pytest.approx(0, abs=1e-9)
    assert metrics["heldout_loss"].n == 24


def test_echoing_z_scores_as_the_identity_predictor(make_subject, training):
    rows, metrics = measured(make_subject("noise"), training)
    for row in rows:
        assert row["mse"] == pytest.approx(row["identity_mse"], rel=1e-6)
        assert row["loss"] == pytest.approx(row["identity_loss"], rel=1e-6)
    last = metrics["heldout_mse/all/0.9-1"]
    assert last.value == pytest.approx(last.baselines["identity"])
    # at t near 1, z is noise: unit variance plus the image's own energy
    assert 1.0 < last.value < 2.2
    assert metrics["heldout_ratio/all"].value > 1


def test_the_affine_predictor_beats_the_identity_and_the_constant_where_both_are_poor(make_subject, training):
    _, metrics = measured(make_subject("noise"), training)
    for bounds in ("0.3-0.4", "0.4-0.5", "0.5-0.6", "0.6-0.7"):
        baselines = metrics[f"heldout_mse/all/{bounds}"].baselines
        assert baselines["affine"] < baselines["identity"]


def test_loss_is_error_over_clamped_t_squared(make_subject, training):
    subject = make_subject("mean_image")
    rows, _ = measured(subject, training)
    for row in rows:
        t = grid_times(row["key"], 10, 1)[row["bin"], 0]  # no resolution shift at 64 pixels
        assert row["loss"] == pytest.approx(row["mse"] / max(t, 0.05) ** 2, rel=1e-4)


def test_the_grid_follows_the_resolution_shift_of_the_size(figures, make_subject):
    subject = make_subject("truth")
    large = Batch("512x512", ({"key": "a"},), np.zeros((1, 512, 512, 3), np.uint8), None)
    for batch, s in ((large, 2.0), (next(subject.batches()), 1.0)):
        times = torch.stack([t for _, _, _, t in heldout_loss._grid(subject, batch, CONFIG)])[:, 0]
        plain = grid_times(batch.keys[0], 10, 1)[:, 0]
        assert times.numpy() == pytest.approx(s * plain / (1 + (s - 1) * plain), rel=1e-6)


@pytest.mark.parametrize("law", [{"shift": 3.0}, {"t_min": 1.0}, {"logit_mean": 0.0, "uniform_share": 0.5}])
def test_the_error_does_not_move_with_the_law_of_training(make_subject, training, law):
    own, other = make_subject("noise"), replace(make_subject("noise"), flow=FlowConfig(**law))
    rows, metrics = measured(own, training)
    moved, changed = measured(other, training)
    assert [row["mse"] for row in moved] == pytest.approx([row["mse"] for row in rows], rel=1e-6)
    for one, two in zip(metrics.values(), changed.values()):
        if one.name != "heldout_loss":  # which is weighted, and says with what
            assert two.to_dict() == one.to_dict() | {
                key: pytest.approx(one.to_dict()[key]) for key in ("value", "low", "high", "baselines")
            }
    differs = compare.differing([one["heldout_loss"].to_dict() for one in (metrics, changed)])
    assert differs == (["weight 1 / max(t, 0.05)^2, 1 / max(t, 1)^2"] if "t_min" in law else [])


@pytest.mark.parametrize(("bins", "begins"), [(10, 0.3), (20, 0.3), (4, 0.5), (3, 0.3333), (2, 0.5)])
def test_the_error_is_the_mean_of_the_bins_from_point_three_on(bins, begins):
    trivial = {f"{name}_{of}": 1.0 for name in heldout_loss.PREDICTORS for of in ("mse", "loss")}
    rows = [
        {"key": f"{image:02d}", "condition": "text", "split": "holdout", "bin": index}
        | {"mse": index / bins + image, "loss": 100.0 - index, **trivial}
        for image in range(12)
        for index in range(bins)
    ]
    config = HeldoutLossConfig(bins=bins)
    found = {metric.name: metric for metric in heldout_loss.losses(rows, config, {}, T_MIN)}
    error, places = found["heldout_error/text"], [place / bins for place in range(bins) if place / bins >= 0.3]
    assert error.value == pytest.approx(np.mean(places) + 5.5)
    assert (error.n, error.better, error.settings["t_from"]) == (12, "lower", begins)
    assert error.baselines == dict.fromkeys(heldout_loss.PREDICTORS, 1.0)
    values = heldout_loss.values_of("heldout_error/text", SimpleNamespace(heldout=rows))
    assert np.mean([value for value, _ in values.values()]) == pytest.approx(error.value)
    shares = heldout_loss.shares(rows, "text")
    assert sum(shares) == pytest.approx(1)
    assert shares == pytest.approx([(100 - index) / sum(100 - place for place in range(bins)) for index in range(bins)])


def test_a_grid_without_a_bin_from_point_three_on_has_no_error_and_says_so(make_subject, judged):
    context = judged.context()
    context.heldout = []
    metrics, skipped = heldout_loss.summarise([], context, HeldoutLossConfig(bins=1))
    assert metrics == []
    assert [one.name for one in skipped] == ["heldout_error"]
    assert "heldout_loss.bins" in skipped[0].reason


def test_the_ratio_is_pooled_from_point_three_on():
    rows = []
    for image in range(12):
        for index in range(10):
            trivial = {f"{name}_mse": 1.0 for name in heldout_loss.PREDICTORS}
            trivial |= {f"{name}_loss": 1.0 for name in heldout_loss.PREDICTORS}
            mse = 9.0 if index == 2 else 0.4 if index == 6 else 0.1  # bin 2 is below t = .3 and does not count
            rows.append({"key": f"{image:02d}", "condition": "all", "bin": index, "mse": mse, "loss": mse, **trivial})
    (ratio,) = [m for m in heldout_loss.losses(rows, CONFIG, {}, T_MIN) if m.name == "heldout_ratio/all"]
    assert (ratio.value, ratio.low, ratio.high) == (pytest.approx((0.4 + 6 * 0.1) / 7),) * 3
    assert ratio.better == "lower"


def test_the_interval_of_the_ratio_covers_the_ratio():
    """All bins alike: the resampled maximum of seven noisy ones, as it was, lay above the truth nearly always."""
    random = np.random.default_rng(0)
    covered = 0
    trivial = {f"{name}_{of}": 1.0 for name in heldout_loss.PREDICTORS for of in ("mse", "loss")}
    for _ in range(100):
        noise = 0.5 * (1 + 0.3 * random.normal(size=(32, 10)))
        rows = [
            {"key": f"{image:02d}", "condition": "all", "bin": index, "mse": mse, "loss": mse, **trivial}
            for (image, index), mse in np.ndenumerate(noise)
        ]
        (ratio,) = [m for m in heldout_loss.losses(rows, CONFIG, {}, T_MIN) if m.name == "heldout_ratio/all"]
        covered += ratio.low <= 0.5 <= ratio.high
    assert covered >= 88


def test_near_duplicates_are_resampled_together():
    """Bursts of four: the interval over groups is twice as wide as that over samples, and counts the groups."""
    values = np.repeat(np.random.default_rng(1).normal(1, 0.1, 16), 4)
    trivial = {f"{name}_{of}": 1.0 for name in heldout_loss.PREDICTORS for of in ("mse", "loss")}
    widths = []
    for burst in (4, 1):
        rows = [
            {"key": f"{image:02d}", "cluster": f"{image // burst:02d}", "bin": index, "condition": "all"}
            | {"mse": mse, "loss": mse, **trivial}
            for image, mse in enumerate(values)
            for index in range(10)
        ]
        loss = heldout_loss.losses(rows, CONFIG, {}, T_MIN)[0]
        assert loss.n == 64 // burst
        widths.append(loss.high - loss.low)
    assert widths[0] > 1.7 * widths[1]


def test_non_finite_predictions_are_null_with_a_reason(make_subject, training):
    _, metrics = measured(make_subject("broken"), training)
    for name in ("heldout_loss", "heldout_ratio/all", "heldout_mse/all/0.5-0.6"):
        assert metrics[name].value is None
        assert "non-finite" in metrics[name].reason
        assert metrics[name].n == 24


def test_batches_and_order_change_nothing(make_subject, training, figures):
    together, _ = measured(make_subject("mean_image", batch_size=32), training)
    rows = figures.rows("holdout")[::-1]
    singly, _ = measured(make_subject("mean_image", rows=rows, batch_size=1), training)
    assert [row["key"] for row in together] == [row["key"] for row in singly]
    assert [row["mse"] for row in together] == pytest.approx([row["mse"] for row in singly], abs=1e-6)


def test_the_gap_is_what_the_training_images_are_known_better():
    def rows(split, loss):
        return [
            {"key": f"{split}{image:02d}", "condition": "all", "bin": index, "mse": 0.1, "loss": loss + 0.01 * image}
            for image in range(20)
            for index in range(10)
        ]

    (gap,) = heldout_loss.gaps(rows("holdout", 0.5), rows("train", 0.3), CONFIG, {"weights": "ema"}, T_MIN)
    assert gap.name == "heldout_gap"
    assert gap.value == pytest.approx(-0.2)
    assert gap.low < -0.2 < gap.high < 0
    assert gap.settings["weights"] == "ema"
    assert "strata" in gap.settings["t_law"]
    (none,) = heldout_loss.gaps(rows("holdout", 0.5), rows("train", 0.5), CONFIG, {}, T_MIN)
    assert none.low < 0 < none.high
    broken = [row | {"mse": float("nan")} for row in rows("train", 0.3)]
    (null,) = heldout_loss.gaps(rows("holdout", 0.5), broken, CONFIG, {}, T_MIN)
    assert null.value is None
    assert "non-finite" in null.reason


def test_every_subset_that_was_trained_is_measured_unless_some_are_named(make_subject):
    subject = make_subject("truth")
    subsets, skipped = choose_subsets(["trained"], subject)
    assert subsets == [ALL, frozenset({"text", "pose"}), frozenset({"text"}), frozenset()]
    assert set(subsets) == set(subject.table)
    assert skipped == []
    named, skipped = choose_subsets(["text", "pose"], subject)
    assert named == [frozenset({"text"})]
    assert [one.name for one in skipped] == ["heldout_loss/pose"]
