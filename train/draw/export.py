"""``train export``: a trained model as a folder that others can load.

``FOLDER/`` holds ``README.md`` (the model card), ``model_index.json`` and ``pipeline.py`` (which diffusers reads), and
``transformer/``: ``config.json`` (what builds the network and says what it may be asked for),
``diffusion_pytorch_model.safetensors`` and ``nanodit.py``. The names are those of diffusers' own folders, so that its
tools and the Hugging Face hub know them. Both Python files only import :mod:`train.pipeline`: an exported model is
drawn from by the code that trained it, and there is one sampler.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanodit.console import Progress, say
from nanodit.errors import ConfigError, DataError
from nanodit.files import canonical_json, check_writable, sha256_file, sync_folder, temporary_beside
from nanodit.rng import noise
from prep.dataset.reader import open_version
from train.checkpoint.checkpoint import load_weights, resolve_checkpoint
from train.checkpoint.exported import COMPONENT, CONFIG, INDEX, LOADER, PREFIX, SCHEMA, SECTIONS, WEIGHTS
from train.checkpoint.open import load_model, weights_file
from train.checkpoint.posthoc import parse_weights
from train.checkpoint.tensorfile import Tensors, sync_file, write_tensors
from train.config import TrainConfig
from train.data.samples import bucket_size, load_conditions
from train.draw.card import EvaluationReport, model_card
from train.method.sampling import Sampling, sample, to_uint8
from train.model.conditions import Conditions, subset_name
from train.model.modalities import MODALITIES
from train.model.network import NanoDiT

PIPELINE, CARD = "pipeline.py", "README.md"
ROUNDED = ("blocks.", "context.")  # nearly all of the bytes
PROBE = Sampling(method="dpm++2m", steps=10)  # how the pictures are drawn that rounding is judged by
PROBES = 4  # at most

# An import by name, because diffusers tells whoever lacks a package that it sees imported to `pip install` that name,
# and `train` on PyPI is somebody else's.
_LOADER = '''\
"""Loads {name} of this model: its code is the package nanodit."""

import importlib

try:
    {name} = importlib.import_module("train.pipeline").{name}
except ModuleNotFoundError as error:
    raise ImportError(
        f"this model needs nanodit and diffusers ({{error}}): run pip install -e '.[export]' in a clone of nanodit's "
        "source, or pip install 'nanodit[export] @ git+URL' with the URL of its repository; it is not on PyPI"
    ) from error
'''


def export(
    checkpoint: Path,
    output: Path,
    *,
    weights: str = "ema",
    half: bool = False,
    report: Path | None = None,
    device: torch.device | str = "cpu",
) -> Path:
    """Write a checkpoint (a step folder, or a run folder for its newest) as the new folder ``output``.

    ``weights`` is ``ema``, ``model`` or ``posthoc:SIGMA_REL``; ``half`` rounds them to bfloat16 and says how many
    pixels that moves, which is drawn on ``device``; ``report`` is the report.json of an evaluation of these weights,
    whose figures the model card then has. The folder appears whole or not at all. Raises :class:`ConfigError` for a
    folder that is not empty, :class:`DataError` for a damaged checkpoint or the report of another one, and
    :class:`ResourceError` where the disk takes no more.
    """
    check_output(output)
    parse_weights(weights)
    step_folder = resolve_checkpoint(checkpoint)
    evaluated = None if report is None else EvaluationReport.read(report)
    model, config, state = load_model(step_folder, weights)
    source = {
        "checkpoint": step_folder.name,
        "weights": weights,
        "weights_sha256": sha256_file(weights_file(step_folder, weights)),
        "parent": state.get("parent"),  # whose weights the run began with, if it did
        "nanodit": importlib.metadata.version("nanodit"),
    }
    if evaluated is not None:
        evaluated.check(source, state["dataset"]["fingerprint"])
    tensors, rounding = model.state_dict(), None
    if half:
        tensors = to_half(tensors)
        rounding = compare(model, tensors, config, state, torch.device(device))
        say(f"bfloat16 weights: {rounding}")
    described = describe(model, config, state, source)
    card = model_card(output.resolve().name, model, described, config, evaluated, rounding)
    return _write(output, described, tensors, card)


def check_output(output: Path) -> None:
    """Refuse a folder with anything in it, or a file; raises :class:`ConfigError`."""
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() or output.is_symlink():
        raise ConfigError(f"--output {output}: already exists, and an export replaces nothing; give another folder")
    check_writable(output, folder=True)


def describe(model: NanoDiT, config: TrainConfig, state: Mapping[str, Any], source: Mapping[str, Any]) -> dict:
    """Return the content of ``config.json``: all that :func:`build` needs, and where the weights come from.

    No paths. The dropout table is spelled out, because a preset's name may mean another table in a later version.
    """
    table = config.conditioning.resolve(model.features.modalities)
    return {
        "schema": SCHEMA,
        "step": state["step"],
        "source": dict(source),
        **{name: getattr(config, name).model_dump(mode="json") for name in SECTIONS},
        "conditioning": {subset_name(subset): share for subset, share in table.items()},
        "dataset": state["dataset"],
    }


# Files


def _write(output: Path, described: Mapping[str, Any], tensors: Tensors, card: str) -> Path:
    output.parent.mkdir(parents=True, exist_ok=True)
    draft = temporary_beside(output)
    try:
        (draft / COMPONENT).mkdir(parents=True)
        config = {"_class_name": "NanoDiTTransformer", **described}
        (draft / CONFIG).write_text(canonical_json(config), encoding="utf-8")
        write_tensors(draft / WEIGHTS, {PREFIX + name: value for name, value in tensors.items()}, {"format": "pt"})
        shutil.copymode(draft / CONFIG, draft / WEIGHTS)  # safetensors gives its files to their owner alone
        (draft / CARD).write_text(card, encoding="utf-8")
        write_loaders(draft)
        for folder in (draft / COMPONENT, draft):
            for file in folder.iterdir():
                if file.is_file():
                    sync_file(file)
            sync_folder(folder)
        draft.rename(output)  # onto nothing, or an empty folder
        sync_folder(output.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return output


def write_loaders(folder: Path) -> None:
    """Write what tells diffusers which classes a folder's model and pipeline are, and where their code is."""
    index = {"_class_name": ["pipeline", "NanoDiTPipeline"], COMPONENT: ["nanodit", "NanoDiTTransformer"]}
    (folder / COMPONENT).mkdir(parents=True, exist_ok=True)
    (folder / INDEX).write_text(canonical_json(index), encoding="utf-8")
    (folder / PIPELINE).write_text(_LOADER.format(name="NanoDiTPipeline"), encoding="utf-8")
    (folder / LOADER).write_text(_LOADER.format(name="NanoDiTTransformer"), encoding="utf-8")


