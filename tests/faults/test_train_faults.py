"""What a training run meets: the exit code, the error's text, and what is on the disk afterwards."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nanodit.config import load_config, walk_keys
from nanodit.errors import ConfigError, ResourceError
from prep.dataset.reader import Dataset
from tests.forked import ForkedPopen, in_child
from tests.train.tiny import write_config, write_dataset
from train.__main__ import main
from train.checkpoint.checkpoint import find_latest, load_checkpoint, save_checkpoint
from train.checkpoint.resume import check_same_run
from train.checkpoint.run_folder import StopRequest, lock_run_folder
from train.config import TrainConfig
from train.hardware import can_compile
from train.loop.tracking import read_metrics

PARTS = ("model", "ema", "optimizer")
STEPS = 12


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("faults") / "dataset")


@pytest.fixture(scope="module")
def straight(dataset, tmp_path_factory) -> Path:
    """The run folder of the run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("straight")
    assert main(["run", "--config", str(write_config(folder / "c.yaml", dataset, folder / "run"))]) == 0
    return folder / "run"


@pytest.fixture
def config(dataset, tmp_path) -> Path:
    return write_config(tmp_path / "c.yaml", dataset, tmp_path / "run")


@pytest.fixture
def interrupted(config, straight, tmp_path) -> Path:
    """A copy of the straight run's folder in which everything after step 6 is lost, except what was logged."""
    shutil.copytree(straight, tmp_path / "run")
    for step in (9, 12):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:06d}")
    return tmp_path / "run"


def train(config: Path, *arguments: str) -> int:
    return main(["run", "--config", str(config), *arguments])


