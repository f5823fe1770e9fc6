"""The holdout is one, the noise belongs to the sample, and every bucket keeps its shape."""

from copy import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from evaluate.arms import choose_arms, choose_subsets
from evaluate.config import EvaluateConfig
from evaluate.subject import check_leaks, dataset_modalities, read_batches, select_holdout, to_float, to_uint8
from prep.errors import ConfigError, DataError


def row(key, split="train", group=None):
    return {"key": key, "source": f"{key}.png", "split": split, "duplicate_group": group, "bucket": "64x64"}


@pytest.mark.parametrize(
    ("holdout", "pair"),
    [(row("a"), "a (a.png) ~ a (a.png)"), (row("z", group="g"), "z (z.png) ~ b (b.png)")],
)
def test_a_leak_stops_the_evaluation_and_lists_the_pairs(holdout, pair):  # trap 10, fault E01
    with pytest.raises(DataError, match="leak: 1 holdout") as caught:
        check_leaks([row("a"), row("b", group="g")], [holdout, row("y", group="h"), row("x")])
    assert pair in str(caught.value)
    assert caught.value.exit_code == 3


def test_samples_without_a_group_are_not_each_others_duplicates():
    check_leaks([row("a"), row("b")], [row("x"), row("y")])


def test_the_holdout_is_taken_in_key_order_and_nothing_else(figures):
    rows = select_holdout(figures, 10)
    assert [r["key"] for r in rows] == sorted(r["key"] for r in figures.rows("holdout"))[:10]
    assert {r["split"] for r in rows} == {"holdout"}


def test_no_holdout_is_an_error_that_says_what_to_do(figures):
    class Whole:
        root = figures.root

        def rows(self, split):
            return figures.rows("train") if split == "train" else []

    with pytest.raises(DataError, match="no holdout samples"):
        select_holdout(Whole(), 10)


def test_trap_22_noise_is_a_function_of_sample_and_seed_alone(figures):
    rows = figures.rows("holdout")
    whole = {key: noise for batch in read_batches(figures, rows, 32) for key, noise in zip(batch.keys, batch.noise(0))}
    for batch in read_batches(figures, rows[::-1][:9], 2):
        for key, noise, other in zip(batch.keys, batch.noise(0), batch.noise(1)):
            assert torch.equal(noise, whole[key])
            assert not torch.equal(noise, other)


def test_trap_24_buckets_keep_their_shape_and_poses_are_passed(figures):
    batches = list(read_batches(figures, figures.rows("holdout"), 4))
    assert len({batch.bucket for batch in batches}) > 3
    for batch in batches:
        assert batch.bucket == f"{batch.width}x{batch.height}"
        assert len(batch.rows) <= 4
        assert batch.conditions.pose.shape == (len(batch.rows), 133, 3)
        assert batch.conditions.keep.all()


def test_pixels_survive_the_way_to_the_model_and_back(figures):
    pixels = np.stack([figures.pixels(r) for r in figures.rows() if r["bucket"] == "64x64"][:3])
    assert np.array_equal(to_uint8(to_float(pixels)), pixels)
    assert to_uint8(torch.tensor([[[[float("nan")]]]])).item() == 0


def test_conditions_never_trained_are_skipped_by_name(make_subject):
    subject = make_subject("noise")
    config = EvaluateConfig.model_validate({"conditions": {"all": 1.0, "cls": 1.0, "text": 2.0}})
    arms, skipped = choose_arms(config, subject)
    assert [arm.name for arm in arms] == ["all", "text"]
    assert [(one.name, one.reason) for one in skipped] == [("samples/cls", "subset cls never trained")]
    subsets, skipped = choose_subsets(["all", "pose"], subject)
    assert [len(subset) for subset in subsets] == [4]
    assert [(one.name, one.reason) for one in skipped] == [("heldout_loss/pose", "subset pose never trained")]


def test_guidance_needs_the_unconditional_to_be_trained(make_subject):
    subject = make_subject("noise")
    table = {subset: share for subset, share in subject.table.items() if subset}
    arms, skipped = choose_arms(EvaluateConfig(), replace(subject, table=table))
    assert [arm.name for arm in arms] == ["all"]  # guidance 1 needs nothing else
    assert {one.reason for one in skipped} == {"subset nothing never trained"}


def test_conditions_that_coincide_without_a_modality_are_refused(make_subject, figures):
    without = copy(figures)
    without.info = {**figures.info, "layers": {name: v for name, v in figures.info["layers"].items() if name != "pose"}}
    assert dataset_modalities(without) == ("text", "cls", "patches")
    subject = replace(make_subject("noise"), dataset=without, table={frozenset({"text"}): 0.9, frozenset(): 0.1})
    with pytest.raises(ConfigError, match="two of them are the same"):
        choose_arms(EvaluateConfig.model_validate({"conditions": {"text": 1.0, "text+pose": 1.0}}), subject)
