"""Models whose answers are known come out in the known order, on every metric; alarms go off for those they are for."""

from copy import copy

import numpy as np
import pytest
import torch
from torch import nn

from evaluate.config import EvaluateConfig
from evaluate.drawing.edits import choose
from evaluate.drawing.texts import Texts
from evaluate.run import evaluate
from evaluate.subject import Subject
from prep.encoders.registry import build_encoder
from tests.evaluate.conftest import FiguresInMemory, Oracle, to_tensor
from tests.evaluate.suite.test_edit import picture
from train.draw.request import encoder_config
from train.method.dropout import ConditioningConfig
from train.method.flow import FlowConfig

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


# --- models that do, or do not, what they are told


class Obedient(nn.Module):
    """Draws the image that its features are of: the class token, else the patches, else the text; else grey."""

    def __init__(self, images):
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))
        self._images = images  # bytes of float32 features -> uint8 (H, W, 3)

    def encode_context(self, conditions, height: int, width: int, *, cache: bool = False):
        grey = np.full((height, width, 3), 128, np.uint8)
        given = [self._given(conditions, index) for index in range(len(conditions))]
        return torch.stack([to_tensor(self._images.get(features, grey)) for features in given])

    def forward(self, z, t, context):
        return context

    @staticmethod
    def _given(conditions, index):
        for name in ("cls", "patches"):
            if getattr(conditions, name) is not None:
                return getattr(conditions, name)[index].numpy().tobytes()
        if conditions.text is None:
            return b""
        return conditions.text[index][conditions.text_mask[index]].numpy().tobytes()


@pytest.fixture(scope="module")
def told():
    """What the swap and the edit test find of a model that obeys and of one that ignores both features and text."""
    figures = copy(FiguresInMemory(12, 28))
    t5 = build_encoder(encoder_config(figures.info, {}), "t5", "cpu").fingerprint()  # as a dataset records it
    figures.info = {**figures.info, "layers": {**figures.info["layers"], "t5": {"width": 8, "encoder": t5}}}
    texts, images = Texts(figures), {}
    figures.t5 = lambda row, flipped=False: texts.embed(row["caption"])
    rows = figures.rows("holdout")
    for row in rows:
        key, own = row["key"], figures.pixels(row)
        change, null = (choose(row["caption"], type, key) for type in ("attribute", "paraphrase"))
        edited = picture(key, **{change.attribute: change.words[0][1]})
        for features, image in (
            (figures.cls(row), own),
            (figures.patches(row), own),
            (texts.embed(row["caption"]), own),
            (texts.embed(null.text), own),
            (texts.embed(change.text), edited),
        ):
            images[features.astype(np.float32).tobytes()] = image
    truth = {row["key"]: figures.pixels(row) for row in rows}
    return figures, {"obedient": Obedient(images), "ignoring": Oracle(figures, truth, noises=1)}


@pytest.fixture(scope="module")
def obeyed(told, tmp_path_factory):
    """Metrics by name of each of the two models."""
    figures, models = told
    settings = {"tests": ["swap", "edit"], "conditions": {"text": 1.0}, "edit": {"types": ["attribute"]}}
    config = EvaluateConfig.model_validate({**CONFIG, **settings})
    table = ConditioningConfig(preset="default").resolve()
    found = {}
    for name, model in models.items():
        subject = Subject(model, FlowConfig(), table, figures, tuple(figures.rows("holdout")))
        evidence = evaluate(subject, config, tmp_path_factory.mktemp(name))
        assert {one.name for one in evidence.skipped} <= {"swap/lpips", "edit/lpips"}  # where there are no weights
        found[name] = {metric.name: metric for metric in evidence.metrics}
    return found


@pytest.mark.parametrize("mode", ["", "/cls", "/patches"])
def test_the_donor_is_told_from_a_model_that_obeys_and_by_chance_from_one_that_ignores_it(obeyed, mode):  # fault E08
    for space in ("", "_pixels"):
        right, chance = (obeyed[model][f"swap/identified{space}{mode}"] for model in ("obedient", "ignoring"))
        assert right.value == 1
        assert chance.low <= chance.baselines["chance"] <= chance.high < 1
        assert obeyed["obedient"][f"swap/gain{space}{mode}"].low > 0
        assert obeyed["ignoring"][f"swap/gain{space}{mode}"].value == pytest.approx(0, abs=1e-6)
    assert obeyed["ignoring"][f"swap/text_kept{mode}"].value > 0.9 > obeyed["obedient"][f"swap/text_kept{mode}"].high


def test_edits_show_where_the_text_is_obeyed_alone(obeyed):  # fault E08
    obedient, ignoring = obeyed["obedient"], obeyed["ignoring"]
    for name in ("effect", "effect_pixels", "direction_gain"):
        assert obedient[f"edit/{name}"].low > 0
        assert ignoring[f"edit/{name}"].value == pytest.approx(0, abs=1e-6)
    assert obedient["edit/direction"].value > 0.9
    assert obedient["edit/preserved"].value > 0.95 > 0.6 > obedient["edit/preserved"].baselines["random_pair"]
    assert obedient["edit/pose_kept"].value > 0.95
