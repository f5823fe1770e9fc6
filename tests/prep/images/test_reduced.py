"""JPEGs much larger than their crop are reduced while they are decoded: nearly the same crop, said in the recipe."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from prep.dataset.buckets import Bucket, choose_bucket, crop_to_bucket, reduction
from prep.dataset.layout import Unit
from prep.dataset.reader import Dataset
from prep.images.sources import decode
from prep.passes import plan as planning
from prep.passes.fitting import judge_sizes
from prep.passes.plan import make_plan
from tests.prep.images.test_filters import natural
from tests.prep.images.test_sources import CAP, encoded
from tests.prep.passes.test_missing_sources import poses, prepare
from tests.prep.passes.test_plan import write_images

BASE = 64


def photograph(width: int, height: int) -> Image.Image:
    """Natural noise with a bright bar beside the middle, which shows a shift."""
    picture = natural(1024).resize((width, height), Image.Resampling.BICUBIC)
    picture.paste((255, 250, 240), (width // 2 + 40, 0, width // 2 + 60, height))
    return picture


@pytest.mark.parametrize(
    ("size", "factor"),
    [
        ((80, 56), 1),
        ((159, 112), 1),
        ((319, 224), 1),
        ((320, 224), 2),
        ((640, 448), 4),
        ((1280, 896), 8),
        ((9999, 7000), 8),
    ],
)
def test_the_reduced_image_has_twice_the_pixels_of_the_crop(size, factor):
    bucket = Bucket(80, 56)
    assert reduction(*size, bucket) == reduction(*size[::-1], bucket.transposed) == factor
    assert factor == 1 or min(size[0] / factor / bucket.width, size[1] / factor / bucket.height) >= 2


@pytest.mark.parametrize("size", [(641, 449), (1303, 917), (700, 1023)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_crop_is_nearly_that_of_all_pixels(size, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    data = encoded(photograph(*size), "JPEG", quality=92, exif=exif)
    whole = decode(data, CAP)
    bucket = choose_bucket(*whole.size, BASE)
    small = decode(data, CAP, bucket)
    factor = reduction(*whole.size, bucket)
    assert factor > 1
    assert small.size == tuple(-(-side // factor) for side in whole.size)
    ours, theirs = (np.asarray(crop_to_bucket(image, bucket), float) for image in (small, whole))
    assert 10 * np.log10(255**2 / np.square(ours - theirs).mean()) > 40  # of photographs 52
    columns = [crop.mean(axis=(0, 2) if orientation < 5 else (1, 2)) for crop in (ours, theirs)]
    place = [np.average(np.arange(len(column)), weights=np.maximum(column - 200, 1e-9)) for column in columns]
    assert abs(place[0] - place[1]) < 0.05  # pixels of the crop


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_other_formats_are_decoded_whole(kind):
    data = encoded(photograph(700, 500), kind)
    assert decode(data, CAP, Bucket(80, 56)).size == (700, 500)


def test_only_shards_with_large_images_say_so_and_their_pixels_are_such(tmp_path):
    write_images(tmp_path / "source", 4)
    before = make_plan(poses(tmp_path)).recipes
    picture = photograph(801, 561)
    picture.save(tmp_path / "source" / "large.jpg", quality=92)
    plan = make_plan(poses(tmp_path))
    (key,) = [key for key, source in plan.sources.items() if source.name == "large.jpg"]
    (place,) = [place for place, keys in plan.shards.items() if key in keys]
    reduced = {unit for unit, recipe in plan.recipes.items() if "reduced" in recipe}
    assert reduced == {Unit(*place, "px")}
    assert all("reduced" not in recipe for recipe in before.values())
    dataset = prepare(poses(tmp_path))
    (row,) = [row for row in dataset.rows() if row["source"] == "large.jpg"]
    data, bucket = (tmp_path / "source" / "large.jpg").read_bytes(), Bucket.parse(row["bucket"])
    expected = crop_to_bucket(decode(data, CAP, bucket), bucket)
    assert np.array_equal(Dataset(tmp_path / "out").pixels(row), np.asarray(expected))
    assert not np.array_equal(np.asarray(expected), np.asarray(crop_to_bucket(decode(data, CAP), bucket)))


def test_pixels_from_before_stay_where_an_image_of_the_shard_is_gone(tmp_path, monkeypatch):
    (tmp_path / "source").mkdir()
    for number in range(3):
        photograph(801 + number, 561).save(tmp_path / "source" / f"{number}.jpg", quality=92)
    with monkeypatch.context() as patched:
        patched.setattr(
            planning, "judge_sizes", lambda *_: replace(judge_sizes(*_), large=set())
        )  # once none was reduced
        prepare(poses(tmp_path))
    assert set(make_plan(poses(tmp_path)).missing.values()) == {"changed: reduced", "changed: px layer"}
    (tmp_path / "source" / "1.jpg").rename(tmp_path / "1.jpg")
    plan = make_plan(poses(tmp_path))
    assert (plan.missing, len(plan.sources)) == ({}, 3)
    (tmp_path / "1.jpg").rename(tmp_path / "source" / "1.jpg")
    prepare(poses(tmp_path))
    (tmp_path / "source" / "1.jpg").unlink()
    assert make_plan(poses(tmp_path)).missing == {}  # nor are reduced ones made again
