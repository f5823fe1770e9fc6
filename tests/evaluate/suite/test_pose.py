"""Pose accuracy: joints that were asked for and nothing else, floor and ceiling, mirror images, nobody and several."""

from copy import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from evaluate.config import EvaluateConfig
from evaluate.metrics.examiner import Examiner
from evaluate.metrics.joints import JOINTS_BOX, PARTS, TRUE_BOX, Box, mirror, score_joints
from evaluate.records import BASELINE, MODEL, REAL
from evaluate.run import evaluate
from evaluate.subject import Subject, read_batches
from evaluate.suite import pose
from prep.encoders.dwpose import Pose, denormalise
from tests.evaluate.conftest import to_tensor
from train.method.dropout import ConditioningConfig
from train.method.flow import FlowConfig
from train.model.mirror import flip_pixels, flip_pose

BOX = Box(40.0, 50.0)
SIDE = 64


def skeletons(count, seed=0):
    """Random people in a picture of 64 pixels: float32 (count, 133, 3)."""
    random = np.random.default_rng(seed)
    points = random.uniform(5, 59, size=(count, 133, 2))
    return np.concatenate([points, np.ones((count, 133, 1))], axis=2).astype(np.float32)


def rows(found, targets, kind=MODEL, condition="text+pose", box=BOX, persons=None):
    """As the examiner makes them; ``persons`` found defaults to one where there are joints."""
    scored = score_joints(found, targets, [box] * len(targets), SIDE, SIDE)
    persons = persons or [int(joints is not None) for joints in found]
    place = {"kind": kind, "condition": condition, "seed": 0, "degenerate": None, "width": SIDE, "height": SIDE}
    return [
        {"key": f"{index:02d}", **place, **row, "persons": number}
        for index, (row, number) in enumerate(zip(scored, persons))
    ]


def drawn(own, references=None, condition="text+pose"):
    return pose.PosedPictures(condition, own, references or {}, {"guidance": 2.0, "box": TRUE_BOX})


def accuracies(one):
    return {metric.name: metric for metric in pose.accuracy(one)}


def pck(own, references=None):
    return accuracies(drawn(own, references))["pose_pck/text+pose"]


def test_the_asked_pose_scores_one_and_its_mirror_image_less():
    targets = skeletons(30)
    for measure, most in (("pck", 0.4), ("oks", 0.4)):
        name = f"pose_{measure}/text+pose"
        assert accuracies(drawn(rows(list(targets), targets)))[name].value == 1.0
        mirrored = accuracies(drawn(rows(list(mirror(targets, SIDE)), targets)))[name]  # fault E09
        assert mirrored.high < most
        assert accuracies(drawn(rows(list(skeletons(30, seed=1)), targets)))[name].high < most


def test_the_allowance_is_a_tenth_of_the_box():
    targets = skeletons(20)
    moved = targets.copy()
    moved[:, :, 0] += 4.9
    assert pck(rows(list(moved), targets)).value == 1.0
    assert pck(rows(list(moved), targets, box=Box(48.0, 20.0))).value == 0.0


def test_face_and_hands_are_measured_by_their_own_box():
    """A face drawn as one dot in its middle is no face, though a tenth of the person's box reaches around all of it."""
    targets = skeletons(20)
    for part, place in ((PARTS["face"], 20), (slice(91, 112), 40), (slice(112, 133), 50)):
        targets[:, part, :2] = place + np.random.default_rng(0).uniform(-2, 2, (part.stop - part.start, 2))
    dots = targets.copy()
    for part in (PARTS["face"], slice(91, 112), slice(112, 133)):
        dots[:, part, :2] = targets[:, part, :2].mean(axis=1, keepdims=True)
    found = accuracies(drawn(rows(list(dots), targets)))
    for part in ("face", "hands"):
        assert found[f"pose_pck/text+pose/{part}"].value < 0.1
        assert (
            found[f"pose_pck/text+pose/{part}"]
            .settings["of"]
            .endswith("of face and hands, of their own joints asked for")
        )
    assert found["pose_pck/text+pose"].value == 1
    assert accuracies(drawn(rows(list(targets), targets)))["pose_pck/text+pose/whole"].value == 1
    lone = targets.copy()
    lone[:, 24:91, 2] = 0  # a single joint of the face has no box
    assert accuracies(drawn(rows(list(lone), lone)))["pose_pck/text+pose/face"].value is None


