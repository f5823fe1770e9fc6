"""From a checkpoint to evidence: which tests run on which samples, from which noise, and the files they write.

``OUTPUT/`` holds ``samples.parquet`` (a row per picture), ``heldout_loss.parquet`` (a row per point of the grid),
``report.json`` (the metrics), ``training.jsonl`` (the run's curves up to this step), ``images/`` and ``config.yaml``.
Nothing in it depends on the clock, the batch size or the order of the work.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from evaluate.arms import Arm, choose_arms, choose_subsets, draw
from evaluate.baselines import TrainingImages, load_training_images, round_trip
from evaluate.config import EvaluateConfig
from evaluate.examine import Examiner, open_detector
from evaluate.metrics import Lpips, lpips_unavailable
from evaluate.records import BASELINE, MODEL, REAL, SAMPLES_SCHEMA, SCHEMA_VERSION, Metric, Skipped
from evaluate.subject import Batch, Subject, dataset_modalities, select_holdout
from evaluate.suite import attributes, heldout_loss, pose, reconstruction
from prep.config import dump_config
from prep.console import Progress
from prep.errors import ConfigError, DataError
from prep.files import canonical_json, sha256_file, write_atomic
from prep.shards import Dataset, parquet_bytes
from train import tracking
from train.checkpoint import load_model, resolve_checkpoint

PACKAGES = ("lpips", "numpy", "onnxruntime", "onnxruntime-gpu", "pillow", "pyarrow", "torch")
CURVES = ("train/", "grad_norm/")  # tags of metrics.jsonl that the same training gives again


@dataclass(frozen=True)
class Evidence:
    """What the tests found: rows of samples.parquet and heldout_loss.parquet, metrics, and what was left out."""

    samples: list[dict[str, Any]]
    heldout: list[dict[str, Any]]
    metrics: list[Metric]
    skipped: list[Skipped]


def run(
    checkpoint: Path, config: EvaluateConfig, dataset: Path | str | None = None, output: Path | None = None
) -> tuple[Path, Evidence]:
    """Evaluate a checkpoint (a step folder, or a run folder for its newest) and write what was found.

    ``dataset`` defaults to the one the run's config names, ``output`` to ``RUN/validation_outputs/step-NNNNNN``.
    Returns the output folder and the evidence. Raises :class:`DataError` when the dataset is not the one trained on,
    or when its holdout leaks into training.
    """
    step_folder = resolve_checkpoint(checkpoint)
    run_folder = step_folder.parent.parent
    model, train_config, state = load_model(step_folder)
    data = Dataset(dataset or train_config.dataset)
    if data.fingerprint != state["dataset"]["fingerprint"]:
        raise DataError(
            f"{data.root}: its fingerprint is {data.fingerprint}, the checkpoint {step_folder.name} was trained on "
            f"{state['dataset']['fingerprint']}. Evaluate on the dataset of the run, or train again on this one"
        )
    subject = Subject(
        model=model.to(pick_device(config.device)),
        flow=train_config.flow,
        table=train_config.conditioning.resolve(dataset_modalities(data)),
        dataset=data,
        rows=select_holdout(data, config.samples),
        batch_size=config.batch_size,
        device=pick_device(config.device),
    )
    folder = output or run_folder / "validation_outputs" / step_folder.name
    (folder / "report.json").unlink(missing_ok=True)  # written last: until then the folder is not complete
    evidence = evaluate(subject, config, folder)
    curves = [
        record for record in tracking.read_metrics(run_folder / "metrics.jsonl") if record["step"] <= state["step"]
    ]
    write(folder, config, evidence, provenance(subject, config, state, step_folder), curves)
    return folder, evidence


def evaluate(subject: Subject, config: EvaluateConfig, folder: Path) -> Evidence:
    """Run every test on ``subject``; pictures of the grid go to ``folder/images``, everything else is returned."""
    arms, skipped = choose_arms(config, subject)
    subsets, untrained = choose_subsets(config.heldout_loss.conditions, subject)
    no_lpips = lpips_unavailable()
    lpips = Lpips() if no_lpips is None else None
    detector, no_detector = open_detector(config, subject.dataset)
    examiner = Examiner(subject.dataset, lpips, detector)
    skipped += untrained + _skipped_metrics(no_lpips, no_detector, examiner.figures)

    training = load_training_images(subject.dataset, {row["bucket"] for row in subject.rows}, config.baseline_images)
    with Progress("held-out loss", len(subject.rows)) as progress:
        heldout = heldout_loss.measure(subject, subsets, training, config.heldout_loss, progress.advance)
    samples = draw_and_examine(subject, config, arms, training, examiner, folder)

    settings = _settings(subject, config, arms, lpips)
    measures = [measure for measure in reconstruction.MEASURES if measure != "lpips" or lpips is not None]
    metrics = heldout_loss.summarise(heldout, config.heldout_loss, _common(subject))
    metrics += reconstruction.summarise(samples, [arm.name for arm in arms], settings, measures)
    if detector is not None and examiner.figures:
        metrics += attributes.summarise(samples, [arm.name for arm in arms if "text" in arm.subset], settings)
    if detector is not None:
        metrics += pose.summarise(samples, [arm.name for arm in arms if "pose" in arm.subset], settings, examiner.box)
    metrics, without = with_bars(metrics, config.needed)
    return Evidence(samples, heldout, metrics, skipped + without)


def draw_and_examine(
    subject: Subject,
    config: EvaluateConfig,
    arms: Sequence[Arm],
    training: TrainingImages,
    examiner: Examiner,
    folder: Path,
) -> list[dict[str, Any]]:
    """Draw every sample with every arm and seed and score it beside the real image and the baselines.

    Returns the rows of samples.parquet, sorted; keeps the pictures of the first ``grid_images`` samples.
    """
    kept = {row["key"] for row in subject.rows[: config.grid_images]}
    samples: list[dict[str, Any]] = []
    with Progress("pictures", len(subject.rows) * (1 + len(arms) * config.seeds), "pictures") as progress:
        for batch in subject.batches():
            rows = _reference_rows(batch, subject, training, examiner)
            _keep_images(rows[: len(batch.rows)], batch.pixels, kept, folder)  # the real ones come first
            samples += rows
            progress.advance(len(batch.rows))
            for arm, seed in itertools.product(arms, range(config.seeds)):
                pictures, reasons = draw(subject, batch, arm, seed, config.sampler)
                labels = {"kind": MODEL, "condition": arm.name, "seed": seed, "guidance": arm.guidance}
                rows = examiner.rows(batch, pictures, degenerate=reasons, **labels)
                _keep_images(rows, pictures, kept, folder)
                samples += rows
                progress.advance(len(batch.rows))
    order = {REAL: 0, BASELINE: 1, MODEL: 2}
    return sorted(samples, key=lambda row: (row["key"], order[row["kind"]], row["condition"], row["seed"] or 0))


def with_bars(metrics: Sequence[Metric], needed: Mapping[str, float]) -> tuple[list[Metric], list[Skipped]]:
    """Attach the configured bars to their metrics; a bar whose metric was not computed is listed as skipped."""
    names = {metric.name for metric in metrics}
    missing = [Skipped(name, "a bar is set for it, but it was not computed") for name in needed if name not in names]
    return [replace(metric, needed=needed.get(metric.name)) for metric in metrics], missing


def pick_device(name: str) -> str:
    """``auto`` is the GPU where torch sees one; raises :class:`ConfigError` for a GPU that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda: torch sees no GPU here; install a torch build for it, or set it to cpu")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def provenance(subject: Subject, config: EvaluateConfig, state: Mapping[str, Any], step_folder: Path) -> dict[str, Any]:
    """What the numbers depend on: weights, data, configs, code and packages; unknown where it cannot be told."""
    info = subject.dataset.info
    return {
        "checkpoint": step_folder.name,
        "step": state["step"],
        "weights": "ema",
        "weights_sha256": sha256_file(step_folder / "ema.safetensors"),
        "parameters": sum(parameter.numel() for parameter in subject.model.parameters()),
        "dataset": {name: info[name] for name in ("fingerprint", "encoders", "base", "counts")},
        "training": state["config"],
        "evaluation": config.model_dump(mode="json"),
        "git": tracking.git_state(Path(tracking.__file__).parent),
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {subject.device}",
    }


