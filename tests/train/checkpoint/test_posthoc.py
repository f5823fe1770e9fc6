"""Averages chosen after training: the fit of profiles, the averages they give, and the snapshots on the disk."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from nanodit.errors import ConfigError, DataError
from prep.dataset.reader import Dataset
from tests.train.tiny import tiny_config
from train.__main__ import main
from train.checkpoint.checkpoint import load_checkpoint
from train.checkpoint.open import load_model
from train.checkpoint.posthoc import (
    FIT_LIMIT,
    fit_profile,
    list_snapshots,
    parse_weights,
    power_profile,
    reachable,
    read_snapshot,
    reconstruct,
    save_snapshot,
)
from train.loop.trainer import Trainer
from train.method.ema import EMA, EmaConfig, PowerAverages, gamma_of, power_decay
from train.method.schedule import snapshot_steps

CPU = torch.device("cpu")
ON = "ema.snapshots=8"


class Walk(nn.Module):
    """Weights that drift linearly and, in half of their entries, also wander."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(40))
        self.rng = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def step(self) -> None:
        self.w += torch.arange(40.0) / 1000
        self.w[20:] += torch.randn(20, generator=self.rng) / 10


def walk(run: Path, steps: int, sigma_rel: float, count: int = 12) -> tuple[dict, dict, torch.Tensor]:
    """Walk with snapshots; returns the stored averages at the end, the wished one directly, and all weights."""
    model, config = Walk(), EmaConfig(snapshots=count)
    power, wished = PowerAverages(model, config), EMA(model, partial(power_decay, gamma=gamma_of(sigma_rel)))
    trajectory = []
    for step in range(1, steps + 1):
        model.step()
        trajectory.append(model.w.detach().double().clone())
        power.update(model, step)
        wished.update(model, step)
        if step in snapshot_steps(steps, count):
            save_snapshot(run, step, power)
    return power.tensors(), wished.state, torch.stack(trajectory)


def stored_profiles(steps: int, count: int) -> np.ndarray:
    at = sorted(snapshot_steps(steps, count))
    return np.stack([power_profile(width, step, steps) for step in at for width in (0.05, 0.1)])


# The fit


@pytest.mark.parametrize(("sigma_rel", "at"), [(0.05, 700), (0.1, 1000), (0.28, 1000)])
def test_a_profile_is_what_the_decays_make_of_each_step(sigma_rel, at):
    weights = np.eye(1000)
    average = np.zeros(1000)
    for step in range(1, at + 1):
        decay = power_decay(step, gamma_of(sigma_rel))
        average = decay * average + (1 - decay) * weights[step - 1]
    profile = power_profile(sigma_rel, at, 1000)
    np.testing.assert_allclose(profile, average, rtol=1e-9, atol=1e-15)
    assert profile.sum() == pytest.approx(1)
    assert not profile[at:].any()


def test_no_other_coefficients_of_sum_one_fit_better():
    stored, wished = stored_profiles(600, 8), power_profile(0.15, 600, 600)
    fit = fit_profile(stored, wished)
    assert fit.coefficients.sum() == pytest.approx(1, abs=1e-12)
    assert fit.error == pytest.approx(np.linalg.norm(wished - fit.coefficients @ stored) / np.linalg.norm(wished))
    rng = np.random.default_rng(0)
    for _ in range(50):
        shift = rng.standard_normal(len(stored)) * 1e-3
        other = (fit.coefficients + shift - shift.mean()) @ stored
        assert np.linalg.norm(wished - other) >= np.linalg.norm(wished - fit.coefficients @ stored)
    # the Lagrange system of the same problem, solved directly
    gram, one = stored @ stored.T, np.ones((len(stored), 1))
    system = np.block([[gram, one], [one.T, np.zeros((1, 1))]])
    exact = np.linalg.solve(system, np.append(stored @ wished, 1))[:-1]
    np.testing.assert_allclose(fit.coefficients, exact, atol=1e-8)


@pytest.mark.parametrize("index", [0, 7, 23])
def test_a_stored_profile_comes_back_exactly(index):
    stored = stored_profiles(600, 12)
    fit = fit_profile(stored, stored[index])
    assert fit.error == 0
    assert fit.coefficients.tolist() == np.eye(24)[index].tolist()


