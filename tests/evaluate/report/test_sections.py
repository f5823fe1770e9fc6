"""What tests leave beside metrics is shown, every word of it escaped, and nothing outside of the folder is read."""

import numpy as np
import pytest
from PIL import Image

from evaluate.report.curves import minutes
from evaluate.report.files import EvaluationFiles, name_runs
from evaluate.report.metrics import against_floor, label, roles
from evaluate.report.pictures import EmbeddedImages, shorten
from evaluate.report.sections import sections
from evaluate.suite.reconstruction import quantiles
from nanodit.errors import DataError
from nanodit.svg import joints_overlay

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def files(tmp_path) -> EvaluationFiles:
    """Two samples with pictures, as rows of samples.parquet, without an evaluation."""
    (tmp_path / "images").mkdir()
    rows = []
    for key, kind, condition, seed in [
        *((key, "real", "real", None) for key in ("a", "b")),
        *(
            (key, "model", condition, 0)
            for key in ("a", "b")
            for condition in ("all", "text", "swap/both", "edit/attribute")
        ),
        *((key, "model", "noises/text", 1) for key in ("a", "b")),
    ]:
        name = f"images/{key}-{condition.replace('/', '_')}.png"
        Image.fromarray(np.full((48, 64, 3), len(rows), np.uint8)).save(tmp_path / name)
        row = {"key": key, "kind": kind, "condition": condition, "seed": seed, "image": name, "degenerate": None}
        rows.append({**row, "width": 64, "height": 48, "caption": f"{HOSTILE} in red", "top_true": None})
    Image.fromarray(np.zeros((80, 40, 3), np.uint8)).save(tmp_path / "images" / "train-x.png")
    report = {"metrics": [], "skipped": [], "provenance": {}}
    return EvaluationFiles(tmp_path, report, rows, [], {}, [])


def show(files: EvaluationFiles, **extras) -> dict:
    files.extras.update(extras)
    (run,) = name_runs([files])
    return {test: one[0]["shown"] for test, one in sections([run], EmbeddedImages()).items()}


def test_the_swap_matrix_has_texts_in_rows_and_features_in_columns(files):
    cells = [
        [{"condition": "all" if one == other else "swap/both", "key": one, "seed": 0} for other in "ab"] for one in "ab"
    ]
    example = {"key": "a", "seed": 0, "donor": "b", "candidates": ["a", "b"], "pictures": {"both": "swap/both"}}
    found = show(
        files,
        swap={
            "modes": [{"mode": "both", "condition": "swap/both", "unswapped": "all", "given": "all"}],
            "candidates": 2,
            "matrix": {"mode": "both", "keys": ["a", "b"], "cells": cells},
            "examples": [example | {"nearest": {"both": {"feature": "b", "feature_pixels": "a"}}}],
        },
    )["swap"]
    rows = found["matrix"]["rows"]
    assert [[cell["own"] for cell in row["cells"]] for row in rows] == [[True, False], [False, True]]
    assert rows[0]["cells"][1]["data"] == EmbeddedImages().make(files.folder / "images/a-swap_both.png")
    assert [one["title"] for one in found["examples"][0]["pictures"]] == [
        "real",
        "donor",
        "unswapped",
        "donor's CLS and patches",
    ]
    assert found["examples"][0]["pictures"][-1]["note"] == "donor told in 1 of 2 spaces"


def test_edits_show_the_words_that_differ(files):
    pair = {
        **{"key": "a", "seed": 0, "type": "attribute", "condition": "edit/attribute", "attribute": "top"},
        "diff": [["same", "in "], ["removed", "red"], ["added", HOSTILE]],
        "judged": {"unedited": "red", "edited": None},
        "distance": {"feature": 0.3},
        "null_distance": None,
    }
    count = {"attribute": {"edited": 2, "none": 0}}
    found = show(files, edit={"condition": "text", "counts": count, "pairs": [pair]})["edit"]
    assert found["pairs"][0]["diff"] == [("same", "in "), ("removed", "red"), ("added", HOSTILE)]
    assert [one["note"] for one in found["pairs"][0]["pictures"]] == ["top: red", "top: not found"]
    assert found["pairs"][0]["distances"] == [{"space": "DINO", "value": 0.3, "null": None}]


