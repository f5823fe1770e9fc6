"""The learning rate against its formulas."""

from __future__ import annotations

import math

import pytest
import torch

from prep.dataset.reader import Dataset
from tests.train.tiny import tiny_config
from train.loop.tracking import read_metrics
from train.loop.trainer import Trainer
from train.method.schedule import Course, learning_rate, snapshot_steps


def rates(steps, *arguments):
    return [learning_rate(step, steps, 1e-3, 1e-6, *arguments) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_it_warms_up_and_then_only_falls(schedule):
    values = rates(1000, None, schedule)
    assert values[:50] == pytest.approx([1e-3 * (step + 1) / 51 for step in range(50)])
    assert values[50] == pytest.approx(1e-3)
    assert values[50:] == sorted(values[50:], reverse=True)
    assert values[-1] < 1e-5


@pytest.mark.parametrize(("steps", "warmup"), [(1000, 50), (100_000, 500)])
def test_warm_up_is_a_twentieth_of_the_steps_at_most_500(steps, warmup):
    values = [learning_rate(step, steps, 1.0, 0.0) for step in (warmup - 1, warmup)]
    assert values == [warmup / (warmup + 1), 1.0]
    assert learning_rate(0, 10, 1.0, 0.0, 0) == 1.0


def test_cosine_is_half_a_period():
    for step, value in enumerate(rates(1000, 100)[100:]):
        assert value == pytest.approx(1e-6 + 0.5 * (1e-3 - 1e-6) * (1 + math.cos(math.pi * step / 900)))


def test_wsd_is_constant_and_then_one_minus_the_root():
    values = rates(1000, 100, "wsd", 0.2)
    assert values[100:801] == pytest.approx([1e-3] * 701, rel=1e-12)
    for step, value in enumerate(values[800:]):
        assert value == pytest.approx(1e-6 + (1e-3 - 1e-6) * (1 - math.sqrt(step / 200)))
    assert values[850] == pytest.approx((1e-3 + 1e-6) / 2), "half way down after a quarter of the decay"


def test_a_decay_longer_than_what_the_warm_up_leaves_starts_after_it():
    values = rates(100, 40, "wsd", 1.0)
    assert values[39] < values[40] == pytest.approx(1e-3)
    assert values[55] == pytest.approx((1e-3 + 1e-6) / 2)
    assert learning_rate(100, 100, 1e-3, 1e-6, 40, "wsd") == pytest.approx(1e-6), "past the end it stays down"


def test_a_run_follows_and_logs_it(tiny_dataset, tmp_path):
    shape = ["train.schedule=wsd", "train.decay_share=0.5", "train.warmup=2", "train.steps=6", "train.lr_min=1e-4"]
    config = tiny_config(tiny_dataset, tmp_path / "run", *shape)
    config.run_folder.mkdir()
    trainer = Trainer(config, Dataset(tiny_dataset), torch.device("cpu"))
    used, real = [], trainer.optimizer.step

    def step():
        used.append((trainer.optimizer.adamw.lr, trainer.optimizer.muon.lr))
        real()

    trainer.optimizer.step = step
    trainer.run()
    expected = [learning_rate(step, 6, 3e-3, 1e-4, 2, "wsd", 0.5) for step in range(6)]
    assert [record["train/learning_rate"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == expected
    assert used == [(rate, rate) for rate in expected]
    assert expected[2:4] == [3e-3, 3e-3]
    assert expected[5] < expected[4] < 2e-3


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_after_the_end_the_rate_stays_where_it_ended(schedule):
    assert learning_rate(150, 100, 1.0, 0.25, 0, schedule) == 0.25
    assert learning_rate(99, 100, 1.0, 0.25, 99, schedule) == 1.0  # the one step that is left


def test_wsd_decays_on_the_last_fifth():
    rates = [learning_rate(step, 1000, 1.0, 0.0, 0, "wsd") for step in (799, 800, 850, 999)]
    assert rates == pytest.approx([1.0, 1.0, 0.5, 1 - math.sqrt(199 / 200)])


def test_a_step_belongs_to_the_part_that_it_is_in():
    course = Course((600, 1000))
    assert [course.part(step) for step in (0, 599, 600, 999, 1200)] == [(0, 600), (0, 600), *[(600, 1000)] * 3]
    assert [course.within(step) for step in (0, 599, 600, 700)] == [(0, 600), (599, 600), (0, 400), (100, 400)]


def test_snapshots_are_those_of_each_part():
    assert snapshot_steps(1000, 8) == {125, 250, 375, 500, 625, 750, 875, 1000}
    assert snapshot_steps(5, 8) == {1, 2, 3, 4, 5}
    assert Course((600, 1000)).snapshot_steps(8) == {75, 150, 225, 300, 375, 450, 525, 600, 625, 750, 875, 1000}
