"""Real photographs of mixed sizes, formats and orientations through ``prep run`` at production size.

The pictures are those that scikit-image carries in its package.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps
from skimage import data
from transformers import DINOv3ViTConfig, DINOv3ViTModel, T5Config, T5EncoderModel, T5Tokenizer

from prep.config import PrepConfig
from prep.dataset.buckets import Bucket
from prep.dataset.reader import Dataset
from prep.encoders.demo import pieces
from prep.run import run

pytestmark = pytest.mark.slow

CAPTION = "A photograph of {}, taken in daylight, with the subject in the middle and a plain background behind it."


def oriented(image: Image.Image, orientation: int) -> tuple[Image.Image, Image.Exif]:
    """What a camera turned to ``orientation`` would have stored, with the tag that says so."""
    exif = Image.Exif()
    exif[274] = orientation
    turn = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270, 3: Image.Transpose.ROTATE_180}[orientation]
    return image.transpose(turn), exif


def save(folder: Path, name: str, image: Image.Image, **options) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    image.save(folder / name, **options)
    (folder / name).with_suffix(".txt").write_text(CAPTION.format(Path(name).stem.replace("-", " ")))


def write_photographs(folder: Path) -> dict[str, np.ndarray]:
    """Ten photographs in ten kinds of files; returns the upright sRGB pixels each must give."""
    pictures = {
        name: Image.fromarray(getattr(data, function)()).convert("RGB")
        for name, function in [
            ("astronaut", "astronaut"), ("cat", "chelsea"), ("coffee", "coffee"), ("rocket", "rocket"),
            ("retina", "retina"), ("stars", "hubble_deep_field"), ("tissue", "immunohistochemistry"),
        ]
    }  # fmt: skip
    grey = Image.fromarray(data.camera())
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name, orientation in (("cat", 6), ("rocket", 8), ("coffee", 3)):
        stored, exif = oriented(pictures[name], orientation)
        save(folder, f"phone/{name}.jpg", stored, quality=95, subsampling=0, exif=exif, icc_profile=srgb)
    save(folder, "astronaut.webp", pictures["astronaut"], lossless=True)
    save(folder, "retina.PNG", pictures["retina"])
    save(folder, "stars.tif", pictures["stars"], compression="tiff_deflate")
    save(folder, "tissue.bmp", pictures["tissue"])
    save(folder, "coffee.print.jpg", pictures["coffee"].crop((0, 0, 400, 400)).convert("CMYK"), quality=95)
    save(folder, "camera-16-bit.png", Image.fromarray(np.asarray(grey).astype(np.uint16) * 257))
    logo = Image.open(Path(data.__file__).parent / "logo.png")
    assert logo.mode == "RGBA"
    save(folder, "logo.gif", logo.convert("P", palette=Image.Palette.ADAPTIVE))
    upright = {f"phone/{name}.jpg": pictures[name] for name in ("cat", "rocket", "coffee")}
    upright |= {"astronaut.webp": pictures["astronaut"], "retina.PNG": pictures["retina"]}
    upright |= {"stars.tif": pictures["stars"], "tissue.bmp": pictures["tissue"]}
    upright |= {"camera-16-bit.png": grey.convert("RGB"), "coffee.print.jpg": pictures["coffee"].crop((0, 0, 400, 400))}
    return {name: np.asarray(image) for name, image in upright.items()}


def test_photographs_of_every_kind_become_upright_production_crops(tmp_path, without_ray):
    upright = write_photographs(tmp_path / "photos")
    settings = PrepConfig(
        source=str(tmp_path / "photos"),
        output=str(tmp_path / "dataset"),
        encoders="demo",
        image={"max_upscale": 4.0},  # these pictures are small; the default would refuse most
    )
    run(settings)
    dataset = Dataset(tmp_path / "dataset")
    rows = {row["source"]: row for row in dataset.rows()}
    assert len(rows) == 10
    assert rows["phone/cat.jpg"]["width"] > rows["phone/cat.jpg"]["height"]  # as it is looked at, not as it is stored
    for name, pixels in upright.items():
        row = rows[name]
        assert pixels.shape[:2] == (row["height"], row["width"]), name
        bucket = Bucket.parse(row["bucket"])
        crop = dataset.pixels(row)
        assert crop.shape == (bucket.height, bucket.width, 3)
        # another resampler than ours, on pixels that never were in a file
        box = (row["crop_left"], row["crop_top"], row["crop_right"], row["crop_bottom"])
        expected = ImageOps.fit(Image.fromarray(pixels), crop.shape[1::-1], Image.Resampling.BICUBIC)
        assert box == pytest.approx(centred_box(pixels, bucket), abs=1e-6)
        difference = np.abs(crop.astype(float) - np.asarray(expected)).mean()
        assert difference < (6 if "print" in name else 3), name  # CMYK without a profile loses some colour
    assert {row["bucket"] for row in rows.values()} >= {"1024x1024", "1216x832"}


def centred_box(pixels: np.ndarray, bucket: Bucket) -> tuple[float, float, float, float]:
    """The centred box of the bucket's shape, by the book."""
    height, width = pixels.shape[:2]
    if width / height > bucket.width / bucket.height:
        inner = height * bucket.width / bucket.height
        return (width - inner) / 2, 0, (width + inner) / 2, height
    inner = width * bucket.height / bucket.width
    return 0, (height - inner) / 2, width, (height + inner) / 2