def test_joints_that_nobody_asked_for_cost_something():
    targets = skeletons(20)
    found = targets.copy()
    targets[:, 5:11, 2] = 0  # six of the body's seventeen joints are not asked for, and drawn all the same
    one = drawn(rows(list(found), targets), {pose.CEILING: rows(list(targets), targets, kind=REAL, condition="real")})
    assert accuracies(one)["pose_pck/text+pose"].value == 1
    metric = pose.wanted(one)
    assert metric.name == "pose_wanted/text+pose"
    assert metric.value == pytest.approx(11 / 17)
    assert metric.baselines[pose.CEILING] == 1
    nobody = pose.wanted(drawn(rows([None] * 20, targets)))
    assert (nobody.value, nobody.reason) == (None, "no joint was found")


def test_every_part_of_the_body_has_its_own_numbers():
    targets = skeletons(20)
    targets[:10, PARTS["feet"]] = 0  # of these pictures no foot is asked for
    found = targets.copy()
    found[:, PARTS["hands"], 2] = 0
    metrics = accuracies(drawn(rows(list(found), targets)))
    assert set(metrics) == {
        f"pose_{measure}/text+pose{part}"
        for measure in ("pck", "oks")
        for part in ("", "/feet", "/face", "/hands", "/whole")
    }
    for measure in ("pck", "oks"):
        assert metrics[f"pose_{measure}/text+pose"].value == 1.0
        assert metrics[f"pose_{measure}/text+pose/face"].value == 1.0
        assert metrics[f"pose_{measure}/text+pose/hands"].value == 0.0
        assert metrics[f"pose_{measure}/text+pose/hands"].high > 0.1  # twenty misses are no certainty
        assert metrics[f"pose_{measure}/text+pose/feet"].n == 10
    whole = [(133 - 42) / 133] * 10 + [(133 - 42 - 6) / (133 - 6)] * 10
    assert metrics["pose_oks/text+pose/whole"].value == pytest.approx(np.mean(whole))
    assert metrics["pose_pck/text+pose/whole"].value == pytest.approx((91 * 10 + 85 * 10) / (133 * 10 + 127 * 10))
    assert metrics["pose_oks/text+pose/whole"].settings["sigmas"] == "COCO-WholeBody"
    assert metrics["pose_oks/text+pose/whole"].settings["area"] == "0.53 x that of the true box"


def test_a_missed_figure_misses_every_joint_asked_for():
    targets = skeletons(20)
    targets[:, 9:, 2] = 0.1  # not asked for
    metrics = accuracies(drawn(rows([None] * 10 + list(targets[10:]), targets)))
    for name in ("pose_pck/text+pose", "pose_oks/text+pose"):
        assert metrics[name].value == 0.5
        assert metrics[name].n == 20
    hands = metrics["pose_pck/text+pose/hands"]
    assert (hands.value, hands.reason) == (None, "none of these was asked for")


def test_samples_without_a_person_are_counted_and_not_scored():  # fault E09
    targets = skeletons(24)
    targets[:12] = 0
    own = rows([None] * 11 + list(skeletons(1)) + list(targets[12:]), targets)
    metric = pck(own)
    assert (metric.value, metric.n) == (1.0, 12)
    counts = pose.count(own, {row["key"]: {"persons": 1} for row in own})
    assert (counts["pictures"], counts["asked"], counts["nobody_asked"], counts["found_unasked"]) == (24, 12, 12, 1)
    nobody = pck(rows([None] * 12, targets[:12]))
    assert nobody.value is None
    assert nobody.reason == "no sample has a pose to ask for"


def test_several_people_and_none_are_counted():  # fault E09
    targets = skeletons(20)
    targets[0, 3] = (70, 20, 1)  # beyond the edge
    own = rows([None] * 5 + list(targets[5:]), targets, persons=[0] * 5 + [1] * 13 + [2, 3])
    real = rows(list(targets), targets, REAL, "real", persons=[1] * 19 + [2])
    nobody, several = pose.persons(drawn(own, {pose.CEILING: real}))
    assert (nobody.name, nobody.value, nobody.baselines) == (
        "pose_persons/text+pose/nobody",
        0.25,
        {"detector_on_real": 0.0},
    )
    assert (several.name, several.value, several.baselines) == (
        "pose_persons/text+pose/several",
        0.1,
        {"detector_on_real": 0.05},
    )
    assert (nobody.n, nobody.better) == (20, "lower")
    assert nobody.low < 0.25 < nobody.high
    unasked = rows([None], np.zeros((1, 133, 3), np.float32))[0] | {"key": "99"}
    assert pose.persons(drawn([*own, unasked]))[0].value == 0.25
    sources = {row["key"]: {"persons": 2 if row["key"] < "04" else 1} for row in own}
    assert pose.count(own, sources) == {
        **{"pictures": 20, "degenerate": 0, "asked": 20, "nobody_asked": 0, "several_in_source": 4},
        **{"nobody_found": 5, "several_found": 2, "found_unasked": 0, "outside": 1},
    }


