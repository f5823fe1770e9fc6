"""The holdout is one, the noise belongs to the sample, and every bucket keeps its shape."""

from copy import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from evaluate.config import EvaluateConfig
from evaluate.drawing.arms import SamplerConfig, choose_arms, choose_subsets, draw
from evaluate.report.compare import differing
from evaluate.run import evaluate
from evaluate.subject import check_leaks, dataset_modalities, read_batches, select_holdout, to_float, to_uint8
from evaluate.suite.heldout_loss import HeldoutLossConfig, measure
from nanodit.errors import PROBLEM_BREAK, DataError, MemoryShortage
from train.method.dropout import ConditioningConfig
from train.method.sampling import Guidance, Sampling, sample, trajectory_keep_ids
from train.model.config import ModelConfig
from train.model.modalities import Features
from train.model.network import build_model
from train.model.tread import TreadConfig


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


@given(
    train=st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from([None, "g", "h", "i"])), max_size=5),
    holdout=st.lists(st.tuples(st.sampled_from("efghij"), st.sampled_from([None, "g", "j", "k"])), max_size=5),
)
def test_leaks_are_those_that_comparing_all_pairs_finds(train, holdout):
    train, holdout = ([row(key, group=group) for key, group in dict(rows).items()] for rows in (train, holdout))
    leaks = {}
    for one in holdout:
        same_group = [other for other in train if one["duplicate_group"] in ({other["duplicate_group"]} - {None})]
        twins = [other for other in train if other["key"] == one["key"]] or same_group[-1:]
        leaks |= {f"{one['key']} ({one['source']}) ~ {other['key']} ({other['source']})": None for other in twins}
    said: list[str] = []
    try:
        check_leaks(train, holdout)
    except DataError as error:
        said = str(error).split(PROBLEM_BREAK)[1:]
    assert said == list(leaks)


def test_the_holdout_is_taken_in_key_order_and_nothing_else(figures):
    for part in ("test", "dev"):
        rows = select_holdout(figures, 10, part=part)
        assert [r["key"] for r in rows] == sorted(r["key"] for r in figures.rows(part))[:10]
        assert {r["split"] for r in rows} == {"holdout"}
    assert select_holdout(figures, 10) == select_holdout(figures, 10, part="test")


def test_a_seed_takes_other_samples_of_the_holdout_the_same_ones_each_time(figures):
    chosen = [row["key"] for row in select_holdout(figures, 10, 42)]
    assert chosen == [row["key"] for row in select_holdout(figures, 10, 42)] == sorted(set(chosen))
    assert len(chosen) == 10
    assert set(chosen) != {row["key"] for row in select_holdout(figures, 10, 43)}
    assert len(select_holdout(figures, 10**6, 42)) == len(figures.rows("test"))


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
    arms, skipped = choose_arms(config.conditions, subject)
    assert [arm.name for arm in arms] == ["all", "text"]
    assert [(one.name, one.reason) for one in skipped] == [("samples/cls", "subset cls never trained")]
    subsets, skipped = choose_subsets(["all", "pose"], subject)
    assert [len(subset) for subset in subsets] == [4]
    assert [(one.name, one.reason) for one in skipped] == [("heldout_loss/pose", "subset pose never trained")]


def test_guidance_needs_the_unconditional_to_be_trained(make_subject):
    subject = make_subject("noise")
    table = {subset: share for subset, share in subject.table.items() if subset}
    arms, skipped = choose_arms(EvaluateConfig().conditions, replace(subject, table=table))
    assert [arm.name for arm in arms] == ["all"]  # guidance 1 needs nothing else
    assert {one.reason for one in skipped} == {"subset nothing never trained"}


def test_every_kind_of_guidance_needs_what_it_leads_away_from(make_subject):
    subject = make_subject("noise")
    asked = {"text": {"text": 2.0}, "text+pose": {"dino": 2.0}, "all": {"self": 3.0}}
    arms, skipped = choose_arms(asked, subject)
    assert [(arm.name, str(arm.guidance)) for arm in arms] == [("text", "text=2")]
    assert {one.name: one.reason for one in skipped} == {
        "samples/text+pose": "guidance dino=2 has a scale of what is not given",
        "samples/all": "self-guidance needs a model that was trained with routing",
    }


