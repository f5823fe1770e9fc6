"""From a checkpoint to evidence: which tests run on which samples, from which noise, and the files they write.

``OUTPUT/`` holds ``samples.parquet`` (a row per picture), ``heldout_loss.parquet`` (a row per point of the grid),
``report.json`` (the metrics), ``training.jsonl`` (the run's curves up to this step), ``images/`` and ``config.yaml``.
Nothing in it depends on the clock, the batch size or the order of the work.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from evaluate.config import EvaluateConfig
from evaluate.drawing.baselines import load_training_images
from evaluate.drawing.context import DrawingContext, Rows
from evaluate.drawing.draw import draw_and_examine, keep_nearest, show
from evaluate.drawing.finished import FinishedBatches
from evaluate.drawing.pictures import once
from evaluate.drawing.texts import Texts
from evaluate.metrics.clip import open_probe
from evaluate.metrics.examiner import Examiner, detector_label, open_detector
from evaluate.metrics.likeness import open_judge
from evaluate.metrics.pixels import Lpips, lpips_unavailable
from evaluate.records import SCHEMA_VERSION, Metric, Skipped, folder_name, to_table
from evaluate.subject import Subject, dataset_modalities, select_holdout
from evaluate.suite import TESTS
from nanodit.config import dump_config
from nanodit.errors import DataError
from nanodit.files import canonical_json, check_writable, sha256_file, write_atomic
from prep.dataset.layout import parquet_bytes
from prep.dataset.reader import open_version
from prep.dataset.readers import reading
from prep.images.twins import altered_twins
from train.checkpoint.checkpoint import resolve_checkpoint
from train.checkpoint.open import load_model, weights_file
from train.checkpoint.provenance import git_state
from train.config import TrainConfig
from train.hardware import pick_device
from train.loop.tracking import read_metrics

PACKAGES = ("lpips", "numpy", "onnxruntime", "onnxruntime-gpu", "pillow", "pyarrow", "torch")
CURVES = ("train/", "grad_norm/")  # tags of metrics.jsonl that the same training gives again


@dataclass(frozen=True)
class Evidence:
    """The findings of the tests: rows of samples.parquet and heldout_loss.parquet, metrics, and what was left out."""

    samples: list[dict[str, Any]]
    heldout: list[dict[str, Any]]
    metrics: list[Metric]
    skipped: list[Skipped]
    extras: dict[str, Any] = field(default_factory=dict)
    judges: dict[str, str] = field(default_factory=dict)  # where joints, LPIPS and features were computed


def run(
    checkpoint: Path,
    config: EvaluateConfig,
    dataset: Path | str | None = None,
    output: Path | None = None,
    weights: str = "ema",
) -> tuple[Path, Evidence]:
    """Evaluate a checkpoint (a step folder, or a run folder for its newest) and write what was found.

    ``dataset`` defaults to the one the run's config names, ``output`` to ``RUN/validation_outputs/step-NNNNNN``, with
    the ``weights`` behind it where they are not ``ema`` (:func:`train.checkpoint.open.load_model` has the others), and
    ``dev`` where that part of the holdout is read. Returns the output folder and the evidence. Raises
    :class:`DataError` when the dataset is not the one trained on, or when its holdout leaks into training.
    """
    step_folder = resolve_checkpoint(checkpoint)
    run_folder = step_folder.parent.parent
    source = weights_file(step_folder, weights)  # or says that there are no such weights
    folder = output or run_folder / "validation_outputs" / folder_name(step_folder.name, weights, config.holdout)
    check_writable(folder, "--output" if output else "the evaluation's folder", folder=True)
    subject, state = open_subject(step_folder, config, dataset, weights)
    if config.captions == "short":
        subject.with_short_captions()  # or says that there are none, before anything is deleted
    (folder / "report.json").unlink(missing_ok=True)  # written last: until then the folder is not complete
    facts = provenance(subject, config, state, source)
    if not (folder / "parts").is_dir():  # nothing to go on from
        shutil.rmtree(folder / "images", ignore_errors=True)
    with reading(subject.dataset, folder):
        evidence = evaluate(subject, config, folder, run_folder, facts, state["step"])
    write(folder, config, evidence, facts, curves_until(run_folder, state["step"]))
    shutil.rmtree(folder / "parts", ignore_errors=True)  # what they held is in the files now
    return folder, evidence


def open_subject(
    step_folder: Path, config: EvaluateConfig, dataset: Path | str | None = None, weights: str = "ema"
) -> tuple[Subject, dict[str, Any]]:
    """Load a checkpoint with the holdout samples that ``config`` chooses; returns the subject and its state.json.

    ``dataset`` defaults to the one the run's config names. Raises :class:`DataError` when it is not the one trained on,
    or when its holdout leaks into training.
    """
    model, train_config, state = load_model(step_folder, weights)
    data = open_version(dataset or train_config.dataset, state["dataset"]["fingerprint"])
    if data.fingerprint != state["dataset"]["fingerprint"]:
        raise DataError(
            f"{data.root}: its fingerprint is {data.fingerprint}, but the checkpoint {step_folder.name} was trained on "
            f"{state['dataset']['fingerprint']}, which is not kept there. Evaluate on the dataset of the run, or train "
            "again on this one"
        )
    subject = Subject(
        model=model.to(str(pick_device(config.device))),
        flow=train_config.flow,
        table=train_config.conditioning.resolve(dataset_modalities(data)),
        dataset=data,
        rows=select_holdout(data, config.samples, config.seed, config.holdout),
        part=config.holdout,
        batch_size=config.batch_size,
        device=str(pick_device(config.device)),
        losses=perceptual_losses(train_config),
        tread=train_config.tread,
        precision=config.precision,
        weights=weights,
    )
    return subject, state


def evaluate(
    subject: Subject,
    config: EvaluateConfig,
    folder: Path,
    run_folder: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    step: int | None = None,
    judges: str | None = None,
) -> Evidence:
    """Run the tests on ``subject``; pictures for the report go to ``folder/images``, everything else is returned.

    ``identity`` is all that the numbers depend on: with it, finished batches are kept in ``folder/parts``, and those of
    an evaluation with the same identity are not computed again. ``judges`` is the device of LPIPS and of the detector
    of joints; None: the model's.
    """
    if config.captions == "short":
        subject = subject.with_short_captions()
    context = build_context(subject, config, run_folder, step, judges)
    devices = context.examiner.devices
    judged_by = {"judges": devices, "contents": context.examiner.contents}
    parts = FinishedBatches(folder / "parts" if identity else None, {**(identity or {}), **judged_by})
    tests = {test: config.section(name) for name, test in TESTS.items() if name in config.tests}
    pictures, skipped = [], []
    for test, section in tests.items():
        wanted, left_out = test.pictures(context, section)
        pictures += wanted
        skipped += left_out
    pictures = once(pictures)
    for test, section in tests.items():
        if test.measure:
            test.measure(context, section, parts)
    rows = draw_and_examine(context, pictures, parts, folder)
    metrics: list[Metric] = []
    for test, section in tests.items():
        found, left_out = test.summarise(Rows(rows), context, section)
        metrics += [replace(one, objective=context.objective(one, test.minimised)) for one in found]
        skipped += left_out
    keep_nearest(context, rows)
    show(context, pictures, rows, folder)
    metrics, without = with_bars(metrics, config.needed)
    return Evidence(rows, context.heldout, metrics, list(dict.fromkeys(skipped + without)), context.extras, devices)


def perceptual_losses(config: TrainConfig) -> frozenset[str]:
    """Return the networks of :attr:`Subject.losses`."""
    used = {"lpips": config.perceptual.every > 0, "dinov2": config.perceptual.dino_weight > 0}
    return frozenset(name for name, there in used.items() if there)


def build_context(
    subject: Subject,
    config: EvaluateConfig,
    run_folder: Path | None = None,
    step: int | None = None,
    judges: str | None = None,
) -> DrawingContext:
    """Read the training images, and open the judges where a test looks at pictures: they take seconds to import."""
    device = judges or subject.device
    looks = any(TESTS[name].looks for name in config.tests)
    lpips = Lpips(device=device) if looks and lpips_unavailable() is None else None
    nobody = None, "no test looks at pictures"
    detector, no_detector = open_detector(config.pose_models, subject.dataset, device) if looks else nobody
    judge, no_judge = open_judge(config.judge, subject.dataset, subject.device) if looks else nobody
    probe, no_probe = open_probe(config.probe, subject.device) if looks else nobody
    buckets = {row["bucket"] for row in subject.rows}
    return DrawingContext(
        subject=subject,
        config=config,
        training=load_training_images(subject.dataset, buckets, config.baseline_images),
        judge=judge,
        no_judge=no_judge,
        examiner=Examiner(subject.dataset, lpips, detector, judge, probe),
        texts=Texts(subject.dataset, subject.device),
        run_folder=run_folder,
        step=step,
        probe=probe,
        no_probe=no_probe,
        detector=detector_label(config.pose_models),
        no_detector=no_detector,
        looks=looks,
    )


def with_bars(metrics: Sequence[Metric], needed: Mapping[str, float]) -> tuple[list[Metric], list[Skipped]]:
    """Attach the configured bars to their metrics; a bar whose metric was not computed is listed as skipped.

    A bar of a family that isolates a condition, such as ``attribute_gain``, is for whichever conditions do so. Of tests
    without any metric, which did not run or say themselves why they were skipped, bars say nothing.
    """
    isolated = {test.isolated for test in TESTS.values() if test.isolated}
    bars = {
        metric.name: bar
        for metric in metrics
        for name, bar in needed.items()
        if metric.name == name or (name in isolated and metric.name.startswith(f"{name}/"))
    }
    silent = [test for test in TESTS.values() if not any(test.owns(metric.name) for metric in metrics)]
    pair = "no two conditions were drawn that differ in what it isolates; the test reconstruction draws most"
    missing = [
        Skipped(name, f"a bar is set for it, but {pair if name in isolated else 'it was not computed'}")
        for name in needed
        if not any(one == name or (name in isolated and one.startswith(f"{name}/")) for one in bars)
        if not any(test.owns(name) for test in silent)
    ]
    return [replace(metric, needed=bars.get(metric.name)) for metric in metrics], missing


def curves_until(run_folder: Path, step: int) -> list[dict[str, Any]]:
    """Return the records of a run's metrics.jsonl up to a step."""
    return [record for record in read_metrics(run_folder / "metrics.jsonl") if record["step"] <= step]


