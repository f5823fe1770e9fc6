"""Held-out flow loss on a fixed grid of times and noises, against predictors that anybody could write down.

The grid: [0, 1] is cut into equal bins, mapped through the resolution shift of the image's size, whatever times
training drew; within each bin every sample has its own times and noises, functions of (sample key, bin) alone. One row
per (sample, conditions, bin).

``heldout_error`` is what recipes are compared by: with e_ib the mean squared error of the predicted image of sample i
in bin b (pixels in [-1, 1], no weight), and B the bins that begin at NOISY_FROM or later,
``heldout_error = mean over i of 1 / |B| * sum over b in B of e_ib``. Neither times nor weights of training are in it,
so it does not move with them. ``heldout_loss`` is the mean of e_ib / max(t, t_min)^2 over all bins: mostly that of
small t, where the noisy image is nearly the answer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor

from evaluate.drawing.arms import TRAINED, choose_subsets
from evaluate.drawing.baselines import TrainingImages
from evaluate.drawing.context import DrawingContext, Rows
from evaluate.drawing.finished import FinishedBatches
from evaluate.drawing.pictures import Picture
from evaluate.records import Metric, Skipped, cluster_of
from evaluate.statistics import intervals
from evaluate.subject import Batch, Row, Subject, chunks, group_of, read_batch, to_float
from evaluate.suite.declaration import SuiteTest, Values
from nanodit.config import Config
from nanodit.console import Progress
from nanodit.rng import generator
from train.hardware import computing_in
from train.method.flow import flow_loss, interpolate, resolution_shift, shift, to_x
from train.model.conditions import Subset, subset_name

PREDICTORS = ("mean_image", "identity", "affine")
NOISY_FROM = 0.3  # below this unshifted t the noisy image is close to the answer: copying it is hard to beat


class HeldoutLossConfig(Config):
    """The grid and the conditions it is evaluated under."""

    bins: int = Field(default=10, ge=1)
    times_per_bin: int = Field(default=1, ge=1)
    conditions: list[str] = Field(default=[TRAINED], min_length=1)
    gap: list[str] = Field(default=["all"])  # of these also on as many training images


def grid_times(key: str, bins: int, times_per_bin: int) -> np.ndarray:
    """Return the times of one sample before the resolution shift, stratified: float64 (bins, times_per_bin)."""
    offsets = generator("heldout times", key).random((bins, times_per_bin))
    strata = (np.arange(times_per_bin) + offsets) / times_per_bin
    return (np.arange(bins)[:, None] + strata) / bins


def measure(
    subject: Subject,
    subsets: Sequence[Subset],
    training: TrainingImages | None,
    config: HeldoutLossConfig,
    advance: Callable[[int], None] = lambda count: None,
) -> list[dict[str, Any]]:
    """Score the model and the trivial predictors at every point of the grid.

    Returns rows of key, condition, bin, ``mse`` and ``loss`` of the model, and the same of each trivial predictor as
    ``mean_image_mse``, ``mean_image_loss``, ...; without ``training`` of none. Errors are per pixel in [-1, 1]; the
    loss divides by max(t, t_min)^2. ``advance`` is told how many samples are done.
    """
    rows: list[dict[str, Any]] = []
    for batch in subject.batches():
        rows += measure_batch(subject, batch, subsets, training, config)
        advance(len(batch.rows))
    return in_order(rows)


def in_order(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort rows by condition, key and bin."""
    return sorted(rows, key=lambda row: (row["condition"], row["key"], row["bin"]))


@torch.inference_mode()
def measure_batch(
    subject: Subject,
    batch: Batch,
    subsets: Sequence[Subset],
    training: TrainingImages | None,
    config: HeldoutLossConfig,
) -> list[dict[str, Any]]:
    """Return the rows of :func:`measure` for one batch."""
    rows, clusters = [], [group_of(row) for row in batch.rows]
    trivial = _trivial_errors(subject, batch, training, config) if training else {}
    for subset in subsets:
        condition = subset_name(subset, subject.modalities)
        errors = _model_errors(subject, batch, subset, config)
        for index, position in np.ndindex(config.bins, len(batch.rows)):
            row = {"key": batch.keys[position], "cluster": clusters[position], "condition": condition, "bin": index}
            row["mse"], row["loss"] = errors[index, :, position].tolist()
            for name, errors_of_it in trivial.items():
                row[f"{name}_mse"], row[f"{name}_loss"] = errors_of_it[index, :, position].tolist()
            rows.append(row)
    return rows


