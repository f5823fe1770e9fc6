"""Compiled blocks: a handful of graphs serve every shape of a long run, and where torch stops it is said."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import nanodit
from nanodit.config import load_config
from nanodit.rng import generator
from prep.config import PrepConfig
from tests.train.loop.test_trainer import make
from train.config import TrainConfig
from train.loop.compiling import say_where_it_stops
from train.loop.flops import META
from train.loop.microbatch import deal_subsets, split
from train.loop.trainer import Trainer
from train.model.conditions import pack
from train.model.context import Context
from train.model.spans import Spans
from train.plan.memory import meta_trainer
from train.plan.rehearsal import StandIn

STEPS, GRAPHS = 100, 10
CONFIGS = Path(nanodit.__file__).parent / "configs"
NARROW = (
    "model.hidden_size=32", "model.num_heads=2", "model.depth=2", "model.bottleneck=16", "tread.start=1",
    "tread.end=1", "repa.enabled=false", "perceptual.every=0",
)  # fmt: skip


class Graphs:
    """A backend of torch.compile that counts graphs; a block then gives back what it is given, and computes nothing."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., tuple[Tensor]]:
        self.count += 1
        names = [node.name for node in graph.graph.find_nodes(op="placeholder")]
        (place,) = [i for i, name in enumerate(names) if name.lower() == "l_x_bnd_"]
        return lambda *given: (given[place],)


@pytest.fixture
def graphs(monkeypatch) -> Iterator[Graphs]:
    counter = Graphs()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    torch._dynamo.reset()
    # not monkeypatch, whose undoing hides the key from torch itself
    with torch._dynamo.config.patch(recompile_limit=8):
        yield counter
    torch._dynamo.reset()


class Captions(StandIn):
    """The dataset of production, with captions of every length in each bucket."""

    def rows(self, split: str) -> list[dict]:
        rng, rows = generator("captions"), []
        for row in super().rows(split):
            lengths = rng.normal(220, 60, 200).clip(8, 512).astype(int).tolist()
            rows += [row | {"key": f"{len(rows) + i:032x}", "t5_tokens": n} for i, n in enumerate(lengths)]
        return rows


def forwards(trainer: Trainer, steps: int) -> Iterator[tuple[tuple[int, int], int | None, Spans]]:
    """Size, kept tokens and context tokens of every forward of a run's first so many steps; no sample is read."""
    config, batches = trainer.config, trainer.batches
    for step in range(steps):
        cuts, rng = batches.plan.of_step(step), generator(config.seed, "conditions", step)
        dealt = deal_subsets(batches.table, [len(cut.images) for cut in cuts], rng)
        for index, cut, subsets in zip(batches.plan.numbers(step), cuts, dealt):
            rows, kept = batches.data.select(cut), None
            if config.tread.routes(*batches.course.within(step), generator(config.seed, "routed", index)):
                kept = config.tread.kept(batches.plan.tokens(cut.size))
            for part in split(subsets):
                features = {
                    "text": [np.empty((row["t5_tokens"], 1), np.float16) for row in rows[part]],
                    "cls": [np.empty(1, np.float32)] * len(rows[part]),
                    "patches": [np.empty((rows[0]["dino_h"], rows[0]["dino_w"], 1), np.int8)] * len(rows[part]),
                    "pose": [np.ones((133, 3), np.float32)] * len(rows[part]),
                }
                given = pack(count=len(rows[part]), **features).keeping(subsets[part])
                yield cut.size, kept, batches._with_spans(given, rows[0]).spans


@pytest.mark.slow
def test_ten_graphs_serve_a_hundred_steps_of_production(graphs):
    config = load_config(TrainConfig, CONFIGS / "train/production.yaml", list(NARROW))
    prep = load_config(PrepConfig, CONFIGS / "prep/production.yaml", ["source=."])
    trainer = meta_trainer(config, Captions(prep))
    model = trainer.model
    model.compile_blocks()
    shapes = set()
    for (width, height), kept, spans in forwards(trainer, STEPS):
        images, tokens = len(spans.lengths), sum(spans.lengths)
        shape = width, height, kept, images, tokens, spans.are_equal
        if shape in shapes:  # an equal one finds its graph
            continue
        shapes.add(shape)
        with META:
            x, waves = torch.empty(tokens, 32, requires_grad=True), torch.empty(tokens, 1, 8)
            cls = torch.empty(images, 32, requires_grad=True)
            context = Context(x, spans.map(lambda tensor: tensor.to(META)), waves, waves, cls)
            keep_ids = None if kept is None else torch.empty(images, kept, dtype=torch.int64)
            model(torch.empty(images, 3, height, width), torch.empty(images), context, keep_ids)
    print(f"{len(shapes)} shapes, {graphs.count} graphs")
    assert len(shapes) > 700, "static graphs would be as many"
    assert 2 <= graphs.count <= GRAPHS


def test_a_limit_that_is_reached_is_said(tiny_dataset, tmp_path, graphs, capfd):
    trainer = make(tiny_dataset, tmp_path / "run", "conditioning.preset=default")
    say_where_it_stops()
    with torch._dynamo.config.patch(accumulated_recompile_limit=1):
        trainer.model.compile_blocks()
        batch = trainer.batches.make(0)
        for images in (4, 1):  # one image alone has a graph of its own
            conditions = batch.groups[0].conditions.select(slice(images))
            trainer.model(batch.x[:images], batch.t[:images], conditions)
    assert graphs.count == 1
    told = capfd.readouterr().out
    assert told.count("is reached, so new shapes now run uncompiled") == 1
    assert "torch._dynamo hit" not in told