def test_strips_and_neighbours_show_the_pictures_that_were_kept(files):
    found = show(
        files,
        divergence={
            "condition": "text",
            "prompts": ["a", "b"],
            "labels": ["text", "noises/text"],
            "strips": ["a"],
            "alarms": [],
        },
        memorisation={
            **{"wording": "an indicator", "training_images": 9, "alarms": []},
            "closest": [
                {
                    **{"key": "b", "condition": "text", "seed": 0, "training_key": "x"},
                    "training_image": "images/train-x.png",
                    "distance": {"feature": 0.1},
                    "relative": {"feature": 0.5, "feature_pixels": None},
                }
            ],
        },
    )
    assert [one["title"] for one in found["divergence"]["groups"][0]["pictures"]] == ["real", "noise 0", "noise 1"]
    (pair,) = found["memorisation"]["pairs"]
    assert [one["width"] for one in pair["pictures"]] == [64, 40]  # a training image may have another shape
    assert pair["relative"] == [{"space": "DINO", "value": 0.5}]


def test_no_path_of_the_extras_leads_out_of_the_folder(files):
    closest = [{"key": "b", "condition": "text", "seed": 0, "training_image": "../secret.png", "relative": {}}]
    with pytest.raises(DataError, match=r"extras\.json is damaged .*leads out"):
        show(files, memorisation={"wording": "", "training_images": 9, "alarms": [], "closest": closest})


def test_extras_that_name_no_picture_are_damaged(files):
    strips = {"condition": "text", "prompts": ["c"], "labels": ["text"], "strips": ["c"], "alarms": []}
    with pytest.raises(DataError, match=r"extras\.json is damaged \(divergence: KeyError"):
        show(files, divergence=strips)


def test_overlays_leave_out_joints_that_are_not_there():
    given = [(1.0, 2.0, 1.0), (3.0, 4.0, 1.0), (0.0, 0.0, 0.0)]
    drawing = str(joints_overlay(given, [(5.0, 6.0, 0.9)], [(0, 1), (1, 2)], (64, 64)))
    assert 'class="bone given" d="M1.0 2.0L3.0 4.0"' in drawing  # and none to the joint that was not asked for
    assert 'class="dot found" d="M5.0 6.0h0"' in drawing
    assert "0.0 0.0" not in drawing


def test_time_is_that_of_the_steps_alone():
    log = [{"step": 10}, {"step": 20, "sys/iter_per_sec": 0.5}, {"step": 30, "sys/iter_per_sec": 1.0}, {"step": 90}]
    assert minutes(log) == pytest.approx({10: 20 / 60, 20: 40 / 60, 30: 50 / 60, 90: 110 / 60})
    assert minutes([{"step": 10}]) == {}


def test_quantiles_are_ranks_of_all_pictures():
    rows = [{"key": f"{index:02d}", "psnr": float(index % 4)} for index in range(9)]
    assert [(one["label"], one["key"], one["value"]) for one in quantiles(rows)] == [
        ("worst", "00", 0.0), ("median", "05", 1.0), ("best", "07", 3.0),
    ]  # fmt: skip
    assert quantiles([*rows, {"key": "x", "psnr": None}]) == []


def test_names_read_well():
    assert label("reconstruction/psnr_gain/text") == ("PSNR gained over a random pair", "text", "")
    assert label("divergence/diversity_pixels/text@1") == (
        "Diversity over noises, mean colours",
        "text, no guidance",
        "",
    )
    assert label("reconstruction/ssim/text@self=3")[1] == "text, self-guidance 3"
    assert label("reconstruction/ssim/text@dino=1.5,text=3")[1] == "text, guidance dino 1.5, text 3"
    assert label("swap/gain/cls") == ("Likeness gained toward the donor", "CLS alone", "")
    assert label("pose_pck/text+pose/mirrored") == ("Pose, PCK at 0.1", "text + pose", "mirrored")
    assert label("novel/thing/x") == ("novel thing", "x", "")


def test_the_floor_is_the_best_of_what_needs_no_skill():
    known = {"random_pair": 1, "mean_image": 3, "nearest_train": 2, "round_trip": 9}
    for better, floor in (("higher", "mean_image"), ("lower", "random_pair")):
        metric = {"name": "reconstruction/psnr", "better": better, "baselines": known}
        assert roles(metric) == (floor, "round_trip")
    at = {"name": "edit/effect", "better": "higher", "baselines": {"null_edit": 0.0, "random_pair": 1.0}, "n": 9}
    assert roles(at) == ("null_edit", None)
    for value, verdict in ((0.0, "inconclusive"), (1e-9, "inconclusive"), (0.1, "better"), (-0.1, "worse")):
        assert against_floor({**at, "value": value, "low": value, "high": value})["verdict"] == verdict
    kept = {"name": "edit/preserved", "better": "higher", "baselines": {"null_edit": 1, "random_pair": 0}}
    assert roles(kept) == (None, "null_edit")


def test_long_words_are_cut():
    assert shorten("one two three", 9) == "one two …"


def test_one_words_caption_of_a_megabyte_is_cut(files):  # fault E07
    assert len(shorten("x" * 1_000_000)) < 500
