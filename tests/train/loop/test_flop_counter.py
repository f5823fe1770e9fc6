"""FLOPs: against the formula, against torch's count of the whole network, and what is left out."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from prep.dataset.reader import Dataset
from tests.train.tiny import tiny_config
from train.loop import trainer as trainer_module
from train.loop.flops import META, FlopCounter, ModelFlops, count_flops
from train.loop.tracking import read_metrics
from train.loop.trainer import Trainer
from train.method.dino_loss import DinoLoss
from train.method.perceptual import PerceptualConfig, PerceptualLoss
from train.method.repa import RepaConfig, RepaHead, RepaLoss
from train.model.conditions import Conditions
from train.model.config import ModelConfig
from train.model.modalities import MODALITIES, Features
from train.model.network import NanoDiT
from train.model.spans import Spans

FEATURES = Features(64, {"text": 24, "cls": 16, "patches": 16, "pose": 3})
CONFIG = ModelConfig(hidden_size=64, depth=5, num_heads=4, patch_size=8, bottleneck=16)


def conditions(images: int, text: int | None = 32) -> Conditions:
    nothing = Conditions(torch.ones(images, len(MODALITIES), dtype=torch.bool, device=META), {})
    return nothing.replace(
        text=None if text is None else torch.empty(images, text, 24, device=META),
        text_mask=None if text is None else torch.ones(images, text, dtype=torch.bool, device=META),
        cls=torch.empty(images, 16, device=META),
        patches=torch.empty(images, 4, 4, 16, device=META),
        pose=torch.empty(images, 133, 3, device=META),
    )


def arguments(images: int, text: int | None = 32, kept: int | None = None):
    keep_ids = None if kept is None else torch.empty(images, kept, dtype=torch.int64, device=META)
    z, t = torch.empty(images, 3, 64, 48, device=META), torch.empty(images, device=META)
    return z, t, conditions(images, text), keep_ids


def test_a_block_costs_what_the_formula_says():
    with META:
        models = [NanoDiT(CONFIG.model_copy(update={"depth": depth}), FEATURES) for depth in (1, 2)]
    block = count_flops(models[1], *arguments(1)) - count_flops(models[0], *arguments(1))
    n, d, inner = 48, 64, 192
    m = 32 + 1 + 16 + 133
    projections = 4 * n * d * d + 2 * m * d * d  # q, k, v, out; keys and values of the context
    attention = 2 * n * (n + m) * d
    assert block == 3 * 2 * (projections + attention + 3 * n * d * inner)  # the backward pass costs twice the forward


@pytest.mark.parametrize("kept", [None, 24])
def test_three_small_models_stand_for_the_whole(kept):
    route = range(1, 4) if kept else range(0)
    with META:
        whole = NanoDiT(CONFIG, FEATURES, route)
    assert ModelFlops(CONFIG, FEATURES, route)(*arguments(1, kept=kept)) == count_flops(whole, *arguments(1, kept=kept))


def test_what_is_remembered_is_of_as_many_images():
    flops = ModelFlops(CONFIG, FEATURES, range(0))
    assert flops(*arguments(3)) > 2.9 * flops(*arguments(1))


def test_only_what_is_executed_counts():
    flops = ModelFlops(CONFIG, FEATURES, range(1, 4))
    full = flops(*arguments(1))
    assert flops(*arguments(1, text=None)) < full < flops(*arguments(1, text=64))
    assert flops(*arguments(1, kept=24)) < 0.8 * full


def test_the_counter_multiplies_by_images_and_counts_a_shape_once():
    counted = []

    def count(*call):
        counted.append(call)
        return ModelFlops(CONFIG, FEATURES, range(0))(*call)

    counter = FlopCounter({"model": count})
    for images in (3, 5):
        counter.note("model", images, *arguments(images))
    counter.note("model", 2, *arguments(2, text=64))
    with META:
        model = NanoDiT(CONFIG, FEATURES)
    expected = sum(count_flops(model, *arguments(images)) for images in (3, 5))
    assert counter.take() == expected + count_flops(model, *arguments(2, text=64))
    assert len(counted) == 2
    assert counter.take() == 0


@pytest.mark.parametrize("kept", [None, 24])
def test_context_tokens_that_count_are_added_up_without_counting_each_length(kept):
    counted = []

    def count(*call):
        counted.append(call)
        return ModelFlops(CONFIG, FEATURES, route)(*call)

    route = range(1, 4) if kept else range(0)
    with META:
        model = NanoDiT(CONFIG, FEATURES, route)
    counter, expected = FlopCounter({"model": count}), 0
    for lengths in ((182, 182), (5, 182, 40), (0, 7, 30)):
        z, t, given, keep_ids = arguments(len(lengths), kept=kept)
        mask = torch.arange(182) < torch.tensor(lengths)[:, None]
        call = z, t, replace(given, spans=Spans.of(mask).map(lambda tensor: tensor.to(META))), keep_ids
        counter.note("model", len(lengths), *call)
        expected += count_flops(model, *call)
    assert counter.take() == expected
    assert len(counted) == 2
    assert counter.take() == 0


def test_lpips_costs_the_prediction_twice_as_much_as_the_image():
    loss = PerceptualLoss(PerceptualConfig(every=1, size=32), META)
    x = torch.empty(1, 3, 64, 64, device=META)
    both = count_flops(loss.one_image(), x.clone().requires_grad_(), x)
    # VGG-16's thirteen 3x3 convolutions at 32 px, and LPIPS's five 1x1
    widths = [3, 64, 64, 128, 128, 256, 256, 256, *[512] * 6]
    sides = [32, 32, 16, 16, 8, 8, 8, 4, 4, 4, 2, 2, 2]
    trunk = sum(2 * 9 * a * b * side * side for (a, b), side in zip(pairwise(widths), sides))
    heads = sum(2 * width * side * side for width, side in zip((64, 128, 256, 512, 512), (32, 16, 8, 4, 2)))
    assert both == 3 * trunk + 2 * heads  # two forward passes and one backward


def test_the_patch_distance_costs_the_prediction_twice_as_much_as_the_image(dinov2_home):
    config = PerceptualConfig(every=1, dino_weight=0.01, size=32)
    loss = DinoLoss(config, torch.device("cpu"))
    x = torch.empty(1, 3, 64, 48, device=META)
    both = count_flops(loss.one_image(), x.clone().requires_grad_(), x)
    d, layers, patches = 32, 2, 2 * 2  # of 14 pixels, as a crop of 32 is shown at 28
    tokens = patches + 1
    linear = 2 * patches * 3 * 14 * 14 * d + layers * 2 * tokens * 12 * d * d  # patches; q, k, v, out and 2 x 4 d^2
    attention = layers * 2 * 2 * tokens * tokens * d
    # two forward passes; backward, frozen matrices have one gradient, and the products of attention two
    assert both == 3 * linear + 4 * attention
    assert next(loss.network.parameters()).device.type == "cpu", "a copy is counted"


def test_the_head_of_repa_counts():
    config = RepaConfig(enabled=True, width=32)
    loss = RepaLoss(config, RepaHead(config, 4, 64, 16), 16, 8, {})
    assert count_flops(loss.one_image(), torch.empty(2, 48, 16)) == 3 * 2 * 48 * (64 * 32 + 32 * 32 + 32 * 16)


def test_a_micro_step_is_said_to_cost_what_torch_counts(tiny_dataset, tmp_path, monkeypatch, vgg_home, dinov2_home):
    monkeypatch.setattr(trainer_module, "peak_flops", lambda device, dtype: 1e12)
    options = ("conditioning.preset=default", "train.batch_size=24", "model.depth=3", "tread.enabled=true")
    options += ("repa.enabled=true", "perceptual.every=1", "perceptual.size=16", "perceptual.dino_weight=0.01")
    trainer = Trainer(tiny_config(tiny_dataset, tmp_path / "run", *options), Dataset(tiny_dataset), torch.device("cpu"))
    trainer.device = META  # where torch counts attention as the formula does
    for network in (trainer.model, trainer.losses["lpips"].network, trainer.losses["dino"].network):
        network.to(META)
    batch = trainer.batches.make(0).to(META)
    assert batch.keep_ids is not None
    assert any("views" in part.prepared for part in batch.groups)
    assert any("teacher" in part.prepared for part in batch.groups)
    with FlopCounterMode(display=False) as counter:
        trainer.micro_step(batch)
    assert trainer.flops.take() == counter.get_total_flops()


def test_a_run_reports_its_share_of_the_peak(tiny_dataset, tmp_path, monkeypatch, vgg_home, dinov2_home):
    options = ("tread.enabled=true", "tread.start=0", "tread.end=-1", "repa.enabled=true", "perceptual.every=1")
    options += ("perceptual.dino_weight=0.01",)
    runs = {}
    for name, peak in (("known", 1e12), ("unknown", None)):
        monkeypatch.setattr(trainer_module, "peak_flops", lambda device, dtype, peak=peak: peak)
        config = tiny_config(tiny_dataset, tmp_path / name, *options, "train.steps=4", "perceptual.size=16")
        config.run_folder.mkdir()
        trainer = Trainer(config, Dataset(tiny_dataset), torch.device("cpu"))
        trainer.run()
        runs[name] = read_metrics(tmp_path / name / "metrics.jsonl")
    assert not any("sys/mfu" in record for record in runs["unknown"]), "absent rather than invented"
    shares = [record.get("sys/mfu") for record in runs["known"]]
    assert shares[:2] == [None, None]  # trap 33: the warm-up
    assert all(0 < share < 1 for share in shares[2:])
    for known, unknown in zip(*runs.values()):
        assert known["train/loss"] == unknown["train/loss"], "counting changes nothing"
