"""A graph for each static shape: which shapes a run has, and that none of them is left uncompiled."""

from __future__ import annotations

import re
from functools import partial
from itertools import chain

import pytest
import torch

from prep.dataset.reader import Dataset
from tests.train.tiny import tiny_config
from train.loop.compiling import (
    MANY_GRAPHS,
    allow_graphs,
    coming_shapes,
    compile_blocks,
    describe,
    possible_shapes,
    unions,
)
from train.loop.microbatch import MIN_GROUP, group_sizes, split
from train.loop.trainer import Trainer

OPTIONS = {
    "plain": ("conditioning.preset=default",),
    "everything": (
        "conditioning.preset=default", "train.batch_size=2", "train.grad_accumulation_steps=9", "model.patch_size=4",
        "train.token_budget=2500", "train.phases=[{until_step: 2, scale: 0.5}]", "data.flip=0.5",
        "tread.enabled=true", "tread.start=0", "tread.end=0", "model.context_patches=16", "model.context_joints=23",
    ),
    "large": ("conditioning.preset=default", "train.batch_size=24", "train.grad_accumulation_steps=1"),
    "one subset": ("conditioning.preset=null", "conditioning.table={text: 1.0}", "train.batch_size=12"),
}  # fmt: skip


def make(dataset, folder, *overrides) -> Trainer:
    config = tiny_config(dataset, folder / "run", "data.prefetch=0", "train.steps=40", *overrides)
    config.run_folder.mkdir(exist_ok=True)
    return Trainer(config, Dataset(dataset), torch.device("cpu"))


def seen_shapes(trainer: Trainer, steps: int) -> set[tuple[int, int, int]]:
    """What the blocks really get in the first so many steps."""
    shapes, meta = set(), torch.device("meta")
    for block in trainer.model.to(meta).blocks:
        block.register_forward_pre_hook(lambda _, inputs: shapes.add((*inputs[0].shape[:2], inputs[3][0].shape[1])))
    for number in chain.from_iterable(map(trainer.batches.plan.numbers, range(steps))):
        batch = trainer.batches.make(number).to(meta)
        for part in batch.groups:
            keep_ids = None if batch.keep_ids is None else batch.keep_ids[part.images]
            trainer.model(batch.x[part.images], batch.t[part.images], part.conditions, keep_ids)
    return shapes


@pytest.mark.parametrize("options", OPTIONS)
def test_every_shape_that_comes_was_foreseen(tiny_dataset, tmp_path, options):
    trainer = make(tiny_dataset, tmp_path, *OPTIONS[options])
    modalities = trainer.model.features.modalities
    foreseen = coming_shapes(trainer.batches, modalities, 5)
    assert foreseen <= possible_shapes(trainer.batches, modalities)
    assert seen_shapes(trainer, 5) == foreseen


def test_parts_of_every_size_and_no_other():
    a, b, c = "abc"
    for images in (1, MIN_GROUP, MIN_GROUP + 1, 20):
        found = set()
        for first in range(images + 1):
            for second in range(images - first + 1):
                subsets = [a] * first + [b] * second + [c] * (images - first - second)
                found |= {part.stop - part.start for part in split(subsets)}
        assert found == group_sizes(images, 3)
        assert group_sizes(images, 1) == {images}


def test_unions():
    text, pose, both = frozenset({"text"}), frozenset({"pose"}), frozenset({"text", "pose"})
    assert unions([text, pose]) == {text, pose, both}
    assert unions([both]) == {both}


@pytest.fixture
def dynamo(monkeypatch):
    """Dynamo as it is, its graphs run by PyTorch itself: compiling them would take seconds each."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # not monkeypatch, whose undoing hides the key from torch itself
    with torch._dynamo.config.patch(recompile_limit=3, accumulated_recompile_limit=3):
        yield torch._dynamo.utils.counters
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def test_every_static_shape_is_compiled_and_its_number_said(tiny_dataset, tmp_path, dynamo, capsys):
    options = (*OPTIONS["everything"], "train.gradient_checkpointing=2")
    trainer = make(tiny_dataset, tmp_path, *options)
    compile_blocks(trainer.model, trainer.batches, dynamic=False)
    for number in chain.from_iterable(map(trainer.batches.plan.numbers, range(2))):
        trainer.micro_step(trainer.batches.make(number))
    coming = coming_shapes(trainer.batches, trainer.model.features.modalities, 2)
    assert dynamo["stats"]["unique_graphs"] == len(coming) > 8
    told = capsys.readouterr().out
    assert re.search(r"compile: \d+ shapes of blocks in the first 40 steps.*\d+ at most", told)
    assert "is reached" not in told


def test_a_limit_that_is_reached_is_said(tiny_dataset, tmp_path, dynamo, capfd):
    trainer = make(tiny_dataset, tmp_path, *OPTIONS["plain"])
    allow_graphs(0)
    assert torch._dynamo.config.recompile_limit == 3, "never lowered"
    trainer.model.compile_blocks(dynamic=False)
    for number in range(12):
        trainer.micro_step(trainer.batches.make(number))
    assert dynamo["stats"]["unique_graphs"] == 3
    told = capfd.readouterr().out
    assert told.count("is reached, so new shapes now run uncompiled") == 1
    assert "torch._dynamo hit" not in told


def test_many_graphs_are_warned_of():
    assert "warning" in describe(MANY_GRAPHS + 1, 100, 9999)
    assert describe(MANY_GRAPHS, 100, 9999).endswith("(9999 at most in a long run)")
