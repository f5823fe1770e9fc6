"""Which images are wanted: every rule refuses with its reason, reaches what it must, and leaves no trace when off."""

from itertools import pairwise

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from nanodit.config import walk_keys
from nanodit.errors import DataError
from nanodit.storage import open_storage
from prep.config import PrepConfig
from prep.images.filters import (
    FilterConfig,
    blur_problem,
    crop_remarks,
    filter_recipe,
    header_problem,
    persons_problem,
    sharpness,
)
from prep.passes.advice import warn
from prep.passes.plan import make_plan
from prep.passes.publish import gate
from prep.report.report import render
from tests.prep.passes.test_missing_sources import poses, prepare
from tests.prep.passes.test_plan import config, pretend_committed, write_images

FILTERS = {
    "min_side": 64,
    "min_pixels": 5000,
    "max_aspect": 1.5,
    "min_sharpness": 10.0,
    "min_persons": 1,
    "max_persons": 1,
}


def reason_of(width: int, height: int, **filters) -> str | None:
    problem = header_problem(width, height, FilterConfig(**filters), base=64, max_upscale=4 / 3)
    return problem and problem[0]


def test_every_filter_is_off_by_default():
    assert set(FILTERS) == set(walk_keys(FilterConfig))
    assert set(FilterConfig().model_dump().values()) == {None}
    assert reason_of(20_000, 100) is None
    assert blur_problem(0.0, FilterConfig()) is None
    assert persons_problem(0, FilterConfig()) is None
    assert all(filter_recipe(layer, FilterConfig()) == {} for layer in ("px", "text", "t5", "dino", "pose"))


@given(st.integers(48, 4000), st.integers(48, 4000))
def test_trap_04_the_header_is_judged_alike_for_both_orientations(width, height):
    wanted = {name: FILTERS[name] for name in ("min_side", "min_pixels", "max_aspect")}
    reason = reason_of(width, height, **wanted)
    assert reason == reason_of(height, width, **wanted)  # trap 4
    small = min(width, height) < 64 or width * height < 5000
    assert reason == (
        "too_small" if small else "too_elongated" if max(width, height) > 1.5 * min(width, height) else None
    )


def test_limits_are_inclusive():
    assert reason_of(150, 100, max_aspect=1.5) is None
    assert reason_of(151, 100, max_aspect=1.5) == "too_elongated"
    assert reason_of(100, 100, min_side=100, min_pixels=10_000) is None
    assert blur_problem(10.0, FilterConfig(min_sharpness=10.0)) is None
    assert blur_problem(9.99, FilterConfig(min_sharpness=10.0))[0] == "blurred"
    one = FilterConfig(min_persons=1, max_persons=1)
    reasons = [(persons_problem(count, one) or [None])[0] for count in range(3)]
    assert reasons == ["too_few_persons", None, "too_many_persons"]


def test_wrong_limits_are_refused():
    for layers, filters in ((["pose"], {"min_persons": 2, "max_persons": 1}), (["text"], {"min_persons": 1})):
        with pytest.raises(ValueError, match=r"min_persons"):
            PrepConfig(source="a", output="b", layers=layers, filters=filters)


def natural(side: int) -> Image.Image:
    """Grey noise with the spectrum of photographs: amplitudes fall with the frequency (Field, JOSA A 1987)."""
    spectrum = np.fft.fft2(np.random.default_rng(1).standard_normal((side, side)))
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None])
    grey = np.fft.ifft2(spectrum / np.maximum(frequency, 1 / side)).real
    grey = 127 + 50 * (grey - grey.mean()) / grey.std()
    return Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).convert("RGB")


def test_sharpness_falls_with_blur_and_hardly_knows_resolution():
    picture = natural(1024)
    values = [sharpness(np.asarray(picture.filter(ImageFilter.GaussianBlur(radius)))) for radius in (0, 2, 4, 8)]
    assert all(sharp > 2 * soft for sharp, soft in pairwise(values))
    half = sharpness(np.asarray(picture.resize((512, 512), Image.Resampling.BOX)))
    assert half == pytest.approx(values[0], rel=0.05)


def test_sharpness_is_exact():
    assert sharpness(np.full((64, 64, 3), 77, np.uint8)) == 0
    point = np.zeros((5, 5, 3), np.uint8)
    point[2, 2] = 10  # the Laplacian is -40 there, 10 at four neighbours, and 0 at the other four of nine
    assert sharpness(point) == round((40**2 + 4 * 10**2) / 9, 3)