def _grid(subject: Subject, batch: Batch, config: HeldoutLossConfig) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Yield (bin, x, z, t) for every point of a batch's grid: x and z (B, 3, H, W), t (B,)."""
    x = to_float(batch.pixels)
    times = np.stack([grid_times(key, config.bins, config.times_per_bin) for key in batch.keys])
    times = shift(times, resolution_shift(batch.height, batch.width)).astype(np.float32)
    for index, repeat in np.ndindex(config.bins, config.times_per_bin):
        t = torch.from_numpy(times[:, index, repeat])
        yield index, x, interpolate(x, batch.noise(index * config.times_per_bin + repeat), t), t


def _model_errors(subject: Subject, batch: Batch, subset: Subset, config: HeldoutLossConfig) -> np.ndarray:
    """Return the mean squared error and loss of the model in every bin, float64 (bins, 2, B)."""

    def errors_of(part: Batch) -> np.ndarray:
        errors = np.zeros((config.bins, 2, len(part)))
        with computing_in(subject.precision, torch.device(subject.device)):
            conditions = part.conditions.keeping(subset).to(subject.device)
            context = subject.model.encode_context(conditions, part.height, part.width, cache=True)
            for index, x, z, t in _grid(subject, part, config):
                output = subject.model(z.to(subject.device), t.to(subject.device), context).float().cpu()
                x_hat = to_x(output, z, t, subject.flow.prediction)
                errors[index] += _errors(x_hat, x, t, subject.flow.t_min) / config.times_per_bin
        return errors

    return np.concatenate(list(subject.as_fits(errors_of, batch)), axis=2)


def _trivial_errors(
    subject: Subject, batch: Batch, training: TrainingImages, config: HeldoutLossConfig
) -> dict[str, np.ndarray]:
    """Return the same of each trivial predictor, by name."""
    mean_image = to_float(training.mean_image(batch.bucket)[None])
    s = resolution_shift(batch.height, batch.width)
    errors = {name: np.zeros((config.bins, 2, len(batch.rows))) for name in PREDICTORS}
    for index, x, z, t in _grid(subject, batch, config):
        low, high = shift(index / config.bins, s), shift((index + 1) / config.bins, s)
        slope, offset = training.affine(low, high)
        for name, x_hat in {"mean_image": mean_image, "identity": z, "affine": slope * z + offset}.items():
            errors[name][index] += _errors(x_hat, x, t, subject.flow.t_min) / config.times_per_bin
    return errors


def _errors(x_hat: Tensor, x: Tensor, t: Tensor, t_min: float) -> np.ndarray:
    """Return the mean squared error and flow loss of each image: float64 (2, B)."""
    loss = flow_loss(x_hat, x, t, t_min).double()
    return torch.stack([loss * t.double().clamp_min(t_min) ** 2, loss]).numpy()


def measure_all(context: DrawingContext, config: HeldoutLossConfig, parts: FinishedBatches) -> None:
    """Measure the samples, then as many training images for the gap: the rows of heldout_loss.parquet."""
    subject, subsets = context.subject, choose_subsets(config.conditions, context.subject)[0]
    train = tuple(subject.dataset.rows("train")[: len(subject.rows)])  # which are in key order
    gap = [subset for subset in choose_subsets(config.gap, subject)[0] if subset in subsets]
    work = [("holdout", subject.rows, subsets), ("train", train if gap else (), gap)]
    rows: list[dict[str, Any]] = []
    with Progress("held-out loss", sum(len(samples) for _, samples, _ in work)) as progress:
        for split, samples, given in work:
            training = context.training if split == "holdout" else None  # the gap needs no trivial predictors
            for bucket, number, members in chunks(samples, subject.batch_size):
                compute = partial(_measure_chunk, subject, split, given, training, config, members)
                keys = [row["key"] for row in members]
                rows += parts.get(f"{split}_loss-{bucket}-{number:04d}", keys, compute).to_pylist()
                progress.advance(len(members))
    context.heldout = sorted(rows, key=lambda row: (row["split"], row["condition"], row["key"], row["bin"]))


def _measure_chunk(
    subject: Subject,
    split: str,
    subsets: Sequence[Subset],
    training: TrainingImages | None,
    config: HeldoutLossConfig,
    members: tuple[Row, ...],
) -> pa.Table:
    rows = measure_batch(subject, read_batch(subject.dataset, members), subsets, training, config)
    return pa.Table.from_pylist([row | {"split": split} for row in rows])


def pictures(context: DrawingContext, config: HeldoutLossConfig) -> tuple[list[Picture], list[Skipped]]:
    """Ask for no pictures, as predictions are scored; name the conditions that were never trained."""
    return [], choose_subsets(config.conditions, context.subject)[1]


