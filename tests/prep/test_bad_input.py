"""Bad input through ``prep run`` (P01, P02, P04, P18): rows with reasons, gates, nothing published by halves."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from nanodit.errors import DataError
from prep.dataset.reader import Dataset
from prep.run import run
from tests.prep.passes.test_plan import config, write_images
from tests.prep.runs import FINISHED, files_of, poses, rejects_of


def test_p01_p02_bad_files_become_rows_and_the_run_goes_on(tmp_path, ray_session):
    from tests.prep.images.test_sources import animation, encoded, png_with_header

    source = tmp_path / "source"
    write_images(source, 6)
    good = Image.fromarray(np.random.default_rng(99).integers(0, 256, (80, 80, 3), dtype=np.uint8))
    jpeg = encoded(good, "JPEG")
    bad = {
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "empty.png": b"",
        "page.jpg": b"<html></html>",
        "._image-000.png": b"\0\5\x16\7",
        "moving.gif": animation("GIF"),
        "bomb.png": png_with_header(50_000, 50_000),
        "copy.png": (source / "image-003.png").read_bytes(),
    }
    for name, data in bad.items():
        (source / name).write_bytes(data)
    run(poses(tmp_path, max_reject_rate=0.5))
    assert len(Dataset(tmp_path / "out")) == 6
    assert rejects_of(tmp_path / "out") == {
        "cut.jpg": ("px", "truncated"),
        "empty.png": ("source", "empty"),
        "page.jpg": ("source", "not_an_image"),
        "._image-000.png": ("source", "hidden"),
        "moving.gif": ("source", "animated"),
        "bomb.png": ("source", "too_many_pixels"),
        "image-003.png": ("source", "duplicate"),
    }
    before = files_of(tmp_path / "out")
    with pytest.raises(DataError, match=r"5 of 11 sources were rejected .* above max_reject_rate 0.45"):
        run(poses(tmp_path, max_reject_rate=0.45))
    assert files_of(tmp_path / "out") == before  # what was published stays


@pytest.mark.slow
def test_p04_images_without_a_usable_caption_are_left_out_when_allowed(tmp_path, without_ray):
    source = tmp_path / "source"
    write_images(source, 6)
    (source / "image-000.txt").unlink()
    (source / "image-001.txt").write_bytes(b"caf\xe9")
    (source / "image-002.txt").write_text("word " * 10_000)
    settings = config(tmp_path, captions={"on_missing": "reject"}, t5={"max_tokens": 64})
    run(settings)
    dataset = Dataset(tmp_path / "out")
    assert len(dataset) == 4
    assert rejects_of(tmp_path / "out") == {
        "image-000.png": ("text", "caption_missing"),
        "image-001.png": ("text", "caption_not_utf8"),
    }
    long = next(row for row in dataset.rows() if row["source"] == "image-002.png")
    assert (long["t5_tokens"], long["t5_truncated"]) == (64, True)
    for row in dataset.rows():  # trap 3: the mask of a caption is the length of the features of that very caption
        assert len(dataset.t5(row)) == row["t5_tokens"] > 1

    (source / "image-000.txt").write_text("Found again.")  # a repaired sample comes back by running again
    run(settings)
    assert len(Dataset(tmp_path / "out")) == 5


def test_hidden_files_of_other_systems_are_rows_that_do_not_count(tmp_path, without_ray):
    """A folder from a Mac has a hidden file beside every picture and every caption."""
    write_images(tmp_path / "source", 2)
    hidden = [f"._image-{number:03d}{suffix}" for number in range(2) for suffix in (".png", ".txt")]
    hidden += [".DS_Store", "Thumbs.db"]
    for name in hidden:
        (tmp_path / "source" / name).write_bytes(b"\0\5\x16\7")
    run(poses(tmp_path, max_reject_rate=0.0))
    assert Dataset(tmp_path / "out").info["counts"]["samples"] == 2
    rows = [name for name in hidden if not name.endswith(".txt")]  # a hidden caption is none, and no source either
    assert rejects_of(tmp_path / "out") == dict.fromkeys(rows, ("source", "hidden"))
    for path in (tmp_path / "source").glob("image-*"):
        path.unlink()
    with pytest.raises(DataError, match=r"nothing was accepted.* 4 of 4 sources were rejected \(4 hidden\)"):
        run(poses(tmp_path), prune=True)


def test_missing_captions_close_the_gate_before_anything_is_computed(tmp_path):
    write_images(tmp_path / "source", 4)
    for number in range(4):
        (tmp_path / "source" / f"image-{number:03d}.txt").unlink()
    with pytest.raises(DataError, match=r"nothing was accepted.* 4 of 4 sources were rejected \(4 caption_missing\)"):
        run(config(tmp_path, captions={"on_missing": "reject"}))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["runs"]


def test_p18_nothing_accepted_ends_with_numbers_and_publishes_nothing(tmp_path, without_ray):
    (tmp_path / "source").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        run(config(tmp_path))
    write_images(tmp_path / "source", 3, size=(20, 20))
    with pytest.raises(DataError, match=r"nothing was accepted.*3 of 3 sources were rejected \(3 too_small\)"):
        run(config(tmp_path))
    for name in FINISHED:
        assert not (tmp_path / "out" / name).exists()
    assert pq.read_table(tmp_path / "out" / "runs" / "0002" / "rejects.parquet").num_rows == 3


def test_p18_a_single_image_makes_a_dataset_and_a_warning(tmp_path, without_ray, capsys):
    write_images(tmp_path / "source", 1)
    run(poses(tmp_path))
    assert Dataset(tmp_path / "out").info["counts"] == {"samples": 1, "train": 1, "holdout": 0, "rejects": 0}
    output = capsys.readouterr().out
    assert "warning: 1 samples are too few for a holdout" in output
    assert "warning: buckets with a single sample: 80x56" in output