def test_header_filters_are_counted_before_anything_runs(tmp_path):
    write_images(tmp_path / "source", 2)
    write_images(tmp_path / "source", 3, size=(200, 70), first=2)
    write_images(tmp_path / "source", 1, size=(60, 60), first=5)
    plan = make_plan(config(tmp_path, filters={"max_aspect": 2.0, "min_side": 64}))
    assert len(plan.sources) == 2
    assert plan.explain()[0] == "refused before anything is computed: 4 of 6 sources (3 too_elongated, 1 too_small)"
    assert {reject.reason: reject.stage for reject in plan.rejects} == dict.fromkeys(
        ("too_elongated", "too_small"), "source"
    )
    plan = make_plan(config(tmp_path))
    assert (len(plan.sources), plan.notes) == (6, [])


def test_p18_filters_that_leave_nothing_end_with_numbers(tmp_path):
    write_images(tmp_path / "source", 3)
    settings = config(tmp_path, filters={"min_side": 65})
    plan = make_plan(settings)
    with pytest.raises(DataError, match=r"nothing was accepted.*3 of 3 sources were rejected \(3 too_small\)") as error:
        gate(settings, plan.rejects + plan.expected, plan.seen, "runs/0001/rejects.parquet")
    assert error.value.exit_code == 3


@pytest.mark.parametrize(
    ("filters", "reached"),
    [
        ({"min_side": 10, "min_pixels": 10, "max_aspect": 9.0}, set()),
        ({"min_sharpness": 5.0}, {"px", "text", "t5", "dino", "pose"}),
        ({"min_persons": 1}, {"pose", "text", "t5"}),
        ({"max_persons": 2}, {"pose", "text", "t5"}),
    ],
)
def test_p15_a_filter_reaches_only_what_it_must(tmp_path, filters, reached):
    write_images(tmp_path / "source", 3)
    layers = {"layers": ["text", "dino", "pose"]}
    pretend_committed(config(tmp_path, **layers))
    plan = make_plan(config(tmp_path, filters=filters, **layers))
    assert {unit.layer for unit in plan.missing} == reached


def test_only_what_pose_accepted_is_captioned(tmp_path):
    write_images(tmp_path / "source", 3)
    settings = config(tmp_path, layers=["text", "pose"], filters={"min_persons": 1})
    assert settings.active_layers == ("px", "pose", "text", "t5")
    assert [settings.upstream(layer) for layer in ("pose", "text", "t5")] == ["px", "pose", "text"]
    plan = make_plan(settings)
    (task, *_) = plan.tasks(settings.active_layers)
    assert list(task.recipes) == ["px", "pose", "text", "t5"]


def test_blurred_pictures_are_refused_with_their_sharpness_and_the_others_show_it(tmp_path):
    write_images(tmp_path / "source", 2)
    Image.new("RGB", (80, 64), (90, 120, 30)).save(tmp_path / "source" / "flat.png")
    values = {row["source"]: row["sharpness"] for row in prepare(poses(tmp_path)).rows()}
    assert values["flat.png"] == 0 < 1000 < values["image-000.png"]
    dataset = prepare(poses(tmp_path, filters={"min_sharpness": 1000.0}))
    assert {row["source"] for row in dataset.rows()} == {"image-000.png", "image-001.png"}
    (reject,) = pq.read_table(tmp_path / "out" / "rejects.parquet").to_pylist()
    assert reject == {
        "source": "flat.png",
        "stage": "px",
        "reason": "blurred",
        "detail": "sharpness 0.0 is below filters.min_sharpness 1000.0",
    }


def test_images_that_lose_most_of_their_area_are_named_in_plan_and_report(tmp_path):
    write_images(tmp_path / "source", 2)
    for name, size in {"pan.png": (4000, 60), "tower.png": (60, 3000), "kept.png": (200, 60)}.items():
        Image.fromarray(np.random.default_rng(size[0]).integers(0, 256, (*size[::-1], 3), np.uint8)).save(
            tmp_path / "source" / name
        )
    remark = (
        "2 images lose more than 50% of their area to the crop: pan.png (97%), tower.png (96%). filters.max_aspect "
        "leaves out images that are longer than so many times their shorter side"
    )
    assert make_plan(poses(tmp_path)).notes == [f"warning: {remark}"]
    dataset = prepare(poses(tmp_path))
    assert remark in warn(dataset.table, dataset.info["buckets"])
    assert f"<li>{remark}. " in render(open_storage(tmp_path / "out"))
    decided = make_plan(poses(tmp_path, filters={"max_aspect": 4.0}))
    assert [item.reason for item in decided.rejects] == ["too_elongated"] * 2
    assert not any("area" in note for note in decided.notes)


def test_many_images_that_lose_their_area_are_counted():
    assert crop_remarks([]) == []
    (line,) = crop_remarks([(0.6 + number / 100, f"{number}.png") for number in range(9)])
    assert line.startswith("9 images lose more than 50% of their area to the crop: 8.png (68%), 7.png (67%), ")
    assert " and 6 more. " in line
