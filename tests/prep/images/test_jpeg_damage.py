"""Damage inside a JPEG: what is certain is refused, and no good file is, whatever its tables make of its picture."""

import io

import numpy as np
import pytest
from PIL import Image

from prep.images.jpeg_damage import ZEROS, find_damage
from prep.images.sources import BadImage, decode
from tests.benchmarks.damaged_jpegs import KINDS, encode, made_up
from tests.prep.images.test_metadata import jpeg
from tests.prep.images.test_sources import CAP


def noise(width: int = 200, height: int = 160) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def damaged(data: bytes, length: int) -> bytes:
    middle = (data.index(b"\xff\xda") + len(data)) // 2
    return data[:middle] + bytes(length) + data[middle + length :]


@pytest.mark.parametrize("kind", ["quality 50", "quality 92", "quality 100, 4:4:4", "restarts", "grey"])
def test_zeros_inside_are_refused_and_pillow_alone_takes_them(kind):
    data = damaged(encode(noise(), kind), ZEROS)
    Image.open(io.BytesIO(data)).load()
    with pytest.raises(BadImage, match=r"corrupt: damaged inside: (64 zeros or more|\d+ restart markers)"):
        decode(data, CAP)


def test_a_missing_piece_between_restarts_is_refused():
    data = encode(noise(400, 320), "restarts")
    low = (data.index(b"\xff\xda") + len(data)) // 2
    assert "restart markers, or out of order, where 19 belong" in find_damage(data[:low] + data[low + 6000 :])


def test_a_marker_that_cannot_stand_inside_the_data_is_refused():
    data = encode(noise(), "quality 92")
    middle = (data.index(b"\xff\xda") + len(data)) // 2
    assert find_damage(data[:middle] + b"\xff\x3c" + data[middle + 2 :]) == (
        "the marker ff 3c lies inside the picture's data"
    )
    assert find_damage(data[:middle] + b"\xff\xd3" + data[middle + 2 :]) == (
        "a restart marker in a picture without restarts"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_no_good_file_is_blamed(kind):
    """Flat pictures with tables of their own are runs of zeros: those of these pictures are, for a hundred bytes."""
    pictures = [picture.resize((600, 400)) for picture in made_up()]
    files = [encode(picture, kind) for picture in [*pictures, noise(), noise(17, 33), noise(8, 8), noise(1, 1)]]
    assert [find_damage(data) for data in files] == [None] * len(files)
    if kind == "own tables":
        assert any(bytes(ZEROS) in data for data in files)


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("size", [(16, 16), (17, 16), (33, 65), (200, 130)])
def test_the_number_of_restarts_is_that_of_the_standard(rows, subsampling, size):
    for image in (noise(*size), noise(*size).convert("L")):
        file = io.BytesIO()
        image.save(file, "JPEG", restart_marker_rows=rows, subsampling=subsampling)
        assert find_damage(file.getvalue()) is None


def test_metadata_and_what_comes_behind_the_picture_are_no_damage():
    assert find_damage(jpeg((0xE1, bytes(1000)), (0xFE, b"\xff\x3c" * 100))) is None
    assert find_damage(encode(noise(), "quality 92") + bytes(1000) + b"\xff\x3c") is None  # a second picture, a video


def test_zeros_behind_the_last_block_are_padding():
    data = encode(noise(), "quality 92")
    padded = data[:-2] + bytes(500) + data[-2:]
    assert np.array_equal(np.asarray(decode(padded, CAP)), np.asarray(decode(data, CAP)))


@pytest.mark.parametrize("kind", ["quality 92", "progressive"])
def test_a_file_whose_rest_was_never_written_is_refused(kind):
    """A download that broke off in a file of its full size."""
    data = encode(noise(), kind)
    with pytest.raises(BadImage, match=r"corrupt: damaged inside: its data end in zeros|truncated"):
        decode(data[: len(data) // 2] + bytes(len(data) // 2), CAP)


def test_what_is_cut_off_or_odd_is_left_to_the_decoder():
    data = encode(noise(), "quality 92")
    assert all(find_damage(data[:length]) is None for length in range(0, len(data), 61))
    random = np.random.default_rng(0)
    for _ in range(300):  # headers of strangers raise nothing
        head = bytearray(data[:700])
        for place in random.integers(2, 620, 3):
            head[place] = random.integers(256)
        find_damage(bytes(head) + data[700:])
