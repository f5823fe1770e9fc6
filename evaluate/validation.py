"""The few numbers that a run shows while it trains: held-out error and loss of some samples, by what is given.

``validation.tests`` adds tests of the evaluation at its tier pulse, with the files that ``evaluate report`` reads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from evaluate.config import EvaluateConfig
from evaluate.drawing.arms import choose_subsets
from evaluate.drawing.vocabulary import load_pairs
from evaluate.records import folder_name
from evaluate.report.summary import is_headline
from evaluate.run import curves_until, evaluate, perceptual_losses, provenance, write
from evaluate.subject import Subject, dataset_modalities, select_holdout
from evaluate.suite import TESTS
from evaluate.suite.heldout_loss import HeldoutLossConfig, measure, noisy_bins
from nanodit.config import load_config
from nanodit.console import say, waiting
from nanodit.errors import ConfigError, DataError
from nanodit.files import canonical_json, write_atomic
from prep.dataset.reader import Dataset
from train.config import TrainConfig, ValidationSection
from train.data.samples import bucket_size
from train.data.short import check_short
from train.loop.tracking import VALIDATED
from train.loop.trainer import Validate
from train.model.conditions import subset_name
from train.sweep.config import as_arguments

GRID = HeldoutLossConfig()


def build_validation(config: TrainConfig, dataset: Dataset) -> Validate:
    """Return :func:`validate` as a run calls it.

    Raises :class:`ConfigError` where the dropout table trains none of ``validation.conditions``, and
    :class:`DataError` for a holdout that is empty or leaks into the training split.
    """
    subject = _subject(nn.Identity(), config, dataset)
    subsets, skipped = choose_subsets(config.validation.conditions, subject)
    if not subsets:
        reasons = "; ".join(one.reason for one in skipped)
        raise ConfigError(f"validation.conditions: nothing to measure: {reasons}; name others, or set every_steps to 0")
    if unknown := [name for name in config.validation.tests if name not in TESTS]:
        raise ConfigError(f"validation.tests: unknown {unknown[0]}; known: {', '.join(TESTS)}")
    tier = _tier(config.validation, subject.batch_size)
    short = bool(config.validation.tests) and tier.captions == "short"
    check_short(dataset, "captions=short of validation.evaluate_overrides", short)
    _warn_of_a_jump(config)
    return lambda model, step, folder: validate(model, config, dataset, step, folder)


def _warn_of_a_jump(config: TrainConfig) -> None:
    """Warn of a run that goes on and was validated before the holdout had parts: its curves go on with other images."""
    before = sorted(config.run_folder.glob(f"validation_outputs/step-*/{VALIDATED}"))
    if before and b'"holdout":' not in before[-1].read_bytes():
        say(
            f"warning: {before[-1]}: until then validation read all of the holdout, from now on its part dev: where "
            "the curves validation/* jump there, the images did, not the model"
        )


def validate(model: nn.Module, config: TrainConfig, dataset: Dataset, step: int, folder: Path) -> dict[str, float]:
    """Measure ``model``: TensorBoard tag -> value, such as ``validation/heldout_error`` for all conditions together.

    The mean error from t = .3 on and, as ``validation/heldout_loss``, the mean loss over all times, of
    ``validation.samples`` holdout images on the grid of :mod:`evaluate.suite.heldout_loss`, equal at every step, so
    that the curves move with the model alone. The errors by time go to ``folder/heldout.json``. Raises
    :class:`DataError` where the model predicts what is not a number.
    """
    subject = _subject(model, config, dataset)
    subsets, _ = choose_subsets(config.validation.conditions, subject)
    with waiting(f"step {step}: validation on {len(subject.rows)} samples", at_once=False):
        rows = measure(subject, subsets, None, GRID)
    record, values = {}, {}
    for condition in (subset_name(subset, subject.modalities) for subset in subsets):
        own = [row for row in rows if row["condition"] == condition]
        by_bin = [[row["mse"] for row in own if row["bin"] == index] for index in range(GRID.bins)]
        loss, errors = float(np.mean([row["loss"] for row in own])), np.mean(by_bin, axis=1).tolist()
        if not np.isfinite([loss, *errors]).all():
            raise DataError(f"given {condition}, the model predicts values that are not finite")
        record[condition] = {"loss": loss, "mse": errors}
        suffix = "" if condition == "all" else f"/{condition}"
        values[f"validation/heldout_error{suffix}"] = float(np.mean([errors[index] for index in noisy_bins(GRID)]))
        values[f"validation/heldout_loss{suffix}"] = loss
    if config.validation.tests:
        values |= _tests(subject, config, step, folder)
    settings = {"step": step, "holdout": subject.part, "samples": len(subject.rows), "weights": "ema"}
    if config.validation.seed is not None:
        settings["holdout_seed"] = config.validation.seed
    write_atomic(folder / VALIDATED, canonical_json({"schema": 1, **settings, "bins": GRID.bins, "conditions": record}))
    return values


def _tests(subject: Subject, config: TrainConfig, step: int, folder: Path) -> dict[str, float]:
    """Run ``validation.tests`` at tier pulse, write what ``evaluate run`` writes; headline metrics by tag."""
    tier = _tier(config.validation, subject.batch_size)
    subject = replace(subject, losses=perceptual_losses(config), precision=tier.precision)
    state = {"step": step, "config": config.model_dump(mode="json")}
    folder = folder.with_name(folder_name(folder.name, "ema", "dev"))
    weights = config.run_folder / "checkpoints" / f"step-{step:06d}" / "ema.safetensors"
    facts = provenance(subject, tier, state, weights if weights.is_file() else None)
    metrics = _known(folder / "report.json", facts)
    if metrics is None:
        (folder / "report.json").unlink(missing_ok=True)
        # LPIPS and the detector stay on the CPU: training has filled the card
        evidence = evaluate(subject, tier, folder, config.run_folder, step=step, judges="cpu")
        write(folder, tier, evidence, facts, curves_until(config.run_folder, step))
        metrics = [metric.to_dict() for metric in evidence.metrics]
    found = {metric["name"]: metric["value"] for metric in metrics if is_headline(metric["name"])}
    return {f"validation/{name}": value for name, value in found.items() if value is not None}


def _tier(validation: ValidationSection, batch_size: int) -> EvaluateConfig:
    """Return the config of the tests; raises :class:`ConfigError`."""
    own = {"holdout": "dev", "samples": validation.samples, "seed": validation.seed, "batch_size": batch_size}
    if validation.tests:
        own["tests"] = validation.tests
    if taken := [key for key in ("tests", *own) if key in validation.evaluate_overrides]:
        where = "follows the batches of training" if taken[0] == "batch_size" else f"is validation.{taken[0]}"
        raise ConfigError(f"validation.evaluate_overrides: {taken[0]} {where}; remove it there")
    overrides = as_arguments({**validation.evaluate_overrides, **own})
    try:
        tier = load_config(EvaluateConfig, "configs/evaluate/pulse.yaml", overrides)
        if tier.edit.edits and "edit" in validation.tests:
            load_pairs(tier.edit.edits)
        return tier
    except ConfigError as error:
        raise ConfigError(str(error).replace("command line: ", "validation.evaluate_overrides: ")) from None


def _known(file: Path, facts: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return the metrics of a report of the same weights, given the same captions; None where there is none.

    ``evaluate run`` may have written it, with more samples.
    """
    try:
        report = json.loads(file.read_bytes())
        same = report["provenance"]["weights_sha256"] == facts["weights_sha256"] != "unknown"
        of = [(one.get("holdout"), one["evaluation"].get("captions", "long")) for one in (report["provenance"], facts)]
        same = same and of[0] == of[1]
        return report["metrics"] if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _subject(model: nn.Module, config: TrainConfig, dataset: Dataset) -> Subject:
    device = next((str(parameter.device) for parameter in model.parameters()), "cpu")
    rows = select_holdout(dataset, config.validation.samples, config.validation.seed, "dev")
    return Subject(
        model=model,
        flow=config.flow,
        table=config.conditioning.resolve(dataset_modalities(dataset)),
        dataset=dataset,
        rows=rows,
        part="dev",
        batch_size=_batch_size(config, {row["bucket"] for row in rows}),
        device=device,
        tread=config.tread,
    )


def _batch_size(config: TrainConfig, buckets: Iterable[str]) -> int:
    """Return as many images as a micro-batch of the largest bucket has: looking needs no more memory than training."""
    train, patch_size = config.train, config.model.patch_size
    if train.token_budget is None:
        return train.batch_size
    tokens = max(math.prod(side // patch_size for side in bucket_size(bucket)) for bucket in buckets)
    return max(1, min(train.token_budget // tokens, train.batch_size * train.grad_accumulation_steps))