def test_floor_and_ceiling_are_those_of_the_same_samples():
    targets = skeletons(20)
    references = {
        "random_pair": rows(list(skeletons(20, seed=1)), targets, BASELINE, "random_pair"),
        pose.CEILING: rows([None] * 2 + list(targets[2:]), targets, REAL, "real"),
    }
    metric = pck(rows(list(targets), targets), references)
    assert metric.baselines["random_pair"] < 0.2
    assert metric.baselines["detector_on_real"] == pytest.approx(0.9)
    assert metric.settings["alpha"] == 0.1
    assert metric.settings["of"] == "longer side of the true box; of face and hands, of their own joints asked for"
    assert pck(rows(list(targets), targets)[2:], references).baselines["detector_on_real"] == 1.0


def test_a_picture_has_to_miss_the_mirror_image_of_its_pose():
    targets = skeletons(30)
    real = {pose.CEILING: rows(list(targets), targets, REAL, "real")}
    followed = pose.margin(drawn(rows(list(targets), targets), real))
    assert followed.name == "pose_mirror/text+pose"
    assert followed.low > 0.6
    assert followed.baselines["detector_on_real"] == followed.value
    half = targets.copy()  # all joints twice: where they were asked for, or in the mirror
    half[::2] = mirror(half[::2], SIDE)
    undecided = pose.margin(drawn(rows(list(half), targets)))
    assert undecided.low < 0 < undecided.high
    ignored = pose.margin(drawn(rows(list(mirror(targets, SIDE)), targets)))
    assert ignored.high < -0.6


def test_pictures_from_the_mirror_image_have_to_miss_the_pose_itself():
    targets = skeletons(24)
    straight = drawn(rows(list(targets), targets))
    turned = mirror(targets[:16], SIDE)

    def drop(found):
        return pose.drop(
            straight, drawn(rows(found, turned, condition="text+pose/mirrored"), None, "text+pose/mirrored")
        )

    followed, ignored = drop(list(turned)), drop(list(targets[:16]))
    assert (followed.name, followed.n) == ("pose_mirror/text+pose/mirrored", 16)
    assert followed.low > 0.6
    assert followed.baselines == {"pose_ignored": 0.0}
    assert ignored.value == 0
    broken = rows(list(turned), turned, condition="text+pose/mirrored")
    broken[3] |= {"degenerate": "constant", "target_joints": None, "joints": None}
    real = {pose.CEILING: rows(list(targets), targets, REAL, "real")}
    metric = pose.drop(straight, drawn(broken, real, "text+pose/mirrored"))
    assert metric.value is None
    assert metric.reason.startswith("degenerate: 1 of 16")


def test_too_few_samples_say_how_many_are_lacking():
    targets = skeletons(7)
    metric = pck(rows(list(targets), targets))
    assert (metric.value, metric.low, metric.reason) == (1.0, None, "inconclusive, about 1 more samples")
    targets = skeletons(20)
    found = targets.copy()
    found[:11] = mirror(found[:11], SIDE)
    found[:3] = targets[:3]
    margin = pose.margin(drawn(rows(list(found), targets)))
    assert margin.low < 0 < margin.value
    assert margin.reason.startswith("inconclusive, about ")


def test_one_degenerate_picture_is_enough_for_no_number():  # fault E02
    targets = skeletons(20)
    own = rows(list(targets), targets)
    own[4] |= {"degenerate": "constant", "target_joints": None, "joints": None, "persons": None}
    one = drawn(own, {pose.CEILING: rows(list(targets), targets, REAL, "real")})
    for metric in (*pose.accuracy(one), *pose.persons(one), pose.margin(one)):
        assert metric.value is None
        assert metric.reason.startswith("degenerate: 1 of 20 pictures are constant")
        assert metric.baselines["detector_on_real"] is not None
    assert pose.count(own, {row["key"]: {"persons": 1} for row in own})["degenerate"] == 1