@pytest.mark.parametrize("value", [-1.0, {"face": 2.0}, {"self": 3.0, "text": 2.0}])
def test_senseless_guidance_is_refused(value):
    with pytest.raises(ValidationError, match="guidance"):
        EvaluateConfig(conditions={"all": value})


def test_self_guided_pictures_are_those_of_the_sampler_and_the_samples_own_tokens(figures, make_subject):
    tread = TreadConfig(enabled=True, start=0, end=-1)
    torch.manual_seed(0)
    model = build_model(
        ModelConfig(hidden_size=32, depth=2, num_heads=2, patch_size=16), Features.from_dataset(figures.info), tread
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    subject = replace(make_subject("noise"), model=model.eval(), tread=tread)
    (arm,), skipped = choose_arms({"all": {"self": 3.0}}, subject)
    assert (skipped, arm.guidance.value) == ([], "self=3")
    batch = next(subject.batches())
    sampler = SamplerConfig(method="euler", steps=2)
    drawn, _ = draw(subject, batch, arm, 1, sampler)
    keep_ids = trajectory_keep_ids(tread, [(key, 1) for key in batch.keys], batch.height * batch.width // 256)
    sampling = Sampling("euler", 2, self_guidance=3.0, interval=(0.0, 1.0), grid="cosine")
    expected = sample(model, batch.conditions, batch.noise(1), flow=subject.flow, sampling=sampling, keep_ids=keep_ids)
    assert np.array_equal(drawn, to_uint8(expected))
    assert not np.array_equal(drawn, draw(subject, batch, replace(arm, guidance=Guidance()), 1, sampler)[0])


@pytest.mark.parametrize(
    ("layers", "expected", "left_out"),
    [
        (("t5", "dino"), ["all", "text"], {"text+pose": "the dataset has no pose"}),
        (
            ("t5",),
            ["all"],
            {"text+pose": "the dataset has no pose", "text": "the same conditions as all on this dataset"},
        ),
        (
            ("dino",),
            ["all"],
            {"text+pose": "the dataset has no text and no pose", "text": "the dataset has no text"},
        ),
    ],
)
def test_named_conditions_that_the_dataset_lacks_are_skipped(make_subject, figures, layers, expected, left_out):
    """The default config on datasets without pose, with text alone and without text: ``all`` is all there is."""
    smaller = copy(figures)
    smaller.info = {**figures.info, "layers": {name: figures.info["layers"][name] for name in ("px", *layers)}}
    table = ConditioningConfig(preset="quickstart").resolve(dataset_modalities(smaller))
    subject = replace(make_subject("noise"), dataset=smaller, table=table)
    config = EvaluateConfig()
    arms, skipped = choose_arms(config.conditions, subject)
    assert [arm.name for arm in arms] == expected
    assert {one.name: one.reason for one in skipped} == {f"samples/{name}": why for name, why in left_out.items()}
    assert arms[0].subset == frozenset(dataset_modalities(smaller))
    subsets, skipped = choose_subsets(list(config.conditions), subject)
    assert len(subsets) == len(expected)
    assert {one.name: one.reason for one in skipped} == {f"heldout_loss/{name}": why for name, why in left_out.items()}


def test_metrics_of_other_samples_are_not_comparable(judged):
    """A seed chooses other images in the same number; without one the settings are those of before there was any."""
    first, chosen = (judged.context(seed=seed) for seed in (None, 3))
    for settings in (first.common, first.settings("all")):
        assert "holdout_seed" not in settings
    for settings in (chosen.common, chosen.settings("all")):
        assert settings["holdout_seed"] == 3
    metrics = [{"n": 24, "settings": context.settings("all")} for context in (first, chosen)]
    assert differing(metrics) == ["holdout_seed unknown, 3"]


def drawing_subject(figures, make_subject, batch_size: int = 8):
    torch.manual_seed(0)
    config = ModelConfig(hidden_size=32, depth=2, num_heads=2, patch_size=8)
    model = build_model(config, Features.from_dataset(figures.info))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return replace(make_subject("noise", batch_size=batch_size), model=model.eval())


def limit(model, room: int) -> list[int]:
    """Let a model run out of memory above ``room`` images; returns the numbers that it is asked for."""
    asked = []

    def refuse(module, arguments):
        asked.append(len(arguments[0]))
        if len(arguments[0]) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.40 GiB")

    model.register_forward_pre_hook(refuse)
    return asked


def assert_same_pictures(ours, theirs) -> None:
    """Equal, but for the last bits of a sum in another order, which round a pixel in ten thousand to its neighbour."""
    apart = np.abs(ours.astype(int) - theirs)
    assert apart.max() <= 1
    assert (apart > 0).mean() < 1e-3


def test_what_does_not_fit_is_drawn_in_halves_to_equal_pictures(figures, make_subject, capsys):
    subject, sampler = drawing_subject(figures, make_subject), SamplerConfig(method="euler", steps=2)
    (arm,), _ = choose_arms({"text": 2.0}, subject)
    batch = max(subject.batches(), key=len)
    images = len(batch)
    assert images >= 4
    whole = draw(subject, batch, arm, 1, sampler)
    asked = limit(subject.model, images // 2)
    parts = draw(subject, batch, arm, 1, sampler)
    assert_same_pictures(parts[0], whole[0])
    assert parts[1] == whole[1]
    assert asked[:2] == [images, images // 2], "halved"
    assert sum(asked[1:]) == 2 * 2 * images, "both steps of both predictions, of every sample once"
    assert capsys.readouterr().out.count(f"warning: evaluation: batches of {images} do not fit") == 1
    draw(subject, batch, arm, 2, sampler)
    assert asked.count(images) == 1, "nor tried again"
    assert "warning" not in capsys.readouterr().out, "said once"


def test_what_does_not_fit_is_scored_in_halves_to_equal_losses(figures, make_subject):
    subject = drawing_subject(figures, make_subject)
    everything = [frozenset(subject.modalities), frozenset({"text"})]
    config = HeldoutLossConfig(bins=3)
    whole = measure(subject, everything, None, config)
    asked = limit(subject.model, 2)
    halves = measure(subject, everything, None, config)
    assert max(asked) > 2
    assert [row["key"] for row in halves] == [row["key"] for row in whole]
    for name in ("mse", "loss"):
        assert [row[name] for row in halves] == pytest.approx([row[name] for row in whole], rel=1e-5)


def test_a_single_picture_that_does_not_fit_ends_with_4(figures, make_subject):
    subject = drawing_subject(figures, make_subject)
    limit(subject.model, 0)
    (arm,), _ = choose_arms({"text": 1.0}, subject)
    with pytest.raises(MemoryShortage, match="evaluation: a single item does not fit") as caught:
        draw(subject, next(subject.batches()), arm, 1, SamplerConfig(method="euler", steps=1))
    assert caught.value.exit_code == 4


def test_a_gpu_computes_in_the_modes_of_its_caller(figures, make_subject):
    """Inference mode belongs to a thread; without it a loss would keep all activations, and have no array."""
    subject = replace(drawing_subject(figures, make_subject), device="cuda:0")
    with torch.inference_mode():
        assert list(subject.as_fits(lambda part: torch.is_inference_mode_enabled(), next(subject.batches()))) == [True]


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_numbers_of_another_precision_say_so_and_are_not_compared(precision, figures, make_subject, quick, tmp_path):
    few = quick.model_copy(update={"tests": ["reconstruction", "heldout_loss"]})
    subject = drawing_subject(figures, make_subject)
    subject = replace(subject, rows=subject.rows[:8])
    plain = evaluate(subject, few, tmp_path / "plain").metrics
    other = evaluate(replace(subject, precision=precision), few, tmp_path / "other").metrics
    assert [one.name for one in plain] == [one.name for one in other]
    for one, two in zip(plain, other):
        assert "precision" not in one.settings, "so that reports of before are of fp32"
        assert two.settings["precision"] == precision
        assert differing([one.to_dict(), two.to_dict()]) == [f"precision unknown, {precision}"]
        if precision == "tf32" and one.value is not None:
            assert two.value == one.value, "on a CPU it is no other arithmetic"
    names = {one.name: one.value for one in plain}
    assert any(names[two.name] != two.value for two in other) == (precision == "bf16")
