"""Draw images from a checkpoint: from a prompt, or from the stored conditions of a holdout sample."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from prep.errors import ConfigError, DataError
from prep.files import canonical_json
from prep.shards import Dataset
from train.checkpoint import load_model
from train.conditioning import Conditions, Subset, collate, load_conditions, parse_subset, subset_name
from train.config import TrainConfig
from train.data import bucket_size
from train.noise import noise
from train.sample import Method, Sampling, sample, to_uint8, trajectory_keep_ids

BATCH = 8  # images sampled together
PROMPT_NOISE_KEY = "prompt"  # one noise per seed for all prompts, so that prompts can be compared


@dataclass(frozen=True)
class DrawRequest:
    """What to draw and how; exactly one of ``prompt`` and ``key`` (a holdout sample of ``dataset``).

    ``conditions`` is a subset's name such as ``text+pose`` (None: all there are), ``size`` (width, height) in pixels.
    """

    output: Path
    prompt: str | None = None
    key: str | None = None
    dataset: str | None = None
    conditions: str | None = None
    seed: int = 0
    count: int = 1
    size: tuple[int, int] | None = None
    sampler: Method = "heun"
    steps: int = 20
    guidance: float = 1.0
    self_guidance: float = 1.0
    weights: str = "ema"  # ema, model or posthoc:SIGMA_REL
    text_encoder: Path | None = None  # None: the hub's model that the dataset names, or the demo encoder


def draw(checkpoint: Path, request: DrawRequest, device: torch.device) -> list[Path]:
    """Draw ``count`` images of seeds ``seed``, ``seed + 1``, ... and return the PNG files, which hold their settings.

    Raises :class:`ConfigError` for a request that makes no sense, and for conditions that the dataset lacks or training
    never saw; :class:`DataError` for another dataset.
    """
    check_request(request)
    model, config, state = load_model(checkpoint, request.weights)
    model = model.to(device)
    if request.prompt is not None:
        if parse_subset(request.conditions or "text") != {"text"}:
            raise ConfigError("--conditions: a prompt gives text alone; with --key a holdout sample gives the rest")
        subset, conditions = frozenset({"text"}), prompt_conditions(request, state["dataset"], device)
        noise_key, size = PROMPT_NOISE_KEY, (state["dataset"]["base"],) * 2
    else:
        conditions, size = stored_conditions(request, config, state["dataset"])
        subset = available(request.conditions or "all", model.features.modalities)
        noise_key = request.key
    trained = config.conditioning.resolve(model.features.modalities)
    sampling = Sampling(request.sampler, request.steps, request.guidance, self_guidance=request.self_guidance)
    sampling.check(subset, trained, model)
    width, height = request.size or size
    if width % config.model.patch_size or height % config.model.patch_size or not (width and height):
        raise ConfigError(
            f"--size {width}x{height}: both sides must be multiples of the patch size, {config.model.patch_size}"
        )

    settings = {
        "checkpoint": f"step {state['step']} ({request.weights}) on dataset {state['dataset']['fingerprint']}",
        "prompt": request.prompt, "key": request.key, "conditions": subset_name(subset, model.features.modalities),
        "size": f"{width}x{height}", **sampling.settings(),
    }  # fmt: skip
    files, tokens = [], (width // config.model.patch_size) * (height // config.model.patch_size)
    conditions = conditions.keeping(subset).to(device)
    seeds = list(range(request.seed, request.seed + request.count))
    for start in range(0, len(seeds), BATCH):
        chunk = seeds[start : start + BATCH]
        starts = torch.from_numpy(np.stack([noise(noise_key, seed, height, width) for seed in chunk])).to(device)
        images = sample(
            model, conditions.select([0] * len(chunk)), starts, flow=config.flow, sampling=sampling,
            keep_ids=trajectory_keep_ids(config.tread, [(noise_key, seed) for seed in chunk], tokens),
        )  # fmt: skip
        for seed, image in zip(chunk, to_uint8(images)):
            name = request.output if request.count == 1 else request.output.with_stem(f"{request.output.stem}-{seed}")
            files.append(_save(name, image, {**settings, "seed": seed}))
    return files


def check_request(request: DrawRequest) -> None:
    """Refuse, by the name of its option, what cannot be drawn whatever the checkpoint; raises :class:`ConfigError`."""
    for name in ("steps", "count"):
        if getattr(request, name) < 1:
            raise ConfigError(f"--{name} {getattr(request, name)}: must be at least 1")
    for name in ("guidance", "self_guidance"):
        scale = getattr(request, name)
        if not (math.isfinite(scale) and scale >= 0):
            raise ConfigError(f"--{name.replace('_', '-')} {scale}: must be a number from 0 on; 1 is no guidance")
    if request.output.suffix.lower() != ".png" or request.output.is_dir():
        raise ConfigError(f"--output {request.output}: must be a file named *.png, which also holds the settings")
    if request.prompt is not None and request.dataset is not None:
        raise ConfigError("--dataset: a prompt needs none; with --key it says where the holdout sample is")


def available(name: str, modalities: Collection[str]) -> Subset:
    """Return the subset called ``name``, where ``all`` is all of ``modalities``.

    Raises :class:`ConfigError` where it names a condition that the dataset lacks.
    """
    subset, present = parse_subset(name), frozenset(modalities)
    if name == "all":
        return present
    if absent := subset - present:
        raise ConfigError(
            f"--conditions {name}: the dataset has no {', no '.join(sorted(absent))}; it has {', '.join(modalities)}"
        )
    return subset


def prompt_conditions(request: DrawRequest, dataset: dict[str, Any], device: torch.device) -> Conditions:
    """Embed the prompt with the T5 that the dataset's captions went through; one image's conditions.

    Raises :class:`DataError` where the encoder found is not that one.
    """
    from prep.t5 import T5Encoder  # transformers takes seconds to import, and stored conditions need none of it

    layer = dataset["layers"].get("t5")
    if layer is None:
        raise ConfigError("--prompt: this model was trained without text; use --key")
    recorded = layer["encoder"]
    model, revision = request.text_encoder or recorded.get("model"), recorded.get("revision")
    if model is None:  # a folder, which is recorded by its content alone
        from prep.demo import build_demo_encoders, demo_folder

        model = build_demo_encoders(demo_folder()).t5
    encoder = T5Encoder(model, revision, device=str(device), max_tokens=layer["max_tokens"])
    if encoder.fingerprint() != recorded:
        raise DataError(
            f"{model}: not the text encoder of the training captions ({canonical_json(recorded).strip()}); "
            "give its folder as --text-encoder"
        )
    return collate(text=[encoder.encode([request.prompt])[0].embedding], count=1)


def stored_conditions(
    request: DrawRequest, config: TrainConfig, trained_on: dict[str, Any]
) -> tuple[Conditions, tuple[int, int]]:
    """Read the conditions of the holdout sample ``request.key`` and its bucket's (width, height)."""
    dataset = Dataset(request.dataset or config.dataset)
    if dataset.fingerprint != trained_on["fingerprint"]:
        raise DataError(
            f"{dataset.root}: its fingerprint is {dataset.fingerprint}, the checkpoint was trained on "
            f"{trained_on['fingerprint']}; give the dataset of then"
        )
    rows = [row for row in dataset.rows("holdout") if row["key"] == request.key]
    if not rows:
        raise ConfigError(f"--key {request.key}: not a holdout sample of {dataset.root}; its index.parquet lists them")
    return load_conditions(dataset, rows), bucket_size(rows[0]["bucket"])


def _save(path: Path, image: np.ndarray, settings: dict[str, Any]) -> Path:
    info = PngInfo()
    info.add_itxt("nanodit", canonical_json(settings))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, pnginfo=info)
    return path
