"""What a step writes to metrics.jsonl and TensorBoard, against the micro-batches that it was computed from."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from prep.dataset.reader import Dataset
from tests.train.tiny import tiny_config
from train.loop.announce import announce
from train.loop.tracking import read_metrics
from train.loop.trainer import Trainer
from train.method.ema import ema_decay
from train.method.flow import interpolate
from train.model.conditions import subset_name

STEPS = 3
OPTIONS = (
    f"train.steps={STEPS}", "conditioning.preset=default", "tread.enabled=true", "tread.start=1", "tread.end=1",
    "tread.keep=0.25", "tread.dense_tail=0.34", "tread.tail_routed=0", "model.depth=4", "flow.t_min=0.3",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tiny_dataset, tmp_path_factory):
    """A short routed run: its trainer and its folder."""
    folder = tmp_path_factory.mktemp("logged") / "run"
    config = tiny_config(tiny_dataset, folder, *OPTIONS)
    folder.mkdir()
    trainer = Trainer(config, Dataset(tiny_dataset), torch.device("cpu"))
    trainer.run()
    return trainer, folder


def batches(trainer, step):
    return [trainer.batches.make(number) for number in trainer.batches.plan.numbers(step)]


def test_condition_shares_are_those_of_the_images(run):
    trainer, folder = run
    for step, record in enumerate(read_metrics(folder / "metrics.jsonl")):
        dealt = Counter(subset for batch in batches(trainer, step) for subset in batch.subsets)
        logged = {
            key.rsplit("/")[-1]: value for key, value in record.items() if key.startswith("train/condition_share/")
        }
        assert logged == {subset_name(subset): dealt[subset] / 8 for subset in trainer.table}


def test_active_tokens_are_what_a_block_sees_in_the_mean(run):
    trainer, folder = run
    for step, record in enumerate(read_metrics(folder / "metrics.jsonl")):
        expected = 0.0
        for batch in batches(trainer, step):
            tokens = batch.x.shape[2] * batch.x.shape[3] // 64
            routed = step < 2  # the last third is dense
            assert (batch.keep_ids is not None) == routed
            kept = batch.keep_ids.shape[1] if routed else tokens
            expected += len(batch.keys) * (3 * tokens + kept) / 4  # one of four blocks is routed
        assert record["sys/active_tokens"] == pytest.approx(expected)


def test_the_velocity_norm_is_that_of_what_the_network_says_first(run):
    trainer, folder = run
    squares = []
    for batch in batches(trainer, 0):  # the final layer starts at zero, so the first image is grey
        velocity = interpolate(batch.x, batch.noise, batch.t) / batch.t.clamp_min(0.3).view(-1, 1, 1, 1)
        squares += velocity.square().flatten(1).mean(1).tolist()
    record = read_metrics(folder / "metrics.jsonl")[0]
    assert record["train/velocity_norm"] == pytest.approx((sum(squares) / 8) ** 0.5, rel=1e-5)


def test_the_decay_of_the_average_is_logged(run):
    for record in read_metrics(run[1] / "metrics.jsonl"):
        assert record["train/ema_decay"] == ema_decay(record["step"], STEPS, None)


def test_tensorboard_shows_every_value(run):
    board = EventAccumulator(str(run[1] / "tensorboard")).Reload()
    for record in read_metrics(run[1] / "metrics.jsonl"):
        for tag in record.keys() - {"step"}:
            (shown,) = [event.value for event in board.Scalars(tag) if event.step == record["step"]]
            assert shown == pytest.approx(record[tag], rel=1e-6)


def test_the_start_says_what_each_optimiser_has(run, capsys):
    announce(run[0])
    assert run[0].optimizer.describe() in capsys.readouterr().out.splitlines()
