"""The order of the data, the cache, and the background thread."""

from __future__ import annotations

import contextlib
import json
import threading
from collections import Counter
from itertools import count, islice, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanodit.errors import ConfigError, DataError
from nanodit.rng import generator
from prep.dataset.reader import Dataset
from tests.train.tiny import tiny_config
from train.data.order import Order
from train.data.prefetch import prefetch, thread_count
from train.data.samples import TrainingSet, bucket_size, check_patch_size, load_conditions, load_pixels
from train.loop.trainer import Trainer

ORDERS = {
    "sizes": st.lists(st.integers(0, 40), min_size=1, max_size=7).filter(any),
    "batch_size": st.integers(1, 33),
    "seed": st.integers(0, 3),
}


def test_the_order_is_a_pure_function():
    sizes = {"64x64": 13, "80x56": 9}
    forwards = [Order(sizes, 4, seed=7)[i] for i in range(40)]  # a new object every time: no hidden state
    once = Order(dict(reversed(sizes.items())), 4, seed=7)
    assert [once[i] for i in reversed(range(40))] == forwards[::-1]
    assert [Order(sizes, 4, seed=8)[i] for i in range(40)] != forwards


@given(**ORDERS)
@settings(max_examples=60, deadline=None)
def test_trap_34_every_sample_weighs_the_same_whatever_its_bucket(sizes, batch_size, seed):
    sizes = {f"bucket{i}": size for i, size in enumerate(sizes)}
    order = Order(sizes, batch_size, seed)
    total, laps = sum(sizes.values()), 3
    last_epoch = laps * batch_size  # after b epochs every bucket has emitted a whole number of micro-batches
    emitted = order._before(last_epoch)
    assert emitted * batch_size == last_epoch * total
    seen = Counter()
    for i in range(emitted):
        slot = order[i]
        assert len(slot.items) == batch_size
        seen.update((slot.bucket, item) for item in slot.items)
    assert len(seen) == total, "no bucket vanishes, however small"  # trap 34
    assert set(seen.values()) == {last_epoch}, "and every sample was shown as often as any other"


