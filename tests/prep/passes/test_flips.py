"""``flips``: what belongs to the mirrored crops, beside what a dataset holds anyway."""

from __future__ import annotations

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nanodit.errors import DataError
from nanodit.storage import open_storage
from prep.captions.mirror import flip_caption
from prep.config import PrepConfig
from prep.dataset.layers import LAYERS
from prep.dataset.layout import Unit, member_columns, members_of, read_members, read_part
from prep.dataset.reader import Dataset
from prep.encoders.registry import build_encoder
from prep.export import export_flat
from prep.figures.captions import scene_caption
from prep.figures.figures import draw_figure
from prep.figures.keypoints import scene_keypoints
from prep.figures.mirror import mirror_scene
from prep.figures.pose import sample_scene
from prep.figures.scene import Dice
from prep.passes.advice import warn
from prep.passes.cost import sample_bytes
from prep.passes.plan import make_plan
from prep.report.report import write_report
from prep.verify import units as verify_units
from prep.verify.verify import verify
from tests.prep.caption_server import CaptionServer
from tests.prep.captioning import caption_config, captioning, commit_crops, run_captions, text_parts, with_recipes
from tests.prep.prepared import prepare
from tests.prep.runs import files_of

FIGURES = 4
UNSURE, SYMMETRIC = "A man who left the room.", "A wall without anybody."


def write_source(folder: Path, mirrored: bool = False) -> None:
    """Figures as they are or in a mirror, two more with a caption of another kind, all of one bucket."""
    folder.mkdir()
    for index in range(FIGURES + 2):
        figure = draw_figure(1, index, 96, short_caption=True, mirrored=mirrored)
        # cut, not resized: resampling rounds a few values otherwise from the other side
        box = (figure.image.width - 64) // 2, (figure.image.height - 64) // 2
        if mirrored:  # the same part of the scene
            box = figure.image.width - 64 - box[0], box[1]
        figure.image.crop((*box, box[0] + 64, box[1] + 64)).save(folder / f"{index}.png")
        text = {FIGURES: UNSURE, FIGURES + 1: SYMMETRIC}.get(index, figure.caption)
        (folder / f"{index}.txt").write_text(text)


