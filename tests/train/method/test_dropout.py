"""The dropout table, systematic dealing, and that what is dropped costs nothing."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from nanodit.errors import ConfigError
from nanodit.rng import generator
from train.method.dropout import PRESETS, ConditioningConfig, condition_shares, deal
from train.model.conditions import collate, parse_subset, subset_name
from train.model.modalities import MODALITIES


def batch(count=4, tokens=(5, 40, 7, 9)):
    rng = np.random.default_rng(0)
    return collate(
        text=[rng.standard_normal((n, 16)).astype(np.float16) for n in tokens[:count]],
        cls=[rng.standard_normal(8) for _ in range(count)],
        patches=[rng.standard_normal((4, 4, 8)) for _ in range(count)],
        pose=[rng.random((133, 3)) for _ in range(count)],
        count=count,
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_distributions(preset):
    table = ConditioningConfig(preset=preset).resolve()
    assert sum(table.values()) == pytest.approx(1)
    assert len(table) == len(PRESETS[preset])


def test_default_preset_keeps_patches_in_a_third_of_the_images():
    table = ConditioningConfig().resolve()
    assert sum(share for subset, share in table.items() if "patches" in subset) == pytest.approx(0.34)


def test_an_absent_modality_merges_categories():
    table = ConditioningConfig(preset="quickstart").resolve(("text", "cls", "patches"))
    assert table == {
        frozenset(): pytest.approx(0.1),
        frozenset({"text"}): pytest.approx(0.65),
        frozenset({"text", "cls", "patches"}): pytest.approx(0.25),
    }


@pytest.mark.parametrize("table", [{"text": 0.5}, {"text": 1.5, "nothing": -0.5}, {"txt": 1.0}])
def test_wrong_tables_are_refused(table):
    with pytest.raises(ConfigError, match=r"conditions|shares"):
        ConditioningConfig(preset=None, table=table).resolve()


def test_systematic_dealing_holds_the_shares_in_every_step():
    table = ConditioningConfig(preset="quickstart").resolve()
    total: Counter = Counter()
    for step in range(200):
        counts = Counter(deal(table, 32, generator(0, step)))
        for subset, share in table.items():
            assert abs(counts[subset] - 32 * share) < 1
        total.update(counts)
    for subset, share in table.items():
        assert total[subset] / 6400 == pytest.approx(share, abs=0.005)


def test_dealing_is_independent_of_position():
    table = {frozenset(): 0.5, frozenset({"text"}): 0.5}
    first = [deal(table, 8, generator(1, step))[0] for step in range(400)]
    assert 0.4 < np.mean([bool(subset) for subset in first]) < 0.6


def test_trap_14_dropped_modalities_leave_nothing_behind():
    conditions = batch().keeping({"text", "pose"})
    assert conditions.patches is None
    assert conditions.cls is None
    assert conditions.keep.tolist() == [[True, False, False, True]] * 4
    nothing = batch().keeping(())
    assert nothing.text is None
    assert nothing.text_mask is None


def test_text_is_trimmed_to_the_longest_kept():
    conditions = batch()
    assert conditions.text.shape == (4, 64, 16)
    kept = conditions.keeping([frozenset({"text"}), frozenset(), frozenset({"text"}), frozenset()])
    assert kept.text.shape == (4, 32, 16)


def test_what_was_dropped_does_not_come_back():
    assert not batch().keeping({"text"}).keeping({"text", "pose"}).keep[:, 3].any()


def test_names_round_trip():
    for name in ("nothing", "all", "text", "text+pose", "cls+patches"):
        assert subset_name(parse_subset(name)) == name
    assert parse_subset("pose+text") == {"text", "pose"}
    with pytest.raises(ConfigError, match="unknown txt"):
        parse_subset("txt+pose")


def test_select_and_length():
    conditions = batch().select(slice(1, 3))
    assert len(conditions) == 2
    assert conditions.pose.shape == (2, 133, 3)
    assert tuple(MODALITIES) == ("text", "cls", "patches", "pose")
    assert isinstance(conditions.text_mask, torch.Tensor)


def test_a_share_of_nothing_is_left_out():
    table = ConditioningConfig(preset=None, table={"nothing": 0.0, "text": 0.25, "all": 0.75}).resolve()
    assert {subset_name(subset): share for subset, share in table.items()} == {"text": 0.25, "all": 0.75}


def test_the_share_of_a_step_is_that_of_its_images():
    nothing, text, cls = frozenset(), frozenset({"text"}), frozenset({"cls"})
    shares = condition_shares([text, text, nothing, text], {nothing: 0.3, text: 0.6, cls: 0.1})
    assert shares == {
        "train/condition_share/nothing": 0.25, "train/condition_share/text": 0.75, "train/condition_share/cls": 0.0,
    }  # fmt: skip