def test_the_settings_say_whose_box_the_allowance_is_part_of(figures):
    """On figures the true box; without a truth the one around the confident joints that prep found."""
    unknown = copy(figures)
    unknown.truth = lambda: None
    (batch, *_) = read_batches(figures, figures.rows("holdout")[:1], 1)
    joints = denormalise(figures.pose(batch.rows[0]), batch.width, batch.height)
    found = {}
    for dataset, box in ((figures, TRUE_BOX), (unknown, JOINTS_BOX)):
        examiner = Examiner(dataset, lpips=None, detector=None)
        assert examiner.box == box
        (found[box],) = examiner.rows(batch, batch.pixels, kind=MODEL, condition="all", joints=[joints])
    corners = np.reshape(figures.truth()[batch.keys[0]]["box"], (2, 2))
    assert found[TRUE_BOX]["box_side"] == pytest.approx(float(np.ptp(corners, axis=0).max()))
    assert found[TRUE_BOX]["box_area"] == pytest.approx(0.53 * float(np.ptp(corners, axis=0).prod()))
    confident = joints[joints[:, 2] >= pose.CONFIDENCE, :2]
    assert found[JOINTS_BOX]["box_side"] == pytest.approx(float(np.ptp(confident, axis=0).max()))


def test_the_ceiling_of_photographs_is_no_circle(figures):
    """The target is what the detector found in the image itself: found there once more, it would be perfect."""
    unknown = copy(figures)
    unknown.truth = lambda: None
    (batch, *_) = read_batches(figures, figures.rows("holdout")[:2], 2)
    own = [denormalise(figures.pose(row), batch.width, batch.height) for row in batch.rows]

    class Detector:
        """Finds the joints of these images, and in a mirrored one everything two pixels further right."""

        def detect(self, pictures):
            mirrored = not np.array_equal(pictures, batch.pixels)
            assert not mirrored or np.array_equal(pictures, batch.pixels[:, :, ::-1])
            found = [
                mirror(joints, batch.width) + np.float32([2, 0, 0]) * mirrored if mirrored else joints for joints in own
            ]
            return [Pose(joints, np.ones((1, 5), np.float32)) for joints in found]

    rows = Examiner(unknown, lpips=None, detector=Detector()).rows(batch, batch.pixels, kind=REAL, condition="real")
    for row, joints in zip(rows, own):
        there = joints[:, 2] > 0
        found = np.reshape(row["joints"], (-1, 3))[there]
        assert found[:, :2] == pytest.approx(joints[there, :2] - (2, 0), abs=1e-4)
        assert row["persons"] == 1
    rows = Examiner(figures, lpips=None, detector=Detector()).rows(batch, batch.pixels, kind=REAL, condition="real")
    assert np.reshape(rows[0]["joints"], (-1, 3)) == pytest.approx(own[0])  # the truth of figures is no detector's


def test_pictures_are_those_with_a_pose_and_some_from_its_mirror_image(figures, judged):
    context = judged.context(conditions={"all": 1.0, "text+pose": 2.0, "text": 2.0}, pose={"mirrored": 5}, seeds=2)
    wanted, skipped = pose.pictures(context, context.config.pose)
    mirrored = [picture for picture in wanted if picture.mirrored_pose]
    assert [picture.key for picture in mirrored] == context.keys[:5]
    assert {(picture.condition, picture.guidance.value, picture.seed) for picture in mirrored} == {
        ("text+pose/mirrored", 2.0, 0)
    }
    assert {picture.condition for picture in wanted} == {"all", "text+pose", "text", "text+pose/mirrored"}
    assert [(one.name, one.reason) for one in skipped] == [("pose/pose", "subset pose never trained")]
    context = judged.context(conditions={"text+pose": 2.0}, pose={"mirrored": 0, "conditions": ["text"]})
    none, _ = pose.pictures(context, context.config.pose)
    assert {picture.condition for picture in none} == {"text+pose"}


def test_nobody_is_mirrored_where_nobody_is(figures, judged):
    context = judged.context(conditions={"text+pose": 2.0}, pose={"mirrored": 5})
    context.rows = {**context.rows, context.keys[0]: {**context.rows[context.keys[0]], "persons": 0}}
    keys = [picture.key for picture in pose.pictures(context, context.config.pose)[0] if picture.mirrored_pose]
    assert keys == context.keys[1:6]


# --- models whose answers are known, through the real detector