def plain_slots(sizes, batch_size, seed, count) -> list[tuple[str, list[int]]]:
    """Write the order down as it is defined, slot by slot in plain lists."""
    sizes = {bucket: size for bucket, size in sorted(sizes.items()) if size}
    slots, epoch = [], 0
    while len(slots) < count:
        batches = [
            (bucket, batch)
            for bucket, size in sizes.items()
            for batch in range(epoch * size // batch_size, (epoch + 1) * size // batch_size)
        ]
        slots += [batches[i] for i in generator(seed, "epoch", epoch).permutation(len(batches))]
        epoch += 1
    streams = {}
    for bucket, size in sizes.items():
        last = max([batch for other, batch in slots[:count] if other == bucket], default=0)
        laps = (last + 1) * batch_size // size + 1
        permuted = (generator(seed, "bucket", bucket, lap).permutation(size) for lap in range(laps))
        streams[bucket] = [int(item) for lap in permuted for item in lap]
    return [(bucket, streams[bucket][batch * batch_size : (batch + 1) * batch_size]) for bucket, batch in slots[:count]]


@given(**ORDERS)
@settings(max_examples=25, deadline=None)
def test_the_order_is_the_one_that_plain_lists_give(sizes, batch_size, seed):
    sizes = {f"bucket{i}": size for i, size in enumerate(sizes)}
    order, expected = Order(sizes, batch_size, seed), plain_slots(sizes, batch_size, seed, 40)
    assert [(order[i].bucket, list(order[i].items)) for i in range(40)] == expected
    for slots in (0, 1, 17, 40):
        shown = Counter(bucket for bucket, _ in expected[:slots])
        assert order.unseen(slots) == sum(max(0, size - shown[name] * batch_size) for name, size in sizes.items())


def test_micro_batches_of_an_epoch_mix_the_buckets_in_random_order():
    order = Order({"a": 400, "b": 400}, 4, seed=0)
    first = [order[i].bucket for i in range(200)]
    assert first.count("a") == 100
    switches = sum(x != y for x, y in pairwise(first))
    assert 70 < switches < 130


def test_a_dataset_smaller_than_a_micro_batch_still_goes_on():
    order = Order({"a": 3}, 8, seed=0)
    counts = Counter(item for i in range(3) for item in order[i].items)
    assert counts == {0: 8, 1: 8, 2: 8}
    assert order.epoch_of(0) == 2, "two epochs give nothing, the third completes a micro-batch"


def test_unseen_counts_what_the_planned_steps_never_show():
    order = Order({"a": 10, "b": 3}, 4, seed=1)
    for planned in range(12):
        shown = {(order[i].bucket, item) for i in range(planned) for item in order[i].items}
        assert order.unseen(planned) == 13 - len(shown)


def test_an_empty_training_split_is_refused():
    with pytest.raises(DataError, match="training split is empty"):
        Order({"a": 0}, 4, seed=0)


def test_bucket_size():
    assert bucket_size("88x48") == (88, 48)


def test_the_training_set_reads_what_the_dataset_holds(tiny_dataset):
    dataset = Dataset(tiny_dataset)
    data = TrainingSet(dataset, cache_gb=0.1)
    assert data.sizes == {"64x64": 13, "80x56": 9, "56x80": 3, "88x48": 1}
    rows = data.rows["80x56"][:4]
    for _ in range(2):  # from the disk, then from memory
        x, conditions = data.load(rows)
        assert x.shape == (4, 3, 56, 80)
        assert x.dtype == torch.float32
        assert torch.equal(x, load_pixels(dataset, rows))
        expected = load_conditions(dataset, rows)
        assert torch.equal(conditions.text, expected.text)
        assert torch.equal(conditions.patches, expected.patches)
    assert x.min() >= -1
    assert x.max() <= 1
    exact = torch.from_numpy(dataset.pixels(rows[0]).astype(np.float32)).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(x[0], exact)


def test_the_position_in_the_data_is_one_integer(tiny_dataset, tmp_path):
    config = tiny_config(tiny_dataset, tmp_path / "run", "data.prefetch=3", "train.token_budget=200")
    trainer, other = (Trainer(config, Dataset(tiny_dataset), torch.device("cpu")) for _ in range(2))
    with contextlib.closing(prefetch(trainer.batches.make, trainer.batches.numbers(0), 3)) as batches:
        seen = [[next(batches).keys for _ in trainer.batches.plan.numbers(step)] for step in range(6)]
    trainer.step = 4
    state = trainer.state()
    assert state["slots"] == 4 * trainer.batches.plan.slots
    own = {name: value for name, value in state.items() if name not in ("config", "dataset", "environment")}
    assert len(json.dumps(own)) < 1000, "a few integers and hashes, however large the dataset"
    step = state["slots"] // other.batches.plan.slots
    numbers = islice(other.batches.numbers(step), len(seen[4]) + len(seen[5]))
    assert [other.batches.make(number).keys for number in numbers] == seen[4] + seen[5]


def test_the_cache_stays_within_its_budget(tiny_dataset):
    dataset = Dataset(tiny_dataset)
    budget = 40_000  # three images of 64x64x3 and a bit
    data = TrainingSet(dataset, cache_gb=budget / 1e9)
    for row in data.rows["64x64"]:
        data.pixels(row)
    assert sum(array.nbytes for array in data._cache.values()) <= budget
    assert len(data._cache) == 3
    row = data.rows["64x64"][-1]
    assert np.array_equal(data.pixels(row), dataset.pixels(row))
    assert len(TrainingSet(dataset, cache_gb=0)._cache) == 0


def test_trap_10_a_holdout_key_in_the_training_split_is_refused(tiny_dataset):
    class Leaking(Dataset):
        def rows(self, split=None):
            rows = super().rows(split)
            return [*rows, {**rows[0], "key": leaked, "split": "train"}] if split == "train" else rows

    leaked = Dataset(tiny_dataset).rows("holdout")[0]["key"]
    with pytest.raises(DataError, match=f"{leaked}.*both the holdout and the training split"):  # trap 10
        TrainingSet(Leaking(tiny_dataset), cache_gb=0)


@pytest.mark.parametrize(("depth", "workers"), [(0, 1), (1, 1), (3, 1), (1, 2), (3, 4)])
def test_prefetch_gives_the_same_values_and_errors_in_the_same_place(depth, workers):
    later = threading.Event()

    def make(i):
        if workers > 1 and i == 5:
            assert later.wait(60), "while one is made, another thread goes on"
        if i == 6:
            later.set()
        if i >= 7:
            raise DataError(f"sample {i} is damaged")
        return i * i

    values = prefetch(make, count(3), depth, workers)
    assert [next(values) for _ in range(4)] == [9, 16, 25, 36]
    with pytest.raises(DataError, match="sample 7"):
        next(values)
    assert list(values) == []


def test_prefetch_makes_no_more_than_there_is_room_for():
    made = []
    ahead = prefetch(lambda i: made.append(i) or i, count(), 2, 3)
    assert next(ahead) == 0
    with contextlib.closing(ahead):
        while len(made) < 6:
            pass
        assert next(ahead) == 1
    assert sorted(made) == [*range(len(made))]
    assert len(made) <= 2 + 5, "two that were taken, two ahead and one of each thread"


def test_prefetch_ends_with_the_numbers():
    assert [*prefetch(lambda i: -i, range(10), 2, 3)] == [*range(0, -10, -1)]


def test_auto_leaves_a_processor_to_the_training(monkeypatch):
    for processors, threads in ((1, 1), (2, 1), (4, 3), (64, 8)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, n=processors: set(range(n)), raising=False)
        assert thread_count("auto") == threads
    assert thread_count(5) == 5


def test_prefetching_takes_one_thread_and_leaves_the_others_alone():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        ahead = prefetch(lambda i: torch.get_num_threads(), count(), 1)
        assert next(ahead) == 1
        ahead.close()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_closing_prefetch_ends_its_threads():
    before = threading.active_count()
    iterator = prefetch(lambda i: i, count(), 2, 3)
    assert next(iterator) == 0
    assert threading.active_count() == before + 3
    iterator.close()
    assert threading.active_count() == before


def test_a_patch_size_that_does_not_divide_a_bucket_is_refused():
    check_patch_size(["64x64", "80x56"], 8)
    with pytest.raises(ConfigError, match=r"80x56.*divisor of 8"):
        check_patch_size(["64x64", "80x56"], 16)
