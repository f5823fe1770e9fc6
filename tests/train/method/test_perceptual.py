"""LPIPS as a loss. On random VGG weights: that it is computed as described, not whether it helps."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nanodit.errors import ConfigError, DataError
from nanodit.rng import generator
from prep.dataset.reader import Dataset
from prep.encoders.backbones import VGG16
from tests.train.tiny import tiny_config
from train.checkpoint.checkpoint import load_checkpoint
from train.loop.tracking import read_metrics
from train.loop.trainer import Trainer
from train.method.flow import interpolate, resolution_shift, to_x
from train.method.perceptual import PerceptualConfig, PerceptualLoss, View, draw_views, pool

CPU = torch.device("cpu")
ON = ("perceptual.every=1", "perceptual.size=24", "data.prefetch=0")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # the package uses torchvision's old argument names


def make(dataset: Path, output: Path, *overrides: str) -> Trainer:
    config = tiny_config(dataset, output, *overrides)
    config.run_folder.mkdir(exist_ok=True)
    trainer = Trainer(config, Dataset(dataset), CPU)
    with torch.no_grad():  # away from zero, so that gradients reach every parameter
        rng = torch.Generator().manual_seed(0)
        for parameter in trainer.model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.05, generator=rng)
    return trainer


@pytest.fixture(scope="module")
def reference(random_vgg):
    """The package's own network, which finds the same weights through torch.hub."""
    import lpips

    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.setenv("TORCH_HOME", str(random_vgg))
        return lpips.LPIPS(net="vgg", verbose=False).requires_grad_(False)


def gradients(trainer: Trainer, index: int) -> torch.Tensor:
    trainer.model.zero_grad()
    trainer.micro_step(trainer.batches.make(index))
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


def test_it_is_the_packages_lpips_of_each_crop(vgg_home, reference):
    loss = PerceptualLoss(PerceptualConfig(every=1, size=32), CPU)
    rng = torch.Generator().manual_seed(1)
    x = torch.rand(3, 3, 48, 56, generator=rng) * 2 - 1
    x_hat = (x + 0.3 * torch.randn(x.shape, generator=rng)).requires_grad_()
    views = [View(0, 16, 3), View(2, 0, 24)]
    distances = loss(x_hat, x, views)
    crops = [(x_hat[:1, :, 16:48, 3:35], x[:1, :, 16:48, 3:35]), (x_hat[2:, :, :32, 24:], x[2:, :, :32, 24:])]
    expected = torch.cat([reference(*pair).flatten() for pair in crops])
    torch.testing.assert_close(distances, expected)
    assert (distances > 0).all()
    distances.sum().backward()
    seen = (x_hat.grad != 0).any(1)
    assert seen[0, 16:48, 3:35].float().mean() > 0.9
    assert not x_hat.grad[1].any()
    assert not seen[0, :16].any()
    assert all(not p.requires_grad and p.grad is None for p in loss.network.parameters())


@pytest.mark.parametrize("size", [(256, 256), (768, 768)])
def test_the_gate_follows_the_resolution_shift(size):
    s = resolution_shift(*size)
    gate = {1.0: 0.7, 3.0: 0.875}[s]
    t = np.array([0.05, gate - 1e-4, gate + 1e-4, 0.99, gate - 0.01], np.float32)
    views = draw_views(PerceptualConfig(every=1), 0, t.tolist(), s, size, lambda i: generator("crop", i))
    assert [view.image for view in views] == [0, 1, 4]


def test_crops_are_anywhere_inside_and_belong_to_the_image():
    config = PerceptualConfig(every=1, size=64)
    crops = [draw_views(config, 0, [0.5], 1.0, (80, 64), lambda i: generator("crop", n, i))[0] for n in range(400)]  # noqa: B023
    assert {crop.left for crop in crops} == {0}
    assert {crop.top for crop in crops} == set(range(17))
    alone = draw_views(config, 0, [0.9, 0.5], 1.0, (80, 96), lambda i: generator("crop", i))
    assert alone == draw_views(config, 0, [0.5, 0.5], 1.0, (80, 96), lambda i: generator("crop", i))[1:]
    small = draw_views(config, 0, [0.5], 1.0, (48, 56), lambda i: generator("crop", i))
    assert small == [View(0, 0, 0)], "an image smaller than the crop is seen whole"


def test_a_pooled_view_is_the_mean_of_the_pixels():
    images = torch.rand(2, 3, 64, 128)
    blocks = images.unflatten(3, (64, 2)).unflatten(2, (32, 2)).mean((3, 5))
    torch.testing.assert_close(pool(images, round((32 * 64) ** 0.5)), blocks)
    assert pool(images, 512) is images


