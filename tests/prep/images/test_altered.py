"""Altered forms of holdout images: found whatever was done to them, and nowhere on the other side of a split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageEnhance, ImageOps
from skimage import data
from torch import nn

from evaluate.run import left_out
from evaluate.subject import Subject, select_holdout
from nanodit.errors import DataError
from prep.config import PrepConfig
from prep.dataset.reader import Dataset
from prep.figures.figures import write_figures
from prep.images import altered
from prep.images.altered import altered_pairs
from prep.images.duplicates import join_groups, thumbnail, thumbnail_rows
from prep.images.twins import altered_twins
from prep.passes import split
from prep.verify.verify import verify
from tests.prep.images.test_duplicates import ASSETS, DETECTOR, POSE, photograph, prepare
from train.method.flow import FlowConfig

NAMES = ("astronaut", "chelsea", "coffee", "rocket", "camera", "coins", "clock", "moon")


def cropped(image: Image.Image, share: float) -> Image.Image:
    margin = [round(side * (1 - share) / 2) for side in image.size]
    return image.crop((*margin, image.width - margin[0], image.height - margin[1]))


FORMS = {
    "mirrored": ImageOps.mirror,
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.9),
    "contrast": lambda image: ImageEnhance.Contrast(image).enhance(1.2),
    "cropped": lambda image: cropped(image, 0.95),
    "mirrored, brighter and cropped": lambda image: cropped(
        ImageEnhance.Brightness(ImageOps.mirror(image)).enhance(1.1), 0.95
    ),
}


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    return [ImageOps.fit(Image.fromarray(getattr(data, name)()).convert("RGB"), (256, 256)) for name in NAMES]


def thumbnails(pictures: list[Image.Image]) -> np.ndarray:
    return thumbnail_rows([thumbnail(np.asarray(picture)) for picture in pictures])


@pytest.mark.parametrize("form", FORMS)
def test_an_altered_photograph_is_found_and_no_other(photographs, form):
    count = len(photographs)
    rows = thumbnails([*photographs, *map(FORMS[form], photographs)])
    for chosen in (np.arange(count), np.arange(count, 2 * count)):  # whichever of the two is held out
        pairs = altered_pairs(rows, chosen)
        assert {tuple(sorted(pair)) for pair in pairs.tolist()} == {(index, index + count) for index in range(count)}


def test_figures_are_all_different(tmp_path):
    write_figures(tmp_path, 200, size=64, seed=1, workers=1)
    rows = thumbnails([Image.open(path) for path in sorted(tmp_path.glob("*.png"))])
    assert len(altered_pairs(rows, np.arange(len(rows)))) == 0


def test_pictures_without_anything_to_see_are_like_no_other(photographs):
    noise = np.random.default_rng(0).integers(127, 130, (16, 16, 3), dtype=np.uint8)
    flat = [Image.new("RGB", (64, 64), (200, 200, 200)), Image.new("RGB", (64, 64)), Image.fromarray(noise)]
    rows = thumbnails([*flat, *flat, *photographs])
    assert len(altered_pairs(rows, np.arange(len(rows)))) == 0
    assert altered_pairs(rows, np.empty(0, np.int64)).shape == (0, 2)
    assert altered_pairs(rows[:0], np.empty(0, np.int64)).shape == (0, 2)


@pytest.mark.parametrize("dense", [0, 10**6])
def test_what_is_found_depends_on_no_block_and_no_order(photographs, monkeypatch, dense):
    rows = thumbnails([*photographs, *map(FORMS["cropped"], photographs)])
    whole = {tuple(sorted(pair)) for pair in altered_pairs(rows, np.arange(len(rows))).tolist()}
    monkeypatch.setattr("prep.images.altered.QUERIES", 3)
    monkeypatch.setattr("prep.images.altered.TILE", 5)
    monkeypatch.setattr("prep.images.altered.PAIRS", 2)
    monkeypatch.setattr("prep.images.altered.DENSE", dense)
    monkeypatch.setattr("prep.images.altered.UNSURE", 0.2)  # both ways to compare a pair are taken
    counted = []
    order = np.random.default_rng(0).permutation(len(rows))
    found = altered_pairs(rows[order], np.arange(len(rows)), counted.append)
    assert {tuple(sorted(pair)) for pair in order[found].tolist()} == whole
    assert sum(counted) == len(rows) ** 2


def test_images_that_are_all_built_alike_are_described_once_and_not_once_a_pair(photographs, monkeypatch):
    noise = np.random.default_rng(0).normal(0, 6, (60, 16 * 16 * 3))
    rows = np.clip(thumbnails(photographs[:1]) + noise, 0, 255).astype(np.uint8)
    described, told = altered._described, []
    monkeypatch.setattr(altered, "_described", lambda pictures: (told.append(len(pictures)), described(pictures))[1])
    pairs = altered_pairs(rows, np.arange(60))
    assert len(pairs) == len(rows) * (len(rows) - 1)
    assert sum(told) < 100 * len(rows)  # twice through 37 windows; once a pair it was 75 times as much


def test_groups_that_are_joined_are_named_after_the_smallest_key():
    groups = {"a": "a", "b": "b", "c": "b", "d": "d", "e": "e"}
    joined = {"a": "a", "b": "b", "c": "b", "d": "b", "e": "b"}
    assert join_groups(groups, [("e", "d"), ("c", "e")]) == joined
    assert join_groups(groups, []) == groups


# --- of a dataset -----------------------------------------------------------------------------------------------------


def settings(folder: Path, **changes: object) -> PrepConfig:
    networks = {"detector": str(ASSETS / DETECTOR), "pose": str(ASSETS / POSE)}
    given = {"base": 64, "layers": ["pose"], "pose": networks, "holdout": 0.25, "holdout_min": 0} | changes
    return PrepConfig(source=str(folder / "source"), output=str(folder / "out"), **given)


def write(folder: Path, pictures: dict[str, Image.Image]) -> None:
    (folder / "source").mkdir(exist_ok=True)
    for name, picture in pictures.items():
        picture.save(folder / "source" / f"{name}.png")


@pytest.fixture
def pairs(photographs) -> dict[str, Image.Image]:
    """Every photograph, and a mirrored or a brighter one of it."""
    forms = [FORMS["mirrored"], FORMS["brighter"]]
    altered = {f"{name}-altered": forms[index % 2](photographs[index]) for index, name in enumerate(NAMES)}
    return dict(zip(NAMES, photographs)) | altered


def sides(dataset: Dataset) -> dict[str, str]:
    return {Path(row["source"]).stem: row["split"] for row in dataset.rows()}


@pytest.mark.parametrize("seed", [0, 1])
def test_altered_forms_are_split_as_one(tmp_path, pairs, seed, capsys):
    write(tmp_path, pairs)
    dataset = prepare(settings(tmp_path, seed=seed))
    found = sides(dataset)
    assert [found[f"{name}-altered"] for name in NAMES] == [found[name] for name in NAMES]
    assert sum(side == "holdout" for side in found.values()) == 4
    groups = {Path(row["source"]).stem: row["duplicate_group"] for row in dataset.rows("holdout")}
    assert len(set(groups.values())) == 2  # for intervals they are one
    assert altered_twins(dataset) == {}
    assert [len(select_holdout(dataset, 99, part=part)) for part in ("test", "dev")] == [2, 2]
    assert "warning" not in capsys.readouterr().out
    verify(tmp_path / "out")


def test_where_all_images_look_alike_it_can_be_switched_off(tmp_path, photographs):
    """As X-rays do: one picture with a small mark somewhere else in each."""
    pictures = {}
    for number in range(20):
        picture = photographs[0].copy()
        picture.paste((255, 0, 0), (10 + 12 * number, 40, 20 + 12 * number, 200))
        pictures[f"{number:02d}"] = picture
    write(tmp_path, pictures)
    alike = prepare(settings(tmp_path))
    assert len(alike.rows("holdout")) == 0
    off = settings(tmp_path, duplicates={"altered_cosine": 1.0})
    other = prepare(off.model_copy(update={"output": str(tmp_path / "other")}))
    assert len(other.rows("holdout")) == 5
    assert len({row["duplicate_group"] for row in other.rows()}) > 10
    verify(tmp_path / "other")


def test_a_new_image_follows_what_it_is_an_altered_form_of(tmp_path, pairs):
    write(tmp_path, {name: pairs[name] for name in NAMES})
    first = sides(prepare(settings(tmp_path)))
    write(tmp_path, pairs)
    second = sides(prepare(settings(tmp_path)))
    assert first.items() <= second.items()
    assert [second[f"{name}-altered"] for name in NAMES if first[name] == "holdout"] == ["holdout", "holdout"]
    verify(tmp_path / "out")


@pytest.fixture
def torn(tmp_path, pairs, monkeypatch) -> Path:
    """A dataset of before: the split knew nothing of altered forms."""
    write(tmp_path, pairs | {f"alone-{seed}": Image.fromarray(photograph(seed)) for seed in range(8)})
    with monkeypatch.context() as patch:
        patch.setattr(split, "altered_pairs", lambda *given: np.empty((0, 2), np.int64))
        dataset = prepare(settings(tmp_path, shard_size=8))
    assert sum(side == "holdout" for side in sides(dataset).values()) == 6
    return tmp_path


def without_column(folder: Path) -> None:
    """Make the index of a dataset one of before there was the column."""
    from tests.prep.verify.test_verify import publish_again

    index = pq.read_table(folder / "out" / "index.parquet")
    publish_again(folder / "out", "index.parquet", index.drop_columns(["altered_twin"]))


def test_what_was_published_before_stays_and_is_left_out_of_evaluations(torn, capsys):
    without_column(torn)
    before = Dataset(torn / "out")
    twins, found = altered_twins(before), sides(before)
    names = {row["key"]: Path(row["source"]).stem for row in before.rows()}
    assert 0 < len(twins) < 6
    for held, trained in twins.items():
        assert names[held].removesuffix("-altered") == names[trained].removesuffix("-altered")
        assert (found[names[held]], found[names[trained]]) == ("holdout", "train")
    torn_parts = [part for part in ("test", "dev") if twins.keys() & {row["key"] for row in before.rows(part)}]
    for part in torn_parts:
        whole = {row["key"] for row in before.rows(part)}
        if whole <= twins.keys():
            with pytest.raises(DataError, match="training has all holdout images"):
                select_holdout(before, 99, part=part)
            continue
        rows = select_holdout(before, 99, part=part)
        assert {row["key"] for row in rows} == whole - twins.keys()
        said = capsys.readouterr().out
        assert f"{len(twins.keys() & whole)} of {len(whole)} holdout images ({part}) are left out" in said
        first = min(twins.keys() & whole)
        assert f"{names[first]}.png ({first})" in said
        assert "what was trained on this version can then neither go on nor be evaluated" in said
        assert select_holdout(before, 99, part=part) == rows
        assert "left out" not in capsys.readouterr().out  # once is enough
    assert torn_parts
    for part in ("test", "dev"):  # and a report counts those of what it read
        subject = Subject(nn.Identity(), FlowConfig(), {}, before, (), part)
        own = sorted(twins.keys() & {row["key"] for row in before.rows(part)})
        assert left_out(subject) == {"altered_twins": own}
    after = prepare(settings(torn))  # the column comes with the next publication, and nothing changes its side
    assert sides(after) == found
    assert altered_twins(after) == twins
    assert {row["key"]: row["altered_twin"] for row in after.rows() if row["altered_twin"]} == twins
    verify(torn / "out")


def test_without_thumbnails_nobody_can_tell(torn, capsys):
    without_column(torn)
    next((torn / "out" / "parts").glob("*.px.parquet")).unlink()
    dataset = Dataset(torn / "out")
    assert altered_twins(dataset) is None
    assert sum(len(select_holdout(dataset, 99, part=part)) for part in ("test", "dev")) == 6
    assert "nothing tells whether training has holdout images mirrored" in capsys.readouterr().out


def test_verify_doubts_no_twin_that_it_cannot_compare(torn, capsys):
    (torn / "out" / "runs" / "published.json").unlink()  # publish again, with what is known now
    dataset = prepare(settings(torn))
    shards = {row["key"]: row["shard"] for row in dataset.rows()}
    for shard in (shards[min(altered_twins(dataset).values())], *set(shards.values())):  # one part, then all
        (torn / "out" / f"parts/bucket_64x64-shard-{shard:06d}.px.parquet").unlink(missing_ok=True)
        with pytest.raises(DataError):
            verify(torn / "out")
        said = capsys.readouterr().out
        assert "are in no committed px unit" in said
        assert "altered_twin" not in said
        assert "cannot be compared" not in said


def test_an_index_that_denies_a_twin_does_not_hide_it(torn, capsys):
    from tests.prep.verify.test_verify import publish_again

    (torn / "out" / "runs" / "published.json").unlink()  # publish again, with what is known now
    dataset = prepare(settings(torn))
    held, trained = min(altered_twins(dataset).items())
    index = pq.read_table(torn / "out" / "index.parquet")
    place = index.column_names.index("altered_twin")
    nothing = pa.nulls(len(index), pa.string())
    publish_again(torn / "out", "index.parquet", index.set_column(place, "altered_twin", nothing))
    with pytest.raises(DataError):
        verify(torn / "out")
    assert f"{held}: is in holdout, {trained} in train is an altered form of it" in capsys.readouterr().out