def summarise(rows: Rows, context: DrawingContext, config: HeldoutLossConfig) -> tuple[list[Metric], list[Skipped]]:
    """Return the metrics of :func:`losses` for every subset measured, and :func:`gaps` to training images."""
    held, train = ([row for row in context.heldout if row["split"] == split] for split in ("holdout", "train"))
    t_min = context.subject.flow.t_min
    metrics = losses(held, config, context.common, t_min) + gaps(held, train, config, context.common, t_min)
    few = f"no bin begins at t = {NOISY_FROM:g} or later; set heldout_loss.bins to 10"
    return metrics, [] if noisy_bins(config) else [Skipped("heldout_error", few)]


def gaps(
    held: Sequence[Mapping[str, Any]],
    train: Sequence[Mapping[str, Any]],
    config: HeldoutLossConfig,
    settings: Mapping[str, Any],
    t_min: float,
) -> list[Metric]:
    """Return ``heldout_gap/CONDITION``: the mean loss on training images less that on held-out ones.

    Below zero the model knows the images that it was trained on better than others like them.
    """
    metrics = []
    for condition in dict.fromkeys(row["condition"] for row in train):
        name = "heldout_gap" + ("" if condition == "all" else f"/{condition}")
        seen, unseen = ([row for row in rows if row["condition"] == condition] for rows in (train, held))
        details = {"settings": {**_settings(config, settings, t_min), "conditions": condition}}
        details["baselines"] = {"no_gap": 0.0}
        keys = [[cluster_of(row) for row in rows] for rows in (seen, unseen)]
        reason = _non_finite([*seen, *unseen])
        if reason:
            metrics.append(Metric(name, None, n=min(len(set(one)) for one in keys), reason=reason, **details))
            continue
        values = [[row["loss"] for row in rows] for rows in (seen, unseen)]
        metrics.append(Metric.of(name, intervals.difference(values[0], keys[0], values[1], keys[1]), **details))
    return metrics


def _settings(config: HeldoutLossConfig, settings: Mapping[str, Any], t_min: float) -> dict[str, Any]:
    """Return the settings of every weighted metric of the grid."""
    return {
        **settings,
        "t_law": f"uniform, {config.bins} strata x {config.times_per_bin}, before the resolution shift of the size",
        "weight": f"1 / max(t, {t_min:g})^2",
    }


def noisy_bins(config: HeldoutLossConfig) -> list[int]:
    """Return the bins that begin at NOISY_FROM or later: as the grid has them, none of a single one."""
    return [index for index in range(config.bins) if index / config.bins >= NOISY_FROM - 1e-9]


def losses(
    rows: Sequence[Mapping[str, Any]], config: HeldoutLossConfig, settings: Mapping[str, Any], t_min: float
) -> list[Metric]:
    """Return metrics from the rows of :func:`measure`; ``t_min`` is that of their loss.

    ``heldout_error`` (all conditions) and ``heldout_error/CONDITION``: the error from t = .3 on, see above.
    ``heldout_loss`` and ``heldout_loss/CONDITION``: the mean loss on the grid. ``heldout_mse/CONDITION/ LOW-HIGH``: the
    error in one bin. ``heldout_ratio/CONDITION``: the error of the model over that of the best trivial predictor of
    each bin, both pooled over the bins from t = .3 on.
    """
    settings = _settings(config, settings, t_min)
    metrics: list[Metric] = []
    by_condition: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        by_condition[row["condition"]].append(row)
    for condition, own in by_condition.items():
        suffix = "" if condition == "all" else f"/{condition}"
        named = {**settings, "conditions": condition}
        unweighted = {name: value for name, value in named.items() if name != "weight"}
        bins = [[row for row in own if row["bin"] == index] for index in range(config.bins)]
        noisy = [bins[index] for index in noisy_bins(config)]
        if noisy:
            begun = {"t_from": round(noisy_bins(config)[0] / config.bins, 4)}
            members = [row for members in noisy for row in members]
            metrics.append(_mean_metric(f"heldout_error{suffix}", members, "mse", unweighted | begun))
        metrics.append(_mean_metric(f"heldout_loss{suffix}", own, "loss", named))
        for index, members in enumerate(bins):
            low, high = index / config.bins, (index + 1) / config.bins
            bounds = {**unweighted, "t_low": low, "t_high": high}
            metrics.append(_mean_metric(f"heldout_mse/{condition}/{low:.2g}-{high:.2g}", members, "mse", bounds))
        if noisy:
            pooled = {**unweighted, "t_from": NOISY_FROM, "pooled": "bins"}
            metrics.append(_ratio_metric(f"heldout_ratio/{condition}", noisy, pooled))
    return metrics


