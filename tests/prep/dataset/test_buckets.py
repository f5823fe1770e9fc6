"""Buckets: sizes at every base, the choice on the logarithmic ratio, and the crop."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nanodit.errors import ConfigError
from prep.dataset.buckets import Bucket, buckets_for, centre_crop, choose_bucket, crop_boxes, crop_to_bucket

SIDES = st.integers(1, 20_000)
BASES = st.sampled_from([64, 128, 256, 512, 768, 1024])


def names(base: int) -> list[str]:
    return [str(bucket) for bucket in buckets_for(base)]


def test_the_buckets_of_the_published_bases():
    assert names(1024) == ["1024x1024", "1216x832", "832x1216", "1280x768", "768x1280", "1344x704", "704x1344"]
    assert names(64) == ["64x64", "80x56", "56x80", "80x48", "48x80", "88x48", "48x88"]


@pytest.mark.parametrize("base", [64, 128, 192, 256, 512, 768, 1024, 2048])
def test_every_base_has_seven_buckets_of_about_its_area(base):
    buckets = buckets_for(base)
    assert len(set(buckets)) == 7
    for bucket in buckets:
        assert bucket.width % 8 == 0
        assert bucket.height % 8 == 0
        assert bucket.transposed in buckets
        assert bucket.width * bucket.height == pytest.approx(base**2, rel=0.11)
        assert Bucket.parse(str(bucket)) == bucket


@pytest.mark.parametrize("base", [0, 8, 48, 60, 72, 100])
def test_a_base_without_seven_buckets_is_refused(base):
    with pytest.raises(ConfigError, match="multiple of 64"):
        buckets_for(base)


@given(SIDES, SIDES, BASES)
def test_trap_04_an_image_and_its_transpose_get_transposed_buckets(width, height, base):
    assert choose_bucket(width, height, base) == choose_bucket(height, width, base).transposed  # trap 4


@given(SIDES, SIDES, BASES)
def test_trap_04_no_bucket_is_nearer_on_the_logarithmic_scale(width, height, base):
    def distance(bucket):
        return abs(math.log(width / height) - math.log(bucket.width / bucket.height))

    assert distance(choose_bucket(width, height, base)) <= min(map(distance, buckets_for(base))) + 1e-12


def test_trap_04_the_predecessors_example():
    """It sent 1200x1000 to the square and 1000x1200 to the portrait bucket."""
    wide, tall = choose_bucket(1200, 1000, 1024), choose_bucket(1000, 1200, 1024)
    assert str(wide) == str(tall) == "1024x1024"  # log 1.2 is .182 from the square and .197 from 1216x832


@given(SIDES, SIDES, BASES)
def test_the_crop_is_centred_inside_and_of_the_buckets_shape(width, height, base):
    bucket = choose_bucket(width, height, base)
    crop = centre_crop(width, height, bucket)
    assert 0 <= crop.left <= crop.right <= width * (1 + 1e-12)
    assert 0 <= crop.top <= crop.bottom <= height * (1 + 1e-12)
    assert crop.left + crop.right == pytest.approx(width)
    assert crop.top + crop.bottom == pytest.approx(height)
    assert (crop.right - crop.left) * crop.scale == pytest.approx(bucket.width)
    assert (crop.bottom - crop.top) * crop.scale == pytest.approx(bucket.height)
    assert min(crop.left, crop.top) == pytest.approx(0, abs=1e-6)  # one side is used in full


@given(st.lists(st.tuples(SIDES, SIDES, BASES), max_size=20))
def test_the_crops_of_many_images_are_those_of_each_to_the_bit(images):
    buckets = [choose_bucket(*image) for image in images]
    sizes = [(width, height, bucket.width, bucket.height) for (width, height, _), bucket in zip(images, buckets)]
    boxes = crop_boxes(*np.array(sizes, np.float64).reshape(-1, 4).T)
    each = [centre_crop(width, height, bucket).box for (width, height, _), bucket in zip(images, buckets)]
    assert np.stack(boxes, axis=1).tolist() == [list(box) for box in each]


def test_cropping_puts_the_marked_pixel_where_the_crop_box_says():
    pixels = np.zeros((300, 500, 3), np.uint8)
    pixels[120:130, 330:340] = 255
    image = Image.fromarray(pixels)
    bucket = Bucket(80, 56)
    crop = centre_crop(*image.size, bucket)
    small = np.asarray(crop_to_bucket(image, bucket).convert("L")).astype(float)
    assert small.shape == (56, 80)
    y, x = np.indices(small.shape)
    found_x, found_y = (small * (x + 0.5)).sum() / small.sum(), (small * (y + 0.5)).sum() / small.sum()
    assert found_x == pytest.approx((335 - crop.left) * crop.scale, abs=0.1)
    assert found_y == pytest.approx((125 - crop.top) * crop.scale, abs=0.1)


def test_downscaling_is_antialiased():
    """A one-pixel checkerboard has no detail that survives at a tenth of its size: it must become flat grey."""
    board = np.indices((640, 640)).sum(axis=0) % 2 * 255
    small = crop_to_bucket(Image.fromarray(board.astype(np.uint8)).convert("RGB"), Bucket(64, 64))
    inner = np.asarray(small)[4:-4, 4:-4].astype(int)
    assert np.abs(inner - 127.5).max() <= 2
