"""The model card of an exported model: a Hugging Face README whose figures come from files, never from prose."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from huggingface_hub import ModelCardData

from nanodit.config import dump_config
from nanodit.errors import ConfigError, DataError
from nanodit.files import sha256_bytes
from train.config import TrainConfig
from train.model.modalities import MODALITIES
from train.model.network import NanoDiT

REPORT_SCHEMA = 1
_FIELDS = {"name", "value", "low", "high", "n", "baselines", "settings"}
# tests that hold pictures against training images
COMPARED = ("heldout_gap", "memorisation", "distribution", "unpaired")


@dataclass(frozen=True)
class EvaluationReport:
    """The content of a report.json that ``evaluate run`` wrote, and the SHA-256 of the file."""

    path: Path
    sha256: str
    metrics: Sequence[Mapping[str, Any]]
    skipped: Sequence[Mapping[str, str]]
    provenance: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a report.json.

        Raises :class:`ConfigError` for a file that cannot be read, :class:`DataError` for one that is no report.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"--report {path}: {error.strerror}") from None
        try:
            content = json.loads(data)
            report = cls(path, sha256_bytes(data), content["metrics"], content["skipped"], content["provenance"])
            known = content["schema"] == REPORT_SCHEMA and all(metric.keys() >= _FIELDS for metric in report.metrics)
            known &= all(one.keys() >= {"name", "reason"} for one in report.skipped)
            known &= isinstance(report.provenance["dataset"], Mapping)
        except (ValueError, TypeError, KeyError, AttributeError):
            known = False
        if not known:
            raise DataError(f"--report {path}: not a report.json of schema {REPORT_SCHEMA}; run nanodit evaluate run")
        return report

    def check(self, source: Mapping[str, Any], fingerprint: str) -> None:
        """Refuse a report of other weights than those of ``source``, or on another dataset: :class:`DataError`."""
        theirs = {name: self.provenance.get(name) for name in ("checkpoint", "weights", "weights_sha256")}
        if theirs["weights"] != source["weights"] or theirs["weights_sha256"] != source["weights_sha256"]:
            of = lambda one: f"{one['checkpoint']} ({one['weights']}, SHA-256 {str(one['weights_sha256'])[:16]})"  # noqa: E731
            raise DataError(
                f"--report {self.path}: is about {of(theirs)}, but this export holds {of(source)}; give the report "
                "of these weights, or none"
            )
        measured_on = self.provenance.get("dataset", {}).get("fingerprint")
        if measured_on != fingerprint:
            raise DataError(
                f"--report {self.path}: was measured on dataset {measured_on}, but the model was trained on "
                f"{fingerprint}"
            )


def model_card(
    name: str,
    model: NanoDiT,
    described: Mapping[str, Any],
    config: TrainConfig,
    report: EvaluationReport | None = None,
    rounding: str | None = None,
) -> str:
    """Return the card of a model as Markdown with its YAML front matter.

    ``described`` is the export's config.json, ``config`` the training's; ``rounding`` says what bfloat16 costs, where
    the weights were rounded. Without a ``report`` the card says that nothing was measured.
    """
    data, text = described["dataset"], "text" in model.features.modalities
    metadata = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image" if text else "unconditional-image-generation",
        tags=[
            "nanodit", "pixel-space", "rectified-flow", f"dataset-{data['fingerprint'][:16]}",
            *(["demo-encoders"] if data["encoders"] == "demo" else []),
        ],
    )  # fmt: skip
    sections = [
        f"# {name}",
        _summary(model, described, rounding),
        _usage(name, described, text),
        _conditions(described),
        _data(data, report),
        _training(model, config, described),
        _evaluation(report, rounding),
        _limits(described, report),
    ]
    return f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def _summary(model: NanoDiT, described: Mapping[str, Any], rounding: str | None) -> str:
    geometry, source = described["model"], described["source"]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"A NanoDiT, a diffusion transformer on pixels, of {parameters / 1e6:.1f} million parameters (hidden size "
        f"{geometry['hidden_size']}, {geometry['depth']} blocks, {geometry['num_heads']} heads, patches of "
        f"{geometry['patch_size']} pixels), trained with rectified flow"
        f"{'' if source['parent'] else ' from scratch'}. These are the weights `{source['weights']}` after "
        f"{described['step']} steps"
        f"{', most of the matrices rounded to bfloat16' if rounding else ''}."
    )


def _usage(name: str, described: Mapping[str, Any], text: bool) -> str:
    asked = 'prompt="..."' if text else "reference=image"
    demo = described["dataset"]["encoders"] == "demo"
    encoder = "" if demo or not text else f" The text encoder is {_encoder(described['dataset'], 't5')}."
    quoted = json.dumps(name)
    command = f"nanodit train sample --checkpoint {shlex.quote(name)} --prompt '...' --seed 0 --output picture.png"
    lines = [
        "## Use",
        "The code is the package nanodit, which is not on PyPI: `pip install -e '.[export]'` in a clone of its source, "
        "or `pip install 'nanodit[export] @ git+URL'` with the URL of its repository.",
        "```python\n"
        "from diffusers import DiffusionPipeline\n\n"
        f"pipeline = DiffusionPipeline.from_pretrained({quoted}, custom_pipeline={quoted}, trust_remote_code=True)\n"
        f"image = pipeline({asked}, seed=0).images[0]\n"
        "```",
        f"`trust_remote_code` is for two files of a few lines that import nanodit.{encoder}",
    ]
    if text:
        lines += [f"The same picture without diffusers:\n\n```sh\n{command}\n```"]
    lines += [
        f'Without either: `model, config, state = train.checkpoint.exported.load_exported(Path("{name}"))`, '
        "`train.method.sampling.sample(model, conditions, noise, ...)`."
    ]
    return "\n\n".join(lines)


def _conditions(described: Mapping[str, Any]) -> str:
    rows = [(name.replace("+", " + "), f"{share:.2f}") for name, share in described["conditioning"].items()]
    return "\n\n".join(
        [
            "## Conditions",
            "What the network was told about an image in training, and how often. Any other combination is refused, "
            "and guidance also needs the combinations that it leads away from, usually `nothing`.",
            table(("given", "share"), rows),
        ]
    )


def _data(data: Mapping[str, Any], report: EvaluationReport | None) -> str:
    counts = data.get("counts") or (report and report.provenance["dataset"].get("counts"))
    samples = "not recorded"
    if isinstance(counts, Mapping):  # a report may say "unknown"
        samples = f"{counts['train']} for training, {counts['holdout']} held out"
    encoded = dict.fromkeys(one.layer for one in MODALITIES.values() if one.layer in data["layers"])
    rows = [
        ("fingerprint", f"`{data['fingerprint']}`"),
        ("samples", samples),
        ("size", f"{data['base']}x{data['base']} pixels, and other shapes of about that area"),
        *((_ENCODERS.get(layer, f"{layer} encoder"), _encoder(data, layer)) for layer in encoded),
    ]
    lines = ["## Data", table(("", ""), rows)]
    if data["encoders"] == "demo":
        lines.append(
            "**Demo encoders**: text, image and pose features come from small local stand-ins, built for tests and the "
            "quickstart. The model shows that the machinery works, and no more."
        )
    return "\n\n".join(lines)


_ENCODERS = {"t5": "text encoder", "dino": "image encoder", "pose": "pose estimator"}


def _encoder(data: Mapping[str, Any], layer: str) -> str:
    """Name an encoder and its build: a hub model with its commit, or the hash of a folder's content."""
    recorded = data["layers"][layer]
    encoder = recorded.get("encoder", {})
    builds = [str(encoder[name])[:16] for name in ("revision", "content", "detector", "pose") if name in encoder]
    name = encoder.get("model") or recorded.get("model", "unnamed")
    return f"{name} (`{'`, `'.join(builds)}`)" if builds else str(name)


