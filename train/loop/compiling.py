"""Room for every graph of a run: torch.compile with static shapes makes one for each shape that a block computes.

After 8 graphs of a function (``recompile_limit``), and after 256 in any case, torch runs further shapes uncompiled. A
run has more: sizes of buckets and phases, kept and all tokens, parts of micro-batches, and contexts of every length.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from itertools import product
from typing import Any

import torch

from nanodit.console import say
from nanodit.rng import generator
from train.config import TrainConfig
from train.data.batch_plan import scaled_size
from train.data.samples import Row
from train.hardware import can_compile
from train.loop.microbatch import MicroBatches, deal_subsets, group_sizes, split
from train.model.conditions import Subset, padded_length
from train.model.modalities import MODALITIES
from train.model.network import NanoDiT

FORESEEN_STEPS = 100  # whose shapes are counted before a run begins
MANY_GRAPHS = 128  # at some seconds each they may take longer than they save; said, not refused
Shape = tuple[int, int, int]  # of a block's input: images, image tokens, context tokens


def compile_if_asked(model: NanoDiT, batches: MicroBatches, device: torch.device) -> None:
    """Compile the model's blocks where ``train.compile`` says so; where it is auto, as far as this machine can."""
    asked = batches.config.train.compile
    if asked is True or (asked == "auto" and can_compile(device.type)):
        # on a CPU one graph for all shapes: buckets and dropped conditions make dozens, at seconds each
        compile_blocks(model, batches, dynamic=device.type == "cpu")
    elif asked == "auto":
        say("compile: no C++ compiler with Python's headers (or no Triton) here, so the blocks run uncompiled")


def compile_blocks(model: NanoDiT, batches: MicroBatches, *, dynamic: bool) -> None:
    """Compile the model's blocks, with room for a graph of each shape of the run unless one serves all shapes."""
    if not dynamic:
        steps, modalities = min(FORESEEN_STEPS, batches.config.train.steps), model.features.modalities
        possible = len(possible_shapes(batches, modalities))
        allow_graphs(possible)
        say(describe(len(coming_shapes(batches, modalities, steps)), steps, possible))
    model.compile_blocks(dynamic=dynamic)


def possible_shapes(batches: MicroBatches, modalities: Sequence[str]) -> set[Shape]:
    """Return every shape that a block may compute in a run, however long: by its plan, its table and all captions.

    ``modalities`` are those of the network.
    """
    config, plan, shapes = batches.config, batches.plan, set()
    columns = ("t5_tokens", "t5_flip_tokens") if config.data.flip else ("t5_tokens",)
    for bucket, rows in batches.data.rows.items():
        texts = {padded_length(row[column]) for row in rows for column in columns if row.get(column)} or {0}
        contexts = {
            _context_tokens(config, rows[0], kept, text, modalities) for kept in unions(batches.table) for text in texts
        }
        for scale in plan.scales:
            sizes = plan.batch_sizes(bucket, scale)
            images = {part for size in sizes for part in group_sizes(size, len(batches.table))}
            shapes.update(product(images, _image_tokens(batches, scaled_size(bucket, scale)), contexts))
    return shapes


def coming_shapes(batches: MicroBatches, modalities: Sequence[str], steps: int) -> set[Shape]:
    """Return the shapes of a run's first ``steps`` optimiser steps, all of them routed if any; no sample is read."""
    config, shapes = batches.config, set()
    for step in range(steps):
        cuts = batches.plan.of_step(step)
        sizes = [len(cut.images) for cut in cuts]
        dealt = deal_subsets(batches.table, sizes, generator(config.seed, "conditions", step))
        for cut, subsets in zip(cuts, dealt):
            rows = batches.data.select(cut)
            flips = batches.flips(step, cut.images, rows)
            texts = [_text_tokens(row, flip) for row, flip in zip(rows, flips)]
            for part in split(subsets):
                kept = frozenset().union(*subsets[part])
                longest = max((n for n, subset in zip(texts[part], subsets[part]) if "text" in subset), default=0)
                context = _context_tokens(config, rows[0], kept, padded_length(longest), modalities)
                images = {part.stop - part.start}
                shapes.update(product(images, _image_tokens(batches, cut.size), {context}))
    return shapes


def _image_tokens(batches: MicroBatches, size: tuple[int, int]) -> set[int]:
    tokens, tread = batches.plan.tokens(size), batches.config.tread
    return {tokens, tread.kept(tokens)} if tread.enabled else {tokens}


def _text_tokens(row: Row, flip: bool) -> int:
    return (flip and row.get("t5_flip_tokens")) or row.get("t5_tokens", 0)


def _context_tokens(config: TrainConfig, row: Row, kept: Subset, text: int, modalities: Sequence[str]) -> int:
    """Count what images of a bucket, of which ``row`` is one, attend to: a null token a modality, and what is kept."""
    return len(modalities) + sum(MODALITIES[name].count(config.model, row, text) for name in kept)


def unions(subsets: Collection[Subset]) -> set[Subset]:
    """Return the unions of any one or more subsets."""
    found: set[Subset] = set()
    for subset in subsets:
        found |= {subset | other for other in found} | {subset}
    return found


def allow_graphs(count: int) -> None:
    """Let torch keep so many graphs of a function; where it stops all the same, it is said, and what to do."""
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, count)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, count)
    logger = logging.getLogger("torch._dynamo.convert_frame")
    if not any(isinstance(one, _LimitHit) for one in logger.filters):
        logger.addFilter(_LimitHit())


def describe(coming: int, steps: int, possible: int) -> str:
    """Say for how many shapes the blocks are compiled in the first steps, and for how many in all at most."""
    line = f"compile: {coming} shapes of blocks in the first {steps} steps; each takes seconds to compile at first use"
    if coming > MANY_GRAPHS:
        return f"warning: {line}. That may take longer than it saves; train.compile=false avoids it"
    return f"{line} ({possible} at most in a long run)"


class _LimitHit(logging.Filter):
    """Says in one line what torch says in five of its limit."""

    def filter(self, record: logging.LogRecord) -> bool:
        if not str(record.msg).startswith("torch._dynamo hit config."):
            return True
        limit: Any = record.args[0] if record.args else "recompile_limit"
        say(
            f"warning: compile: torch's {limit} is reached, so new shapes now run uncompiled, and slower. "
            "If most do (sys/images_per_sec falls), set train.compile to false"
        )
        return False
