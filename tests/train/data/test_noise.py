"""Noise of a counter: the integers of Philox, normals of them, and a run that goes on with the noise it began with."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nanodit.errors import ConfigError
from prep.dataset.reader import Dataset
from tests.train.tiny import tiny_config
from train.checkpoint.checkpoint import find_latest, load_checkpoint
from train.checkpoint.resume import check_same_run
from train.data.buffers import Buffer
from train.data.noise import noise_key, noise_record, normal, philox
from train.loop.trainer import Trainer

CPU = torch.device("cpu")


def reference(key: tuple[int, int], count: int) -> np.ndarray:
    """Philox 4x32-10 in unsigned integers of numpy, uint32 (count, 4), written from the paper's round function."""
    counter = np.zeros((count, 4), np.uint64)
    counter[:, 0] = np.arange(count)
    k = np.array(key, np.uint32)
    for _ in range(10):
        left, right = counter[:, 0] * np.uint64(0xD2511F53), counter[:, 2] * np.uint64(0xCD9E8D57)
        high, low = (lambda x: x >> np.uint64(32)), (lambda x: x & np.uint64(0xFFFFFFFF))
        columns = high(right) ^ counter[:, 1] ^ k[0], low(right), high(left) ^ counter[:, 3] ^ k[1], low(left)
        counter = np.stack(columns, 1)
        with np.errstate(over="ignore"):
            k = k + np.array([0x9E3779B9, 0xBB67AE85], np.uint32)
    return counter.astype(np.uint32)


def test_the_integers_are_philoxs():
    first = [int(word[0]) for word in philox(torch.tensor([0, 0]), 1)]
    assert first == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]  # kat_vectors of Random123
    for key in ((0, 0), (1, 2), (0xFFFFFFFF, 0x80000000), noise_key(7, 3, 12)):
        ours = torch.stack(philox(torch.tensor(key), 5000), 1).numpy()
        np.testing.assert_array_equal(ours, reference(key, 5000))


def test_normals_are_of_these_integers_and_of_an_image_alone():
    keys = torch.tensor([noise_key(0, 5, image) for image in range(3)])
    noise = normal(keys, (3, 7, 9))
    for key, image in zip(keys.tolist(), noise.double().numpy()):
        words = reference(tuple(key), 48).astype(np.int64)
        u = np.where(words >= 1 << 31, (1 << 32) - 1 - words, words) * 4.6566127342e-10
        radius, angle = np.sqrt(-2 * np.log(np.maximum(u[:, ::2], 1e-7))), 2 * np.pi * u[:, 1::2]
        pairs = np.stack((radius * np.cos(angle), radius * np.sin(angle)), 2)
        np.testing.assert_allclose(image.ravel(), pairs.ravel()[: 3 * 7 * 9], atol=2e-6)
    assert torch.equal(normal(keys[1:2], (3, 7, 9))[0], noise[1])
    assert len({noise_key(seed, step, image) for seed in (0, 1) for step in (0, 1) for image in (0, 1)}) == 8
    many = normal(keys[:1], (3, 256, 256)).double()
    assert abs(many.mean()) < 0.01
    assert abs(many.std() - 1) < 0.01
    assert abs((many**4).mean() - 3) < 0.1


def make(tiny_dataset, folder, *overrides: str) -> Trainer:
    config = tiny_config(tiny_dataset, folder / "run", *overrides)
    config.run_folder.mkdir(parents=True, exist_ok=True)
    return Trainer(config, Dataset(tiny_dataset), CPU)


def test_the_device_draws_of_keys_that_travel(tiny_dataset, tmp_path):
    trainer, host = make(tiny_dataset, tmp_path / "a", "data.noise=device"), make(tiny_dataset, tmp_path / "b")
    packed = trainer.batches.pack(3, Buffer())
    step = 3 // trainer.batches.plan.stride
    images = trainer.batches.plan.of_step(step)[3 % trainer.batches.plan.stride].images
    assert packed.noise.tolist() == [list(noise_key(0, step, image)) for image in images]
    batch, other = packed.unpacked(), host.batches.make(3)
    assert torch.equal(batch.noise, normal(packed.noise, batch.x.shape[1:]))
    assert torch.equal(batch.x, other.x)
    assert torch.equal(batch.t, other.t)
    assert not torch.equal(batch.noise, other.noise)


def test_a_run_goes_on_with_the_noise_that_it_began_with(tiny_dataset, tmp_path):
    straight = make(tiny_dataset, tmp_path / "straight", "data.noise=device")
    straight.run()
    assert straight.state()["noise"] == {"kind": "device", "version": 1}
    checkpoint = load_checkpoint(tmp_path / "straight" / "run" / "checkpoints" / "step-000006")
    auto = make(tiny_dataset, tmp_path / "auto")
    assert auto.batches.noise == "host"
    auto.load(checkpoint)
    assert auto.batches.noise == "device", "on a resume auto is what the state says"
    auto.run()
    theirs = straight.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in auto.model.state_dict().items())


def test_another_noise_is_refused_whatever_is_allowed(tiny_dataset, tmp_path):
    trainer = make(tiny_dataset, tmp_path, "train.steps=1")
    trainer.run()
    checkpoint = load_checkpoint(find_latest(tmp_path / "run"))
    assert checkpoint.state["noise"] == {"kind": "host", "version": 1}
    allowed = {"allowed_changes": ["data", "data.noise"], "allow_environment_change": True}
    environment, fingerprint = checkpoint.state["environment"], trainer.data.fingerprint
    for asked in ("auto", "host"):
        config = tiny_config(tiny_dataset, tmp_path / "run", "train.steps=1", f"data.noise={asked}")
        check_same_run(checkpoint, config, fingerprint, environment)
    config = tiny_config(tiny_dataset, tmp_path / "run", "train.steps=1", "data.noise=device")
    with pytest.raises(ConfigError, match=r"kind host, version 1, and would go on with device"):
        check_same_run(checkpoint, config, fingerprint, environment, **allowed)
    checkpoint.state["noise"]["version"] = 0
    config = tiny_config(tiny_dataset, tmp_path / "run", "train.steps=1")
    with pytest.raises(ConfigError, match=r"kind host, version 0, and would go on with host, version 1"):
        check_same_run(checkpoint, config, fingerprint, environment, **allowed)


def test_who_draws_where_nothing_is_said():
    assert noise_record("auto", CPU)["kind"] == "host"
    assert noise_record("auto", torch.device("cuda"))["kind"] == "device"
    assert noise_record("auto", torch.device("cuda"), {})["kind"] == "host", "a state of before there was a choice"