def _training(model: NanoDiT, config: TrainConfig, described: Mapping[str, Any]) -> str:
    train, flow = config.train, config.flow
    extras = [*(section.title for section in config.losses if section.on), *(["TREAD routing"] if model.route else [])]
    parent = described["source"]["parent"]
    rows = [
        *([("begun with the weights", f"`{parent['sha256']}`, step {parent['step']}")] if parent else []),
        ("steps", f"{described['step']} of {train.steps}"),
        ("images per step", str(train.batch_size * train.grad_accumulation_steps)),
        ("optimiser", f"{config.optimizer.type}, learning rate {train.lr:g} to {train.lr_min:g}, {train.schedule}"),
        ("prediction", f"{flow.prediction}, times logit-normal({flow.logit_mean:g}, {flow.logit_std:g})"),
        *([("short captions", f"{short:.0%} of the captions")] if (short := config.data.short_captions) else []),
        ("beside the velocity loss", ", ".join(extras) or "nothing"),
        ("nanodit", described["source"]["nanodit"]),
        ("SHA-256 of the checkpoint's weights", f"`{described['source']['weights_sha256']}`"),
    ]
    whole = dump_config(config.model_copy(update={"dataset": "DATASET", "output": "RUN"}))  # not whose machine it was
    details = f"<details><summary>The whole config</summary>\n\n```yaml\n{whole}```\n\n</details>"
    return "\n\n".join(["## Training", table(("", ""), rows), details])


