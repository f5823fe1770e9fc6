"""The encoder that judges likeness: one that the model was neither given as a condition nor taught by.

DINOv2 judges what was made from DINOv3's features and the other way round; for datasets made with the demo encoders,
another seed of the demo network, which can order pictures and claims nothing of their quality. Its weights are taken
from a folder or the hub's cache and never downloaded.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nanodit.errors import ConfigError
from nanodit.files import canonical_json, sha256_bytes
from prep.dataset.reader import Dataset

if TYPE_CHECKING:  # transformers, which no config and no report needs, takes seconds to import
    from prep.encoders.dinov3 import DINOv3Encoder

SIDE = 16  # of the second feature space: an image as SIDE x SIDE mean colours
DINOV2, DINOV3 = "facebook/dinov2-base", "facebook/dinov3-vitb16-pretrain-lvd1689m"
DEMO_LABEL = "demo network of another seed; not a quality claim"


@dataclass(frozen=True)
class Judge:
    """An encoder of images: ``label`` is what reports call it, ``fingerprint`` identifies weights and preprocessing.

    Features are counted from ``origin`` (width,), if there is one.
    """

    encoder: DINOv3Encoder
    label: str
    origin: np.ndarray | None = None

    @property
    def fingerprint(self) -> str:
        """A name for everything that the features depend on beside the picture."""
        facts = {**self.encoder.fingerprint(), "from_grey": self.origin is not None}
        return sha256_bytes(canonical_json(facts).encode())[:16]

    @property
    def width(self) -> int:
        """Length of a feature."""
        return self.encoder.width

    def features(self, pictures: np.ndarray) -> np.ndarray:
        """Return the class token of each picture, uint8 (B, H, W, 3) to float32 (B, width)."""
        features = self.encoder.encode(pictures)[0]
        return features if self.origin is None else features - self.origin


def open_judge(model: str | None, dataset: Dataset, device: str) -> tuple[Judge | None, str | None]:
    """Open the judge of a dataset; returns None and the reason where there is none.

    ``model`` names another one (a folder or a model in the hub's cache). Raises :class:`ConfigError` for one that is
    named and cannot be had, or that the dataset's features are of.
    """
    recorded = dataset.info["layers"].get("dino", {}).get("encoder", {})
    if model is None and dataset.info["encoders"] == "demo":
        from prep.encoders.dinov3 import DINOv3Encoder

        encoder = DINOv3Encoder(demo_judge(), device=device, input_scale=1.0)
        # what all its features share is most of each, so that any two pictures would be alike: count from plain grey
        grey = encoder.encode(np.full((1, 64, 64, 3), 128, np.uint8))[0][0]
        return Judge(encoder, DEMO_LABEL, grey), None
    name = model or (DINOV3 if _is_dinov2(recorded) else DINOV2)
    try:
        folder = local_folder(name)
        from prep.encoders.dinov2 import DINOv2Encoder
        from prep.encoders.dinov3 import DINOv3Encoder
        from prep.encoders.weights import architecture

        kind = DINOv2Encoder if architecture(folder) in DINOv2Encoder.MODELS else DINOv3Encoder
        encoder = kind(folder, device=device, input_scale=0.5)
    except ConfigError as error:
        if model is not None:
            raise
        return None, f"no judge: {error}"
    if encoder.fingerprint().get("content") == recorded.get("content", ""):
        raise ConfigError(f"judge: {name} is what the model is conditioned on; name another encoder, or null")
    return Judge(encoder, name), None


def _is_dinov2(recorded: dict[str, Any]) -> bool:
    return "dinov2" in str(recorded.get("model", ""))


def local_folder(model: str) -> Path:
    """Return the folder of a model on this machine.

    Raises :class:`ConfigError` where it is neither a folder nor cached.
    """
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, "config.json")
    weights = try_to_load_from_cache(model, "model.safetensors")
    if not isinstance(found, str) or not isinstance(weights, str):
        raise ConfigError(f"{model} is neither a folder nor in the hub's cache; get it with: hf download {model}")
    return Path(found).parent


def demo_judge() -> Path:
    """Return the folder of the demo judge, built where it is not there yet; equal bytes every time."""
    from prep.encoders.demo import build_dino, demo_folder

    folder = demo_folder().with_name(f"{demo_folder().name}-judge")
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.tmp-", dir=folder.parent))
        try:
            build_dino(temporary / "dino", "judge")
            (temporary / "dino").chmod(0o755)
            os.replace(temporary / "dino", folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster, with the same bytes
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def pixel_features(pictures: np.ndarray, side: int = SIDE) -> np.ndarray:
    """Average colours on a grid: uint8 (B, H, W, 3) to float32 (B, side * side * 3) in [0, 1].

    Exact averages over areas; a pixel on the border of two cells counts in each as far as it lies there.
    """
    rows, columns = (_areas(length, side) for length in pictures.shape[1:3])
    cells = np.einsum("ih,bhwc,jw->bijc", rows, pictures.astype(np.float32) / 255, columns, optimize=True)
    return cells.reshape(len(pictures), -1)


def _areas(length: int, cells: int) -> np.ndarray:
    """Return the share of each of ``length`` pixels in each of ``cells`` equal intervals, float32 (cells, length)."""
    edges = np.arange(cells + 1) * length / cells
    pixels = np.arange(length)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (overlap.clip(min=0) * cells / length).astype(np.float32)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the cosine of each pair of features (B, width): float64 (B,) in [-1, 1]."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.einsum("bd,bd->b", a, b) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
