"""The modalities that an image can be conditioned on: one record for each, which train and evaluate read.

A record says where a modality lies in the dataset, how it is read, mirrored and stacked, and how it becomes context
tokens. To add one, write its functions and put its record at the end of ``MODALITIES``: datasets without its layer,
and the networks trained on them, stay as they are. Shape letters as in :mod:`train.model.network`; L is the length of a
caption, w the width of a modality's features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanodit.keypoints import JOINTS
from prep.dataset.quantise import GROUP, Quantised
from train.model.config import ModelConfig
from train.model.layers import _layer_norm, _linear, _near_zero
from train.model.mirror import flip_pose

NULL_JOINT_CONFIDENCE = 0.05  # below it a joint counts as not found
MAX_TEXT_TOKENS = 512
POSE_FREQUENCIES = 6

Row = Mapping[str, Any]  # of the dataset's index
Stored = np.ndarray | Quantised


class Grid(NamedTuple):
    """The image tokens' grid, and the side of the square one whose cells are one unit apart."""

    rows: int
    columns: int
    base: float


@dataclass(frozen=True)
class Tokens:
    """A modality's context tokens: x (b, m, d) without their role.

    ``positions`` (b or 1, m, 2) are in grid units (None: the centre), and ``nothing`` (d,) is the one token of an image
    whose features say that there is nothing (:attr:`Modality.present`).
    """

    x: Tensor
    positions: Tensor | None = None
    nothing: Tensor | None = None


