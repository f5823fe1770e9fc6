"""The measurement of a sweep's trials: the callables that ``train sweep`` is handed."""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Sequence
from pathlib import Path

from evaluate.config import EvaluateConfig
from evaluate.records import Metric
from evaluate.report.summary import is_headline, summary
from evaluate.run import evaluate, perceptual_losses, run
from evaluate.subject import Subject, dataset_modalities, select_holdout
from nanodit.config import dump_config, load_config, parse_yaml
from nanodit.console import say, waiting
from nanodit.errors import ConfigError
from prep.dataset.reader import Dataset
from train.config import TrainConfig
from train.model.modalities import Features
from train.model.network import build_model

FEW = 4  # samples that show which metrics there are


def resolve(file: Path, overrides: Sequence[str]) -> str:
    """Return the whole config of an evaluation, as YAML."""
    return dump_config(load_config(EvaluateConfig, file, overrides))


def measure(run_folder: Path, file: Path) -> str:
    """Do what ``evaluate run`` does with the newest checkpoint of a run; returns the name of the folder."""
    folder, evidence = run(run_folder, load_config(EvaluateConfig, file))
    for line in summary(evidence.metrics, evidence.skipped).splitlines():
        say(line)
    say(f"wrote {folder}: report.json, samples.parquet")
    return folder.name


def check(text: str, train: TrainConfig, metric: str, mode: str) -> None:
    """Refuse a primary metric that the evaluation would not hold, before anything is trained.

    An untrained network of the trial's config is evaluated on a few samples (on all that the config asks for, where a
    metric needs many), with one step of the sampler, on the CPU. Raises :class:`ConfigError` with the nearest name, or
    with the reason for which the metric is left out, or where ``mode`` is the wrong way round.
    """
    config = EvaluateConfig.model_validate(parse_yaml(text, "evaluation"))
    with waiting(f"checking that the evaluation holds {metric}"):
        found, skipped = _names(config, train, min(FEW, config.samples))
        if metric not in found and config.samples > FEW:
            found, skipped = _names(config, train, config.samples)
    if metric in found:
        better = {"higher": "max", "lower": "min"}[found[metric].better]
        if mode != better:
            raise ConfigError(f"primary.mode {mode}: {metric} is better {found[metric].better}; set it to {better}")
        return
    if metric in skipped:
        raise ConfigError(f"primary.metric {metric}: the evaluation leaves it out: {skipped[metric]}")
    headline = [name for name in found if is_headline(name)]
    near = difflib.get_close_matches(metric, list(found), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"there: {', '.join(headline)}"
    raise ConfigError(f"primary.metric {metric}: the evaluation holds no such metric; {hint}")


def _names(config: EvaluateConfig, train: TrainConfig, samples: int) -> tuple[dict[str, Metric], dict[str, str]]:
    """Return the metrics of an untrained network by name, and the reasons for those left out."""
    data = Dataset(train.dataset)
    few = config.model_copy(
        update={"samples": samples, "sampler": config.sampler.model_copy(update={"steps": 1}), "device": "cpu"}
    )
    subject = Subject(
        model=build_model(train.model, Features.from_dataset(data.info), train.tread).eval(),
        flow=train.flow,
        table=train.conditioning.resolve(dataset_modalities(data)),
        dataset=data,
        rows=select_holdout(data, samples, config.seed, config.holdout),
        part=config.holdout,
        batch_size=config.batch_size,
        device="cpu",
        losses=perceptual_losses(train),
        tread=train.tread,
    )
    with tempfile.TemporaryDirectory() as folder:
        evidence = evaluate(subject, few, Path(folder))
    return {one.name: one for one in evidence.metrics}, {one.name: one.reason for one in evidence.skipped}
