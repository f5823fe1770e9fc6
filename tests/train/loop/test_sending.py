"""What travels to the device: stored bytes in one buffer, of which the device makes what the network sees."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
import torch
from torch import Tensor

from prep.dataset.quantise import Quantised
from prep.dataset.reader import Dataset
from tests.train.tiny import tiny_config
from train.data.buffers import Buffer
from train.data.prefetch import prefetch
from train.loop.microbatch import MicroBatch
from train.loop.sending import within
from train.loop.trainer import Trainer
from train.method.loss import Later

CPU = torch.device("cpu")
ON = ("data.flip=0.5", "repa.enabled=true", "tread.enabled=true", "tread.start=0", "tread.end=-1", "model.patch_size=4")


@pytest.fixture
def trainer(tiny_dataset, tmp_path) -> Trainer:
    return Trainer(tiny_config(tiny_dataset, tmp_path / "run", *ON), Dataset(tiny_dataset), CPU)


def tensors_of(batch: MicroBatch) -> list[Tensor]:
    found: list[Tensor] = []
    batch.map(lambda tensor: found.append(tensor) or tensor)
    return found


def assert_equal(ours: MicroBatch, theirs: MicroBatch) -> None:
    assert (ours.keys, ours.subsets, ours.flipped) == (theirs.keys, theirs.subsets, theirs.flipped)
    pairs = [*zip(tensors_of(ours), tensors_of(theirs), strict=True)]
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def test_what_is_stored_travels(trainer):
    batch = next(batch for batch in packed(trainer) if batch.flipped)
    assert batch.x.dtype == torch.uint8
    assert batch.x.shape[-1] == 3
    kinds = {}
    for part in batch.groups:
        kinds |= {name: tensor.dtype for name, tensor in part.conditions.tensors.items()}
        if (teacher := part.prepared.get("teacher")) is not None:
            assert isinstance(teacher, Later)
            assert teacher.conditions.patches.dtype == torch.int8
    expected = {"text": torch.float16, "text_mask": torch.bool, "cls": torch.float32, "pose": torch.float32}
    assert kinds == expected | {"patches": torch.int8, "patches_scale": torch.float16}
    for array in trainer.data._cache.values():
        wide = isinstance(array, np.ndarray) and array.dtype == np.float32
        assert isinstance(array, Quantised) or array.nbytes < 2000 or not wide


def test_pixels_are_mirrored_on_the_device_and_are_those_of_the_samples(trainer):
    dataset = Dataset(trainer.config.dataset)
    rows = {row["key"]: row for row in dataset.rows("train")}
    batch = next(batch for batch in packed(trainer) if 0 < batch.flipped < len(batch.keys))
    for image, key, mirror in zip(batch.unpacked().x, batch.keys, batch.mirror):
        pixels = dataset.pixels(rows[key])[:, :: -1 if mirror else 1].astype(np.float32)
        np.testing.assert_array_equal(image, np.moveaxis(pixels, 2, 0) / np.float32(127.5) - 1)


def test_a_buffer_holds_a_whole_micro_batch_and_serves_the_next_one(trainer, monkeypatch):
    monkeypatch.setattr(Buffer, "_fresh", lambda self, shape, dtype: torch.empty(shape, dtype=dtype))  # no GPU here
    buffer, wanted = Buffer(pinned=True), trainer.batches.make(0)
    first = trainer.batches.pack(0, buffer)
    assert not any(map(buffer.holds, tensors_of(first))), "it is empty and learns what is needed"
    seen = trainer.batches.pack(0, buffer.reset())
    assert all(map(buffer.holds, tensors_of(seen))), "so that one copy moves all"
    assert {tensor.untyped_storage().data_ptr() for tensor in tensors_of(seen)} == {buffer.bytes.data_ptr()}
    place, known = buffer.bytes.data_ptr(), (seen.keys, seen.unpacked().t)
    for batch in (first, seen, within(seen, buffer, buffer.bytes.clone())):
        assert_equal(batch.unpacked(), wanted)
    trainer.batches.pack(1, buffer.reset())
    assert buffer.bytes.data_ptr() == place
    buffer.bytes.zero_()
    assert known[0] == wanted.keys
    assert torch.equal(known[1], wanted.t), "a step asks for t after its micro-batches are gone"
    assert not torch.equal(seen.x.float(), first.x.float()), "what lay there is overwritten"


def test_a_run_makes_its_micro_batches_in_few_buffers(trainer):
    numbers = [*islice(trainer.batches.numbers(0), 24)]
    used = set()
    with contextlib.closing(prefetch(trainer._make_batch, iter(numbers), 2)) as batches:
        for number, batch in zip(numbers, batches):
            used.add(id(batch.buffer))
            with trainer.sender.sent(batch) as sent:
                assert_equal(sent, trainer.batches.make(number))
    assert len(used) <= 5, "two that wait, one each in the making and in use, and one that was just given back"


def packed(trainer: Trainer) -> Iterator[MicroBatch]:
    return (trainer.batches.pack(number, Buffer()) for number in islice(trainer.batches.numbers(0), 40))
