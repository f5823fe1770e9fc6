"""Micro-batches by a token budget, and the resolution schedule."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nanodit.errors import ConfigError
from nanodit.rng import generator
from prep.dataset.buckets import Bucket, crop_to_bucket
from prep.dataset.reader import Dataset
from tests.train.loop.test_trainer import _unfreeze, logged, make
from train.data.batch_plan import BatchPlan, Phase, scale_of, scaled_size
from train.data.order import Order
from train.data.prefetch import prefetch
from train.data.samples import TrainingSet, resize
from train.loop.announce import announce
from train.loop.microbatch import deal_subsets
from train.loop.tracking import read_metrics
from train.method import flow
from train.method.dropout import ConditioningConfig
from train.method.flow import timesteps

NAMES = ["64x64", "80x48", "48x80", "96x32", "32x96"]
HALF = [Phase(until_step=3, scale=0.5)]


def make_plan(sizes, batch_size=1, slots=16, budget=None, phases=(), patch_size=8, seed=0) -> BatchPlan:
    sizes = dict(zip(NAMES, sizes)) if isinstance(sizes, list) else sizes
    return BatchPlan(Order(sizes, batch_size, seed), slots, budget, phases, patch_size)


@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=5).filter(any),
    batch_size=st.integers(1, 5),
    slots=st.integers(1, 12),
    budget=st.integers(64, 700),
    seed=st.integers(0, 2),
)
@settings(max_examples=60, deadline=None)
def test_a_step_is_the_same_images_however_it_is_cut(sizes, batch_size, slots, budget, seed):
    plan = make_plan(sizes, batch_size, slots, budget, HALF, seed=seed)
    plain = make_plan(sizes, batch_size, slots, seed=seed)
    for step in range(6):
        cuts = plan.of_step(step)
        assert sorted(i for cut in cuts for i in cut.images) == list(range(batch_size * slots))
        named = {i: (cut.bucket, item) for cut in cuts for i, item in zip(cut.images, cut.items)}
        dealt = [plan.order[number] for number in range(step * slots, (step + 1) * slots)]
        expected = [(slot.bucket, item) for slot in dealt for item in slot.items]
        assert [named[i] for i in range(len(named))] == expected, "the order's, whatever the budget and the phase"
        assert [(c.bucket, c.items) for c in plain.of_step(step)] == [(slot.bucket, slot.items) for slot in dealt]
        for cut in cuts:
            assert cut.size == scaled_size(cut.bucket, 0.5 if step < 3 else 1)
            assert len(cut.items) * (cut.size[0] // 8) * (cut.size[1] // 8) <= budget
        for bucket in {cut.bucket for cut in cuts}:
            lengths = [len(cut.items) for cut in cuts if cut.bucket == bucket]
            assert max(lengths) - min(lengths) <= 1
            assert (len(lengths) - 1) * plan.most_images(bucket, 0.5 if step < 3 else 1) < sum(lengths), "as few as fit"


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any),
    slots=st.integers(1, 30),
    budget=st.integers(64, 2000),
    seed=st.integers(0, 2),
)
@settings(max_examples=40, deadline=None)
def test_trap_34_every_sample_is_shown_as_often_as_any_other(sizes, slots, budget, seed):
    plan = make_plan(sizes, 1, slots, budget, seed=seed)
    seen, total = Counter(), sum(sizes)
    steps = -(-3 * total // slots)  # three epochs and a bit
    for step in range(steps):
        seen.update((cut.bucket, item) for cut in plan.of_step(step) for item in cut.items)
        epochs = (step + 1) * slots / total
        assert plan.order.unseen((step + 1) * slots) == total - len(seen)
        assert max(seen.values()) <= int(epochs) + 1
        if epochs >= 1:
            assert len(seen) == total  # trap 34
            assert min(seen.values()) >= int(epochs)


def test_one_number_names_step_and_micro_batch():
    plan = make_plan([20, 10, 3], slots=16, budget=300)
    assert plan.numbers(0).start == 0
    for step in range(5):
        assert all(divmod(number, plan.stride) == (step, i) for i, number in enumerate(plan.numbers(step)))
    plain = make_plan([20, 10, 3], batch_size=4, slots=3)
    assert [number for step in range(4) for number in plain.numbers(step)] == list(range(12)), "as ever"


def test_unequal_micro_batches_get_every_subset_as_often_as_the_table_says():
    table = ConditioningConfig(preset="quickstart").resolve()
    sizes, counts = [1, 6, 2, 3], [Counter() for _ in range(4)]
    for step in range(3000):
        chunks = deal_subsets(table, sizes, generator(1, step))
        assert [len(chunk) for chunk in chunks] == sizes
        together = Counter(subset for chunk in chunks for subset in chunk)
        assert all(abs(together[subset] - 12 * share) < 1 for subset, share in table.items())
        for counter, chunk in zip(counts, chunks):
            counter.update(chunk)
    for size, counter in zip(sizes, counts):
        for subset, share in table.items():
            assert counter[subset] / (3000 * size) == pytest.approx(share, abs=0.03)


def test_phases_end_with_their_step():
    phases = [Phase(until_step=2, scale=0.25), Phase(until_step=5, scale=0.5)]
    assert [scale_of(phases, step) for step in range(7)] == [0.25, 0.25, 0.5, 0.5, 0.5, 1, 1]
    assert scale_of([], 0) == 1
    assert scaled_size("832x1216", 0.5) == (416, 608)
    assert scaled_size("96x96", 0.333) == (32, 32)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.phases=[{until_step: 4, scale: 0.5}]", r"bucket 56x80 at scale 0.5 is 28x40.*smaller model.patch_size"),
        ("train.token_budget=60", r"one image of bucket .* has (64|70|66) tokens. Raise it"),
        ("train.phases=[{until_step: 4, scale: 0.5}, {until_step: 4, scale: 1}]", "until_step must grow"),
        ("train.phases=[{until_step: 4, scale: 1.5}]", "less than or equal to 1"),
    ],
)
def test_what_cannot_be_cut_is_refused(tiny_dataset, tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        make(tiny_dataset, tmp_path / "run", override)


# What micro-batches of it hold


def test_each_image_weighs_the_same_whatever_the_budget(tiny_dataset, tmp_path):
    gradients, lengths = [], []
    for budget in ("null", 1000, 200, 70):
        trainer = make(
            tiny_dataset, tmp_path / "run", "train.batch_size=1", "train.grad_accumulation_steps=12",
            f"train.token_budget={budget}", "conditioning.preset=null", "conditioning.table={all: 1}",
        )  # fmt: skip
        _unfreeze(trainer)
        batches = [trainer.batches.make(number) for number in trainer.batches.plan.numbers(1)]
        lengths.append(max(len(batch.x) for batch in batches))
        for batch in batches:
            trainer.micro_step(batch)
        gradients.append({n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None})
    assert lengths[0] == lengths[3] == 1
    assert lengths[1] > lengths[2] == 3
    for other in gradients[1:]:  # same images, noise and times: only how many go together differs
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=2e-3, atol=2e-6)


def test_a_phase_changes_pixels_tokens_and_shift_alone(tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(flow, "resolution_shift", lambda height, width: height * width / 1500)
    small, whole = (
        make(tiny_dataset, tmp_path / "run", "model.patch_size=4", f"train.phases={phases}", "tread.enabled=true",
             "tread.start=0", "tread.end=0")
        for phases in ("[{until_step: 2, scale: 0.5}]", "[]")
    )  # fmt: skip
    for number in range(6):
        ours, theirs = small.batches.make(number), whole.batches.make(number)
        assert ours.keys == theirs.keys
        assert ours.subsets == theirs.subsets
        for part, other in zip(ours.groups, theirs.groups):
            for name in ("text", "cls", "patches", "pose"):
                one, two = getattr(part.conditions, name), getattr(other.conditions, name)
                assert (one is None and two is None) or torch.equal(one, two), "cached features stay"
        height, width = theirs.x.shape[2:]
        if number >= 4:
            assert torch.equal(ours.x, theirs.x)
            assert torch.equal(ours.t, theirs.t)
            continue
        assert ours.x.shape[2:] == ours.noise.shape[2:] == (height // 2, width // 2)
        assert ours.keep_ids.shape[1] * 4 == theirs.keep_ids.shape[1] == height * width // 16 // 2
        assert ours.active_tokens(4, 0) * 4 == theirs.active_tokens(4, 0)
        shifts = []
        for other in (number // 2 * 2, number // 2 * 2 + 1):
            h, w = small.batches.make(other).x.shape[2:]
            shifts += [h * w / 1500] * 4
        drawn = timesteps(small.config.flow, generator(0, "timesteps", number // 2), np.array(shifts))
        assert np.array_equal(ours.t.numpy(), drawn[number % 2 * 4 :][:4])
        assert not torch.equal(ours.t, theirs.t)


def test_a_smaller_image_is_what_prep_would_have_made(tiny_dataset):
    dataset = Dataset(tiny_dataset)
    data = TrainingSet(dataset, cache_gb=1e-3)
    row = next(row for row in dataset.rows("train") if row["bucket"] == "80x56")
    expected = np.asarray(crop_to_bucket(Image.fromarray(dataset.pixels(row)), Bucket(40, 28)))
    assert np.array_equal(data.pixels(row, (40, 28)), expected)
    flat = np.full((56, 80, 3), 77, np.uint8)
    assert (resize(flat, 40, 28) == 77).all()


def test_the_cache_holds_one_size_of_an_image(tiny_dataset):
    dataset = Dataset(tiny_dataset)
    data = TrainingSet(dataset, cache_gb=4e-5)
    rows = data.rows["64x64"][:5]
    budget = data._budget
    for size in ((32, 32), (64, 64), (16, 16), None):
        for row in rows:
            pixels = data.pixels(row, size)
            assert pixels.shape[:2] == (size or (64, 64))[::-1]
        held = sum(array.nbytes for array in data._cache.values())
        assert held + data._budget == budget
        assert data._budget >= 0
    assert len(data._cache) == 3


def test_prefetching_shifts_nothing(tiny_dataset, tmp_path):
    trainer = make(
        tiny_dataset, tmp_path / "run", "model.patch_size=4", "train.batch_size=1", "train.grad_accumulation_steps=7",
        "train.token_budget=600", "train.phases=[{until_step: 3, scale: 0.5}]",
    )  # fmt: skip
    batches = trainer.batches
    at_once = [(b.keys, b.subsets, b.t) for b in map(batches.make, islice(batches.numbers(1), 20))]
    for depth in (1, 4):
        ahead = prefetch(batches.make, batches.numbers(1), depth)
        for (keys, subsets, t), batch in zip(at_once, ahead):
            assert (batch.keys, batch.subsets) == (keys, subsets)
            assert torch.equal(batch.t, t)
        ahead.close()


def test_a_run_through_the_phases(tiny_dataset, tmp_path, capsys):
    overrides = ["model.patch_size=2", "train.batch_size=1", "train.grad_accumulation_steps=30", "train.steps=3"]
    phases = "train.phases=[{until_step: 1, scale: 0.25}, {until_step: 2, scale: 0.5}]"
    trainer = make(tiny_dataset, tmp_path / "run", *overrides, phases, "train.token_budget=2300")
    announce(trainer)
    trainer.run()
    printed = capsys.readouterr().out
    assert "images at 0.25 times their size up to step 1, 0.5 times their size up to step 2, then whole" in printed
    assert "images in a micro-batch at most, at scale 0.5: 56x80 8, 64x64 8, 80x56 8, 88x48 8" in printed
    assert "a step takes 30 images: more than the 26 training samples, so they repeat" in printed
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [record["train/scale"] for record in records] == [0.25, 0.5, 1]
    tokens = [record["sys/active_tokens"] for record in records]
    assert tokens[0] * 16 == pytest.approx(tokens[2], rel=0.1)
    assert tokens[1] * 4 == pytest.approx(tokens[2], rel=0.1)
    make(tiny_dataset, tmp_path / "plain", "train.steps=1").run()
    assert "train/scale" not in logged(tmp_path / "plain")[0]


def test_a_phase_that_never_ends_says_nothing_of_whole_images():
    lines = make_plan([5], phases=[Phase(until_step=9, scale=0.5)], slots=2).describe(steps=9)
    assert lines == ["images at 0.5 times their size up to step 9"]
