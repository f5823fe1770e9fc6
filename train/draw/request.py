"""What a picture is asked for with: prompts, a reference image, a pose; encoded just as ``prep`` encoded the dataset.

The encoders are those of ``prep``, loaded one after another, checked against what the checkpoint's data went through,
and freed before the next one.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np
import torch
from PIL import Image

from nanodit.console import say, waiting
from nanodit.errors import ConfigError, DataError
from nanodit.files import sha256_bytes
from prep.config import ImageConfig, PrepConfig
from prep.dataset.buckets import Bucket, buckets_for, centre_crop, choose_bucket, crop_to_bucket
from prep.dataset.quantise import dequantise, quantise
from prep.encoders.registry import build_encoder
from prep.images.sources import BadImage, canonical_pixels, decode, read_orientation
from train.model.conditions import Conditions, Subset, collate
from train.model.modalities import MODALITIES

if TYPE_CHECKING:  # onnxruntime, which a prompt does not need, takes a while to import
    from train.draw.pose_file import Skeleton

T = TypeVar("T")
# what --encoder names -> the layer that it is of
ENCODERS = {"t5": "t5", "dino": "dino", "detector": "pose", "pose": "pose"}
# layer -> what it encodes, and the name of its networks
NAMES = {one.layer: (one.option.removeprefix("--"), one.networks) for one in MODALITIES.values()}


@dataclass(frozen=True)
class Given:
    """The prompts, the reference image and the pose of one request, read and decoded; what is not given is None.

    ``files`` says of the reference and the pose which file each was: name and SHA-256.
    """

    prompts: tuple[str, ...] = ()
    reference: Image.Image | None = None
    pose: Image.Image | Skeleton | None = None
    files: Mapping[str, dict[str, str]] = field(default_factory=dict)

    @classmethod
    def read(cls, prompts: Sequence[str] = (), reference: Path | None = None, pose: Path | None = None) -> Self:
        """Read the files; ``pose`` is an image, or JSON as :mod:`train.draw.pose_file` documents it.

        Raises :class:`ConfigError` for files that cannot be opened, :class:`DataError` for content that is no image or
        no pose.
        """
        paths = {name: path for name, path in (("reference", reference), ("pose", pose)) if path is not None}
        data = {name: _read(f"--{name} {path}", path) for name, path in paths.items()}
        decoded: dict[str, Any] = {}
        for name, path in paths.items():
            if name == "pose" and path.suffix.lower() == ".json":
                from train.draw.pose_file import read_skeleton as read
            else:
                read = _decode
            decoded[name] = read(data[name], f"--{name} {path}")
        # a name that is not UTF-8 would not go into a PNG's text
        shown = {name: os.fsencode(path.name).decode("utf-8", "backslashreplace") for name, path in paths.items()}
        files = {name: {"name": shown[name], "sha256": sha256_bytes(data[name])} for name in paths}
        return cls(tuple(prompts), **decoded, files=files)

    @property
    def subset(self) -> Subset:
        """The conditions that these give."""
        given = {"--prompt": self.prompts, "--reference": self.reference, "--pose": self.pose}
        return frozenset(name for name, modality in MODALITIES.items() if given.get(modality.option))

    def bucket(self, base: int) -> Bucket:
        """Return the bucket that ``prep`` chooses for the pose's picture, else for the reference, else the square."""
        picture = self.pose or self.reference
        return choose_bucket(*picture.size, base) if picture else buckets_for(base)[0]


def canonical(image: Any, name: str) -> Image.Image:
    """Convert an image in memory as :meth:`Given.read` decodes a file: upright, sRGB, transparency over white.

    Raises :class:`ConfigError` for what is no Pillow image, :class:`DataError` for one without a meaning as a picture.
    """
    if not isinstance(image, Image.Image):
        raise ConfigError(f"{name}: is a {type(image).__name__}; give a Pillow image")
    image.load()
    try:
        return canonical_pixels(image, read_orientation(image))
    except BadImage as bad:
        raise DataError(f"{name}: {bad.detail}") from None


