"""The perceptual loss's DINOv2 term. On random weights: that it is computed as described, not whether it helps."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torchvision.transforms import functional as vision
from transformers import Dinov2Model

from nanodit.errors import ConfigError, DataError
from nanodit.files import canonical_json, write_atomic
from tests.train.method.test_perceptual import gradients, make
from tests.train.tiny import tiny_config, write_dataset
from train.checkpoint.checkpoint import load_checkpoint
from train.loop.announce import announce
from train.loop.tracking import read_metrics
from train.method.dino_loss import MODEL, DinoLoss, dino_folder
from train.method.flow import interpolate, to_x
from train.method.perceptual import PerceptualConfig, View

CPU = torch.device("cpu")
ON = ("perceptual.every=1", "perceptual.size=24", "perceptual.dino_weight=0.5", "data.prefetch=0")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # lpips uses torchvision's old argument names


@pytest.fixture
def distance(dinov2_home):
    """What the loss should be of two images (3, H, W): by transformers' and torchvision's own hands."""
    network = Dinov2Model.from_pretrained(dino_folder()).requires_grad_(False).eval()

    def patches(image, size):
        image = vision.resize(image[None] * 0.5 + 0.5, size, antialias=True)
        image = vision.normalize(image, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        tokens = network(image).last_hidden_state[0, 1:]
        return tokens / tokens.norm(dim=1, keepdim=True)

    return lambda a, b, size: 1 - (patches(a, size) * patches(b, size)).sum(1).mean()


def pair(*size: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    x = torch.rand(3, 3, *size, generator=rng) * 2 - 1
    return (x + 0.3 * torch.randn(x.shape, generator=rng)).requires_grad_(), x


def test_it_is_the_mean_cosine_distance_of_the_patches_of_each_crop(distance):
    loss = DinoLoss(PerceptualConfig(every=1, dino_weight=0.01, size=40), CPU)
    x_hat, x = pair(48, 56)
    distances = loss(x_hat, x, [View(0, 8, 3), View(2, 0, 16)])
    crops = [(slice(8, 48), slice(3, 43)), (slice(0, 40), slice(16, 56))]
    expected = [
        distance(x_hat[i][:, rows, columns], x[i][:, rows, columns], (42, 42))
        for i, (rows, columns) in zip((0, 2), crops)
    ]
    torch.testing.assert_close(distances, torch.stack(expected))
    assert distances.dtype == torch.float32
    assert (distances > 1e-3).all()
    distances.sum().backward()
    seen = (x_hat.grad != 0).any(1)
    assert seen[0, 8:, 3:43].float().mean() > 0.9
    assert not x_hat.grad[1].any()
    assert not seen[0, :8].any()
    assert all(not p.requires_grad and p.grad is None for p in loss.network.parameters())


@pytest.mark.parametrize(("shown", "size"), [((28, 42), (28, 42)), ((20, 37), (14, 42)), ((16, 16), (14, 14))])
def test_an_image_is_shown_in_whole_patches(distance, shown, size):
    loss = DinoLoss(PerceptualConfig(every=1, dino_weight=0.01, view="pool"), CPU)
    x_hat, x = pair(*shown)
    torch.testing.assert_close(loss(x_hat, x, [View(1, 0, 0)])[0], distance(x_hat[1], x[1], size))


def test_equal_images_are_at_no_distance(dinov2_home):
    x = pair(32, 32)[1]
    loss = DinoLoss(PerceptualConfig(every=1, dino_weight=0.01), CPU)
    torch.testing.assert_close(loss(x, x, [View(0, 0, 0), View(1, 0, 0)]), torch.zeros(2), atol=1e-6, rtol=0)


def test_the_step_adds_the_weighted_sum_over_the_views_of_lpips(vgg_home, distance, tiny_dataset, tmp_path):
    plain = make(tiny_dataset, tmp_path / "a", *ON, "perceptual.dino_weight=0")
    trainer = make(tiny_dataset, tmp_path / "b", *ON)
    before, after = gradients(plain, 1), gradients(trainer, 1)
    plain.model.zero_grad()
    batch, total = trainer.batches.make(1), 0.0
    for part in batch.groups:
        x, noise, t = batch.x[part.images], batch.noise[part.images], batch.t[part.images]
        z = interpolate(x, noise, t)
        x_hat = to_x(plain.model(z, t, part.conditions), z, t, "x")
        views = part.prepared.get("views", [])
        assert [view.image for view in views] == (t <= 0.7).nonzero().flatten().tolist(), "the gate of LPIPS"
        for v in views:
            cut = v.image, slice(None), slice(v.top, v.top + 24), slice(v.left, v.left + 24)
            total = total + distance(x_hat[cut], x[cut], (28, 28))
    (0.5 * total / 8).backward()
    added = torch.cat([p.grad.flatten() for p in plain.model.parameters() if p.grad is not None])
    assert added.norm() > 1e-4 * before.norm()
    torch.testing.assert_close(after - before, added, rtol=1e-3, atol=1e-6)


def test_every_nth_micro_step_has_n_times_the_weight(vgg_home, dinov2_home, tiny_dataset, tmp_path):
    def added(index, *overrides):
        with_it = make(tiny_dataset, tmp_path / "a", *ON, *overrides)
        without = make(tiny_dataset, tmp_path / "b", *ON, *overrides, "perceptual.dino_weight=0")
        return gradients(with_it, index) - gradients(without, index)

    assert not added(0, "perceptual.every=2").any()
    torch.testing.assert_close(added(1, "perceptual.every=2"), 2 * added(1), rtol=1e-3, atol=1e-6)


def test_what_is_logged(vgg_home, dinov2_home, tiny_dataset, tmp_path):
    trainer = make(
        tiny_dataset, tmp_path / "run", *ON, "train.steps=4", "perceptual.every=2", "train.batch_size=8",
        "train.grad_accumulation_steps=1",
    )  # fmt: skip
    trainer.run()
    for record in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        assert ("train/dino_loss" in record) == (record["step"] % 2 == 0)
        views = 0.1 * record.get("train/lpips_loss", 0) + 0.5 * record.get("train/dino_loss", 0)
        expected = record["train/flow_loss"] + 2 * record["train/lpips_share"] * views
        assert record["train/loss"] == pytest.approx(expected, rel=1e-6)


def test_off_nothing_is_loaded(vgg_home, tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it would raise
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    trainer = make(tiny_dataset, tmp_path / "run", *ON, "perceptual.dino_weight=0", "train.steps=1")
    trainer.run()
    assert "train/dino_loss" not in read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    assert trainer.state()["perceptual_dino"] is None


def test_missing_weights_are_named_with_what_to_do(vgg_home, tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    command = r"`hf download facebook/dinov2-base config\.json model\.safetensors --revision [0-9a-f]{40}`"
    with pytest.raises(
        ConfigError, match=rf"not in the hub's cache, {tmp_path / 'hub'}\. Download them with {command}"
    ):
        make(tiny_dataset, tmp_path / "run", *ON)


def test_weights_of_another_network_are_refused(dinov2_home, tmp_path, monkeypatch):
    folder = dino_folder()
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 3}
    other = tmp_path / folder.relative_to(dinov2_home)
    other.mkdir(parents=True)
    (other / "config.json").write_text(json.dumps(config))
    (other / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DataError, match=r"not DINOv2's weights .*are missing.*hf download"):
        DinoLoss(PerceptualConfig(every=1, dino_weight=0.01), CPU)
    (other / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(DataError, match="not DINOv2's weights"):
        DinoLoss(PerceptualConfig(every=1, dino_weight=0.01), CPU)


def test_a_run_continues_with_the_weights_it_began_with(vgg_home, dinov2_home, tiny_dataset, tmp_path):
    trainer = make(tiny_dataset, tmp_path / "run", *ON, "train.steps=1")
    trainer.run()
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoints" / "step-000001")
    trainer.load(checkpoint)
    trainer.losses["dino"].sha256 = "0" * 64
    with pytest.raises(DataError, match=r"other weights than those of DINOv2 in"):
        trainer.load(checkpoint)


@pytest.mark.parametrize(
    ("encoder", "told"),
    [({"encoder": "dino", "model": MODEL, "revision": "main"}, True),
     ({"encoder": "dino", "content": None}, True),  # the test fills in the folder's own
     ({"encoder": "dino", "content": "0" * 64}, False),
     ({"encoder": "dino", "model": "facebook/dinov3-vitl16-pretrain-lvd1689m"}, False)],
)  # fmt: skip
def test_a_dataset_with_conditions_of_the_same_network_is_allowed_and_said(
    vgg_home, dinov2_home, tmp_path, capsys, encoder, told
):
    from prep.encoders.weights import folder_hash

    dataset = write_dataset(tmp_path / "dataset")
    info = json.loads((dataset / "dataset.json").read_text())
    if encoder.get("content", "") is None:
        encoder = encoder | {"content": folder_hash(dino_folder())}
    info["layers"]["dino"]["encoder"] = encoder
    write_atomic(dataset / "dataset.json", canonical_json(info))
    announce(make(dataset, tmp_path / "run", *ON, "train.steps=1"))
    assert ("the dataset's DINO features are of the DINOv2" in capsys.readouterr().out) == told


def test_a_weight_without_the_loss_it_belongs_to_is_refused(tiny_dataset, tmp_path):
    with pytest.raises(ConfigError, match="dino_weight is of no effect while `every` is 0"):
        tiny_config(tiny_dataset, tmp_path / "run", "perceptual.dino_weight=0.01")