def test_the_step_adds_the_weighted_sum_over_images(vgg_home, reference, tiny_dataset, tmp_path):
    plain = make(tiny_dataset, tmp_path / "a")
    trainer = make(tiny_dataset, tmp_path / "b", *ON)
    before, after = gradients(plain, 1), gradients(trainer, 1)
    plain.model.zero_grad()
    batch, total = trainer.batches.make(1), 0.0
    for part in batch.groups:
        x, noise, t = batch.x[part.images], batch.noise[part.images], batch.t[part.images]
        z = interpolate(x, noise, t)
        x_hat = to_x(plain.model(z, t, part.conditions), z, t, "x")
        for i in (t <= 0.7).nonzero().flatten().tolist():
            (view,) = [view for view in part.prepared.get("views", []) if view.image == i]
            cut = slice(i, i + 1), slice(None), slice(view.top, view.top + 24), slice(view.left, view.left + 24)
            total = total + reference(x_hat[cut], x[cut]).sum()
    (0.1 * total / 8).backward()
    added = torch.cat([p.grad.flatten() for p in plain.model.parameters() if p.grad is not None])
    assert added.norm() > 1e-4 * before.norm()
    torch.testing.assert_close(after - before, added, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("every", [2, 3])
def test_every_nth_micro_step_has_n_times_the_weight(vgg_home, tiny_dataset, tmp_path, every):
    plain = make(tiny_dataset, tmp_path / "a")
    always = make(tiny_dataset, tmp_path / "b", *ON)
    sometimes = make(tiny_dataset, tmp_path / "c", *ON, f"perceptual.every={every}")
    due = []
    for index in range(2 * every):  # two micro-batches a step
        base = gradients(plain, index)
        added, expected = gradients(sometimes, index) - base, gradients(always, index) - base
        due.append(bool(added.any()))
        assert (added - due[-1] * every * expected).norm() < 0.02 * expected.norm()
    # each place of a step once in n steps, with n times the weight: the mean over them is that of computing each
    assert [sum(due[place::2]) for place in range(2)] == [1, 1]


def test_what_is_logged(vgg_home, tiny_dataset, tmp_path):
    trainer = make(
        tiny_dataset, tmp_path / "run", *ON, "train.steps=4", "perceptual.every=2", "train.batch_size=8",
        "train.grad_accumulation_steps=1",
    )  # fmt: skip
    trainer.run()
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    for record in records:
        due = record["step"] % 2 == 0
        assert (record["train/lpips_share"] > 0) == due
        assert ("train/lpips_loss" in record) == due
        lpips = record.get("train/lpips_loss", 0) * record["train/lpips_share"]
        assert record["train/loss"] == pytest.approx(record["train/flow_loss"] + 0.2 * lpips, rel=1e-6)
    assert not trainer.losses["lpips"].published


def test_off_it_is_never_imported(tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)  # importing it would raise
    trainer = make(tiny_dataset, tmp_path / "run", "train.steps=1")
    trainer.run()
    assert not {"train/lpips_loss", "train/lpips_share"} & set(read_metrics(tmp_path / "run" / "metrics.jsonl")[0])


def test_missing_weights_are_named_with_what_to_do(tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"not at .*vgg16-397923af\.pth\. Get them: .*python -c 'from torch.*copy vgg"
    ):
        make(tiny_dataset, tmp_path / "run", *ON)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("perceptual.size=20", "of images of 88x48 VGG would see 27x15 pixels"),
        ("train.phases=[{until_step: 9, scale: 0.25}]", "of images of 14x20 VGG would see 14x20 pixels"),
    ],
)
def test_images_too_small_for_the_network_are_refused_before_the_first_step(tiny_dataset, tmp_path, override, message):
    small = ["perceptual.view=pool", "perceptual.size=64", "model.patch_size=2"]
    with pytest.raises(ConfigError, match=message):
        make(tiny_dataset, tmp_path / "run", *ON, *small, override)


def test_weights_of_another_network_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    VGG16.path.parent.mkdir(parents=True)
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, VGG16.path)
    with pytest.raises(DataError, match="not VGG-16's weights"):
        PerceptualLoss(PerceptualConfig(every=1), CPU)


def test_a_run_continues_with_the_weights_it_began_with(vgg_home, tiny_dataset, tmp_path):
    trainer = make(tiny_dataset, tmp_path / "run", *ON, "train.steps=1")
    trainer.run()
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoints" / "step-000001")
    trainer.load(checkpoint)
    trainer.losses["lpips"].sha256 = "0" * 64
    with pytest.raises(DataError, match=r"other weights than .*vgg16"):
        trainer.load(checkpoint)