def test_any_profile_can_be_wished_for():
    """A fixed decay of .99 over 600 steps, which forgets as fast as sigma_rel 1/6."""
    decay, steps = 0.99, 600
    profile = (1 - decay) * decay ** np.arange(steps - 1, -1, -1)
    profile /= profile.sum()
    assert fit_profile(stored_profiles(steps, 16), profile).error < 0.1
    assert fit_profile(stored_profiles(steps, 60), profile).error < 0.02


def test_more_snapshots_reach_further():
    reach = {n: reachable([(s, w) for s in sorted(snapshot_steps(600, n)) for w in (0.05, 0.1)], 600) for n in (8, 12)}
    assert reach[12][0] < reach[8][0] < 0.05
    assert reach[12][1] > reach[8][1] > 0.15
    low, high = reach[12]
    assert fit_profile(stored_profiles(600, 12), power_profile(low, 600, 600)).error <= FIT_LIMIT
    assert fit_profile(stored_profiles(600, 12), power_profile(high, 600, 600)).error <= FIT_LIMIT
    assert low <= 0.033  # what configs/train/base.yaml says
    assert high >= 0.2


# Averages


@pytest.mark.parametrize("sigma_rel", [0.04, 0.07, 0.08, 0.15])
def test_a_known_trajectory_is_averaged_as_if_it_had_been_asked_for(tmp_path, sigma_rel, capsys):
    own, direct, trajectory = walk(tmp_path, 600, sigma_rel)
    ours = reconstruct(tmp_path, 600, own, sigma_rel)["w"]
    printed = capsys.readouterr().out
    assert f"post-hoc average of sigma_rel {sigma_rel:g}: fit error " in printed
    assert "from 24 stored averages of 12 steps" in printed
    explicit = torch.from_numpy(power_profile(sigma_rel, 600, 600)) @ trajectory
    torch.testing.assert_close(direct["w"].double(), explicit, rtol=1e-5, atol=1e-5)
    spread = trajectory.std(0)
    off = ((ours.double() - explicit).abs() / spread)[1:]  # w[0] stays where it is
    print(off[:19].max(), off.max())
    assert off[:19].max() < 1e-3, "linear drift"
    assert off.max() < 0.01, "and noise"
    other = torch.from_numpy(power_profile(0.2, 600, 600)) @ trajectory
    assert ((other - explicit).abs() / spread)[1:].max() > 0.1, "the test can tell widths apart"


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1])
def test_a_stored_average_is_returned_bit_for_bit(tmp_path, sigma_rel):
    own, direct, _ = walk(tmp_path, 600, sigma_rel)
    ours = reconstruct(tmp_path, 600, own, sigma_rel)["w"]
    assert torch.equal(ours, direct["w"])
    assert torch.equal(ours, own[f"{sigma_rel}/w"])


def test_a_constant_stays_what_it_is(tmp_path):
    """Coefficients that do not sum to 1 would scale it: at .2 the unconstrained ones sum to .993."""
    model = Walk()
    power = PowerAverages(model, EmaConfig(snapshots=12))
    torch.nn.init.constant_(model.w, 3.0)
    for step in range(1, 601):
        power.update(model, step)
        if step in snapshot_steps(600, 12):
            save_snapshot(tmp_path, step, power)
    torch.testing.assert_close(
        reconstruct(tmp_path, 600, power.tensors(), 0.2)["w"], torch.full((40,), 3.0), atol=1e-5, rtol=0
    )


def test_a_bad_fit_is_refused_with_what_is_within_reach(tmp_path):
    own, _, _ = walk(tmp_path, 600, 0.1)
    with pytest.raises(ConfigError, match=r"the fit's error is 17\.0%, above 5%\. Choose one between 0\.03\d and 0\.2"):
        reconstruct(tmp_path, 600, own, 0.02)
    shutil.rmtree(tmp_path / "ema_snapshots")  # the checkpoint's own two alone
    with pytest.raises(ConfigError, match="2 stored averages of 1 steps"):
        reconstruct(tmp_path, 600, own, 0.2)


def test_an_earlier_step_uses_nothing_later(tmp_path):
    walk(tmp_path / "long", 600, 0.08)
    early = {
        f"{width}/{n}": v
        for width, s in read_snapshot(list_snapshots(tmp_path / "long")[400]).items()
        for n, v in s.items()
    }
    expected = reconstruct(tmp_path / "long", 400, early, 0.08)["w"]
    for step, file in list_snapshots(tmp_path / "long").items():
        if step > 400:
            file.write_bytes(b"never read")
    assert torch.equal(reconstruct(tmp_path / "long", 400, early, 0.08)["w"], expected)


