"""``image.format``: crops as lossless WebP or as JPEG, from the plan to the reader."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from prep.dataset.reader import Dataset
from prep.passes.plan import make_plan
from prep.verify.verify import verify
from tests.prep.passes.test_plan import config, write_images
from tests.prep.prepared import prepare


def test_a_dataset_of_jpegs_is_a_dataset(tmp_path):
    write_images(tmp_path / "source", 4)
    prepare(config(tmp_path))
    before, settings = Dataset(tmp_path / "out"), config(tmp_path, image={"format": "jpeg"})
    plan = make_plan(settings)
    assert {unit.layer: why for unit, why in plan.missing.items()} == {
        "px": "changed: format",
        "text": "changed: px layer",
        "t5": "changed: text layer",
    }
    prepare(settings)
    verify(tmp_path / "out")
    dataset = Dataset(tmp_path / "out")
    assert dataset.members("px") == ("jpg",)
    assert "px/jpg/offset" in dataset.table.column_names
    assert "px/webp/offset" not in dataset.table.column_names
    for row, lossless in zip(dataset.rows(), before.rows()):
        with Image.open(io.BytesIO(dataset.read(row, "px/jpg"))) as image:
            assert image.format == "JPEG"
            assert image.layer[0][1:3] == image.layer[1][1:3]  # 4:4:4, every channel at full resolution
        assert row["phash"] == lossless["phash"]  # made from the pixels before they are stored
    prepare(config(tmp_path))  # and back
    assert Dataset(tmp_path / "out").fingerprint == before.fingerprint


def test_recipes_of_lossless_datasets_do_not_name_the_format(tmp_path):
    """Datasets from before there was a choice stay current."""
    write_images(tmp_path / "source", 1)
    (recipe,) = [recipe for unit, recipe in make_plan(config(tmp_path)).recipes.items() if unit.layer == "px"]
    assert "format" not in recipe


def test_encoders_read_jpegs(tmp_path):
    from prep.dataset.writer import LayerWriter
    from prep.passes.crops import decode_batch
    from prep.passes.layers import Job, LayerWorker

    write_images(tmp_path / "source", 2)
    settings = config(tmp_path, layers=["dino"], image={"format": "jpeg"})
    (task,) = make_plan(settings).tasks(("px", "dino"))
    worker = LayerWorker(settings)
    worker.compute(Job(task, "px"))
    with LayerWriter(Path(settings.output), Job(task, "dino").unit, {}, {}) as writer:
        (batch,) = worker._batches(Job(task, "dino"), writer, 4)
    pixels = decode_batch(batch)
    assert (pixels.shape, pixels.dtype) == ((2, 56, 80, 3), np.uint8)


def test_other_formats_are_refused():
    with pytest.raises(ValidationError, match=r"image\.format"):
        config(Path(), image={"format": "png"})
