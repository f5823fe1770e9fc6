"""The records of the layers: files and columns of published datasets, and what encoders must agree with."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from prep.config import PrepConfig
from prep.dataset.layers import CHOICES, ENCODER_LAYERS, LAYERS
from prep.dataset.layout import members_of, part_schema
from prep.dataset.members import Array

FILES = {
    "px": ["webp"],
    "text": ["txt", "json", "flip.txt"],
    "t5": ["t5.npy", "t5_flip.npy"],
    "dino": ["cls.npy", "dino.npy", "dino_scale.npy", "cls_flip.npy", "dino_flip.npy", "dino_flip_scale.npy"],
    "pose": ["pose.npy", "json"],
}
COLUMNS = {
    "px": {"phash": pa.string(), "sharpness": pa.float64(), "thumbnail": pa.binary()},
    "text": {"caption": pa.string(), "caption_flip": pa.string()},
    "t5": {"t5_tokens": pa.int32(), "t5_truncated": pa.bool_(), "t5_flip_tokens": pa.int32()},
    "dino": {"dino_h": pa.int32(), "dino_w": pa.int32(), "dino_cosine": pa.float32()},
    "pose": {"persons": pa.int32()},
}


@pytest.mark.parametrize("layer", FILES)
def test_files_and_columns_of_published_datasets_stay(layer):
    located = {
        f"{layer}/{file}/{name}": kind
        for file in FILES[layer]
        for name, kind in (("offset", pa.int64()), ("length", pa.int64()), ("sha256", pa.string()))
    }
    flip = {"flip": 1}
    assert part_schema(layer, flip) == pa.schema({"key": pa.string(), **COLUMNS[layer], **located})
    assert list(members_of(layer, {})) == [file for file in FILES[layer] if "flip" not in file]
    assert [name for name in part_schema(layer, {}).names if "flip" in name] == []


def test_the_format_of_the_crops_is_that_of_the_recipe():
    assert members_of("px", {"format": "jpeg"}) == ("jpg",)
    assert members_of("px", {"format": "webp"}) == members_of("px", {}) == ("webp",)


def test_recipes_of_published_datasets_stay():
    """A number that is raised has every dataset's units computed again."""
    codes = {name: (layer.code, layer.flip and layer.flip.code) for name, layer in LAYERS.items()}
    assert {name: codes[name] for name in FILES} == {
        "px": (2, None),
        "text": (1, 1),
        "t5": (1, 1),
        "dino": (2, 1),
        "pose": (1, None),
    }


def test_every_record_is_whole():
    config = PrepConfig(source="photos", output="dataset")
    for name, layer in LAYERS.items():
        assert layer.name == name
        assert layer.upstream == "source" or layer.upstream in LAYERS
        assert (layer.encoder is not None) == ("cuda" in layer.rates) == (name in ENCODER_LAYERS)
        if layer.encoder:
            assert getattr(config, name).batch_size
            assert not (layer.encoder.model and layer.encoder.files)
        if layer.flat and name not in ("px", "t5", "dino"):
            assert len(layer.flat) == sum(isinstance(member.kind, Array) for member in layer.members)
    assert set(CHOICES) < set(LAYERS)


def test_shapes_follow_from_the_index_and_the_facts():
    row, facts = {"t5_tokens": 7, "t5_flip_tokens": 0, "dino_h": 8, "dino_w": 10}, {"width": 96}
    shapes = {
        member.name: (np.dtype(member.kind.dtype).name, member.kind.shape(row, facts))
        for layer in ("t5", "dino", "pose")
        for member in LAYERS[layer].members_of({"flip": 1})
        if isinstance(member.kind, Array)
    }
    assert shapes == {
        "t5.npy": ("float16", (7, 96)),
        "t5_flip.npy": ("float16", (0, 96)),
        "cls.npy": ("float32", (96,)),
        "dino.npy": ("int8", (80, 96)),
        "dino_scale.npy": ("float16", (80, 2)),
        "cls_flip.npy": ("float32", (96,)),
        "dino_flip.npy": ("int8", (80, 96)),
        "dino_flip_scale.npy": ("float16", (80, 2)),
        "pose.npy": ("float32", (133, 3)),
    }


def test_reading_a_dataset_needs_no_torch():
    code = "import sys, prep.dataset.reader, prep.dataset.writer; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