def write(
    folder: Path,
    config: EvaluateConfig,
    evidence: Evidence,
    provenance: Mapping[str, Any],
    curves: Sequence[Mapping[str, Any]],
) -> None:
    """Write the output folder; ``report.json`` comes last, so that a folder which has it is complete."""
    write_atomic(folder / "config.yaml", dump_config(config))
    lines = [
        json.dumps({tag: value for tag, value in record.items() if tag == "step" or tag.startswith(CURVES)}) + "\n"
        for record in curves
    ]
    write_atomic(folder / "training.jsonl", "".join(lines))
    write_atomic(folder / "heldout_loss.parquet", parquet_bytes(pa.Table.from_pylist(evidence.heldout)))
    write_atomic(
        folder / "samples.parquet", parquet_bytes(pa.Table.from_pylist(evidence.samples, schema=SAMPLES_SCHEMA))
    )
    report = {
        "schema": SCHEMA_VERSION,
        "metrics": [metric.to_dict() for metric in evidence.metrics],
        "skipped": [vars(skipped) for skipped in evidence.skipped],
        "provenance": dict(provenance),
    }
    write_atomic(folder / "report.json", canonical_json(report))


def _reference_rows(
    batch: Batch, subject: Subject, training: TrainingImages, examiner: Examiner
) -> list[dict[str, Any]]:
    """The rows that need no model: the real images under the judges, and the baselines in their place."""
    rows = examiner.rows(batch, batch.pixels, kind=REAL, condition="real")
    mean_image = np.rint(training.mean_image(batch.bucket)).astype(np.uint8)
    stand_ins = {"mean_image": np.stack([mean_image] * len(batch.rows)), "round_trip": round_trip(batch.pixels)}
    for name, pictures in stand_ins.items():
        rows += examiner.rows(batch, pictures, kind=BASELINE, condition=name, joints=[])
    partners = [subject.partners.get(key) for key in batch.keys]
    paired = [index for index, partner in enumerate(partners) if partner is not None]
    if paired:
        others = [partners[index] for index in paired]
        pictures = np.stack([subject.dataset.pixels(row) for row in others])
        joints = examiner.stored_joints(others, batch.width, batch.height) or None  # without poses: detected
        rows += examiner.rows(batch.select(paired), pictures, kind=BASELINE, condition="random_pair", joints=joints)
    return rows