def test_full_width_encoders_on_two_photographs(tmp_path, without_ray):
    """T5-Large and DINOv3 ViT-L/16 at random weights: the shapes of production, through the whole of prep run.

    With 3 of their 24 blocks: all have the same shapes.
    """
    save(tmp_path / "photos", "coffee.png", Image.fromarray(data.coffee()))
    save(tmp_path / "photos", "astronaut.jpg", Image.fromarray(data.astronaut()), quality=95)
    torch.manual_seed(0)
    large = {"d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 3, "num_heads": 16}
    t5 = T5Config(vocab_size=32128, feed_forward_proj="relu", **large)
    T5EncoderModel._from_config(t5, dtype=torch.bfloat16).save_pretrained(tmp_path / "t5")
    T5Tokenizer(vocab=pieces(CAPTION.split()), extra_ids=0).save_pretrained(tmp_path / "t5")
    vit = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 3, "num_attention_heads": 16}
    dino = DINOv3ViTConfig(num_register_tokens=4, **vit)
    DINOv3ViTModel._from_config(dino, dtype=torch.bfloat16).save_pretrained(tmp_path / "dino")
    settings = PrepConfig(
        source=str(tmp_path / "photos"),
        output=str(tmp_path / "dataset"),
        encoders="demo",
        image={"max_upscale": 3.0},
        layers=["text", "dino"],
        t5={"model": str(tmp_path / "t5")},
        dino={"model": str(tmp_path / "dino"), "input_scale": 0.5},
    )
    run(settings)
    for folder in ("t5", "dino"):
        (tmp_path / folder / "model.safetensors").unlink()  # 0.2 GB that pytest would keep
    dataset = Dataset(tmp_path / "dataset")
    assert dataset.info["layers"]["t5"]["width"] == dataset.info["layers"]["dino"]["width"] == 1024
    grids = {"1216x832": (26, 38), "1024x1024": (32, 32)}
    assert {row["bucket"] for row in dataset.rows()} == set(grids)
    for row in dataset.rows():
        assert dataset.t5(row).shape == (row["t5_tokens"], 1024)
        assert dataset.cls(row).shape == (1024,)
        assert dataset.patches(row).shape == (*grids[row["bucket"]], 1024)
        assert row["dino/dino.npy/length"] == row["dino_h"] * row["dino_w"] * 1024 + 128  # int8 and the NPY header
        assert np.isfinite(dataset.t5(row)).all()
        assert np.isfinite(dataset.patches(row)).all()