@pytest.mark.parametrize("text", ["posthoc", "posthoc:", "posthoc:x", "posthoc:0", "posthoc:0.3", "posthoc:nan", "raw"])
def test_weights_that_mean_nothing_are_refused(text):
    with pytest.raises(ConfigError, match=r"must be ema, model, or posthoc:SIGMA_REL"):
        parse_weights(text)
    assert parse_weights("posthoc:0.08") == 0.08
    assert parse_weights("model") is None


# Snapshots


@pytest.mark.parametrize(("steps", "count"), [(5000, 12), (600, 8), (100, 16), (5, 8)])
def test_snapshots_are_spaced_evenly_and_end_with_the_run(steps, count):
    taken = sorted(snapshot_steps(steps, count))
    assert len(taken) == min(steps, count)
    assert taken[-1] == steps
    assert max(np.diff([0, *taken])) - min(np.diff([0, *taken])) <= 1


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing", "record"])
def test_a_damaged_snapshot_is_refused_by_its_hash(tmp_path, damage):
    own, _, _ = walk(tmp_path, 600, 0.1)
    file = list_snapshots(tmp_path)[300]
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-2] ^= 1
        file.write_bytes(data)
    elif damage == "truncate":
        file.write_bytes(data[:-4])
    elif damage == "missing":
        file.unlink()
    else:
        file.with_suffix(".json").write_text("{")
    with pytest.raises(DataError, match=r"step-000300.*restore it from a copy, or delete step-000300\.json"):
        reconstruct(tmp_path, 600, own, 0.08)
    file.with_suffix(".json").unlink()
    reconstruct(tmp_path, 600, own, 0.08)  # as the message says, without it


# Runs


def make(dataset: Path, output: Path, *overrides: str) -> Trainer:
    config = tiny_config(dataset, output, *overrides)
    config.run_folder.mkdir(exist_ok=True)
    return Trainer(config, Dataset(dataset), CPU)


@pytest.fixture(scope="module")
def run(tiny_dataset, tmp_path_factory) -> Path:
    """The folder of a run of twelve steps with eight snapshots, of which retention keeps one checkpoint."""
    trainer = make(tiny_dataset, tmp_path_factory.mktemp("posthoc") / "run", ON, "checkpoint.keep_last=1")
    trainer.run()
    return trainer.config.run_folder


def contents(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "ema_snapshots").iterdir()}


def test_retention_never_removes_snapshots(run):
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000012"]
    assert list(list_snapshots(run)) == [1, 3, 4, 6, 7, 9, 10, 12]
    assert len(contents(run)) == 16
    last = read_snapshot(list_snapshots(run)[12])
    saved = load_checkpoint(run / "checkpoints" / "step-000012").power
    assert all(torch.equal(value, saved[f"{width}/{name}"]) for width in last for name, value in last[width].items())


def test_the_first_snapshot_is_the_first_steps_weights(tiny_dataset, tmp_path):
    """Whose decay is 0; the second is between them and the next ones, nearer to these."""
    make(tiny_dataset, tmp_path / "run", ON, "train.steps=2", "checkpoint.every_steps=1").run()
    first, second = (load_checkpoint(tmp_path / "run" / "checkpoints" / f"step-00000{step}") for step in (1, 2))
    for step, width in ((1, 0.05), (1, 0.1), (2, 0.1)):
        average = read_snapshot(list_snapshots(tmp_path / "run")[step])[width]
        share = 0.0 if step == 1 else 0.5 ** (gamma_of(width) + 1)
        for name, value in average.items():
            expected = share * first.model[name].double() + (1 - share) * (first, second)[step - 1].model[name].double()
            torch.testing.assert_close(value.double(), expected, atol=1e-7, rtol=0)


def test_a_model_is_loaded_with_any_average(run, capsys):
    model, config, _ = load_model(run, "posthoc:0.08")
    assert config.ema.snapshots == 8
    assert "post-hoc average of sigma_rel 0.08: fit error" in capsys.readouterr().out
    stored = load_checkpoint(run / "checkpoints" / "step-000012")
    exact, _, _ = load_model(run, "posthoc:0.1")
    for name, parameter in exact.named_parameters():
        assert torch.equal(parameter, stored.power[f"0.1/{name}"])
    differs = [not torch.equal(value, stored.ema[name]) for name, value in model.state_dict().items()]
    assert any(differs)


