"""The largest micro-batch of a run, without data: what ``plan`` and the start of a run on a GPU try first.

Where there is no dataset yet, a stand-in has the buckets of a base size and the widths of the encoders.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import product
from operator import getitem
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
from pydantic import ValidationError
from torch import Tensor

from nanodit.config import load_config
from nanodit.errors import ConfigError
from nanodit.storage import open_storage
from prep.config import PrepConfig
from prep.dataset.buckets import buckets_for
from prep.dataset.layers import LAYERS, SHORT_TOKENS, T5_TOKENS, dino_grid, option
from prep.dataset.reader import Dataset
from prep.dataset.rows import Rows
from prep.passes.cost import sample_bytes
from train.config import DataSection, TrainConfig
from train.data.batch_plan import scaled_size
from train.data.samples import Row, bucket_size
from train.loop.microbatch import Group, MicroBatch
from train.loop.trainer import Trainer
from train.model.conditions import Conditions, padded_length
from train.model.config import ModelConfig
from train.model.modalities import MODALITIES, Features
from train.model.spans import Spans

OTHERS = re.compile("flip|short|json")  # members that a run reads of some samples alone, or never


class StandIn:
    """A dataset that does not exist yet, as far as a trainer that reads no sample asks: one sample in each bucket."""

    has_flips = has_short = True
    fingerprint = "none"

    def __init__(self, prep: PrepConfig) -> None:
        self.prep, self.root = prep, prep.output
        widths = {layer.name: layer.encoder.width for layer in LAYERS.values() if layer.encoder and layer.encoder.width}
        described = {name: {"width": width[prep.encoders]} for name, width in widths.items()}
        kept = {name: described.get(name, {}) for name in prep.active_layers if name != "text"}
        self.info = {"base": prep.base, "encoders": prep.encoders, "fingerprint": self.fingerprint, "layers": kept}

    def rows(self, split: str) -> Rows:
        """Return the rows of the split "train", with usual captions and in one row the longest; no other split."""
        scale = option(self.prep, "dino", "input_scale")
        longest = self.prep.t5.max_tokens
        rows = []
        for i, bucket in enumerate(buckets_for(self.prep.base) if split == "train" else ()):
            row = {"key": f"{i:032x}", "source": "none", "bucket": str(bucket), "split": split}
            row["t5_tokens"] = longest if i == 0 else min(T5_TOKENS, longest)
            rows.append(row | dict(zip(("dino_h", "dino_w"), dino_grid(bucket.height, bucket.width, scale))))
        return Rows.of(rows)


def open_dataset(config: TrainConfig, config_file: Path, base: int | None) -> tuple[Dataset | StandIn, str]:
    """Return the run's dataset, or a stand-in where there is none, and what it is.

    The stand-in follows the config of ``prep``, in the folder ``prep`` beside the trainer's, that would write the
    dataset; with ``base``, or without such a config, it has the full-size encoders. Raises :class:`ConfigError` for a
    base without buckets.
    """
    if base is None and open_storage(config.dataset).exists("dataset.json"):
        dataset = Dataset(config.dataset)
        return dataset, f"{dataset.root}: base {dataset.info['base']}, {dataset.info['encoders']} encoders"
    known = _prep_config(config.dataset, config_file) if base is None else None
    side = f"base={1024 if base is None else base}"
    prep = known or load_config(PrepConfig, None, ["source=.", f"output={config.dataset}", side])
    like = "the default" if base is None else "--base"
    if known:
        like = "the config of prep that writes it"
    missing = "does not exist yet" if base is None else "set aside"
    assumed = f"seven equal buckets of base {prep.base}, {prep.encoders} encoders"
    what = f"{config.dataset} {missing}: assuming {assumed} ({like})"
    return StandIn(prep), what


def _prep_config(dataset: str, config_file: Path) -> PrepConfig | None:
    for file in sorted((config_file.resolve().parent.parent / "prep").glob("*.yaml")):
        try:
            prep = load_config(PrepConfig, file)
        except ConfigError:
            continue
        if prep.output == dataset:
            return prep
    return None


@dataclass(frozen=True)
class Shapes:
    """What sizes of a micro-batch depend on: caption tokens, and of each bucket a row, whose features are as large."""

    longest_text: int  # padded
    mean_text: int
    rows: dict[str, Row]
    features: Features

    @classmethod
    def of(cls, info: dict[str, Any], rows: Sequence[Row]) -> Shapes:
        """Read them from a dataset.json and the rows of the training split."""
        features, rows = Features.from_dataset(info), Rows.of(rows)
        longest = total = 0
        if "text" in features.modalities:
            tokens = rows.column("t5_tokens")
            longest, total = pc.max(tokens).as_py(), pc.sum(tokens).as_py()
        one_of_each = {bucket: own[-1] for bucket, own in rows.by("bucket").items()}
        return cls(padded_length(longest), round(total / len(rows)), one_of_each, features)

    def conditions(self, bucket: str, images: int, text_tokens: int, device: torch.device) -> Conditions:
        """Return everything that images of a bucket can be conditioned on, without content."""
        row, tensors = self.rows[bucket], {}
        for name, width in self.features.widths.items():
            shape = images, *MODALITIES[name].shape(row, width, text_tokens)
            tensors[name] = torch.zeros(shape, device=device)
            if MODALITIES[name].ragged:
                tensors[MODALITIES[name].mask] = torch.ones(shape[:2], dtype=torch.bool, device=device)
        kept = torch.tensor([name in self.features.widths for name in MODALITIES], device=device)
        return Conditions(kept.repeat(images, 1), tensors)

    def context_tokens(self, config: ModelConfig, bucket: str) -> int:
        """Count the tokens that all conditions of an image become, with the longest caption there is."""
        counts = (MODALITIES[name].count for name in self.features.modalities)
        return sum(count(config, self.rows[bucket], self.longest_text) for count in counts)


def changed(config: TrainConfig, overrides: Mapping[str, Any]) -> TrainConfig:
    """Return a config with some dotted keys set to other values; raises :class:`ConfigError` where they do not go."""
    values = config.model_dump()
    for key, value in overrides.items():
        *sections, name = key.split(".")
        reduce(getitem, sections, values)[name] = value
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{', '.join(overrides)}: {error.errors()[0]['msg']}") from None


def sample_sizes(dataset: Dataset | StandIn) -> dict[str, float]:
    """Return the mean bytes of a training sample that a run reads, by layer."""
    rows = dataset.rows("train")
    if isinstance(dataset, StandIn):
        layers = [layer for layer in dataset.prep.active_layers if layer != "text"]
        total = lambda layer: sum(sample_bytes(dataset.prep, layer, row["bucket"]) for row in rows)  # noqa: E731
        return {layer: total(layer) / len(rows) for layer in layers}
    sizes: dict[str, float] = {}
    for column in rows[0]:
        layer, _, member = column.partition("/")
        if member.endswith("/length") and layer != "text" and not OTHERS.search(member):
            sizes[layer] = sizes.get(layer, 0.0) + pc.sum(rows.column(column)).as_py() / len(rows)
    return sizes


def cache_bytes(dataset: Dataset | StandIn, data: DataSection) -> int:
    """Return the bytes that all training samples take in memory as :class:`train.data.samples.TrainingSet` keeps them:
    decoded pixels, and features as they are stored.

    Where ``data`` says that images are mirrored, or given short captions, the features of these come on top.
    """
    features, total = Features.from_dataset(dataset.info), 0
    for bucket, rows in dataset.rows("train").by("bucket").items():
        total += len(rows) * 3 * math.prod(bucket_size(bucket))
        lengths = rows.by("t5_tokens") if "t5_tokens" in rows[0] else {0: rows}
        for (tokens, own), (name, width) in product(lengths.items(), features.widths.items()):
            modality = MODALITIES[name]
            one = modality.stored_bytes(rows[0], width, tokens)  # as large for every row of the bucket
            views = 2 if data.flip and modality.mirror is None else 1
            total += len(own) * one * views
            if data.short_captions and modality.read_short:
                total += len(own) * views * modality.stored_bytes(rows[0], width, min(tokens, SHORT_TOKENS))
    return total


def largest_batch(trainer: Trainer, shapes: Shapes, device: torch.device) -> MicroBatch:
    """Return the largest kind of micro-batch of a run, by the image and context tokens that a block sees.

    All their images keep everything and go through the network together, with the longest caption there is, every
    token where some micro-batches are not routed, every loss on every image.
    """
    plan, model = trainer.batches.plan, trainer.config.model

    def size(kind: tuple[str, float]) -> float:
        return plan.most_images(*kind) * (plan.tokens(scaled_size(*kind)) + shapes.context_tokens(model, kind[0]))

    kind = max(product(plan.order.sizes, plan.scales), key=size)
    return full_batch(trainer, shapes, *kind, plan.most_images(*kind), device)


def full_batch(
    trainer: Trainer, shapes: Shapes, bucket: str, scale: float, images: int, device: torch.device
) -> MicroBatch:
    """Return a micro-batch without content of so many images of a bucket at a scale, which keep everything."""
    config: TrainConfig = trainer.config
    width, height = scaled_size(bucket, scale)
    rows, columns = height // config.model.patch_size, width // config.model.patch_size
    zeros = lambda *shape: torch.zeros(images, *shape, device=device)  # noqa: E731
    losses = trainer.losses.values()
    conditions = shapes.conditions(bucket, images, shapes.longest_text, device)
    prepared = {loss.needs: loss.largest(images, (width, height), device) for loss in losses if loss.needs}
    tread, keep_ids = config.tread, None
    if tread.enabled and (tread.tail_routed == 1 or round(tread.dense_tail * config.train.steps) == 0):
        keep_ids = torch.arange(tread.kept(rows * columns), device=device).repeat(images, 1)
    conditions = replace(conditions, spans=Spans.equal(images, shapes.context_tokens(config.model, bucket), device))
    group = Group(slice(0, images), conditions, prepared)
    subset = frozenset(shapes.features.modalities)
    x, noise, t = zeros(3, height, width), zeros(3, height, width), zeros() + 0.5
    return MicroBatch(["none"] * images, [subset] * images, x, noise, t, [group], keep_ids)


def probe(trainer: Trainer) -> None:
    """Take the largest micro-batch through the network twice, so that too little memory shows before the first step.

    Nothing of it stays: gradients are forgotten, and there is no random state that it could change.
    """
    shapes = Shapes.of(trainer.data.info, trainer.data.all_rows)
    batch = largest_batch(trainer, shapes, trainer.device)
    for _ in range(2):  # the second time the gradients are there already
        trainer.micro_step(batch)
    trainer.optimizer.zero_grad()
    if trainer.flops:
        trainer.flops.take()


def drawing_request(trainer: Trainer, shapes: Shapes, device: torch.device) -> tuple[Conditions, Tensor]:
    """Return conditions and noise of as many images as the visual debug may draw at once, of the largest bucket."""
    bucket = max(trainer.batches.plan.order.sizes, key=lambda name: math.prod(bucket_size(name)))
    width, height = bucket_size(bucket)
    count = trainer.config.visual_debug.count
    conditions = shapes.conditions(bucket, count, shapes.longest_text, device)
    return conditions, torch.zeros(count, 3, height, width, device=device)
