"""Which files are looked at, what is said of the others, and the formats of telephones."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from prep.images.formats import foreign_format, is_image_name, other_files, suffix_of
from prep.images.scan import scan
from prep.images.sources import BadImage, decode, read_header
from tests.prep.images.test_sources import CAP, encoded, picture, reason_of


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("a.jpg", ".jpg"),
        ("2024.b/A.JPEG", ".JPEG"),
        ("2024.b/plain", ""),
        ("St. Moritz", ""),
        (".hidden", ""),
        ("a.jpg~", ".jpg~"),
        ("a.", ""),
        ("写真.png", ".png"),
    ],
)
def test_a_suffix_is_what_people_take_for_one(name: str, suffix: str) -> None:
    assert suffix_of(name) == suffix


def test_names_of_images_and_names_without_a_suffix_are_looked_at() -> None:
    assert all(map(is_image_name, ["a.jpg", "A.JPE", "b.HEIC", "c.avif", "d.tiff", "3f2a", "St. Moritz"]))
    assert not any(map(is_image_name, ["a.txt", "a.xmp", "a.CR2", "a.mp4", "a.svg", "a.npz", "a.jpg~", "a.psd"]))


def test_companions_are_counted_and_are_no_rejects(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(encoded(picture(seed=number), "JPEG"))
        for suffix in (".txt", ".xmp", ".CR2"):
            (tmp_path / f"{number}{suffix}").write_bytes(b"II*\0")
    (tmp_path / "clip.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    (tmp_path / "README").write_text("pictures of a summer")
    (tmp_path / "bare").write_bytes(encoded(picture(seed=9)))
    found = scan(tmp_path, CAP)
    assert [source.name for source in found.sources] == ["0.jpg", "1.jpg", "2.jpg", "bare"]
    assert found.rejects == []
    assert found.others == "8 other files ignored: 3 .CR2, 3 .xmp, 1 .mp4, 1 without a suffix"


def test_a_raw_photograph_without_a_picture_of_its_name_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.JPG").write_bytes(encoded(picture(), "JPEG"))
    for name in ("a.cr2", "b.CR2", "c.nef"):
        (tmp_path / name).write_bytes(b"II*\0")
    others = scan(tmp_path, CAP).others
    assert others.endswith(
        "2 raw photographs have no picture of the same name beside them: export them as JPEG or TIFF"
    )
    (tmp_path / "c.nef").unlink()
    others = scan(tmp_path, CAP).others
    assert others.endswith("1 raw photograph has no picture of the same name beside it: export it as JPEG or TIFF")


def test_many_kinds_of_other_files_make_one_line() -> None:
    assert other_files(Counter(), 0) == ""
    assert other_files(Counter({".txt~": 1}), 0) == "1 other file ignored: 1 .txt~"
    kinds = Counter({f".{letter}": 2 for letter in "abcdefgh"})
    line = "16 other files ignored: 2 .a, 2 .b, 2 .c, 2 .d, 2 .e, 2 .f, 2 more kinds"
    assert other_files(kinds, 0) == line


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"\xff\x0a\0\0", "JPEG XL"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"8BPS\0\1", "Photoshop document"),
        (b"\0\0\0\x18ftypcrx ", "raw photograph"),
        (b"\0\0\0\x18ftypmp42", "video"),
        (b"\xef\xbb\xbf\n<!DOCTYPE html><title>", "web page"),
        (b"<svg xmlns=", "SVG drawing"),
        (b"%PDF-1.7", "PDF"),
        (b"\0" * 64, "no format that is known here"),
    ],
)
def test_another_format_under_an_images_name_is_named(head: bytes, words: str) -> None:
    assert foreign_format(head) == words
    with pytest.raises(BadImage, match=f"not_an_image: the content is {words}, not one of JPEG, .* Export it as JPEG"):
        decode(head, CAP)


@pytest.mark.parametrize("name", ["a.avif", "a.jpg"])
def test_a_telephones_picture_is_read_under_any_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(encoded(picture(), "AVIF"))
    (tmp_path / "b.HEIC").write_bytes(encoded(picture(seed=1), "HEIF"))
    found = scan(tmp_path, CAP)
    assert [(source.width, source.height) for source in found.sources] == [(60, 40)] * 2


@pytest.mark.parametrize("kind", ["AVIF", "HEIF"])
def test_a_damaged_header_of_a_telephones_picture_is_damage(kind: str) -> None:
    data = encoded(picture(), kind)
    assert reason_of(data[:80]) in ("truncated", "corrupt")
    assert reason_of(data[:32] + bytes(4000)) in ("truncated", "corrupt")
    assert reason_of(data[: len(data) - 40]) in ("truncated", "corrupt")


def test_alpha_goes_over_white_and_ten_bits_become_eight() -> None:
    clear = Image.new("RGBA", (16, 16), (0, 255, 0, 0))
    for kind in ("AVIF", "HEIF"):
        assert np.asarray(decode(encoded(clear, kind), CAP)).min() >= 253
    deep = pillow_heif.from_bytes("RGB;16", (16, 16), np.full((16, 16, 3), 40_000, np.uint16).tobytes())
    buffer = io.BytesIO()
    deep.save(buffer)
    assert np.abs(np.asarray(decode(buffer.getvalue(), CAP)).astype(int) - 156).max() <= 2


def test_of_several_pictures_in_one_file_the_primary_one_is_taken_and_a_moving_one_is_refused() -> None:
    first, second = picture(seed=1), picture(seed=2)
    data = encoded(first, "HEIF", save_all=True, append_images=[second], quality=-1, primary_index=1)
    taken = np.asarray(decode(data, CAP)).astype(int)
    assert np.abs(taken - np.asarray(second)).mean() < 3 < np.abs(taken - np.asarray(first)).max()
    assert reason_of(encoded(first, "AVIF", save_all=True, append_images=[second])) == "animated"


def test_a_photograph_with_another_behind_it_is_a_still_picture_however_its_markers_are_padded(tmp_path):
    pictures = [Image.effect_noise((300, 200), spread).convert("RGB") for spread in (40, 60)]
    pictures[0].save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=pictures[1:])
    data = (tmp_path / "a.jpg").read_bytes()
    second = 4 + int.from_bytes(data[4:6], "big")  # a marker may have fill bytes before it: ITU-T T.81, B.1.1.2
    (tmp_path / "b.jpg").write_bytes(data[:second] + b"\xff" + data[second:])
    for name in ("a.jpg", "b.jpg"):
        assert read_header(tmp_path, name, CAP).width == decode((tmp_path / name).read_bytes(), CAP).width == 300
