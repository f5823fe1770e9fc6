"""What a forward costs, counted on the meta device: a dropped condition and a token that is not kept cost nothing."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from train.loop.flops import _results, call_on_meta
from train.model.conditions import Conditions
from train.model.config import ModelConfig
from train.model.context import find_spans, token_counts
from train.model.modalities import MODALITIES, Features
from train.model.network import build_model
from train.model.tread import TreadConfig

IMAGES, ROWS, COLUMNS, TEXT, PATCHES = 3, 6, 4, 32, (4, 4)
CONFIG = ModelConfig(hidden_size=64, depth=3, num_heads=2, patch_size=8, bottleneck=16, context_joints=23)
FEATURES = Features(64, {"text": 24, "cls": 16, "patches": 16, "pose": 3})
SUBSETS = [frozenset(c) for size in range(5) for c in combinations(MODALITIES, size)]


def counted(subsets, kept: int | None = None, tread: TreadConfig | None = None) -> int:
    """FLOPs of one forward; ``subsets`` is one for all images or one for each."""
    tensors = {
        "text": torch.zeros(IMAGES, TEXT, FEATURES.widths["text"]),
        "text_mask": torch.ones(IMAGES, TEXT, dtype=torch.bool),
        "cls": torch.zeros(IMAGES, FEATURES.dino_width),
        "patches": torch.zeros(IMAGES, *PATCHES, FEATURES.dino_width),
        "pose": torch.ones(IMAGES, 133, 3),
    }
    conditions = Conditions(torch.ones(IMAGES, len(MODALITIES), dtype=torch.bool), tensors)
    with torch.device("meta"):
        model = build_model(CONFIG, FEATURES, tread)
        z, t = torch.zeros(IMAGES, 3, 8 * ROWS, 8 * COLUMNS), torch.zeros(IMAGES)
        keep_ids = None if kept is None else torch.zeros(IMAGES, kept, dtype=torch.int64)
    given = conditions.keeping(subsets)
    row = {"dino_h": PATCHES[0], "dino_w": PATCHES[1]}
    spans = find_spans(given, FEATURES.modalities, token_counts(given, CONFIG, row))
    with FlopCounterMode(display=False) as counter:
        model(z, t, replace(given, spans=spans).to("meta"), keep_ids)
    return counter.get_total_flops()


def expected(subset: frozenset[str]) -> int:
    """What the kept conditions of an image add: their embedding, their keys and values, and the attention to them."""
    d, joints = CONFIG.hidden_size, CONFIG.context_joints
    tokens = {"text": TEXT, "cls": 1, "patches": PATCHES[0] * PATCHES[1], "pose": joints}
    embedding = {
        "text": TEXT * FEATURES.widths["text"] * d,
        "cls": 2 * FEATURES.dino_width * d,  # as a token and into adaLN
        "patches": tokens["patches"] * FEATURES.dino_width * d,
        "pose": joints * (3 * d + d * d + 24 * d),
    }
    a_token = CONFIG.depth * (2 * d * d + 2 * ROWS * COLUMNS * d)
    return sum(2 * (embedding[name] + (tokens[name] - 1) * a_token) for name in subset)  # one replaces the null token


def embedding_alone(subset: frozenset[str]) -> int:
    """What kept conditions add for an image that does not keep them, beside one that does."""
    d, joints = CONFIG.hidden_size, CONFIG.context_joints
    sizes = {"text": TEXT * FEATURES.widths["text"] * d, "pose": joints * (3 * d + d * d + 24 * d)}
    return sum(2 * sizes[name] for name in subset)


class Compared(TorchDispatchMode):
    """Compares what an operator gives with what :func:`call_on_meta` says that it would."""

    remembered = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        before = {tensor.untyped_storage()._cdata for tensor in arguments if isinstance(tensor, torch.Tensor)}
        called = function(*arguments, **(keywords or {}))
        results = len(_results)
        for _ in range(2):  # the second is remembered
            result = call_on_meta(function, arguments, keywords or {})
            for one, other in zip(*(one if isinstance(one, tuple | list) else (one,) for one in (called, result))):
                if isinstance(one, torch.Tensor):
                    assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype), function
                    storages = one.untyped_storage(), other.untyped_storage()
                    assert storages[0].nbytes() == storages[1].nbytes(), function
                    assert len({storage._cdata in before for storage in storages}) == 1, function
        self.remembered += len(_results) - results
        return result


def test_what_operators_give_is_remembered_only_where_it_is_the_same():
    _results.clear()
    x = torch.zeros(3, 4, dtype=torch.int64, device="meta")
    with Compared():
        kinds = [(x * factor).dtype for factor in (1, 1.0, True, 1)]
        x.add_(1).view(4, 3).t().contiguous().split(2)
    assert kinds == [torch.int64, torch.float32, torch.int64, torch.int64]
    try:
        torch.set_default_dtype(torch.float64)
        with Compared():
            assert (x * 1.0).dtype is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    with Compared() as compared:
        counted(SUBSETS[-1], tread=TreadConfig(enabled=True, start=1, end=2), kept=5)
    assert compared.remembered > 50


@pytest.mark.parametrize("subset", SUBSETS, ids=lambda subset: "+".join(sorted(subset)) or "nothing")
def test_trap_14_an_image_pays_for_the_conditions_it_keeps_and_no_other(subset):
    assert counted(subset) - counted(()) == IMAGES * expected(subset)  # trap 14


def test_beside_images_that_keep_more_only_the_embedding_is_paid_for():
    text, pose = frozenset({"text"}), frozenset({"pose"})
    own = sum(map(expected, (text, pose)))
    others = sum(map(embedding_alone, (pose, text, text | pose)))
    assert counted([text, pose, frozenset()]) - counted(()) == own + others


def test_routed_blocks_pay_for_the_kept_tokens():
    tread, n, k, d = TreadConfig(enabled=True, start=1, end=1), ROWS * COLUMNS, 7, CONFIG.hidden_size
    context, inner = 3 + TEXT, 192  # 8/3 of 64, rounded to 64
    saved = (n - k) * (4 * d * d + 3 * d * inner) + 2 * d * (n * (n + context) - k * (k + context))
    assert counted({"text"}, tread=tread) - counted({"text"}, k, tread) == IMAGES * 2 * saved