def _evaluation(report: EvaluationReport | None, rounding: str | None) -> str:
    lines = ["## Evaluation"]
    if report is None:
        lines.append("Not evaluated.")
    else:
        rows = [_metric(metric) for metric in report.metrics if _is_headline(metric)]
        tests = {metric["name"].split("/")[0] for metric in report.metrics}
        compared = " and ".join(f"`{name}`" for name in COMPARED if name in tests)
        against = f"; {compared} compare with training images" if compared else ""
        chosen = " They are the part `dev`, by which validation and sweeps choose: it flatters what was chosen."
        chosen = chosen if report.provenance.get("holdout") == "dev" else ""
        lines += [
            f"On samples that training never saw{against}.{chosen} 95 % intervals over pictures unless stated "
            "otherwise; one training seed, so they do not show how much another seed would differ.",
            table(("metric", "value", "95 % interval", "pictures", "baselines", "drawn with"), rows),
            *[f"Not measured: {one['name']} ({one['reason']})." for one in report.skipped],
            f"From `report.json` of `nanodit evaluate run`, SHA-256 `{report.sha256}`. It names these weights by their "
            f"SHA-256 and has {len(report.metrics)} metrics.",
        ]
    if rounding:
        measured = " The figures above were measured with the float32 weights." if report else ""
        lines.append(f"Rounded to bfloat16 and computed in float32, {rounding}.{measured}")
    return "\n\n".join(lines)


def _is_headline(metric: Mapping[str, Any]) -> bool:
    """Whether the card shows a metric: one per test, those with a bar, and all likely copies; not the breakdowns."""
    name = metric["name"]
    headline = name.count("/") <= 1 and not name.startswith("heldout_mse")
    return headline or metric.get("needed") is not None or name.startswith("memorisation/copies")


def _metric(metric: Mapping[str, Any]) -> tuple[str, ...]:
    number = lambda value: "null" if value is None else f"{value:.3g}"  # noqa: E731
    value = f"{number(metric['value'])} {metric.get('unit', '')}".strip()
    if metric["value"] is None:
        value = f"none: {metric.get('reason')}"
    interval = "none" if metric["low"] is None else f"[{number(metric['low'])}, {number(metric['high'])}]"
    baselines = ", ".join(f"{name} {number(value)}" for name, value in metric["baselines"].items())
    settings = metric["settings"]
    if metric["low"] is not None and "interval_by" in settings:
        interval += f", {settings['interval_by']}"
    drawn = [f"{settings[key]} {label}".strip() for key, label in _DRAWN.items() if key in settings]
    if (guidance := settings.get("guidance", 1)) != 1:  # text where it is not one scale for all conditions
        drawn.append(f"guidance {guidance if isinstance(guidance, str) else f'{guidance:g}'}")
    return metric["name"], value, interval, str(metric["n"]), baselines, ", ".join(drawn)


_DRAWN = {"sampler": "", "steps": "steps", "grid": "grid", "seeds": "seed(s)", "given_captions": "captions"}


def _limits(described: Mapping[str, Any], report: EvaluationReport | None) -> str:
    base, data = described["dataset"]["base"], described["dataset"]
    searched = report is not None and any(
        metric["name"].startswith("memorisation/copies") and metric["value"] is not None for metric in report.metrics
    )
    lines = [
        "## Limits",
        f"- It draws what its training images show, and only that: one kind of image, at about {base}x{base} pixels.",
        "- It has whatever bias its training images and captions have. Nothing filters prompts or pictures.",
        "- Whether it repeats training images is only indicated: `memorisation` counts pictures that are near one "
        "of them, which proves nothing; look at pictures before you publish them."
        if searched
        else "- Nothing here tests whether it repeats training images; look at pictures before you publish them.",
        "- No licence is stated: whoever publishes this model must choose one that suits its training images, "
        "and write it as `license:` into the block at the top of this file.",
    ]
    if data["encoders"] == "demo":
        lines.insert(2, "- It was trained with demo encoders: for pictures like its training images alone.")
    return "\n".join([lines[0], "", *lines[1:]])


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; a cell's line breaks and bars are made harmless."""
    cells = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in row)} |" for row in cells)


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")
