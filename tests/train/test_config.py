"""Every key of the trainer's config: documented in the base file, read by a run, and of effect."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nanodit.config import Config, dump_config, load_config, section_model, walk_keys
from nanodit.errors import ConfigError
from prep.dataset.reader import Dataset
from tests.train.tiny import tiny_config
from train import __main__ as command_line
from train.checkpoint.resume import SAFE_TO_CHANGE
from train.config import TrainConfig
from train.loop.trainer import Trainer

pytestmark = pytest.mark.usefixtures("vgg_home", "dinov2_home")
CONFIGS = sorted(Path("configs/train").glob("*.yaml"))
TINY = [
    "model.hidden_size=32", "model.depth=1", "model.num_heads=2", "model.patch_size=4",
    "train.steps=2", "train.batch_size=4", "checkpoint.every_steps=1", "checkpoint.keep_last=1",
    "visual_debug.every_steps=2", "visual_debug.count=2", "visual_debug.steps=1", "train.device=cpu",
    "validation.every_steps=2",
    "train.compile=false", "ema.snapshots=8",
    "tread.enabled=true", "tread.start=0", "tread.end=-1", "repa.enabled=true",
    "perceptual.every=1", "perceptual.size=16", "perceptual.dino_weight=0.01",
    "optimizer.type=muon", "train.grad_accumulation_steps=2",
]  # fmt: skip

# another value for every key that is part of a run's identity; it must change the weights or their average in 3 steps
EFFECTS: dict[str, Any] = {
    "seed": 1,
    "model.hidden_size": 48, "model.depth": 1, "model.num_heads": 4, "model.patch_size": 4, "model.bottleneck": 8,
    "model.context_patches": 4, "model.context_joints": 17, "model.output_conv": "true",
    "conditioning.preset": "seed", "conditioning.table": "{nothing: 0.5, all: 0.5}",
    "flow.prediction": "v", "flow.logit_mean": 0.0, "flow.logit_std": 2.0, "flow.uniform_share": 0.9,
    "flow.shift": 2.0, "flow.t_min": 0.5,
    "tread.enabled": "true", "tread.start": 1, "tread.end": 0, "tread.keep": 0.25, "tread.dense_tail": 1.0,
    "tread.tail_routed": 1.0,
    "repa.enabled": "true", "repa.weight": 2.0, "repa.schedule": "constant", "repa.until": 1.0,
    "repa.block_index": 2, "repa.width": 8,
    "perceptual.every": 2, "perceptual.weight": 1.0, "perceptual.t_max": 0.3, "perceptual.view": "pool",
    "perceptual.size": 16, "perceptual.dino_weight": 1.0,
    "optimizer.type": "adamw", "optimizer.betas": "[0.5, 0.6]", "optimizer.eps": 0.1, "optimizer.weight_decay": 0.5,
    "optimizer.muon_momentum": 0.5, "optimizer.muon_nesterov": "false", "optimizer.muon_ns_steps": 2,
    "optimizer.muon_adjust_lr": "original", "optimizer.muon_lr_factor": 3.0,
    "train.steps": 4, "train.batch_size": 3, "train.grad_accumulation_steps": 1, "train.token_budget": 200,
    "train.phases": "[{until_step: 2, scale: 0.5}]", "train.lr": 1e-3,
    "train.lr_min": 1e-3, "train.warmup": 2, "train.grad_clip": 1e-3, "train.ema_decay": 0.5, "train.ema_warmup": 2,
    "train.precision": "bf16", "train.schedule": "wsd", "train.decay_share": 0.9,
    "data.flip": 0.5, "data.short_captions": 0.5, "data.noise": "device",
    "ema.snapshots": 0, "ema.sigma_rel": "[0.1, 0.2]",
}  # fmt: skip
# sections that are off by default: what switches them on
SWITCHES = {
    "train.phases": ("model.patch_size=4",),  # half of the buckets' sides in whole patches
    "tread": ("tread.enabled=true", "tread.start=0", "tread.end=-1", "tread.dense_tail=0.5"),
    "repa": ("repa.enabled=true",),
    "ema": ("ema.snapshots=8",),
    "train.decay_share": ("train.schedule=wsd",),
    "train.ema_warmup": ("train.ema_decay=0.5",),
    "perceptual": ("perceptual.every=1", "perceptual.size=24"),
}
# these change time, memory or the place of the computation; tests of their own: test_trainer.py, and threads below
NO_EFFECT_ON_WEIGHTS = {"train.compile", "train.threads", "train.device"}
# an image has three channels: any other value is an error
ERRORS = {"model.in_channels": 4}


def test_there_are_configs():
    assert {path.stem for path in CONFIGS} >= {"base", "quickstart", "figures-64-long"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load_and_survive_a_round_trip(path, tmp_path):
    config = load_config(TrainConfig, path)
    resolved = tmp_path / "config.yaml"
    resolved.write_text(dump_config(config))
    assert load_config(TrainConfig, resolved) == config


def test_the_base_shows_every_key_with_its_default():
    def leaves(values, prefix=""):
        for key, value in values.items():
            if isinstance(value, dict) and value:
                yield from leaves(value, f"{prefix}{key}.")
            else:
                yield prefix + key

    text = Path("configs/train/base.yaml").read_text()
    assert list(leaves(yaml.safe_load(text))) == walk_keys(TrainConfig)
    base = load_config(TrainConfig, "configs/train/base.yaml")
    assert base == TrainConfig(dataset=base.dataset, output=base.output)
    undocumented = [line for line in text.splitlines() if line.strip() and "#" not in line and not line.endswith(":")]
    assert len(undocumented) < 15, "most keys carry a comment"


@pytest.mark.parametrize("path", [p for p in CONFIGS if not p.stem.endswith("gb")], ids=lambda path: path.stem)
def test_trap_29_a_run_reads_every_key(path, tiny_dataset, tmp_path, monkeypatch):
    read: set[tuple[str, str]] = set()
    plain = Config.__getattribute__

    def recording(self, name):
        read.add((type(self).__name__, name))
        return plain(self, name)

    def load_then_record(*arguments):
        config = load_config(*arguments)
        read.clear()  # validation reads keys as well
        return config

    monkeypatch.setattr(Config, "__getattribute__", recording)
    monkeypatch.setattr(command_line, "load_config", load_then_record)
    overrides = [f"dataset={tiny_dataset}", f"output={tmp_path / 'run'}", *TINY]
    assert command_line.main(["run", "--config", str(path), *overrides]) == 0
    unread = [key for key in walk_keys(TrainConfig) if (_section(key), key.rsplit(".", 1)[-1]) not in read]
    assert unread == []  # trap 29, trap 9


def test_every_key_is_either_safe_to_change_or_known_to_have_an_effect():
    identity = {key for key in walk_keys(TrainConfig) if not any(_within(key, safe) for safe in SAFE_TO_CHANGE)}
    assert identity == set(EFFECTS) | NO_EFFECT_ON_WEIGHTS | set(ERRORS)


@pytest.fixture(scope="module")
def reference(tiny_dataset, tmp_path_factory):
    """What three steps with some overrides lead to."""
    return cache(lambda *overrides: _three_steps(tiny_dataset, tmp_path_factory.mktemp("reference"), *overrides))


@pytest.mark.parametrize("key", EFFECTS)
def test_trap_29_every_key_has_an_effect(key, tiny_dataset, tmp_path, reference):
    switches = SWITCHES.get(key, SWITCHES.get(key.split(".")[0], ()))
    overrides = [*switches, f"{key}={EFFECTS[key]}"]
    if key == "conditioning.table":
        overrides.append("conditioning.preset=null")
    changed = _three_steps(tiny_dataset, tmp_path, *overrides)
    before = reference() if key.endswith(".enabled") else reference(*switches)
    same = changed.keys() == before.keys() and all(torch.equal(changed[name], before[name]) for name in changed)
    assert not same  # trap 29


@pytest.mark.parametrize("key", ERRORS)
def test_what_cannot_be_is_an_error(key, tiny_dataset, tmp_path):
    with pytest.raises((ConfigError, RuntimeError)):
        _three_steps(tiny_dataset, tmp_path, f"{key}={ERRORS[key]}")


@pytest.mark.parametrize(
    "override",
    ["flow.shift=0", "flow.shift=-1.5", "flow.shift=.inf", "optimizer.betas=[0.9, 1.0]", "optimizer.betas=[-0.1, 0.9]",
     "train.lr=.nan"],
)  # fmt: skip
def test_numbers_without_a_meaning_are_refused(override, tiny_dataset, tmp_path):
    with pytest.raises(ConfigError, match=override.split("=")[0]):
        tiny_config(tiny_dataset, tmp_path / "run", override)


def test_threads_are_set(tiny_dataset, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    overrides = [f"dataset={tiny_dataset}", f"output={tmp_path / 'run'}", *TINY, "train.threads=3"]
    assert command_line.main(["run", "--config", "configs/train/base.yaml", *overrides]) == 0
    assert asked[0] == 3  # the thread that reads ahead then takes one for itself


def _three_steps(dataset: Path, folder: Path, *overrides: str) -> dict[str, torch.Tensor]:
    config = tiny_config(dataset, folder / "run", "train.steps=3", "checkpoint.every_steps=100", *overrides)
    config.run_folder.mkdir(parents=True)
    trainer = Trainer(config, Dataset(dataset), torch.device("cpu"))
    # the zero-initialised layers hide what happens before them from the first steps
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in trainer.model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.05, generator=generator)
    trainer.run()
    averages = {f"ema/{name}": value for name, value in trainer.ema.state.items()}
    return {**trainer.model.state_dict(), **averages, **trainer.power.tensors()}


def _section(key: str) -> str:
    return section_model(TrainConfig, key.split(".")[:-1]).__name__


def _within(key: str, section: str) -> bool:
    return key == section or key.startswith(section + ".")
