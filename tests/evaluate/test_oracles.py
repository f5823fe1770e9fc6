"""Models whose answers are known come out in the known order, on every metric; alarms go off for those they are for."""

import pytest

from evaluate.config import EvaluateConfig
from evaluate.run import evaluate
from evaluate.subject import Subject
from tests.evaluate.conftest import Oracle
from train.conditioning import ConditioningConfig
from train.flow import FlowConfig

# what else known models must score, degenerate ones among them, is in test_run.py
CONFIG = {
    "tests": ["reconstruction", "divergence", "memorisation", "distribution"],
    "conditions": {"all": 1.0},
    "sampler": {"method": "euler", "steps": 2},
    "reconstruction": {"conditions": ["all"]},
    "divergence": {"prompts": 12, "noises": 2},
    "grid_images": 0,
}


@pytest.fixture(scope="module")
def copy_cat(figures):
    """Draws a training image of the bucket for every sample."""
    by_bucket = {row["bucket"]: figures.pixels(row) for row in figures.rows("train")}
    return Oracle(figures, {row["key"]: by_bucket[row["bucket"]] for row in figures.rows("holdout")})


@pytest.fixture(scope="module")
def evidence(models, copy_cat, figures, tmp_path_factory):
    """What the tests found of every known model, by its name; computed once."""
    table = ConditioningConfig(preset="quickstart").resolve()
    config, rows = EvaluateConfig.model_validate(CONFIG), tuple(figures.rows("holdout"))
    known = {name: models[name] for name in ("truth", "shuffled", "mean_image", "noise")} | {"copy_cat": copy_cat}
    return {
        name: evaluate(Subject(model, FlowConfig(), table, figures, rows), config, tmp_path_factory.mktemp(name))
        for name, model in known.items()
    }


@pytest.fixture(scope="module")
def values(evidence):
    """Metric values by model and name."""
    return {model: {metric.name: metric.value for metric in found.metrics} for model, found in evidence.items()}


@pytest.mark.parametrize("measure", ["ssim", "dino_similarity", "skill_mse", "skill_ssim", "skill_dino_similarity"])
def test_likeness_falls_from_the_truth_over_others_to_noise(values, measure):  # fault E08
    for other in ("shuffled", "copy_cat"):
        order = [values[model][f"reconstruction/{measure}"] for model in ("truth", other, "noise")]
        assert order == sorted(order, reverse=True), other
        assert order[0] > order[1]


@pytest.mark.parametrize("distance", ["kid", "cmmd"])
def test_sets_of_real_pictures_are_nearer_than_any_others(values, distance):  # fault E08
    name = f"distribution/{distance}"
    real = [values[model][name] for model in ("truth", "shuffled")]
    assert real[0] == pytest.approx(real[1], abs=0.02)  # as sets they are the same, up to lone samples
    assert max(real) < min(values[model][name] for model in ("mean_image", "noise"))


def test_the_noise_makes_no_difference_to_an_oracle_and_all_to_an_echo(values, evidence):  # fault E08
    def collapsed(model):
        return {alarm["name"]: alarm["fired"] for alarm in evidence[model].extras["divergence"]["alarms"]}["collapse"]

    assert values["truth"]["divergence/diversity/text"] == pytest.approx(0, abs=1e-5)
    assert values["noise"]["divergence/diversity/text"] > 0.1
    assert collapsed("truth")
    assert collapsed("mean_image")
    assert not collapsed("noise")


def test_only_the_copy_cat_sets_off_the_alarm_of_memorisation(evidence):  # fault E08
    fired = {
        model: [alarm["fired"] for alarm in found.extras["memorisation"]["alarms"]] for model, found in evidence.items()
    }
    assert fired == {model: [model == "copy_cat"] for model in evidence}