# Half the bytes


def to_half(tensors: Tensors) -> Tensors:
    """Round the matrices of :data:`ROUNDED` to bfloat16, and nothing else.

    On the quickstart's checkpoint that moves pixels by 0.10/255 on average and 4/255 at most; with all matrices it is
    0.14 and 9, with all tensors 0.17 and 36: times, and the way into and out of the network, need the precision.
    """
    halves = lambda name, value: value.ndim > 1 and name.startswith(ROUNDED)  # noqa: E731
    return {name: value.bfloat16() if halves(name, value) else value for name, value in tensors.items()}


def compare(
    model: NanoDiT, tensors: Tensors, config: TrainConfig, state: Mapping[str, Any], device: torch.device
) -> str:
    """Say how far the pictures of ``tensors`` are from the model's own, in steps of 1/255; both computed in float32.

    They are drawn from the conditions of holdout samples where the run's dataset is at hand, and else from nothing.
    """
    conditions, (width, height), what = _probe(config, state, model.features.modalities)
    starts = torch.from_numpy(np.stack([noise("export", i, height, width) for i in range(len(conditions))]))
    rounded = deepcopy(model)
    load_weights(rounded, tensors, Path("bfloat16"))
    pictures = []
    with Progress("rounding", 2 * PROBE.steps, "steps") as progress:
        for network in (model, rounded):
            drawn = sample(
                network.to(device), conditions, starts, flow=config.flow, sampling=PROBE,
                on_step=lambda t, z: progress.advance(),
            )  # fmt: skip
            pictures.append(to_uint8(drawn).astype(int))
            network.to("cpu")
    difference = np.abs(pictures[0] - pictures[1])
    return (
        f"pixels differ from those of the float32 weights by {difference.mean():.3f}/255 on average and "
        f"{difference.max()}/255 at most, in {len(difference)} pictures of {width}x{height} drawn from {what}"
    )


def _probe(
    config: TrainConfig, state: Mapping[str, Any], modalities: tuple[str, ...]
) -> tuple[Conditions, tuple[int, int], str]:
    base = state["dataset"]["base"]
    try:
        dataset = open_version(config.dataset, state["dataset"]["fingerprint"])
        at_hand = dataset.fingerprint == state["dataset"]["fingerprint"]
        rows = dataset.rows("holdout") if at_hand else []
    except DataError:
        rows = []
    if not rows:
        keep = torch.zeros(PROBES, len(MODALITIES), dtype=torch.bool)
        return Conditions(keep, {}), (base, base), "no conditions, because the dataset is not at hand"
    table = config.conditioning.resolve(modalities)
    subset = max(table, key=lambda subset: (len(subset), table[subset]))
    rows = [row for row in rows if row["bucket"] == rows[0]["bucket"]][:PROBES]
    conditions = load_conditions(dataset, rows).keeping(subset)
    what = f"the conditions ({subset_name(subset, modalities)}) of as many holdout samples"
    return conditions, bucket_size(rows[0]["bucket"]), what
