"""Models whose answers are known come out in the known order, on every metric; alarms go off for those they are for."""

import re
from copy import copy

import numpy as np
import pytest
import torch
from torch import nn

from evaluate.config import EvaluateConfig
from evaluate.drawing.baselines import load_training_images, nearest
from evaluate.drawing.edits import choose
from evaluate.drawing.texts import Texts
from evaluate.metrics.likeness import open_judge, pixel_features
from evaluate.metrics.training_features import load_train_features
from evaluate.records import ATTRIBUTES
from evaluate.report.files import EvaluationFiles, name_runs
from evaluate.report.metrics import metric_groups
from evaluate.report.report import render, tally
from evaluate.run import evaluate, write
from evaluate.subject import Subject, random_pairs
from evaluate.suite import TESTS
from prep.encoders.registry import build_encoder
from tests.evaluate.conftest import FiguresInMemory, Oracle, to_tensor
from tests.evaluate.report.test_report import provenance
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
    assert fired == {model: [model == "copy_cat"] * 2 for model in evidence}  # and asked by training images' own words


# --- painters without skill


@pytest.fixture(scope="module")
def unskilled(readable_figures, tmp_path_factory):
    """The files of every test on painters of the mean training image, and of the nearest ones by two measures."""
    figures = readable_figures
    train = {row["key"]: row for row in figures.rows("train")}
    rows = [row for row in figures.rows("holdout") if row["bucket"] in {other["bucket"] for other in train.values()}]
    training = load_training_images(figures, {row["bucket"] for row in rows}, 40)
    pixels = np.concatenate([pixel_features(figures.pixels(row)[None]) for row in rows])
    judge, _ = open_judge(None, figures, "cpu")
    known = load_train_features(figures, judge, 40)
    features = np.concatenate([judge.features(np.array(figures.pixels(row))[None]) for row in rows])
    near, alike = (
        [nearest(own[None], row["bucket"], known, space)[0] for own, row in zip(found, rows)]
        for found, space in ((pixels, known.feature_pixels), (features, known.feature))
    )
    pictures = {
        "mean_image": {row["key"]: np.uint8(np.rint(training.mean_image(row["bucket"]))) for row in rows},
        "retrieved": {row["key"]: figures.pixels(train[key]) for row, key in zip(rows, near)},
        "retrieved_by_features": {row["key"]: figures.pixels(train[key]) for row, key in zip(rows, alike)},
    }
    sizes = {"heldout_loss": {"conditions": ["all"], "gap": []}, "edit": {"types": ["attribute"]}}
    changes = {"tests": list(TESTS), "conditions": {"all": 1.0, "text": 1.0}, "pose": {"mirrored": 8}, **sizes}
    config = EvaluateConfig.model_validate({**CONFIG, **changes})
    own = copy(figures)
    own.rows = lambda split=None: [row for row in figures.rows(split) if split != "holdout" or row in rows]
    found = {}
    for name, drawn in pictures.items():
        subject = Subject(Oracle(own, drawn), FlowConfig(), ConditioningConfig().resolve(), own, tuple(rows))
        folder = tmp_path_factory.mktemp(name)
        write(folder, config, evaluate(subject, config, folder), provenance(config), [])
        found[name] = EvaluationFiles.read(folder)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("painter", ["mean_image", "retrieved", "retrieved_by_features"])
def test_who_paints_the_mean_image_or_a_training_image_is_no_better_than_the_floor(unskilled, painter):
    metrics = unskilled[painter].metrics
    rows = [
        row
        for group in metric_groups(metrics)
        for rows in (group["headline"], *group["others"].values())
        for row in rows
    ]
    verdicts = {row["name"]: row["floor"]["verdict"] for row in rows if row["floor"]}
    assert len(verdicts) > 40
    assert [name for name, verdict in verdicts.items() if verdict == "better"] == []
    (run,) = name_runs([unskilled[painter]])
    assert tally(run)["better"] == 0


@pytest.mark.slow
def test_retrieval_by_features_is_its_own_floor_where_features_are_the_measure(unskilled):
    found = {metric["name"]: metric for metric in unskilled["retrieved_by_features"].metrics}
    likeness = found["reconstruction/dino_similarity"]
    assert likeness["value"] == pytest.approx(likeness["baselines"]["nearest_features"], abs=1e-5)
    assert likeness["value"] > likeness["baselines"]["nearest_train"]


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