class Follower(nn.Module):
    """Draws the figure whose pose it is given, or its mirror image for a mirrored pose."""

    def __init__(self, figures):
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))
        self._poses, self._pictures = [], []
        for row in figures.rows("holdout"):
            for turn in (False, True):
                given, picture = figures.pose(row), figures.pixels(row)
                self._poses.append(torch.from_numpy(flip_pose(given) if turn else given))
                self._pictures.append(to_tensor(flip_pixels(picture) if turn else picture))

    def encode_context(self, conditions, height, width, *, cache=False):
        return conditions

    def forward(self, z, t, context):
        known = torch.stack(self._poses)
        nearest = [int((known - given).abs().sum((1, 2)).argmin()) for given in context.pose]
        return torch.stack([self._pictures[index] for index in nearest])


CONFIG = {
    **{"tests": ["pose"], "conditions": {"pose": 1.0}, "sampler": {"method": "euler", "steps": 2}},
    **{"pose": {"mirrored": 16}, "grid_images": 0, "baseline_images": 40},
}


@pytest.fixture(scope="module")
def evidence(models, figures, tmp_path_factory):
    """What the test found of every known model, by its name; computed once."""
    known = {name: models[name] for name in ("truth", "shuffled", "noise")} | {"follower": Follower(figures)}
    table, config = ConditioningConfig(preset="default").resolve(), EvaluateConfig.model_validate(CONFIG)
    subject = Subject(nn.Identity(), FlowConfig(), table, figures, tuple(figures.rows("holdout")))
    folders = {name: tmp_path_factory.mktemp(name) for name in known}
    return {
        name: (evaluate(replace(subject, model=model), config, folders[name]), folders[name])
        for name, model in known.items()
    }


@pytest.fixture(scope="module")
def metrics(evidence):
    return {name: {metric.name: metric for metric in found.metrics} for name, (found, _) in evidence.items()}


@pytest.mark.parametrize("measure", ["pose_pck/pose", "pose_oks/pose", "pose_oks/pose/whole"])
def test_the_truth_is_at_the_ceiling_and_others_at_the_floor(metrics, measure):  # fault E08
    truth, shuffled, noise = (metrics[name][measure] for name in ("truth", "shuffled", "noise"))
    assert truth.value == pytest.approx(truth.baselines["detector_on_real"], abs=0.05)
    assert truth.baselines["random_pair"] < 0.5 * truth.baselines["detector_on_real"]
    assert shuffled.low - 0.03 <= shuffled.baselines["random_pair"] <= shuffled.high + 0.03
    assert shuffled.high < truth.low
    assert noise.value < shuffled.low
    assert (truth.n, truth.baselines) == (24, shuffled.baselines)


def test_noise_shows_nobody(metrics, evidence):  # fault E08
    assert metrics["noise"]["pose_persons/pose/nobody"].value == 1.0
    assert metrics["noise"]["pose_pck/pose"].value == 0.0
    assert evidence["noise"][0].extras["pose"]["counts"]["pose"]["nobody_found"] == 24
    for name in ("truth", "shuffled", "follower"):
        assert metrics[name]["pose_persons/pose/nobody"].value < 0.1


def test_only_a_model_that_follows_the_pose_follows_its_mirror_image(metrics):  # fault E09
    follower, truth = metrics["follower"], metrics["truth"]
    assert follower["pose_mirror/pose"].low > 0.2
    assert truth["pose_mirror/pose"].low > 0.2
    assert follower["pose_mirror/pose/mirrored"].low > 0.2
    assert truth["pose_mirror/pose/mirrored"].value == 0.0  # it draws the figure, whatever it is given
    assert follower["pose_pck/pose/mirrored"].value > truth["pose_pck/pose/mirrored"].high
    assert metrics["shuffled"]["pose_mirror/pose"].low < 0.1
    assert follower["pose_mirror/pose/mirrored"].settings["seeds"] == 1


def test_the_overlays_are_the_worst_the_median_and_the_best(evidence):
    found, folder = evidence["follower"]
    extras = found.extras["pose"]
    assert extras["detector"] == "demo networks, not a quality claim"
    assert set(extras["counts"]) == {"pose", "pose/mirrored"}
    own = [one for one in extras["overlays"] if one["condition"] == "pose"]
    assert [one["label"] for one in own] == ["worst", "median", "best"]
    assert own[0]["oks"] <= own[1]["oks"] <= own[2]["oks"]
    samples = {(row["condition"], row["key"], row["seed"]): row for row in found.samples if row["kind"] == MODEL}
    for one in extras["overlays"]:
        row = samples[one["condition"], one["key"], one["seed"]]
        assert (folder / row["image"]).is_file()
        assert np.shape(one["given"]) == (133, 3)
        assert one["hits"] == row["pose_hits"]
        assert one["joints"] == row["pose_joints"]
