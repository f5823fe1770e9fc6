"""LPIPS in all tests that report it, with the words of the original recipe, over steps, and with its alarm."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from evaluate.config import EvaluateConfig
from evaluate.metrics.likeness import open_judge
from evaluate.records import ITSELF, MODEL, RELATED, Metric, upgraded
from evaluate.report.compare import differing
from evaluate.report.files import EvaluationFiles
from evaluate.report.report import render
from evaluate.report.summary import summary
from evaluate.run import Evidence, evaluate, write
from evaluate.statistics import intervals
from evaluate.subject import Subject
from evaluate.suite import divergence
from evaluate.suite.reconstruction import scale_words
from tests.evaluate.conftest import Constant
from tests.evaluate.report.test_degenerate import CONFIG, TABLE
from tests.evaluate.report.test_report import provenance
from train.__main__ import main as train
from train.loop.tracking import read_metrics
from train.method.flow import FlowConfig

SCALE = "rule of thumb: <0.3 excellent, 0.3-0.5 good, 0.5-0.7 blurry, >0.7 poor"
PUBLISHED = {"lpips": "AlexNet v0.1"}
NOISE = EvaluateConfig.model_validate({**CONFIG, "tests": ["reconstruction", "swap", "edit", "divergence"]})


def evaluate_noise(figures, folder):
    """Evaluate a model that draws its noise."""
    rows = tuple(figures.rows("holdout"))
    subject = Subject(Constant(lambda z: z), FlowConfig(), TABLE.resolve(), figures, rows, batch_size=8)
    return evaluate(subject, NOISE, folder)


@pytest.fixture(scope="module")
def evaluated(readable_figures, random_alexnet, tmp_path_factory):
    """Noise evaluated with a random AlexNet under LPIPS, which its label says."""
    folder = tmp_path_factory.mktemp("run") / "validation_outputs" / "step-000123"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(random_alexnet))
        evidence = evaluate_noise(readable_figures, folder)
    write(folder, NOISE, evidence, provenance(NOISE), [])
    return folder, evidence


@pytest.mark.parametrize(
    ("name", "condition", "other"),
    [
        ("swap/lpips", "swap/both", "unswapped"),
        ("swap/lpips/cls", "swap/cls", "unswapped"),
        ("swap/lpips/patches", "swap/patches", "unswapped"),
        ("edit/lpips", "edit/attribute", "unedited"),
        ("edit/lpips/opposite", "edit/opposite", "unedited"),
    ],
)
def test_swaps_and_edits_say_how_far_pictures_are_from_their_own_image(evaluated, name, condition, other):
    _, evidence = evaluated
    metric = next(one for one in evidence.metrics if one.name == name)
    rows = [row for row in evidence.samples if (row["kind"], row["condition"]) == (MODEL, condition)]
    assert metric.value == pytest.approx(np.mean([row["lpips"] for row in rows]))
    assert metric.n == len({row["key"] for row in rows}) >= 10
    assert metric.low < metric.value < metric.high
    assert {other, "random_pair", "round_trip"} <= set(metric.baselines)
    assert ("null_edit" in metric.baselines) == name.startswith("edit")
    assert metric.baselines["round_trip"] < metric.baselines["random_pair"]
    assert metric.better == "lower"
    assert "not the published weights" in metric.settings["lpips"]


def test_lpips_is_a_setting_of_its_own_metrics_alone(evaluated):
    """So that a run trained with LPIPS is compared in all others; and in LPIPS itself, where its label says so."""
    _, evidence = evaluated
    for metric in evidence.metrics:
        assert ("lpips" in metric.settings) == ("lpips" in metric.name), metric.name


def labels(figures, folder, losses):
    """Evaluate noise of a model with these perceptual losses, by LPIPS and the judge: metrics by name."""
    rows = tuple(figures.rows("holdout"))
    model = Constant(lambda z: z)
    subject = Subject(model, FlowConfig(), TABLE.resolve(), figures, rows, losses=frozenset(losses))
    sizes = {"conditions": {"text": 1.0}, "reconstruction": {"conditions": ["text"]}, "divergence": {"prompts": 8}}
    tests = {"tests": ["heldout_loss", "reconstruction", "divergence", "distribution"], **sizes}
    evidence = evaluate(subject, EvaluateConfig.model_validate({**CONFIG, **tests}), folder)
    return {metric.name: metric for metric in evidence.metrics}


def test_what_training_minimised_is_a_label_and_keeps_nothing_from_being_compared(
    figures, random_alexnet, tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCH_HOME", str(random_alexnet))
    judge, _ = open_judge(None, figures, "cpu")
    monkeypatch.setattr("evaluate.run.open_judge", lambda *_: (replace(judge, label="dinov2"), None))
    plain, taught = (labels(figures, tmp_path / str(len(losses)), losses) for losses in ((), ("lpips", "dinov2")))
    assert plain.keys() == taught.keys()
    for name, metric in plain.items():
        assert differing([metric.to_dict(), taught[name].to_dict()]) == []
        itself = name.startswith(("heldout", "reconstruction/psnr", "reconstruction/skill_mse"))
        seen = name.startswith(("divergence", "distribution")) or "dino_similarity" in name or "lpips" in name
        assert metric.objective == (ITSELF if itself else ""), name
        network = RELATED if seen and "_pixels" not in name else ""
        assert taught[name].objective == (ITSELF if itself else network), name
    said = summary([*taught.values()], [])
    assert f"{RELATED}: distribution/kid/text" in said
    assert f"{ITSELF}: heldout_error" in said


def test_evaluations_from_when_it_was_a_setting_are_read_as_if_it_were_a_label():
    old = {"name": "reconstruction/lpips", "settings": {"lpips": f"AlexNet v0.1, {RELATED}", "steps": 8}}
    assert upgraded(old) == {**old, "settings": {"lpips": "AlexNet v0.1", "steps": 8}, "objective": RELATED}
    other = {"name": "pose_pck/text", "settings": {"lpips": f"AlexNet v0.1, {RELATED}", "steps": 8}}
    assert upgraded(other) == {**other, "settings": {"steps": 8}, "objective": ""}
    judged = {"name": "distribution/kid", "settings": {"judge": f"dinov2, {RELATED}"}}
    assert upgraded(judged) == {**judged, "settings": {"judge": "dinov2"}, "objective": RELATED}
    now = {"name": "swap/gain", "settings": {"judge": "dinov2", "space": "feature"}, "objective": RELATED}
    assert upgraded(now) == now


def test_without_weights_each_is_skipped_with_the_way_to_get_them(readable_figures, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    evidence = evaluate_noise(readable_figures, tmp_path)
    assert [one.name for one in evidence.skipped if "no backbone weights" in one.reason] == [
        "reconstruction/lpips", "swap/lpips", "edit/lpips", "divergence/lpips",
    ]  # fmt: skip
    assert not any("lpips" in metric.name for metric in evidence.metrics)
    lines = [line for line in summary(evidence.metrics, evidence.skipped).splitlines() if "no backbone" in line]
    (line,) = lines  # the long way to get them is said once
    assert line.startswith("skipped: reconstruction/lpips, swap/lpips, edit/lpips, divergence/lpips: no backbone")
    assert "torch.hub import load_state_dict_from_url" in line


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (0.29, "excellent"),
        (0.3, "good"),
        (0.49, "good"),
        (0.5, "blurry"),
        (0.69, "blurry"),
        (0.7, "poor"),
        (1.2, "poor"),
    ],
)
def test_the_scale_of_the_original_recipe_stands_beside_the_number(value, word):
    for name in ("reconstruction/lpips", "reconstruction/lpips/text"):
        said = scale_words(name, value, PUBLISHED)
        assert said.startswith(f"{word} (reference scale of the original recipe, a ")
        assert SCALE in said
    metric = Metric("reconstruction/lpips", value, value - 0.1, value + 0.1, 12, settings=PUBLISHED, better="lower")
    assert f"reconstruction/lpips: {word} (reference scale" in summary([metric], [])
    assert scale_words("swap/lpips", value, PUBLISHED) == scale_words("reconstruction/psnr", value, {}) == ""
    assert scale_words("reconstruction/lpips", None, PUBLISHED) == ""
    assert scale_words("reconstruction/lpips", value, {"lpips": "x, not the published weights"}).startswith(
        "not on the"
    )


def test_the_page_shows_the_scale_beside_the_number(evaluated):
    files = EvaluationFiles.read(evaluated[0])
    escaped = SCALE.replace("<", "&lt;").replace(">", "&gt;")
    assert f"not on the reference scale of the original recipe, a {escaped}" in render(files)
    for metric in files.report["metrics"]:
        metric["settings"] = metric["settings"] | PUBLISHED
        if metric["name"] == "reconstruction/lpips":
            metric["value"], metric["low"], metric["high"] = 0.42, 0.4, 0.44
    assert "good (reference scale of the original recipe" in render(files)


@pytest.mark.slow
def test_tensorboard_and_the_log_have_the_tags(figures_dataset, random_alexnet, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(random_alexnet))
    small = ["model.hidden_size=32", "model.depth=2", "model.num_heads=2", "model.bottleneck=16", "train.batch_size=4"]
    places = ["--config", "configs/train/quickstart.yaml", f"dataset={figures_dataset}", f"output={tmp_path / 'run'}"]
    # so violent that the averaged weights draw something: blank pictures have no LPIPS
    short = ["train.steps=24", "train.lr=0.02", "train.lr_min=0.02", "train.device=cpu", "visual_debug.every_steps=0"]
    tests = ["validation.every_steps=24", "validation.tests=[reconstruction, edit]", "validation.samples=16"]
    assert train(["run", *places, *small, *short, *tests]) == 0
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    folder = tmp_path / "run" / "validation_outputs" / "step-000024-dev"
    metrics = {one["name"]: one["value"] for one in json.loads((folder / "report.json").read_text())["metrics"]}
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    for name in ("reconstruction/lpips", "edit/lpips"):
        assert last[f"validation/{name}"] == metrics[name]
        assert board.Scalars(f"validation/{name}")[-1].value == pytest.approx(metrics[name])


# --- over steps


def interval_of(values):
    return intervals.quantile(values, 0.5)


def steady(random, steps=5, prompts=32):
    """LPIPS of prompts that differ by .08, wobble by .03 each and by .01 together from checkpoint to checkpoint."""
    base = random.normal(0.6, 0.08, prompts)
    return [base + random.normal(0, 0.03, prompts) + random.normal(0, 0.01) for _ in range(steps)]


def test_a_spike_fires_and_noise_does_not():
    random = np.random.default_rng(0)
    false, missed = 0, 0
    for _ in range(100):
        *before, now = steady(random)
        past = [interval_of(one) for one in before]
        false += divergence.is_spike(interval_of(now), past)
        missed += not divergence.is_spike(interval_of(now + 0.15), past)
    assert (false, missed) == (0, 1)  # the spike is half as large again as an interval is wide


def test_a_slow_rise_and_a_fall_are_no_spike():
    first, *_ = steady(np.random.default_rng(1))
    rising = [interval_of(first + 0.02 * step) for step in range(5)]
    assert not any(divergence.is_spike(rising[step], rising[:step]) for step in range(2, 5))
    assert divergence.is_spike(interval_of(first - 0.3), rising) is False


def test_too_few_checkpoints_or_prompts_cannot_tell():
    first, second, third, *_ = map(interval_of, steady(np.random.default_rng(1)))
    assert divergence.is_spike(third, [first]) is None
    assert divergence.is_spike(third, [first, second]) is False
    assert divergence.is_spike(interval_of(np.ones(7)), [first, second]) is None
    assert divergence.is_spike(third, [first, interval_of(np.ones(7))]) is None


LABELS = [("text", 0), ("noises/text", 1)]
STEPS = {"conditions": {"all": 1.0, "text": 2.0}, "divergence": {"noises": 2}}


def checkpoint(judged, pictures, run_folder, step, lpips):
    """Evaluate and write one checkpoint whose pictures have these LPIPS, by prompt; return metrics and extras."""
    rows = judged.rows(dict.fromkeys(LABELS, pictures))
    for row in rows:
        if row["kind"] != "real":
            row["lpips"] = float(lpips[row["key"]]) + 0.01 * (row["seed"] or 0)
    context = judged.context(run_folder, step, **STEPS)
    context.examiner = SimpleNamespace(figures=True, lpips_label="AlexNet v0.1", no_lpips=None)
    metrics, skipped = divergence.summarise(rows, context, context.config.divergence)
    for name in sorted(context.shown):  # of which this test keeps no files
        assert name[0] == MODEL
    folder = run_folder / "validation_outputs" / f"step-{step:06d}"
    facts = provenance(context.config) | {"step": step}
    write(folder, context.config, Evidence(rows.all, [], metrics, skipped, context.extras), facts, [])
    return {metric.name: metric for metric in metrics}, context.extras["divergence"]


def test_the_distribution_over_steps_is_stored_and_its_alarm_reads_it(judged, known_pictures, tmp_path):
    random, fired = np.random.default_rng(0), []
    keys = judged.context().keys
    for step, values in zip((100, 200, 300, 400), steady(random, 4, len(keys))):
        lpips = dict(zip(keys, values + (0.2 if step == 400 else 0)))
        metrics, extra = checkpoint(judged, known_pictures["shuffled"], tmp_path, step, lpips)
        fired.append({alarm["name"]: alarm["fired"] for alarm in extra["alarms"]}["spike"])
    assert fired == [None, None, False, True]
    assert [one["step"] for one in extra["lpips"]["steps"]] == [100, 200, 300, 400]
    own = np.array([lpips[key] for key in keys]) + 0.005  # the mean over two noises
    assert extra["lpips"]["quantiles"] == [0.1, 0.25, 0.5, 0.75, 0.9]
    assert extra["lpips"]["steps"][-1]["values"] == pytest.approx(np.quantile(own, extra["lpips"]["quantiles"]))
    assert extra["lpips"]["steps"][-1]["n"] == len(keys) == metrics["divergence/lpips/text"].n
    assert metrics["divergence/lpips/text"].value == pytest.approx(np.sort(own)[11])  # the lower median of 24

    html = render(EvaluationFiles.read(tmp_path / "validation_outputs" / "step-000400"))
    title = "the band of 10 to 90 % of the prompts"
    chart = html.partition(title)[2].partition("</svg>")[0]
    assert '<polygon class="band c1"' in chart
    assert chart.count("<circle") == 4  # one for each checkpoint
    assert "spike: LPIPS jumped" in html
    assert title not in render(EvaluationFiles.read(tmp_path / "validation_outputs" / "step-000100"))