def shares(rows: Iterable[Mapping[str, Any]], condition: str) -> list[float]:
    """Return each bin's share of the held-out loss, in the order of t; empty where that is not a positive number.

    ``rows`` are those of heldout_loss.parquet, also of evaluations from before there were shares.
    """
    totals: dict[int, float] = defaultdict(float)
    for row in rows:
        if row["condition"] == condition and row["split"] == "holdout":
            totals[row["bin"]] += row["loss"]
    whole = sum(totals.values())
    return [totals[index] / whole for index in sorted(totals)] if 0 < whole < np.inf else []


def _mean_metric(name: str, rows: Sequence[Mapping[str, Any]], column: str, settings: Mapping[str, Any]) -> Metric:
    keys = [cluster_of(row) for row in rows]
    baselines = {predictor: float(np.mean([row[f"{predictor}_{column}"] for row in rows])) for predictor in PREDICTORS}
    details = {"baselines": baselines, "settings": settings, "better": "lower"}
    reason = _non_finite(rows)
    if reason:
        return Metric(name, None, n=len(set(keys)), reason=reason, **details)
    return Metric.of(name, intervals.mean([row[column] for row in rows], keys), **details)


def _ratio_metric(name: str, bins: Sequence[Sequence[Mapping[str, Any]]], settings: Mapping[str, Any]) -> Metric:
    """Return model error over best trivial error, both pooled over bins and images.

    Not the worst bin: the maximum of noisy bins lies above the truth, and so do its resamples, whose interval covered
    it in 12 % of simulations. The best predictor of a bin is chosen once, on all images.
    """
    details = {"settings": settings, "better": "lower", "baselines": {"best_trivial": 1.0}}
    images = len({row["key"] for row in bins[0]})
    reason = _non_finite([row for members in bins for row in members])
    if reason:
        return Metric(name, None, n=images, reason=reason, **details)
    rows = [row for members in bins for row in members]
    trivial: list[float] = []
    for members in bins:
        errors = {predictor: [row[f"{predictor}_mse"] for row in members] for predictor in PREDICTORS}
        trivial += min(errors.values(), key=sum)
    clusters = [cluster_of(row) for row in rows]
    return Metric.of(name, intervals.quotient([row["mse"] for row in rows], trivial, clusters), **details)


def _non_finite(rows: Iterable[Mapping[str, Any]]) -> str | None:
    bad = [row["key"] for row in rows if not np.isfinite(row["mse"])]
    return f"degenerate: {len(bad)} predictions are non-finite, the first for sample {bad[0]}" if bad else None


def values_of(name: str, evidence: Any) -> Values | None:
    """Return the points of the grid that a metric is a mean of; None for other metrics."""
    family, _, rest = name.partition("/")
    if family not in ("heldout_error", "heldout_loss", "heldout_mse"):
        return None
    condition, _, bounds = rest.partition("/")
    column = "loss" if family == "heldout_loss" else "mse"
    rows = [row for row in evidence.heldout if row["split"] == "holdout"]
    rows = [row for row in rows if row["condition"] == (condition or "all")]
    bins = len({row["bin"] for row in rows})
    if family == "heldout_error":
        rows = [row for row in rows if row["bin"] / bins >= NOISY_FROM - 1e-9]
    elif bounds:
        rows = [row for row in rows if round(float(bounds.partition("-")[0]) * bins) == row["bin"]]
    return {(row["key"], row["bin"]): (row[column], 1) for row in rows}


TEST = SuiteTest(
    name="heldout_loss",
    title="Held-out loss",
    pictures=pictures,
    summarise=summarise,
    config=HeldoutLossConfig,
    measure=measure_all,
    looks=False,
    stem="heldout",
    families={
        "heldout_error": f"Held-out error, t from {NOISY_FROM:g} on",
        "heldout_loss": "Held-out flow loss",
        "heldout_ratio": "Held-out error / best trivial",
        "heldout_gap": "Loss on training images less held-out",
    },
    charted=("heldout_mse",),
    minimised={"heldout": "flow"},
    roles={"heldout": (("best_trivial", *PREDICTORS), ())},
    values=values_of,
    terms=(
        (
            "Held-out error and flow loss",
            "On a fixed grid: t uniform in equal strata before the resolution shift of the image's size; t and noise "
            f"depend on the sample alone. The error is ‖x̂ − x‖², the mean over the strata from t = {NOISY_FROM:g} on, "
            "where it is decided what the picture shows. Times and weights of training are not in it, so recipes are "
            "compared by it. The flow loss is ‖x̂ − x‖² / max(t, t_min)² over all strata; most of it is of small t, "
            "where the noisy image is nearly the answer. Trivial predictors on the same grid: the training set's mean "
            "image, x̂ = z, and a z + b fitted on the training set for each stratum. The gap is the loss on as many "
            "training images minus the loss on the holdout: below zero, the model predicts training images better.",
        ),
    ),
)