def train_process(
    config: Path, *arguments: str, fault: str | None = None, start: type[subprocess.Popen] = ForkedPopen
) -> subprocess.Popen:
    """Start ``train run``: forked, but where a test is about what a new Python does before that."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **({"NANODIT_FAULT": fault} if fault else {})}
    command = [sys.executable, "-m", "train", "run", "--config", str(config), *arguments]
    return start(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def weights(run: Path, step: int = STEPS) -> dict[str, bytes]:
    """Every tensor file of a step, and the snapshots on the way to it."""
    files = [*(run / "checkpoints" / f"step-{step:06d}").glob("*.safetensors"), *run.glob("ema_snapshots/*")]
    return {file.name: file.read_bytes() for file in files}


def deterministic(run: Path) -> list[dict[str, float]]:
    """The logged records without speed and memory."""
    return [
        {key: value for key, value in record.items() if not key.startswith(("sys/", "memory/"))}
        for record in read_metrics(run / "metrics.jsonl")
    ]


def assert_same_run(run: Path, straight: Path) -> None:
    assert weights(run) == weights(straight)
    assert deterministic(run) == deterministic(straight)
    ours, theirs = (load_checkpoint(folder / "checkpoints" / f"step-{STEPS:06d}").state for folder in (run, straight))
    assert {**ours, "config": None} == {**theirs, "config": None}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {stepz: 3}", "unknown key `train.stepz`; did you mean `train.steps`?"),
        ("train:\n  steps: 3\n   lr: 1e-3", "c.yaml"),
        ('train: {compile: "false"}', "`train.compile`"),
        ("seed: 1\nseed: 2", "c.yaml:4: duplicate key 'seed'"),
        ("seed: !!python/object:os.system {}", "c.yaml:3"),
        ("conditioning: {preset: null, table: {text: 0.4}}", "shares must be >= 0 and sum to 1, not 0.4"),
    ],
)
def test_T01_a_wrong_config_is_refused_before_anything_is_written(dataset, tmp_path, capsys, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(f"dataset: {dataset}\noutput: {tmp_path / 'run'}\n{text}\n")
    assert train(path) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "stage",
    ["after_model", "after_ema", "after_optimizer", "after_state", "after_tmp", "before_rename", "after_rename"],
)
@pytest.mark.parametrize("again", [False, True], ids=["first", "replacing"])
def test_T02_killed_at_any_stage_of_a_checkpoint(interrupted, stage, again, capsys):
    """``again``: the step exists already, damaged, as after a fallback."""
    old = load_checkpoint(interrupted / "checkpoints" / "step-000006")
    tensors = {part: getattr(old, part) for part in PARTS}
    step = 6 if again else 9
    expected = 9 if stage == "after_rename" else 6
    if again:
        (old.path / "ema.safetensors").write_bytes(b"damaged")
        expected = 6 if stage == "after_rename" else 3

    def save():
        save_checkpoint(interrupted, step, tensors, {**old.state, "step": step})

    assert in_child(save, fault=f"checkpoint.{stage}:kill") == -signal.SIGKILL
    assert find_latest(interrupted).name == f"step-{expected:06d}"
    save()  # the next one sweeps up and succeeds
    assert find_latest(interrupted).name == f"step-{step:06d}"
    assert not list((interrupted / "checkpoints").glob(".*"))


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing", "extra"])
def test_T03_a_damaged_checkpoint_is_named_and_the_one_before_it_used(config, interrupted, straight, damage, capsys):
    file = interrupted / "checkpoints" / "step-000006" / "model.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 0x10
        file.write_bytes(data)
    elif damage == "truncate":
        file.write_bytes(data[:-7])
    elif damage == "missing":
        file.unlink()
    else:  # a manifest that lists a file which is no part of a checkpoint
        manifest = json.loads((file.parent / "manifest.json").read_text())
        manifest["files"]["extra.safetensors"] = manifest["files"]["model.safetensors"]
        (file.parent / "manifest.json").write_text(json.dumps(manifest))
    assert train(config) == 0
    printed = capsys.readouterr().out
    assert "warning: " in printed
    assert f"step-000006/{'manifest.json' if damage == 'extra' else 'model.safetensors'}" in printed
    assert "continuing from" in printed
    assert "step-000003" in printed
    assert_same_run(interrupted, straight)
    assert load_checkpoint(interrupted / "checkpoints" / "step-000006"), "the damaged one was replaced"


def test_T03_no_valid_checkpoint_is_an_error_and_nothing_is_overwritten(config, interrupted, capsys):
    for folder in (interrupted / "checkpoints").iterdir():
        (folder / "state.json").write_text("{}")
    assert train(config) == 3
    assert "all 2 checkpoints are damaged" in capsys.readouterr().err
    assert len(list((interrupted / "checkpoints").iterdir())) == 2


def test_T04_a_pickle_is_never_opened(config, interrupted, tmp_path, capsys):
    class Canary:
        def __reduce__(self):
            return (open, (str(tmp_path / "canary"), "w"))

    bomb = tmp_path / "model.pt"
    bomb.write_bytes(pickle.dumps(Canary()))
    assert train(config, "--resume", str(bomb)) == 2
    assert "is never loaded, because reading one can run any code" in capsys.readouterr().err
    sample = ["sample", "--prompt", "x", "--output", str(tmp_path / "x.png"), "--checkpoint"]
    assert main([*sample, str(bomb)]) == 2
    shutil.copy(bomb, interrupted / "checkpoints" / "step-000006" / "ema.safetensors")
    assert main([*sample, str(interrupted / "checkpoints" / "step-000006")]) == 3
    assert "ema.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "canary").exists()


@pytest.mark.slow
def test_T05_killed_twice_and_resumed_is_byte_equal(config, straight, tmp_path):
    run = tmp_path / "run"
    # once in the first steps, before any checkpoint, and once between two
    for fault in ("train.step:kill:2", "train.step:kill:8", None):
        process = train_process(config, fault=fault)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == (-signal.SIGKILL if fault else 0), output
    assert_same_run(run, straight)  # trap 30
    assert json.loads((run / "provenance.json").read_text())["started_at_steps"] == [0, 0, 6]


@pytest.mark.slow
def test_T05_killed_from_outside_at_a_moment_nobody_chose(config, dataset, tmp_path):
    steps = "train.steps=60"
    run, reference = tmp_path / "run", tmp_path / "reference"
    process = train_process(config, steps)
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 10):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    reached = len(read_metrics(metrics))
    saved = int(find_latest(run).name[5:])
    assert reached - saved <= 3, "a power cut costs at most what came after the last save"
    assert train(config, steps) == 0
    assert train(config, steps, f"output={reference}") == 0
    assert weights(run, 60) == weights(reference, 60)
    assert deterministic(run) == deterministic(reference)


@pytest.mark.slow
@pytest.mark.skipif(not can_compile("cpu"), reason="torch.compile needs a C++ compiler and Python's headers")
def test_T05_compiled_in_bf16_killed_and_resumed_is_byte_equal(config, tmp_path):
    import torch._inductor.compile_fx  # noqa: F401, once for the three

    overrides = ["train.compile=true", "train.precision=bf16", "train.steps=6"]
    for fault, output in (("train.step:kill:5", "run"), (None, "run"), (None, "straight")):
        process = train_process(config, *overrides, f"output={tmp_path / output}", fault=fault)
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == (-signal.SIGKILL if fault else 0), printed
    assert json.loads((tmp_path / "run" / "provenance.json").read_text())["started_at_steps"] == [0, 3]
    assert weights(tmp_path / "run", 6) == weights(tmp_path / "straight", 6)  # trap 30
    assert deterministic(tmp_path / "run") == deterministic(tmp_path / "straight")


def test_T06_a_changed_config_is_refused_with_the_difference(config, interrupted, straight, capsys):
    assert train(config, "train.lr=1e-3", "model.depth=3", "seed=4") == 2
    error = capsys.readouterr().err
    for line in ("train.lr: 0.003 -> 0.001", "model.depth: 2 -> 3", "seed: 0 -> 4"):
        assert line in error
    assert find_latest(interrupted).name == "step-000006"
    assert (
        train(config, "log_every=1", "checkpoint.every_steps=5", "visual_debug.every_steps=6", "data.prefetch=0") == 0
    )
    assert_same_run(interrupted, straight)


@pytest.mark.parametrize("key", [key for key in walk_keys(TrainConfig) if key not in ("dataset", "output")])
def test_T06_every_key_is_safe_or_refused_by_name(config, dataset, straight, key):
    checkpoint = load_checkpoint(straight / "checkpoints" / "step-000006")
    *sections, name = key.split(".")
    section = checkpoint.state["config"]
    for part in sections:
        section = section[part]
    section[name] = "another value"
    same = load_config(TrainConfig, config)
    arguments = checkpoint, same, Dataset(dataset).fingerprint, checkpoint.state["environment"]
    sections = ("log_every", "data", "checkpoint", "visual_debug", "validation")
    safe = key.split(".")[0] in sections and key not in ("data.flip", "data.short_captions")
    if safe or key == "train.gradient_checkpointing":
        check_same_run(*arguments)
    else:
        with pytest.raises(ConfigError, match=re.escape(f"{key}: 'another value' -> ")):
            check_same_run(*arguments)


def test_T06_a_key_that_came_later_counts_as_its_default(config, straight, dataset):
    checkpoint = load_checkpoint(straight / "checkpoints" / "step-000006")
    for name in ("token_budget", "phases"):
        del checkpoint.state["config"]["train"][name]
    del checkpoint.state["config"]["repa"]  # a whole section
    checkpoint.state["config"]["log_every"] = "what an older version wrote"
    same, other = (load_config(TrainConfig, config, more) for more in ([], ["train.token_budget=99"]))
    check_same_run(checkpoint, same, Dataset(dataset).fingerprint, checkpoint.state["environment"])
    with pytest.raises(ConfigError, match=r"train\.token_budget: None -> 99"):
        check_same_run(checkpoint, other, Dataset(dataset).fingerprint, checkpoint.state["environment"])


def test_T07_another_dataset_is_refused(config, interrupted, tmp_path, capsys):
    other = write_dataset(tmp_path / "other", seed=1)
    before = sorted(interrupted.rglob("*"))
    assert train(config, f"dataset={other}") == 3
    assert "the dataset's fingerprint is" in capsys.readouterr().err
    arguments = ["--key", "0" * 32, "--dataset", str(other), "--output", str(tmp_path / "x.png")]
    assert main(["sample", "--checkpoint", str(interrupted), *arguments]) == 3
    assert "its fingerprint is" in capsys.readouterr().err
    assert sorted(interrupted.rglob("*")) == before


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_T08_a_sample_that_is_not_a_number_stops_the_run(tmp_path, value, capsys):
    dataset = write_dataset(tmp_path / "dataset", text_of_one=value)
    config = write_config(tmp_path / "c.yaml", dataset, tmp_path / "run")
    assert train(config, "checkpoint.every_steps=1", "train.steps=60") == 3
    error = capsys.readouterr().err
    assert "is not finite. Optimiser and EMA were not touched" in error
    (record,) = (tmp_path / "run").glob("non-finite-step-*.json")
    content = json.loads(record.read_text())
    assert content["step"] == int(find_latest(tmp_path / "run").name[5:]) + 1
    bad = {image["key"] for image in content["images"] if image["loss"] == "nan"}
    assert len(bad) == 1, "the one sample, however often it is in the micro-batch"
    assert bad.pop() in error
    assert set(content["grad_norms"].values()) & {"nan", "inf"}
    assert f"the last checkpoint, {find_latest(tmp_path / 'run').name}, is intact" in error
    config = write_config(tmp_path / "c.yaml", dataset, tmp_path / "early")
    assert train(config, "checkpoint.every_steps=100", "train.steps=60", "train.grad_accumulation_steps=64") == 3
    assert "there is no checkpoint yet" in capsys.readouterr().err


def test_T10_a_disk_that_takes_no_more_is_a_resource_error_and_costs_no_checkpoint(tmp_path):
    """A limit on the size of files stands for the full disk."""
    save_checkpoint(tmp_path, 1, {part: {"w": torch.ones(2)} for part in PARTS}, {})

    def save():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        try:
            save_checkpoint(tmp_path, 2, {part: {"w": torch.ones(20_000)} for part in PARTS}, {})
        except ResourceError as error:
            sys.exit(0 if "step-000002.tmp/model.safetensors: cannot be written" in str(error) else 1)
        sys.exit(2)

    assert in_child(save) == 0
    assert find_latest(tmp_path).name == "step-000001"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"], "no half files"


def test_T11_a_signal_before_the_first_step_gives_75(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("train.run.Trainer", lambda *arguments: os.kill(os.getpid(), signal.SIGTERM))
    assert train(config) == 75
    assert "error: stopped by a signal" in capsys.readouterr().err


@pytest.mark.slow
def test_T11_sigterm_saves_and_says_how_to_continue(config, straight, tmp_path):
    process = train_process(config, "checkpoint.every_steps=1000", "train.steps=400")
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 5):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "SIGTERM: saving the last completed step" in output
    assert "the same command continues" in output
    step = int(find_latest(tmp_path / "run").name[5:])
    assert step == len(read_metrics(metrics)) >= 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_T11_the_second_signal_ends_at_once(number):
    def busy():
        with StopRequest() as stop:
            os.kill(os.getpid(), number)
            assert stop.requested
            os.kill(os.getpid(), number)
            time.sleep(30)

    started = time.monotonic()
    assert in_child(busy) == 75
    assert time.monotonic() - started < 10


def test_T11_a_signal_after_the_limit_of_hours_does_not_cut_off_the_save():
    def save():
        with StopRequest() as stop:
            stop.requested = True  # as --max-hours does, often just before the machine is taken away
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)

    assert in_child(save) == 0


@pytest.mark.parametrize("damage", ["deleted", "short", "flipped"])
def test_T12_a_bad_shard_stops_the_run_and_is_named(tmp_path, damage, capsys):
    dataset = write_dataset(tmp_path / "dataset")
    shard = dataset / "bucket_80x56" / "shard-000000.px.tar"
    data = bytearray(shard.read_bytes())
    if damage == "deleted":
        shard.unlink()
    elif damage == "short":
        shard.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    assert train(write_config(tmp_path / "c.yaml", dataset, tmp_path / "run")) == 3  # trap 35
    assert "bucket_80x56/shard-000000.px.tar, sample " in capsys.readouterr().err


def test_T13_small_buckets_and_sets_are_announced(config, capsys):
    assert train(config, "train.steps=1", "train.batch_size=16", "train.grad_accumulation_steps=1") == 0
    printed = capsys.readouterr().out
    assert "buckets smaller than a micro-batch, which they fill over several epochs" in printed
    assert "88x48 (1)" in printed
    assert "samples never shown" in printed
    assert train(config, "train.steps=2", "train.batch_size=64", f"output={config.parent / 'b'}") == 0
    assert "a step takes 128 images: more than the 26 training samples, so they repeat" in capsys.readouterr().out
    budget = ["train.token_budget=300", "train.batch_size=1", "train.grad_accumulation_steps=40"]
    assert train(config, "train.steps=2", *budget, f"output={config.parent / 'c'}") == 0
    printed = capsys.readouterr().out
    assert "images in a micro-batch at most: 56x80 4, 64x64 4, 80x56 4, 88x48 4" in printed
    assert " 0 samples never shown" in printed


def test_T15_the_second_trainer_on_a_folder_is_refused(config, tmp_path, capsys):
    with lock_run_folder(tmp_path / "run"):
        assert train(config) == 2
    error = capsys.readouterr().err
    assert f"another trainer (process {os.getpid()} on {socket.gethostname()}) is writing here" in error
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_T15_a_stale_lock_locks_nothing(config, tmp_path):
    def die():
        with lock_run_folder(tmp_path / "run"):
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(die) == -signal.SIGKILL
    assert (tmp_path / "run" / "run.lock").read_text().split()[0].isdigit()
    assert train(config, "train.steps=1") == 0


def test_T17_a_resume_hides_later_events_and_tolerates_a_torn_line(config, interrupted, straight):
    with open(interrupted / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "train/loss": 0.1')
    assert train(config) == 0
    assert_same_run(interrupted, straight)
    board = EventAccumulator(str(interrupted / "tensorboard"))
    board.Reload()
    events = [(event.step, event.value) for event in board.Scalars("train/loss")]
    assert [step for step, _ in events] == list(range(1, STEPS + 1))
    expected = [record["train/loss"] for record in deterministic(straight)]
    assert [value for _, value in events] == pytest.approx(expected, rel=1e-6)


def test_T17_a_torn_line_in_the_middle_is_damage(config, interrupted, capsys):
    path = interrupted / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], lines[3][:20], *lines[4:], ""]))
    assert train(config) == 3
    assert "metrics.jsonl:4" in capsys.readouterr().err
