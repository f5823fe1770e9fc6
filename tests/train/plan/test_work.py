"""What is counted of a network by kind, and the time that it takes a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nanodit.config import load_config
from prep.dataset.reader import Dataset
from tests.train.tiny import tiny_config
from train.config import TrainConfig
from train.hardware import GPUS, Gpu
from train.loop.flops import META, count_flops, flop_counter
from train.plan.cost import phase_costs, range_on
from train.plan.memory import meta_trainer
from train.plan.rehearsal import Shapes, open_dataset
from train.plan.work import DATA_SHEET, FAST, SLOW, Work, count_work, kinds_on, seconds_on


def meta(*shape: int, requires_grad: bool = True) -> torch.Tensor:
    return torch.empty(shape, device=META, requires_grad=requires_grad)


def test_a_product_counts_its_flops_and_what_grows_with_the_images():
    weight = meta(32, 16)
    work = Work(*count_work(lambda x: F.linear(x, weight), meta(1, 8, 16)))
    forward = 2 * 8 * 16 * 32
    assert work.matrix == 3 * forward == count_flops(lambda x: F.linear(x, weight), meta(1, 8, 16))
    x, y = 2 * 8 * 16, 2 * 8 * 32  # bytes in bfloat16
    # forwards x and y; of the input's gradient that of y and of x; of the weight's gradient x and that of y
    assert work.moved == (x + y) + (y + x) + (x + y)
    assert work.attention == 0


def test_other_operators_count_what_they_read_and_write():
    x, number = 4 * 1000, 4
    forward = (x + x) + (x + number)  # abs and sum, each read and written
    # the gradient of the sum is a number that is repeated; abs takes the sign of x, and their product is the gradient
    backward = 2 * number + (x + x) + (x + number + x)
    for function in (lambda a: a.abs(), lambda a: a.abs().view(10, 100).T):  # views are free
        assert Work(*count_work(function, meta(1000))) == (0, 0, 0, forward + backward)


def test_two_images_are_twice_the_work_of_one(tiny_dataset, tmp_path):
    dataset = Dataset(tiny_dataset)
    trainer = meta_trainer(tiny_config(tiny_dataset, tmp_path / "run"), dataset)
    shapes = Shapes.of(dataset.info, dataset.rows("train"))

    def of(images: int) -> Work:
        conditions = shapes.conditions("64x64", images, 32, META)
        return Work(*count_work(trainer.model, meta(images, 3, 64, 64, requires_grad=False), meta(images), conditions))

    one, two = of(1), of(2)
    assert all(one)
    for kind in Work._fields:  # without the weights, their gradients and what is made of positions alone
        # of a single image more lies side by side already, so a few copies are spared
        assert getattr(two, kind) == pytest.approx(2 * getattr(one, kind), rel=0.03 if kind == "elementwise" else 0.01)


def test_the_kinds_add_up_to_the_flops_of_a_run(tiny_dataset, tmp_path):
    dataset = Dataset(tiny_dataset)
    overrides = ("repa.enabled=true", "repa.until=1.0", "tread.enabled=true", "tread.start=0", "tread.end=-1")
    trainer = meta_trainer(tiny_config(tiny_dataset, tmp_path / "run", *overrides), dataset)
    (cost,) = phase_costs(trainer, Shapes.of(dataset.info, dataset.rows("train")))
    assert cost.work.flops == pytest.approx(sum(cost.flops.values()))
    assert cost.work.attention > 0
    counter = flop_counter(trainer.model, trainer.losses.values(), count_work)
    counter.note("repa", 3, meta(1, 5, 1))
    assert Work(*counter.take()).flops == 3 * counter._counts["repa"](meta(1, 5, 1))[0]


def test_each_kind_takes_the_time_of_what_bounds_it():
    gpu, work = Gpu(100.0, 1000.0), Work(matrix=2e14, moved=1e12, attention=1e14, elementwise=3e12)
    assert kinds_on(gpu, work, DATA_SHEET) == {"matrix products": 2.0, "attention": 1.0, "elementwise": 3.0}
    assert kinds_on(gpu, work._replace(moved=5e12), DATA_SHEET)["matrix products"] == 5.0
    fast, slow = seconds_on(gpu, work)
    assert slow == pytest.approx(2 / SLOW.matrix + 1 / SLOW.attention + 3 / SLOW.bandwidth)
    assert fast == pytest.approx(2 / FAST.matrix + 1 / FAST.attention + 3 / FAST.bandwidth)


@pytest.mark.slow
def test_what_a_card_reaches_follows_from_its_bandwidth():
    file = Path("configs/train/baseline.yaml")
    config = load_config(TrainConfig, file)
    dataset, _ = open_dataset(config, file, None)
    costs = phase_costs(meta_trainer(config, dataset), Shapes.of(dataset.info, dataset.rows("train")))
    flops = sum(cost.steps * sum(cost.flops.values()) for cost in costs)
    reached = {}
    for card in ("GeForce RTX 3060", "GeForce RTX 4090", "H100 80GB HBM3"):
        reached[card] = [flops / seconds / (GPUS[card].tflops * 1e12) for seconds in range_on(GPUS[card], costs)]
    assert reached["GeForce RTX 3060"] > reached["GeForce RTX 4090"] > reached["H100 80GB HBM3"]
    most, least = reached["GeForce RTX 4090"]
    assert 0.1 < least < most < 0.3, "a .3 of all cards was too much for this one"
