"""``train plan``: what it says is what a run then does, and what cannot fit is refused with what would help."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from prep.config import load_config_with_origins
from prep.errors import ConfigError
from prep.shards import Dataset
from tests.train.test_trainer import make
from tests.train.tiny import write_config
from train.__main__ import main
from train.config import TrainConfig
from train.cost import phase_costs
from train.memory import meta_trainer
from train.plan import look_ahead, parse_size
from train.rehearsal import Shapes


@pytest.fixture
def config(tiny_dataset, tmp_path) -> Path:
    return write_config(tmp_path / "tiny.yaml", tiny_dataset, tmp_path / "run")


def shapes_of(dataset) -> Shapes:
    return Shapes.of(dataset.info, dataset.rows("train"))


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


def test_flops_are_those_that_a_run_counts(tiny_dataset, tmp_path):
    dataset = Dataset(tiny_dataset)
    overrides = ("repa.enabled=true", "repa.until=1.0", "tread.enabled=true", "tread.start=0", "tread.end=-1",
                 "tread.dense_tail=0.5", "tread.tail_routed=0", "train.steps=16",
                 "conditioning.preset=null", "conditioning.table={text: 1.0}")  # fmt: skip
    trainer = make(tiny_dataset, tmp_path / "run", *overrides)
    trainer.flops = trainer._flop_counter()
    for step in range(0, 16, 2):  # routed and dense ones
        trainer.step = step
        for number in trainer.batches.plan.numbers(step):
            trainer.micro_step(trainer.batches.make(number))
    executed = trainer.flops.take() / 8
    (cost,) = phase_costs(meta_trainer(trainer.config, dataset), shapes_of(dataset))
    # of few steps the buckets and the longest captions of a micro-batch have their own mean
    assert sum(cost.flops.values()) == pytest.approx(executed, rel=0.06)
    assert cost.flops["repa"] > 0
    assert cost.recomputed == 0


@pytest.mark.parametrize("text", ["", "GB", "24 apples", "-3GB", "1e3GB"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ConfigError, match="such as 24GB"):
        parse_size(text)


def test_a_base_can_be_named(config, capsys):
    assert main(["plan", "--config", str(config), "--base", "128", "--memory", "8GB"]) == 0
    out = capsys.readouterr().out
    assert "set aside: seven equal buckets of base 128" in out
    assert re.search(r"^104x152 ", out, flags=re.MULTILINE)
    assert main(["plan", "--config", str(config), "--base", "65"]) == 2