class Told(nn.Module):
    """Draws the sample's own image from its class token; without, a figure whose colours the text says if it is one of
    ``heard``, and whose joints the pose says if it is; what nobody says is another sample's."""

    def __init__(self, figures, heard):
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))
        rows = {row["key"]: row for row in figures.rows("holdout")}
        pairs = random_pairs(list(rows.values()))
        truth = figures.truth()
        self._images = {}
        for key, row in rows.items():
            colours, joints = ({True: key, False: pairs.get(key, key)}[name in heard] for name in ("text", "pose"))
            other = pairs.get(key, key)
            features = {"text": figures.t5(row), "pose": figures.pose(row)}
            given = {name: array.astype(np.float32).tobytes() for name, array in features.items()}

            def drawn(colours, joints):
                return picture(joints, **{name: truth[colours][name] for name in ATTRIBUTES})

            self._images[figures.cls(row).tobytes()] = figures.pixels(row)
            self._images[given["text"], given["pose"]] = drawn(colours, joints)
            self._images[given["text"], None] = drawn(colours, other)
            self._images[None, given["pose"]] = drawn(other, joints)

    def encode_context(self, conditions, height: int, width: int, *, cache: bool = False):
        grey = np.full((height, width, 3), 128, np.uint8)
        return torch.stack(
            [to_tensor(self._images.get(self._given(conditions, index), grey)) for index in range(len(conditions))]
        )

    def forward(self, z, t, context):
        return context

    @staticmethod
    def _given(conditions, index):
        if conditions.cls is not None:
            return conditions.cls[index].numpy().tobytes()
        text = None if conditions.text is None else conditions.text[index][conditions.text_mask[index]]
        pose = None if conditions.pose is None else conditions.pose[index]
        return tuple(None if one is None else one.float().numpy().tobytes() for one in (text, pose))


@pytest.fixture(scope="module")
def listeners(figures, tmp_path_factory):
    """Evaluations of models that hear both, the pose alone, or the text alone; all obey the image features."""
    config = {**CONFIG, "tests": ["attributes", "pose"], "conditions": {"all": 1.0, "text+pose": 1.0, "text": 1.0}}
    config = EvaluateConfig.model_validate({**config, "pose": {"mirrored": 0}})
    table, rows = ConditioningConfig(preset="default").resolve(), tuple(figures.rows("holdout"))
    found = {}
    for name, heard in {"both": ("text", "pose"), "deaf to text": ("pose",), "deaf to pose": ("text",)}.items():
        folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
        subject = Subject(Told(figures, heard), FlowConfig(), table, figures, rows)
        write(folder, config, evaluate(subject, config, folder), provenance(config), [])
        found[name] = EvaluationFiles.read(folder)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("both", {"text": "obeyed", "pose": "obeyed"}),
        ("deaf to text", {"text": "not obeyed", "pose": "obeyed"}),
        ("deaf to pose", {"text": "obeyed", "pose": "not obeyed"}),
    ],
)
def test_who_is_deaf_to_text_or_pose_is_said_not_to_obey_it(listeners, model, said):
    """Though all of them draw the right colours and joints from all conditions, where DINO features say them."""
    files = listeners[model]
    named = {metric["name"]: metric for metric in files.metrics}
    assert min(named[f"{name}/all"]["value"] for name in ("attribute_accuracy", "pose_pck")) > 0.9
    first = re.sub(r"\s+", " ", render(files).partition('id="first"')[2].partition("</section>")[0])
    for condition, word in said.items():
        assert re.search(f'<dt>{condition}</dt><dd><span class="pill [a-z]+">{word}</span> Given text \\+ pose', first)
    unheard = next((condition for condition, word in said.items() if word == "not obeyed"), None)
    assert (f"The {unheard} is not obeyed yet: train on." in first) == (unheard is not None)
    headline = {row["title"]: row for group in metric_groups(files.metrics) for row in group["headline"]}
    titles = {"text": "Attribute accuracy", "pose": "Pose, PCK at 0.1"}
    for condition, title in titles.items():
        assert headline[title]["part"] == "text + pose"
        assert (headline[title]["floor"]["verdict"] == "better") == (said[condition] == "obeyed")
    gains = {"text": named["attribute_gain/text+pose"], "pose": named["pose_gain/text+pose"]}
    assert [gains[name]["settings"]["without"] for name in ("text", "pose")] == ["pose", "text"]
    for condition, gain in gains.items():
        assert (gain["low"] > 0) == (said[condition] == "obeyed")
