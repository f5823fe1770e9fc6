"""Draw images from a checkpoint: from prompts, a reference image and a pose, or as a holdout sample was described."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from nanodit.config import check_text
from nanodit.console import Progress
from nanodit.errors import ConfigError, DataError
from nanodit.files import canonical_json, check_writable, sha256_file, write_atomic
from nanodit.rng import noise
from prep.dataset.buckets import Bucket, buckets_for
from prep.dataset.reader import open_version
from train.checkpoint.checkpoint import resolve_checkpoint
from train.checkpoint.exported import WEIGHTS, is_exported
from train.checkpoint.open import load_model
from train.config import TrainConfig
from train.data.samples import bucket_size, load_conditions
from train.draw.request import Given, encode
from train.loop.visual import lay_out
from train.method.sampling import Sampling, sample, to_uint8, trajectory_keep_ids
from train.model.conditions import Conditions, Subset, parse_subset, subset_name
from train.model.modalities import MODALITIES
from train.model.network import NanoDiT

BATCH = 8  # images sampled together
PROMPT_NOISE_KEY = "prompt"  # one noise per seed for all prompts, so that prompts can be compared


@dataclass(frozen=True)
class DrawRequest:
    """What to draw and how: any of ``prompts``, ``reference`` and ``pose``, or ``key``, a holdout sample.

    ``conditions`` is a subset's name such as ``text+pose`` (None: all there are). The picture has ``size`` (width,
    height) in pixels, or that of ``bucket``, or that of the sample's, the pose's or the reference's, or the square's.
    ``encoders`` are places of encoders that the checkpoint does not name, see :func:`train.draw.request.encode`.
    """

    output: Path
    prompts: tuple[str, ...] = ()
    reference: Path | None = None
    pose: Path | None = None
    key: str | None = None
    dataset: str | None = None
    conditions: str | None = None
    seed: int = 0
    count: int = 1
    batch_size: int = BATCH
    grid: bool = False
    size: tuple[int, int] | None = None
    bucket: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    weights: str = "ema"  # ema, model or posthoc:SIGMA_REL
    encoders: Mapping[str, str] = field(default_factory=dict)

    @property
    def seeds(self) -> range:
        """The seeds of the images of one prompt."""
        return range(self.seed, self.seed + self.count)


def draw(checkpoint: Path, request: DrawRequest, device: torch.device) -> list[Path]:
    """Draw ``count`` images of seeds ``seed``, ``seed + 1``, ... of each prompt; returns the PNG files, grid last.

    Each file holds its settings (iTXt ``nanodit``, JSON): the same request gives the same files, and in a batch of
    other pictures a pixel may differ by 1/255. Raises :class:`ConfigError` for a request that makes no sense, and for
    conditions that the dataset lacks or training never saw; :class:`DataError` for another dataset, other encoders, or
    files without what they should show.
    """
    check_request(request)
    given = Given.read(request.prompts, request.reference, request.pose)
    folder = checkpoint if is_exported(checkpoint) else resolve_checkpoint(checkpoint)
    model, config, state = load_model(folder, request.weights)
    modalities = model.features.modalities
    if request.key is not None:
        stored, bucket = stored_conditions(request, config, state["dataset"])
        noise_key, offered = request.key, frozenset(modalities)
    else:
        stored, bucket = None, given.bucket(model.features.base)
        noise_key, offered = PROMPT_NOISE_KEY, given.subset
    subset = choose(request.conditions, offered, modalities)
    request.sampling.check(subset, config.conditioning.resolve(modalities), model)
    width, height = picture_size(request, bucket, model)
    if stored is None:  # the encoders come and go before the model takes its place on the GPU
        conditions = encode(given, subset, state["dataset"], (width, height), device, request.encoders)
    else:
        conditions = stored.keeping(subset)

    weights = state["source"]["weights"] if is_exported(folder) else request.weights  # of an export, what it holds
    settings = {
        "checkpoint": f"step {state['step']} ({weights}) on dataset {state['dataset']['fingerprint']}",
        "checkpoint_sha256": sha256_file(folder / (WEIGHTS if is_exported(folder) else "manifest.json")),
        "weights": weights,
        "key": request.key, **given.files, "conditions": subset_name(subset, modalities), "size": f"{width}x{height}",
        **request.sampling.settings(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }  # fmt: skip
    prompts: Sequence[str | None] = request.prompts or [None]
    # row of the conditions, prompt, seed, file
    jobs = [
        (row, prompt, seed, file_name(request, row, seed))
        for row, prompt in enumerate(prompts)
        for seed in request.seeds
    ]
    model = model.to(device)
    tokens = (width // config.model.patch_size) * (height // config.model.patch_size)
    pictures: list[np.ndarray] = []
    starts = range(0, len(jobs), request.batch_size)
    with Progress("drawing", len(starts) * request.sampling.steps, "steps") as progress:
        for start in starts:
            batch = jobs[start : start + request.batch_size]
            seeds = [seed for _, _, seed, _ in batch]
            images = sample(
                model,
                conditions.select([row for row, *_ in batch]).keeping(subset),
                torch.from_numpy(np.stack([noise(noise_key, seed, height, width) for seed in seeds])),
                flow=config.flow,
                sampling=request.sampling,
                keep_ids=trajectory_keep_ids(config.tread, [(noise_key, seed) for seed in seeds], tokens),
                on_step=lambda t, z: progress.advance(),
            )
            for (_, prompt, seed, file), image in zip(batch, to_uint8(images)):
                _save(file, image, {**settings, "prompt": prompt, "seed": seed})
                if request.grid:
                    pictures.append(image)
    files = [file for *_, file in jobs]
    if request.grid:
        rows = [pictures[start : start + request.count] for start in range(0, len(pictures), request.count)]
        labels = [prompt or request.key or settings["conditions"] for prompt in prompts]
        grid = request.output.with_stem(f"{request.output.stem}-grid")
        seeds = list(request.seeds)
        _save(grid, sheet(rows, labels, seeds), {**settings, "prompts": list(request.prompts), "seeds": seeds})
        files.append(grid)
    return files


def check_request(request: DrawRequest) -> None:
    """Refuse, by the name of its option, what cannot be drawn whatever the checkpoint; raises :class:`ConfigError`."""
    for name in ("count", "batch_size"):
        if getattr(request, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(request, name)}: must be at least 1")
    if request.seed < 0:
        raise ConfigError(f"--seed {request.seed}: must be 0 or more")
    if request.output.suffix.lower() != ".png" or request.output.is_dir():
        raise ConfigError(f"--output {request.output}: must be a file named *.png, which also holds the settings")
    if any(not prompt.strip() for prompt in request.prompts):
        raise ConfigError("--prompt: is empty; leave it out for a picture without text")
    for prompt in request.prompts:
        check_text(prompt, "--prompt")
    check_writable(request.output)
    given = {"--prompt": request.prompts, "--reference": request.reference, "--pose": request.pose}
    named = [name for name, value in given.items() if value]
    if request.key is not None and named:
        raise ConfigError(f"{named[0]}: --key takes all conditions from the holdout sample; give one or the other")
    if request.key is None and request.dataset is not None:
        raise ConfigError("--dataset: says where the holdout sample of --key is; without --key nothing is read from it")
    if request.key is None and not named and request.conditions != "nothing":
        raise ConfigError(
            "nothing to draw from: give any of --prompt, --reference and --pose, or --key, or --conditions nothing"
        )


def choose(name: str | None, offered: Subset, modalities: Collection[str]) -> Subset:
    """Return the subset called ``name`` of the conditions ``offered``, all of them by default.

    ``all`` is all that the model has, ``modalities``. Raises :class:`ConfigError` where it names a condition that the
    dataset lacks or that is not given, and where one is given that the dataset lacks.
    """
    subset = offered if name is None else frozenset(modalities) if name == "all" else parse_subset(name)
    if absent := subset - frozenset(modalities):
        asked = MODALITIES[min(absent)].option if name is None else f"--conditions {name}"
        has = ", ".join(modalities) or "no conditions"
        raise ConfigError(f"{asked}: the dataset has no {', no '.join(sorted(absent))}; it has {has}")
    if missing := subset - offered:
        condition = min(missing)
        raise ConfigError(f"--conditions {name}: no {condition} is given; add {MODALITIES[condition].option}")
    return subset


def picture_size(request: DrawRequest, default: Bucket, model: NanoDiT) -> tuple[int, int]:
    """Return (width, height) of the pictures; :class:`ConfigError` for one that is not made of whole patches."""
    if request.bucket is not None:
        names = [str(bucket) for bucket in buckets_for(model.features.base)]
        if request.bucket not in names:
            raise ConfigError(
                f"--bucket {request.bucket}: base {model.features.base} has {', '.join(names)}; --size takes any size"
            )
    width, height = request.size or bucket_size(request.bucket or str(default))
    patch_size = model.config.patch_size
    if width % patch_size or height % patch_size or not (width and height):
        raise ConfigError(f"--size {width}x{height}: both sides must be multiples of the patch size, {patch_size}")
    return width, height


def stored_conditions(
    request: DrawRequest, config: TrainConfig, trained_on: dict[str, Any]
) -> tuple[Conditions, Bucket]:
    """Read the conditions of the holdout sample ``request.key`` and its bucket."""
    dataset = open_version(request.dataset or config.dataset, trained_on["fingerprint"])
    if dataset.fingerprint != trained_on["fingerprint"]:
        raise DataError(
            f"{dataset.root}: its fingerprint is {dataset.fingerprint}, but the checkpoint was trained on "
            f"{trained_on['fingerprint']}, which is not kept there; give that dataset"
        )
    rows = [row for row in dataset.rows("holdout") if row["key"] == request.key]
    if not rows:
        raise ConfigError(f"--key {request.key}: not a holdout sample of {dataset.root}; its index.parquet lists them")
    return load_conditions(dataset, rows), Bucket.parse(rows[0]["bucket"])


def file_name(request: DrawRequest, row: int, seed: int) -> Path:
    """Return the file of one picture: ``output``, with the prompt's number (from 1) and seed if there are several."""
    parts = [request.output.stem]
    if len(request.prompts) > 1:
        parts.append(f"{row + 1:0{len(str(len(request.prompts)))}d}")
    if request.count > 1:
        parts.append(str(seed))
    return request.output.with_stem("-".join(parts))


def sheet(rows: Sequence[Sequence[np.ndarray]], labels: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
    """One picture of all: a row per label, a column per seed; uint8 (H, W, 3) in and out."""
    return lay_out(list(zip(*rows)), labels, [f"seed {seed}" for seed in seeds])


def _save(path: Path, image: np.ndarray, settings: Mapping[str, Any]) -> None:
    info, png = PngInfo(), io.BytesIO()
    info.add_itxt("nanodit", canonical_json(settings))
    Image.fromarray(image).save(png, "PNG", pnginfo=info)
    write_atomic(path, png.getvalue())