def config(folder: Path, **changes) -> PrepConfig:
    fields = {"source": str(folder / "source"), "output": str(folder / "out")} | changes
    return PrepConfig(base=64, encoders="demo", shard_size=4, t5={"batch_size": 3}, dino={"batch_size": 3}, **fields)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three datasets: without flips, with them, and of the mirrored sources. Read only."""
    folder = tmp_path_factory.mktemp("flips")
    write_source(folder / "source")
    write_source(folder / "mirrored", mirrored=True)
    prepare(config(folder, output=str(folder / "plain")))
    prepare(config(folder, flips=True))
    prepare(config(folder, source=str(folder / "mirrored"), output=str(folder / "other")))
    return folder


@pytest.fixture(scope="module")
def pairs(folder):
    """Rows of the dataset with flips, each with that of its mirror image in the dataset of the mirrored sources."""
    ours, theirs = ({row["source"]: row for row in Dataset(folder / name).rows()} for name in ("out", "other"))
    assert len(ours) == FIGURES + 2
    return [(ours[name], theirs[name]) for name in sorted(ours)]


def test_the_index_and_dataset_json_say_what_is_there(folder):
    dataset, plain = Dataset(folder / "out"), Dataset(folder / "plain")
    assert dataset.info["flips"] is True
    assert dataset.has_flips
    assert "flips" not in plain.info
    assert not plain.has_flips
    located = {layer: set(member_columns(layer, {"flip": 1})) - set(member_columns(layer, {})) for layer in LAYERS}
    more = set().union(*located.values())
    assert set(dataset.table.column_names) - set(plain.table.column_names) == {"caption_flip", "t5_flip_tokens"} | more
    for layer in LAYERS:
        assert dataset.members(layer) == members_of(layer, {"flip": 1})
    verify(folder / "out")


def test_what_was_there_without_flips_stays_byte_for_byte(folder):
    dataset, plain = Dataset(folder / "out"), Dataset(folder / "plain")
    for ours, theirs in zip(dataset.rows(), plain.rows(), strict=True):
        for layer in LAYERS:
            for member in members_of(layer, {}):
                assert dataset.read(ours, f"{layer}/{member}") == plain.read(theirs, f"{layer}/{member}")
    ours, theirs = files_of(folder / "out"), files_of(folder / "plain")
    for name in theirs:
        if name.endswith((".px.tar", ".pose.tar", ".px.parquet", ".pose.parquet")):
            assert ours[name] == theirs[name]


def test_switching_flips_on_redoes_what_they_change_and_nothing_else(folder):
    plan = make_plan(config(folder, output=str(folder / "plain"), flips=True))
    reasons = {unit.layer: why for unit, why in plan.missing.items()}
    assert reasons == {"text": "changed: flip", "t5": "changed: flip, text layer", "dino": "changed: flip"}
    assert not make_plan(config(folder, flips=True)).missing
    assert make_plan(config(folder)).missing  # and off again
    recipes = make_plan(config(folder, output=str(folder / "plain"))).recipes
    assert not any("flip" in recipe for recipe in recipes.values())


def test_captions_are_flipped_or_marked(folder, pairs):
    dataset = Dataset(folder / "out")
    for ours, theirs in pairs:
        assert dataset.flippable(ours) == (ours["caption"] != UNSURE)
        assert ours["caption_flip"] == flip_caption(ours["caption"])
        assert dataset.read(ours, "text/flip.txt").decode() == (ours["caption_flip"] or "")
        if dataset.flippable(ours):  # word for word: the mirrored scene was described by itself
            assert ours["caption_flip"] == theirs["caption"]
        assert not Dataset(folder / "other").flippable(theirs)
    assert "1 of 6 captions cannot be flipped safely: training never mirrors their images" in warn(
        dataset.table, dataset.info["buckets"]
    )


def test_the_flipped_captions_have_their_own_features(folder, pairs):
    dataset = Dataset(folder / "out")
    encoder = build_encoder(config(folder), "t5", "cpu")
    for row, _ in pairs:
        stored = row["t5_flip_tokens"]
        if row["caption"] in (UNSURE, SYMMETRIC):
            assert stored == 0
        else:
            (expected,) = encoder.encode([row["caption_flip"]])
            np.testing.assert_allclose(dataset.t5(row, flipped=True), expected.embedding, atol=2e-3)
            assert not np.array_equal(dataset.t5(row, flipped=True), dataset.t5(row))
            assert len(dataset.t5(row, flipped=True)) == stored
        if row["caption"] == SYMMETRIC:
            assert np.array_equal(dataset.t5(row, flipped=True), dataset.t5(row))


def test_generated_captions_are_flipped_without_asking_anybody(tmp_path):
    with CaptionServer() as server:
        settings = caption_config(tmp_path, [server.url])
        tasks = commit_crops(settings, shards=1, size=3)
        run_captions(settings, tasks)
        asked = len(server.captioned)
        (task,) = with_recipes(settings, tasks)
        flipping = replace(task, recipes={"text": task.recipes["text"] | {"flip": 1}})
        list(captioning(settings, [flipping]))
        assert len(server.captioned) == asked
    (part,) = text_parts(settings, tasks)
    assert part.table.num_rows == 3
    members = dict(read_members(settings.output, part, "flip.txt"))
    for row in part.table.to_pylist():
        assert row["caption_flip"] == flip_caption(row["caption"])
        assert members[row["key"]].decode() == (row["caption_flip"] or "")


def test_a_figure_rendered_mirrored_is_the_flipped_sample(folder, pairs):
    dataset, other = Dataset(folder / "out"), Dataset(folder / "other")
    for ours, theirs in pairs:
        assert np.array_equal(dataset.pixels(ours)[:, ::-1], other.pixels(theirs))
        # computed in another batch: equal but for the last bits, and the int8 step of a 254th of the largest channel
        np.testing.assert_allclose(dataset.cls(ours, flipped=True), other.cls(theirs), atol=1e-4)
        np.testing.assert_allclose(dataset.patches(ours, flipped=True), other.patches(theirs), atol=0.05)
        assert np.abs(dataset.cls(ours, flipped=True) - dataset.cls(ours)).max() > 1e-3


def test_resampling_mirrors_to_a_grey_level():
    """Of photographs, that is; figures of any size."""
    from prep.dataset.buckets import choose_bucket, crop_to_bucket

    different = 0
    for index in range(12):
        plain, mirrored = (draw_figure(1, index, 96, mirrored=mirrored).image for mirrored in (False, True))
        bucket = choose_bucket(*plain.size, 64)
        ours, theirs = (np.asarray(crop_to_bucket(image, bucket), int) for image in (plain, mirrored))
        assert np.abs(ours[:, ::-1] - theirs).max() <= 1
        different += np.count_nonzero(ours[:, ::-1] != theirs)
    assert different < 1e-4 * 12 * 64 * 64 * 3


def test_mirroring_a_scene_twice_is_the_identity_and_its_captions_are_the_flipped_ones():
    for index in range(60):
        scene = sample_scene(2, index)
        mirrored, again = mirror_scene(scene), mirror_scene(mirror_scene(scene))
        assert again.attributes == scene.attributes
        np.testing.assert_allclose(*(np.stack(list(s.points.values())) for s in (again, scene)), atol=1e-12)
        assert list(again.points) == list(scene.points)
        for short in (False, True):
            caption, other = (scene_caption(s, Dice("caption", 2, index), short) for s in (scene, mirrored))
            assert flip_caption(caption) == other
        assert sorted(scene_keypoints(scene)[1]) == sorted(scene_keypoints(mirrored)[1])


def test_verify_finds_a_wrong_flip(folder, monkeypatch):
    storage = open_storage(folder / "out")
    layers, shards = ("text", "t5", "dino"), make_plan(config(folder, flips=True)).shards
    units = [Unit(*place, layer) for place in shards for layer in layers]
    for unit in units:
        assert not verify_units.check_unit(storage, unit).findings
    part = read_part(storage, units[0])
    row = part.table.to_pylist()[0]
    for data in (b"another text", b""):
        with pytest.raises(DataError):
            LAYERS["text"].flip.members[0].kind.check(data, row, part)
    t5 = read_part(storage, units[1])
    ((_, data), *_) = read_members(storage, t5, "t5.npy")
    with pytest.raises(DataError):
        LAYERS["t5"].flip.members[0].kind.check(data, t5.table.to_pylist()[0] | {"t5_flip_tokens": 1}, t5)


def test_the_flat_export_leaves_flips_out_and_says_so(folder, tmp_path, capsys):
    export_flat(folder / "out", tmp_path / "flat")
    assert "mirrored crops are left out" in capsys.readouterr().out
    (tar, *_) = sorted((tmp_path / "flat").rglob("*.tar"))
    with tarfile.open(tar) as archive:
        assert not [name for name in archive.getnames() if "flip" in name]


def test_the_report_and_the_cost_know_of_flips(folder, tmp_path):
    write_report(folder / "out", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "with what belongs to the mirrored crops" in page
    assert "cannot be flipped safely" in page
    for layer in ("t5", "dino"):
        plain, flips = (sample_bytes(config(folder, flips=on), layer, "64x64") for on in (False, True))
        assert flips == 2 * plain


def test_the_tars_are_plain_webdatasets(folder):
    (path, *_) = sorted((folder / "out").glob("bucket_*/*.t5.tar"))
    with tarfile.open(path) as archive:
        names = archive.getnames()
    assert [name.split(".", 1)[1] for name in names] == ["t5.npy", "t5_flip.npy"] * (len(names) // 2)
    assert json.loads((folder / "out" / "dataset.json").read_text())["layers"]["t5"]["flip"] == 1