@dataclass(frozen=True)
class Modality:
    """One condition, from the dataset to context tokens.

    A modality that an image drops is one learned null token, however many tokens it would have had.
    """

    name: str
    layer: str  # of the dataset
    option: str  # of `train sample`, that gives it
    networks: str  # that encode it, as messages call them
    # dataset, row and whether of the mirrored crop -> one image's features as they are stored, of any dtype
    read: Callable[[Any, Row, bool], Stored]
    # row, width, length -> shape of one image's features
    shape: Callable[[Row, int, int], tuple[int, ...]]
    # the network's shape, row, length -> how many tokens they become
    count: Callable[[ModelConfig, Row, int], int]
    # the network's shape, width -> layers and parameters of the context encoder by name, in the order they are drawn in
    parts: Callable[[ModelConfig, int], dict[str, nn.Module | nn.Parameter]]
    # the context encoder, features (b, ...), grid -> tokens
    tokens: Callable[[Any, Tensor, Grid], Tokens]
    width: int | None = None  # of the features; None: what dataset.json says of the layer
    ragged: bool = False  # of another length in each image: padded in a batch, with a mask (b, L)
    value_bytes: int = 4  # of a feature as it is stored
    quantised: bool = False  # stored with a scale for every group of channels
    present: Callable[[Tensor], Tensor] | None = None  # features -> (b,), False where they say that there is nothing
    mirror: Callable[[np.ndarray], np.ndarray] | None = None  # None: the dataset stores those of the mirrored crop
    read_short: Callable[[Any, Row, bool], Stored] | None = None  # as ``read``, of the short caption; None: has none
    guidance: str | None = None  # the scale of guidance that it belongs to; None: one of its own name

    @property
    def mask(self) -> str:
        """The name of its mask among the tensors of a batch."""
        return f"{self.name}_mask"

    @property
    def scale(self) -> str:
        """The name of its scales among the tensors of a batch, where it is quantised and not unpacked yet."""
        return f"{self.name}_scale"

    def real(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """Say which tokens count of an image that keeps it, (b, m) or (b, 1); None: all."""
        if self.ragged:
            return tensors[self.mask]
        return None if self.present is None else self.present(tensors[self.name]).unsqueeze(1)

    def stored_bytes(self, row: Row, width: int, length: int) -> int:
        """Return what one image's features take in memory."""
        shape = self.shape(row, width, length)
        scales = 2 * math.prod(shape[:-1]) * math.ceil(shape[-1] / GROUP) if self.quantised else 0
        return self.value_bytes * math.prod(shape) + scales

    def load(self, dataset: Any, row: Row, flipped: bool, short: bool = False) -> Stored:
        """Read one image's features; ``flipped``: those of its mirror image, ``short``: of its short caption."""
        if flipped and self.mirror:
            return self.mirror(self.read(dataset, row, False))
        if short and self.read_short:
            return self.read_short(dataset, row, flipped)
        return self.read(dataset, row, flipped)


def _stored(accessor: str) -> Callable[[Any, Row, bool], Stored]:
    """Return the ``read`` of features for which :class:`prep.dataset.reader.Dataset` has an accessor."""

    def read(dataset: Any, row: Row, flipped: bool) -> Stored:
        load = getattr(dataset, accessor)
        return load(row, flipped=True) if flipped else load(row)

    return read


def _text_parts(config: ModelConfig, width: int) -> dict[str, nn.Module | nn.Parameter]:
    d = config.hidden_size
    return {
        "text": _linear(width, d, bias=True),
        "text_order": _near_zero(MAX_TEXT_TOKENS, d),
    }


def _text_tokens(net: Any, text: Tensor, grid: Grid) -> Tokens:
    return Tokens(net.text(_layer_norm(text)) + net.text_order[: text.shape[1]])


def _cls_parts(config: ModelConfig, width: int) -> dict[str, nn.Module | nn.Parameter]:
    d = config.hidden_size
    return {
        "cls": _linear(width, d, bias=True),
        "cls_to_adaln": _linear(width, d, bias=True),
        "null_cls_to_adaln": _near_zero(d),
    }


def _cls_tokens(net: Any, cls: Tensor, grid: Grid) -> Tokens:
    return Tokens(net.cls(_layer_norm(cls)).unsqueeze(1))


def _patches_parts(config: ModelConfig, width: int) -> dict[str, nn.Module | nn.Parameter]:
    return {"patches": _linear(width, config.hidden_size, bias=True)}


def _patches_tokens(net: Any, patches: Tensor, grid: Grid) -> Tokens:
    pooled = _pool(patches, net.config.context_patches)
    x = net.patches(_layer_norm(pooled.flatten(1, 2)))
    return Tokens(x, positions=_cells(pooled.shape[1:3], *grid, x.device).unsqueeze(0))


def _pool(patches_bhwc: Tensor, limit: int | None) -> Tensor:
    """Average a patch grid down to at most ``limit`` cells of about its aspect ratio; (b, h, w, c) in and out."""
    size = pooled_grid(*patches_bhwc.shape[1:3], limit)
    if patches_bhwc.shape[1:3] == size:
        return patches_bhwc
    return F.adaptive_avg_pool2d(patches_bhwc.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)


def pooled_grid(h: int, w: int, limit: int | None) -> tuple[int, int]:
    """Return the rows and columns that a patch grid becomes as context."""
    if limit is None or h * w <= limit:
        return h, w
    factor = math.sqrt(limit / (h * w))
    return max(1, int(h * factor)), max(1, int(w * factor))


def _cells(cells: tuple[int, int], rows: int, columns: int, base_grid: float, device: torch.device) -> Tensor:
    """Return the positions of another grid over the same image: its cells' centres on the image tokens' axes."""
    y = ((torch.arange(cells[0], device=device) + 0.5) / cells[0] * 2 - 1) * math.sqrt(rows / columns)
    x = ((torch.arange(cells[1], device=device) + 0.5) / cells[1] * 2 - 1) * math.sqrt(columns / rows)
    return torch.cartesian_prod(y, x) * (base_grid / 2)


def _pose_parts(config: ModelConfig, width: int) -> dict[str, nn.Module | nn.Parameter]:
    d = config.hidden_size
    return {
        "pose": nn.Sequential(_linear(width, d, bias=True), nn.GELU(), _linear(d, d, bias=True)),
        "pose_position": _linear(4 * POSE_FREQUENCIES, d),
        "joint": _near_zero(config.context_joints, d),
        "null_joint": _near_zero(d),
        "no_person": _near_zero(d),
    }


def _pose_present(pose: Tensor) -> Tensor:
    return (pose[..., 2] > 0).any(1)


def _pose_tokens(net: Any, pose: Tensor, grid: Grid) -> Tokens:
    pose = pose[:, : net.config.context_joints]
    xy, confidence = pose[..., :2], pose[..., 2:].clamp(0, 1)
    found = confidence >= NULL_JOINT_CONFIDENCE
    xy = torch.where(found, xy, 0)
    x = torch.where(found, net.pose(torch.cat((xy, confidence), -1)).float(), net.null_joint)
    octaves = math.pi * 2.0 ** torch.arange(-1, POSE_FREQUENCIES - 1, device=pose.device)
    angles = (xy.unsqueeze(-1) * octaves).flatten(-2)
    waves = torch.where(found, torch.cat((angles.cos(), angles.sin()), -1), 0)
    # on the same normalised grid as the image tokens, as (y, x)
    ratio, inverse = math.sqrt(grid.rows / grid.columns), math.sqrt(grid.columns / grid.rows)
    # filled and not copied from a list, for which the GPU would have to wait
    span = torch.stack((xy.new_full((), ratio), xy.new_full((), inverse))) * grid.base / 2
    x = x + net.pose_position(waves) + net.joint
    # "no person" is a statement about the image, a dropped pose is not
    return Tokens(x, xy.flip(-1) * span, nothing=net.no_person)


# By name, in the order of the context tokens. A new one goes to the end: see ``SHARED_ROWS`` of the context encoder.
MODALITIES: dict[str, Modality] = {
    modality.name: modality
    for modality in (
        Modality(
            "text", layer="t5", option="--prompt", networks="T5", read=_stored("t5"),
            shape=lambda row, width, length: (length, width), count=lambda config, row, length: length,
            parts=_text_parts, tokens=_text_tokens, ragged=True, value_bytes=2, read_short=_stored("t5_short"),
        ),
        Modality(
            "cls", layer="dino", option="--reference", networks="DINO", read=_stored("cls"),
            shape=lambda row, width, length: (width,), count=lambda config, row, length: 1,
            parts=_cls_parts, tokens=_cls_tokens, guidance="dino",
        ),
        Modality(
            "patches", layer="dino", option="--reference", networks="DINO", read=_stored("stored_patches"),
            shape=lambda row, width, length: (row["dino_h"], row["dino_w"], width),
            count=lambda config, row, length: math.prod(
                pooled_grid(row["dino_h"], row["dino_w"], config.context_patches)
            ),
            parts=_patches_parts, tokens=_patches_tokens, value_bytes=1, quantised=True, guidance="dino",
        ),
        Modality(
            "pose", layer="pose", option="--pose", networks="DWPose", read=_stored("pose"), width=3, mirror=flip_pose,
            shape=lambda row, width, length: (JOINTS, width),
            count=lambda config, row, length: config.context_joints,
            parts=_pose_parts, tokens=_pose_tokens, present=_pose_present,
        ),
    )
}  # fmt: skip


def present(layers: Iterable[str]) -> tuple[str, ...]:
    """Return the modalities that a dataset of these layers has."""
    layers = set(layers)
    return tuple(name for name, modality in MODALITIES.items() if modality.layer in layers)


@dataclass(frozen=True)
class Features:
    """What the data fixes: the base bucket's side in pixels, and by modality how wide the features are it has."""

    base: int
    widths: Mapping[str, int]

    @classmethod
    def from_dataset(cls, info: Mapping[str, Any]) -> Features:
        """Read them from the content of a dataset.json."""
        layers = info["layers"]
        records = [MODALITIES[name] for name in present(layers)]
        return cls(info["base"], {one.name: one.width or layers[one.layer]["width"] for one in records})

    @property
    def modalities(self) -> tuple[str, ...]:
        """The names of those that exist, in the order of ``MODALITIES``."""
        return tuple(name for name in MODALITIES if name in self.widths)

    @property
    def dino_width(self) -> int | None:
        """The width of DINO's features, which REPA aligns with; None without them."""
        return self.widths.get("patches")