def test_the_command_line_draws_with_any_average(tiny_dataset, run, tmp_path, capsys):
    key = Dataset(tiny_dataset).rows("holdout")[0]["key"]

    def sample(weights: str) -> int:
        output = tmp_path / f"{weights.replace(':', '-')}.png"
        what = ["--checkpoint", str(run), "--key", key, "--steps", "1", "--output", str(output)]
        return main(["sample", *what, "--weights", weights])

    assert [sample(weights) for weights in ("ema", "posthoc:0.08", "posthoc:0.1")] == [0, 0, 0]
    assert "fit error" in capsys.readouterr().out
    pictures = [Image.open(path) for path in sorted(tmp_path.glob("*.png"))]
    settings = [json.loads(picture.text["nanodit"])["checkpoint"].partition(" on ")[0] for picture in pictures]
    assert settings == ["step 12 (ema)", "step 12 (posthoc:0.08)", "step 12 (posthoc:0.1)"]
    assert len({picture.tobytes() for picture in pictures}) > 1
    assert sample("posthoc:8") == 2
    assert "such as posthoc:0.08" in capsys.readouterr().err


def test_without_snapshots_there_is_nothing_to_load_or_to_pay(tiny_dataset, tmp_path):
    trainer = make(tiny_dataset, tmp_path / "run", "train.steps=3")
    trainer.run()
    assert not (tmp_path / "run" / "ema_snapshots").exists()
    files = json.loads((tmp_path / "run" / "checkpoints" / "step-000003" / "manifest.json").read_text())["files"]
    assert set(files) == {"model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"}
    with pytest.raises(ConfigError, match=r"trained without `ema\.snapshots`"):
        load_model(tmp_path / "run", "posthoc:0.1")


def test_a_resumed_run_has_the_same_snapshots_and_none_of_a_discarded_branch(tiny_dataset, run, tmp_path):
    broken = make(tiny_dataset, tmp_path / "run", ON)
    broken.snapshot_steps |= {8}  # as of another schedule: a resume from step 6 must not leave it behind
    real = broken.update

    def update(accumulated):
        if broken.step == 8:
            raise KeyboardInterrupt
        return real(accumulated)

    broken.update = update
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    assert list(list_snapshots(tmp_path / "run")) == [1, 3, 4, 6, 7, 8]
    resumed = make(tiny_dataset, tmp_path / "run", ON)
    resumed.load(load_checkpoint(tmp_path / "run" / "checkpoints" / "step-000006"))
    resumed.run()
    assert contents(tmp_path / "run") == contents(run)
    ours, theirs = (folder / "checkpoints" / "step-000012" / "power.safetensors" for folder in (tmp_path / "run", run))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_run_from_the_start_begins_without_snapshots(tiny_dataset, run, tmp_path):
    """What was stored before the first checkpoint belongs to no trajectory that can be continued."""
    shutil.copytree(run / "ema_snapshots", tmp_path / "run" / "ema_snapshots")
    make(tiny_dataset, tmp_path / "run", ON, "train.steps=2").run()
    assert list(list_snapshots(tmp_path / "run")) == [1, 2]


def test_a_branch_takes_the_snapshots_along(tiny_dataset, run, tmp_path):
    source = Path(shutil.copytree(run, tmp_path / "source"))
    branch = make(tiny_dataset, tmp_path / "branch", ON, "train.steps=14")
    branch.load(load_checkpoint(source / "checkpoints" / "step-000012"))
    branch.run()
    assert list(list_snapshots(tmp_path / "branch")) == [1, 3, 4, 6, 7, 9, 10, 12, 14]
    load_model(tmp_path / "branch", "posthoc:0.08")
    damaged = list_snapshots(source)[3]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    other = make(tiny_dataset, tmp_path / "other", ON, "train.steps=14")
    with pytest.raises(DataError, match="step-000003"):
        other.load(load_checkpoint(source / "checkpoints" / "step-000012"))


def test_a_checkpoint_without_the_averages_is_refused(tiny_dataset, run, tmp_path):
    off = make(tiny_dataset, tmp_path / "off", "train.steps=3")
    off.run()
    on = make(tiny_dataset, tmp_path / "on", ON)
    with pytest.raises(DataError, match="power averages are of sigma_rel"):
        on.load(load_checkpoint(tmp_path / "off" / "checkpoints" / "step-000003"))