def _read(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{name}: {error.strerror}") from None


def _decode(data: bytes, name: str) -> Image.Image:
    try:
        return decode(data, ImageConfig().max_pixels)
    except BadImage as bad:
        raise DataError(f"{name}: {bad.detail}") from None


def encoding_size(width: int, height: int, base: int) -> Bucket:
    """Return the size to which reference and pose are cropped for a picture of ``width`` x ``height`` pixels.

    A bucket itself; of another size the shape, at the area that the encoders saw in the dataset: conditions know
    positions in the picture, not its pixels.
    """
    size = Bucket(width, height)
    if size in buckets_for(base):
        return size
    scale = base / math.sqrt(width * height)
    return Bucket(max(1, round(width * scale)), max(1, round(height * scale)))


def encode(
    given: Given,
    subset: Subset,
    dataset: Mapping[str, Any],
    size: tuple[int, int],
    device: torch.device,
    encoders: Mapping[str, str] | None = None,
) -> Conditions:
    """Encode those of the given conditions that ``subset`` names, for a picture of ``size`` (width, height).

    ``dataset`` is a checkpoint's summary of its data (base, encoders, layers); ``encoders`` says where an encoder is
    that it does not name (ENCODERS), a folder or a name on the hub, for ``pose`` and ``detector`` an ONNX file.
    Returns the conditions of one image per prompt, on the CPU; reference and pose are the same for all. Raises
    :class:`DataError` where an encoder is not the one of the dataset, or a picture shows nobody.
    """
    frame = encoding_size(*size, dataset["base"])
    config = encoder_config(dataset, encoders or {})
    text = cls = patches = pose = None
    if "text" in subset:
        text = _through("t5", config, dataset, device, lambda encoder: _embed(encoder, given.prompts))
    if subset & {"cls", "patches"}:
        image = _crop(given.reference, frame, "--reference")
        cls, patches = _through("dino", config, dataset, device, lambda encoder: _features(encoder, image))
    if "pose" in subset:
        pose = _pose(given, frame, config, dataset)
    texts = collate(text=text, count=max(1, len(given.prompts)))
    shared = collate(
        cls=None if cls is None or "cls" not in subset else [cls],
        patches=None if patches is None or "patches" not in subset else [patches],
        pose=None if pose is None else [pose],
        count=1,
    ).map(lambda tensor: tensor.expand(len(texts), *tensor.shape[1:]))  # a view: many prompts may share one reference
    return Conditions(shared.keep | texts.keep, {**texts.tensors, **shared.tensors})


def encoder_config(dataset: Mapping[str, Any], encoders: Mapping[str, str]) -> PrepConfig:
    """Return the part of a ``prep`` config that names a dataset's encoders, as far as its layers record them."""
    if unknown := encoders.keys() - ENCODERS.keys():
        raise ConfigError(f"--encoder {min(unknown)}: unknown; name one of {', '.join(ENCODERS)}")
    recorded = {layer: dataset["layers"].get(layer, {}).get("encoder", {}) for layer in set(ENCODERS.values())}

    def model(layer: str) -> dict[str, Any]:
        if layer in encoders:
            return {"model": str(encoders[layer])}
        return {name: recorded[layer].get(name) for name in ("model", "revision")}

    t5 = model("t5") | ({"max_tokens": recorded["t5"]["max_tokens"]} if "max_tokens" in recorded["t5"] else {})
    if "t5" not in encoders and (words := dataset["layers"].get("t5", {}).get("words")):
        t5["words"] = words
    files = {name: str(encoders[name]) for name in ("detector", "pose") if name in encoders}
    return PrepConfig(
        source="unused", output="unused", base=dataset["base"], encoders=dataset["encoders"],
        t5=t5,
        dino=model("dino") | {"input_scale": recorded["dino"].get("input_scale")},
        pose=files,
    )  # fmt: skip


def _through(
    layer: str, config: PrepConfig, dataset: Mapping[str, Any], device: torch.device, use: Callable[[Any], T]
) -> T:
    """Load the encoder of a layer, ``use`` it, and give its memory back, also the GPU's."""
    what, networks = NAMES[layer]
    recorded = dataset["layers"][layer]
    name = recorded.get("model") or recorded.get("encoder", {}).get("model") or "local"
    with waiting(f"loading {networks} ({name}) for the {what}"):
        encoder = build_encoder(config, layer, str(device))
    check_encoder(layer, encoder.fingerprint(), recorded.get("encoder"))
    result = use(encoder)
    del encoder
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return result


def check_encoder(layer: str, found: Mapping[str, Any], recorded: Mapping[str, Any] | None) -> None:
    """Raise :class:`DataError` where an encoder is not the one that a dataset's layer records."""
    if found == recorded:
        return
    recorded = recorded or {}
    what, networks = NAMES[layer]
    names = [name for name in sorted({*found, *recorded}) if found.get(name) != recorded.get(name)]
    differ = ", ".join(f"{name} {recorded.get(name)} there, {found.get(name)} here" for name in names)
    if {"code", "encoder"} & set(names):
        advice = "The dataset was prepared by another version of nanodit: prepare it again and train on that"
    elif layer == "pose":
        advice = "Give its files as --encoder detector=FILE --encoder pose=FILE"
    else:
        advice = f"Give its folder, or its name on the hub, as --encoder {layer}=FOLDER"
    raise DataError(f"the {what}'s encoder ({networks}) did not make the training data: {differ}. {advice}")


def _embed(encoder: Any, prompts: Sequence[str]) -> list[np.ndarray]:
    """Token features of each prompt; one at a time, so that none depends on the others."""
    encoded = {prompt: encoder.encode([prompt])[0] for prompt in prompts}
    for prompt, tokens in encoded.items():
        if tokens.truncated:
            say(f"warning: only the first {encoder.max_tokens} tokens of a prompt are used: {prompt[:60]}...")
    return [encoded[prompt].embedding for prompt in prompts]


def _features(encoder: Any, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """CLS (D,) and patches (h, w, D) of an image, the latter as a dataset gives them back."""
    (cls,), (grid,) = encoder.encode(image[None])
    stored = dequantise(*quantise(grid.reshape(-1, grid.shape[-1])))
    return cls, stored.reshape(grid.shape)


def _pose(given: Given, frame: Bucket, config: PrepConfig, dataset: Mapping[str, Any]) -> np.ndarray:
    """Joints (133, 3), normalised to the crop: read from a skeleton, or detected in it."""
    if not isinstance(given.pose, Image.Image):
        from train.draw.pose_file import crop_skeleton

        return crop_skeleton(given.pose, frame, "--pose")
    from prep.encoders.dwpose import normalise

    image = _crop(given.pose, frame, "--pose")
    # on the CPU: a single picture is not worth a second set of CUDA libraries, which onnxruntime has of its own
    found = _through("pose", config, dataset, torch.device("cpu"), lambda encoder: encoder.detect(image[None])[0])
    if not (found.keypoints[:, 2] > 0).any():
        raise DataError("--pose: no person was found in that image. Give one that shows a person, or joints as JSON")
    if found.persons > 1:
        say(f"{found.persons} people were found in the pose's image; the largest one is used")
    return normalise(found.keypoints, frame.width, frame.height)


def _crop(image: Image.Image, frame: Bucket, name: str) -> np.ndarray:
    """Crop the image as ``prep`` would have, uint8 (H, W, 3)."""
    scale = centre_crop(*image.size, frame).scale
    if scale > ImageConfig().max_upscale:
        say(f"warning: {name} is enlarged {scale:.1f} times to {frame}; a larger picture would say more")
    return np.array(crop_to_bucket(image, frame))  # a copy: torch wants to be able to write