def _keep_images(rows: Sequence[dict[str, Any]], pictures: np.ndarray, kept: set[str], folder: Path) -> None:
    """Save the pictures of the grid as PNG and note their paths in the rows."""
    for row, picture in zip(rows, pictures):
        if row["key"] in kept:
            seed = "" if row["seed"] is None else f"-{row['seed']}"
            row["image"] = f"images/{row['key']}-{row['condition']}{seed}.png"
            (folder / "images").mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(folder / row["image"])


def _skipped_metrics(no_lpips: str | None, no_detector: str | None, figures: bool) -> list[Skipped]:
    """What cannot be computed here, and why."""
    skipped = [Skipped("reconstruction/lpips", no_lpips)] if no_lpips else []
    if no_detector:
        skipped += [Skipped(name, no_detector) for name in ("attribute_accuracy", "pose_pck")]
    elif not figures:
        skipped.append(
            Skipped("attribute_accuracy", "the dataset has no truth.parquet; only built-in figures have one")
        )
    return skipped


def _common(subject: Subject) -> dict[str, Any]:
    return {"weights": "ema", "base": subject.dataset.info["base"]}


def _settings(
    subject: Subject, config: EvaluateConfig, arms: Sequence[Arm], lpips: Lpips | None
) -> dict[str, dict[str, Any]]:
    """What the pictures of each arm were drawn and judged with."""
    drawn = {"sampler": config.sampler.method, "steps": config.sampler.steps, "seeds": config.seeds}
    judged = {}
    if lpips is not None:
        judged["lpips"] = "AlexNet v0.1" + ("" if lpips.published else ", not the published weights: no meaning")
    return {
        arm.name: {**_common(subject), **drawn, **judged, "conditions": arm.name, "guidance": arm.guidance}
        for arm in arms
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
