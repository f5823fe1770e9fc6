"""``train plan``: what it says is what a run then does, and what cannot fit is refused with what would help."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanodit.config import load_config, load_config_with_origins
from nanodit.console import say
from nanodit.errors import ConfigError, ResourceError
from nanodit.files import sha256_file
from prep.config import PrepConfig
from prep.dataset.reader import Dataset
from tests.train.loop.test_trainer import CPU, make, weights_of
from tests.train.tiny import tiny_config, write_config
from train.__main__ import main
from train.config import TrainConfig
from train.loop.flops import META, flop_counter
from train.loop.trainer import Trainer
from train.plan.cost import CARDS, check_disk, disk_of, folder_bytes, most_checkpoints, phase_costs
from train.plan.memory import CONTEXT, meta_trainer
from train.plan.plan import lines, look_ahead, parse_size
from train.plan.rehearsal import Shapes, StandIn, changed, open_dataset, probe
from train.plan.remedies import explained, room_of
from train.plan.work import Work

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def config(tiny_dataset, tmp_path) -> Path:
    return write_config(tmp_path / "tiny.yaml", tiny_dataset, tmp_path / "run")


def shapes_of(dataset) -> Shapes:
    return Shapes.of(dataset.info, dataset.rows("train"))


# What it says


def test_the_table_says_where_every_value_comes_from(config, capsys):
    child = config.with_name("child.yaml")
    child.write_text("extends: tiny.yaml\ntrain: {lr: 2e-3}\n")
    assert main(["plan", "--config", str(child), "--memory", "8GB", "model.depth=3", "flow.shift=2"]) == 0
    out = capsys.readouterr().out
    by = dict(re.findall(r"^(\S+) +.*?  (\S.*)$", out, flags=re.MULTILINE))
    assert by["train.lr"] == str(child)
    assert by["train.batch_size"] == str(config)
    assert by["model.depth"] == "command line"
    assert by["train.warmup"] == "default", "its section is in the file, the key is not"
    assert out.rstrip().splitlines()[-1] == "plan: wrote nothing; the run fits in 8.0 GB and on the disk"
    assert not (config.parent / "run").exists()


def test_origins_of_replaced_sections(tmp_path):
    (tmp_path / "a.yaml").write_text("dataset: d\noutput: o\nmodel: {depth: 3}\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\nmodel: {num_heads: 2}\n")
    _, origins = load_config_with_origins(TrainConfig, tmp_path / "b.yaml", ["train={steps: 7}"])
    assert origins["model.depth"] == str(tmp_path / "a.yaml")
    assert origins["model.num_heads"] == str(tmp_path / "b.yaml")
    assert origins["train.steps"] == "command line"
    assert origins["train.lr"] == origins["seed"] == "default"


def test_samples_batches_and_parameters_are_the_trainers(config, tiny_dataset, tmp_path):
    report = look_ahead(config, ["train.steps=2", "train.token_budget=200"], memory="8GB")
    trainer = make(tiny_dataset, tmp_path / "run", "train.token_budget=200")
    plan = trainer.batches.plan
    assert report.samples["kept"] == 26
    assert report.samples["held_out"] == 6
    assert report.samples["unseen"] == plan.order.unseen(2 * 2) > 0
    assert sum(report.parameters.values()) > sum(p.numel() for p in trainer.model.parameters())
    assert report.parameters["blocks"] == sum(p.numel() for p in trainer.model.blocks.parameters())
    assert {row["bucket"]: row["images"] for row in report.batches} == {
        bucket: plan.most_images(bucket, 1.0) for bucket in plan.order.sizes
    }
    assert any("buckets smaller than a micro-batch" in note for note in report.notes)


def test_it_says_which_guidance_pictures_are_drawn_with(config):
    routed = ["tread.enabled=true", "tread.start=0", "tread.end=-1", "visual_debug.every_steps=1"]

    def said(*overrides):
        (note,) = (note for note in look_ahead(config, [*routed, *overrides], memory="8GB").notes if "guidance" in note)
        return note

    assert said() == "pictures are drawn with no guidance; visual_debug.guidance={self: 3} guides by the routed network"
    assert said("visual_debug.guidance={self: 3.0}") == "pictures are drawn with guidance self=3"
    assert said("visual_debug.guidance=2", "tread.enabled=false") == "pictures are drawn with guidance 2"


def test_flops_are_those_that_a_run_counts(tiny_dataset, tmp_path):
    dataset = Dataset(tiny_dataset)
    overrides = ("repa.enabled=true", "repa.until=1.0", "tread.enabled=true", "tread.start=0", "tread.end=-1",
                 "tread.dense_tail=0.5", "tread.tail_routed=0", "train.steps=16",
                 "conditioning.preset=null", "conditioning.table={text: 1.0}")  # fmt: skip
    trainer = make(tiny_dataset, tmp_path / "run", *overrides)
    trainer.flops = flop_counter(trainer.model, trainer.losses.values())
    for step in range(0, 16, 2):  # routed and dense ones
        trainer.step = step
        for number in trainer.batches.plan.numbers(step):
            trainer.micro_step(trainer.batches.make(number))
    executed = trainer.flops.take() / 8
    (cost,) = phase_costs(meta_trainer(trainer.config, dataset), shapes_of(dataset))
    # of few steps the buckets and the longest captions of a micro-batch have their own mean
    assert sum(cost.flops.values()) == pytest.approx(executed, rel=0.1)
    assert cost.flops["repa"] > 0
    assert cost.recomputed == 0


def test_phases_checkpointing_and_routing_change_the_flops(tiny_dataset, tmp_path):
    dataset = Dataset(tiny_dataset)

    def costs(*overrides):
        config = tiny_config(tiny_dataset, tmp_path / "run", "model.patch_size=4", *overrides)
        return phase_costs(meta_trainer(config, dataset), shapes_of(dataset))

    (plain,) = costs()
    half, whole = costs("train.phases=[{until_step: 5, scale: 0.5}]")
    assert (half.first_step, half.last_step, whole.first_step, whole.last_step) == (1, 5, 6, 12)
    assert half.flops["model"] < 0.5 * whole.flops["model"]
    assert whole.flops == plain.flops
    (again,) = costs("train.gradient_checkpointing=all")
    assert again.recomputed == pytest.approx(plain.flops["model"] / 3)
    assert again.work == pytest.approx([value * 4 / 3 for value in plain.work])
    (routed,) = costs("tread.enabled=true", "tread.start=0", "tread.end=-1", "tread.dense_tail=0")
    assert routed.flops["model"] < 0.8 * plain.flops["model"]


def test_json_is_one_document(config, capsys):
    assert main(["plan", "--config", str(config), "--memory", "16GiB", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["limit"] == 16 << 30
    assert report["memory"]["peak"] > sum(report["memory"][name] for name in ("weights", "optimizer", "gradients"))
    assert report["reading"]["disk_rate"] is None, "tars of some kB tell nothing"
    assert {"key": "seed", "value": 0, "origin": "default"} in report["config"]
    assert report["seconds"]["measured"] is None
    assert report["problems"] == []


def test_what_is_said_on_the_way_is_no_part_of_json(config, capsys, monkeypatch):
    monkeypatch.setattr("train.plan.plan.measure", lambda *_: say("compile: 12 shapes"))
    assert main(["plan", "--config", str(config), "--measure", "--json"]) == 0
    out, err = capsys.readouterr()
    json.loads(out)
    assert "compile: 12 shapes" in err


def test_without_a_gpu_to_fit_only_the_disk_is_spoken_of(config, capsys):
    assert main(["plan", "--config", str(config)]) == 0
    out = capsys.readouterr().out.rstrip().splitlines()
    assert out[-1] == "plan: wrote nothing; the run fits on the disk"
    assert "  for a GPU of 8 GB or more" in out


def test_the_patch_distance_of_the_perceptual_loss_costs_flops(tiny_dataset, tmp_path):
    overrides = ("perceptual.every=2", "perceptual.size=32", "perceptual.t_max=1.0", "flow.shift=1",
                 "perceptual.dino_weight=0.01")  # fmt: skip
    trainer = meta_trainer(tiny_config(tiny_dataset, tmp_path / "run", *overrides), Dataset(tiny_dataset))
    (cost,) = phase_costs(trainer, shapes_of(Dataset(tiny_dataset)))
    view = torch.empty(1, 3, 32, 32, device="meta")
    count = flop_counter(trainer.model, trainer.losses.values())._counts["dino"]
    assert cost.flops["dino"] == pytest.approx(trainer.images_per_step / 2 * count(view.clone().requires_grad_(), view))
    assert cost.flops["lpips"] > 0


@pytest.mark.parametrize(("text", "size"), [("24GB", 24e9), ("24", 24e9), ("8 GiB", 8 << 30), ("500mb", 5e8)])
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "24 apples", "-3GB", "1e3GB"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ConfigError, match="such as 24GB"):
        parse_size(text)


# Without a dataset


def test_without_a_dataset_the_config_that_would_write_it_says_what_it_will_be(capsys):
    config, _ = load_config_with_origins(TrainConfig, "configs/train/production.yaml")
    dataset, what = open_dataset(config, Path("configs/train/production.yaml"), None)
    assert isinstance(dataset, StandIn)
    assert "does not exist yet" in what
    assert "base 1024, production encoders (the config of prep that writes it)" in what
    shapes = shapes_of(dataset)
    assert shapes.conditions("1216x832", 1, 32, META).patches.shape == (1, 26, 38, 1024)
    assert shapes.features.widths == {"text": 1024, "cls": 1024, "patches": 1024, "pose": 3}
    assert (shapes.longest_text, shapes.mean_text) == (512, 262)


def test_a_base_can_be_named(config, capsys):
    assert main(["plan", "--config", str(config), "--base", "128", "--memory", "8GB"]) == 0
    out = capsys.readouterr().out
    assert "set aside: assuming seven equal buckets of base 128" in out
    assert re.search(r"^104x152 ", out, flags=re.MULTILINE)
    assert main(["plan", "--config", str(config), "--base", "65"]) == 2


# What cannot fit


def test_too_little_memory_ends_with_4_and_what_would_help_the_best_first(config, capsys):
    overrides = ["model.depth=8", "train.batch_size=16"]
    enough = look_ahead(config, overrides, memory="8GB").memory.peak
    arguments = ["plan", "--config", str(config), "--memory", f"{enough // 10**6 - 1}MB", *overrides]
    assert main(arguments) == 4
    error = capsys.readouterr().err
    assert "out of memory: the run takes about" in error
    assert "(estimate; most in micro-step, 16 images of" in error
    units = {"MB": 1e6, "kB": 1e3}
    saved = [float(number) * units[unit] for number, unit in re.findall(r"saves ([\d.]+) (MB|kB)", error)]
    same = [line for line in error.splitlines() if "saves" in line and "another network" not in line]
    assert len(same) >= 4
    assert saved[: len(same)] == sorted(saved[: len(same)], reverse=True)
    assert "train.token_budget=70 train.gradient_checkpointing=all: saves" in same[0]
    assert same[0].endswith("fits")
    key = dict(item.split("=") for item in same[0].strip().split(":")[0].split(" "))
    fixed = [f"{name}={value}" for name, value in key.items()]
    assert main([*arguments, *fixed]) == 0, "the first remedy is one"


def test_a_remedy_shows_the_same_images(config, tiny_dataset, tmp_path):
    trainer = make(tiny_dataset, tmp_path / "a" / "run")
    fixed = make(tiny_dataset, tmp_path / "b" / "run", "train.token_budget=70", "train.gradient_checkpointing=all")
    for step in range(3):
        keys = [
            sorted(key for number in t.batches.plan.numbers(step) for key in t.batches.make(number).keys)
            for t in (trainer, fixed)
        ]
        assert keys[0] == keys[1]


def full(monkeypatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12 - free, free))


def test_fault_t10_a_full_disk_is_foreseen_and_the_run_not_started(config, capsys, monkeypatch):
    full(monkeypatch, 1_000_000)
    assert main(["plan", "--config", str(config), "--memory", "8GB", "ema.snapshots=8"]) == 4
    error = capsys.readouterr().err
    assert "4 at once" in error
    assert "and 1.0 MB are free" in error
    assert "checkpoint.keep_last=2 saves" in error
    assert main(["run", "--config", str(config), "ema.snapshots=8"]) == 4
    assert "and 1.0 MB are free" in capsys.readouterr().err
    assert not (config.parent / "run" / "metrics.jsonl").exists()
    full(monkeypatch, 10**9)
    assert main(["run", "--config", str(config), "train.steps=1"]) == 0


def test_the_bytes_foreseen_are_those_written(tiny_dataset, tmp_path):
    overrides = ("ema.snapshots=8", "checkpoint.every_steps=5", "visual_debug.every_steps=6", "train.steps=12")
    trainer = make(tiny_dataset, tmp_path / "run", *overrides)
    disk = disk_of(trainer)
    trainer.run()
    run = trainer.config.run_folder
    saved = [folder_bytes(path) for path in sorted((run / "checkpoints").iterdir())]
    assert len(saved) == disk.most == 3
    for size in saved:  # with headers, state and manifest
        assert disk.checkpoint < size < 1.5 * disk.checkpoint
    assert disk.snapshots == pytest.approx(folder_bytes(run / "ema_snapshots"), rel=0.5)
    assert disk.needed > 0.8 * (folder_bytes(run / "checkpoints") + folder_bytes(run / "ema_snapshots"))
    assert disk_of(trainer).there == folder_bytes(run)
    assert disk_of(trainer).needed < disk.needed, "what is there already has its room"


def test_checkpoints_at_once(tiny_dataset, tmp_path):
    def most(*overrides):
        return most_checkpoints(tiny_config(tiny_dataset, tmp_path / "run", "train.steps=100", *overrides))

    every = "checkpoint.every_steps=9"
    assert most(every) == 12
    assert most(every, "checkpoint.keep_last=3") == 4, "the next one is whole before the oldest goes"
    assert most(every, "checkpoint.keep_last=30") == 12
    assert most(every, "checkpoint.keep_last=3", "checkpoint.keep_every=6") == 9, "18, 36, ..., 90 stay"
    assert most("checkpoint.every_steps=60", "checkpoint.every_minutes=1", "checkpoint.keep_last=3") == 4


# Measured


def test_measured_here_and_nothing_left(config, capsys):
    before = sorted(path.name for path in config.parent.iterdir())
    report = look_ahead(config, ["visual_debug.every_steps=6", "train.compile=false"], memory=None, measured=True)
    assert sorted(path.name for path in config.parent.iterdir()) == before
    measured = report.measured
    assert measured.what == "process"
    assert measured.peak > 50e6
    assert measured.batch == "4 images of 88x48"
    assert report.disk.checkpoint < measured.checkpoint < 1.5 * report.disk.checkpoint
    assert 0 < report.measured_seconds < 60
    assert any(re.search(r" in all, if begun now until \w{3} \d\d \w{3} \d\d:\d\d; ", line) for line in lines(report))
    assert re.fullmatch(r"\d+ micro-batches of \d+ images of the dataset", measured.samples)
    assert report.limit is None
    assert report.peak == report.memory.peak, "a process on a CPU says nothing about a GPU"


def test_measured_with_the_data_that_a_run_waits_for(config, tiny_dataset, monkeypatch):
    monkeypatch.setattr("train.plan.measure.SECONDS", 0.5)

    def rate(*overrides):
        found = look_ahead(config, ["train.compile=false", "data.workers=1", *overrides], memory=None, measured=True)
        return found.measured.flop_rate

    usual, read = rate("data.cache_gb=0"), Dataset.pixels
    monkeypatch.setattr(Dataset, "pixels", lambda self, row: (time.sleep(0.05), read(self, row))[1])
    assert rate("data.cache_gb=0") < 0.7 * usual


def test_measured_on_made_up_samples_where_there_is_no_dataset(config, monkeypatch):
    monkeypatch.setattr("train.plan.measure.SECONDS", 0.1)
    prep = load_config(PrepConfig, None, ["source=.", "output=none", "base=64", "encoders=demo"])
    monkeypatch.setattr("train.plan.plan.open_dataset", lambda *_: (StandIn(prep), "made up"))
    before = sorted(path.name for path in config.parent.iterdir())
    measured = look_ahead(config, ["data.flip=0.5"], memory=None, measured=True).measured
    assert measured.samples.endswith("images made up")
    assert measured.flop_rate > 0
    assert sorted(path.name for path in config.parent.iterdir()) == before


def test_times_are_ranges(config):
    report = look_ahead(config, ["train.steps=1000"], memory="8GB")
    (phase,) = report.phases
    large = replace(phase, work=Work(*(1e4 * value for value in phase.work)))  # of a network whose steps take long
    report = replace(report, phases=[large])
    for card in CARDS:
        least, most = report.span(card)
        assert 0 < least < report.seconds(card) < most
        assert report.seconds(card) == pytest.approx((least + most) / 2)
        (line,) = [line for line in lines(report) if line.startswith(f"  {card}: ")]
        assert re.search(r": [\d.]+ to [\d.]+ s a step, \d+ to \d+ images/s, .+ in all \(.+ to .+\)$", line)
        assert json.loads(report.as_json())["seconds_range"][card] == [least, most]


# On a GPU


def test_probing_changes_nothing(tiny_dataset, tmp_path):
    straight, probed = (make(tiny_dataset, tmp_path / name / "run", "train.steps=3") for name in "ab")
    probe(probed)
    assert all(parameter.grad is None for parameter in probed.model.parameters())
    for trainer in (straight, probed):
        trainer.run()
    assert weights_of(straight.config.run_folder, 3) == weights_of(probed.config.run_folder, 3)


def test_fault_t09_out_of_memory_ends_with_4_and_what_would_help(config, tiny_dataset, capsys, monkeypatch):
    assert main(["run", "--config", str(config), "train.steps=12", "checkpoint.every_steps=3", "seed=0"]) == 0
    run = config.parent / "run"
    before = {path: sha256_file(path) for path in sorted((run / "checkpoints").rglob("*")) if path.is_file()}
    capsys.readouterr()
    take = Trainer.micro_step

    def fail(trainer, batch):
        if trainer.device.type == "meta":
            return take(trainer, batch)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("train.loop.trainer.Trainer.micro_step", fail)
    assert main(["run", "--config", str(config), "train.steps=12", f"output={run.with_name('other')}"]) == 4
    error = capsys.readouterr().err
    assert "out of memory: the run takes about" in error
    assert "train.gradient_checkpointing=all" in error
    assert "The last checkpoint, if there is one, is intact" in error
    assert before == {path: sha256_file(path) for path in before}


def card(monkeypatch, free: float, total: float, ours: float = 0.0) -> torch.device:
    """A GPU of so many bytes, as far as its memory is asked for."""
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device=None: (int(free), int(total)))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device=None: int(ours))
    return torch.device("cuda")


def test_the_room_is_what_other_programs_leave_free(monkeypatch):
    assert room_of(CPU) is None
    room = room_of(card(monkeypatch, free=19.3e9, total=24e9))  # .7 are this process's own context
    assert (room.limit, room.held) == (20e9, 4e9)
    assert str(room) == "the GPU has 20.0 GB free, and other programs hold 4.0 GB"
    room = room_of(card(monkeypatch, free=9.3e9, total=24e9, ours=10e9))
    assert (room.limit, room.held) == (20e9, 4e9), "what is ours can be used again"
    room = room_of(card(monkeypatch, free=23.7e9, total=24e9))
    assert (room.limit, room.held) == (24e9, 0), "a context smaller than assumed is nobody else's"
    assert str(room) == "the GPU has 24.0 GB"


def test_plan_compares_with_what_is_free(config, monkeypatch):
    """A card that is large enough, of which another program holds too much."""
    monkeypatch.setattr("train.plan.plan.measure", lambda *arguments: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    config.write_text(config.read_text().replace("device: cpu", "device: auto"))
    need = look_ahead(config, memory="24GB").memory.peak
    total = 4 * need
    card(monkeypatch, free=total, total=total)
    fits = look_ahead(config, memory=None)
    assert (fits.limit, fits.held, fits.problems) == (total, 0, [])
    card(monkeypatch, free=need // 2 - CONTEXT, total=total)
    full = look_ahead(config, memory=None)
    assert full.limit == pytest.approx(need // 2, abs=2)
    assert full.held == pytest.approx(total - need // 2, abs=2)
    assert "and other programs hold" in full.problems[0]
    assert "which other programs leave free: they hold" in "\n".join(lines(full))


def test_other_errors_are_not_explained_away(tiny_dataset, tmp_path):
    config = tiny_config(tiny_dataset, tmp_path / "run")
    with pytest.raises(ZeroDivisionError), explained(config, Dataset(tiny_dataset), CPU):
        raise ZeroDivisionError


def test_changed_configs_are_checked(tiny_dataset, tmp_path):
    config = tiny_config(tiny_dataset, tmp_path / "run")
    assert changed(config, {"train.token_budget": 99}).train.token_budget == 99
    assert changed(config, {}) == config
    with pytest.raises(ConfigError, match=r"train\.steps"):
        changed(config, {"train.steps": 0})


def test_a_run_that_fits_is_not_refused(tiny_dataset, tmp_path, monkeypatch):
    trainer = make(tiny_dataset, tmp_path / "run")
    check_disk(trainer)
    full(monkeypatch, disk_of(trainer).needed)
    check_disk(trainer)
    full(monkeypatch, disk_of(trainer).needed - 1)
    with pytest.raises(ResourceError, match="a checkpoint, 4 at once"):
        check_disk(trainer)