def provenance(
    subject: Subject, config: EvaluateConfig, state: Mapping[str, Any], weights: Path | None
) -> dict[str, Any]:
    """Return what the numbers depend on: weights, data, configs, code and packages; unknown where it cannot be told."""
    info = subject.dataset.info
    return {
        "checkpoint": f"step-{state['step']:06d}",
        "step": state["step"],
        "weights": subject.weights,
        "weights_sha256": sha256_file(weights) if weights else "unknown",
        "parameters": sum(parameter.numel() for parameter in subject.model.parameters()),
        "dataset": {name: info.get(name, "unknown") for name in ("fingerprint", "encoders", "base", "counts")},
        "holdout": subject.part,
        "holdout_images": len(subject.dataset.rows(subject.part)),
        "left_out": left_out(subject),
        "training": state["config"],
        "evaluation": config.model_dump(mode="json"),
        "git": git_state(Path(__file__).parent),
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {subject.device}",
    }


def left_out(subject: Subject) -> dict[str, Any]:
    """Return the keys of the holdout, as far as it is read, that training has in an altered form; or "unknown"."""
    twins = altered_twins(subject.dataset)
    if twins is None:
        return {"altered_twins": "unknown"}
    return {"altered_twins": sorted(row["key"] for row in subject.dataset.rows(subject.part) if row["key"] in twins)}


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
    write_atomic(folder / "extras.json", canonical_json(evidence.extras))
    write_atomic(folder / "heldout_loss.parquet", parquet_bytes(pa.Table.from_pylist(evidence.heldout)))
    write_atomic(folder / "samples.parquet", parquet_bytes(to_table(evidence.samples)))
    report = {
        "schema": SCHEMA_VERSION,
        "metrics": [metric.to_dict() for metric in evidence.metrics],
        "skipped": [vars(skipped) for skipped in evidence.skipped],
        "provenance": {**provenance, "judges": evidence.judges},
    }
    write_atomic(folder / "report.json", canonical_json(report))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
