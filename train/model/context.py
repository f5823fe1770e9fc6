"""Conditions as context tokens: each modality normalised and projected, with its role and position.

Shape letters as in :mod:`train.model.network`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.model.conditions import MODALITIES, Conditions
from train.model.config import Features, ModelConfig
from train.model.layers import _layer_norm, _linear

NULL_JOINT_CONFIDENCE = 0.05  # below it a joint counts as not found
MAX_TEXT_TOKENS = 512


POSE_FREQUENCIES = 6


@dataclass(frozen=True)
class Context:
    """Encoded conditions: tokens (b, m, d), mask (b, m) of tokens that count, RoPE cos, sin (b, 1, m, k/2), CLS (b, d).

    ``kv`` holds each block's keys and values where they were asked for: they depend on neither t nor z.
    """

    tokens: Tensor
    mask: Tensor
    cos: Tensor
    sin: Tensor
    cls: Tensor
    kv: tuple[tuple[Tensor, Tensor], ...] | None = None


class ContextEncoder(nn.Module):
    """Turns :class:`Conditions` into context tokens: each modality normalised, projected, with its role and position.

    A dropped modality is one learned null token, however many tokens it would have had. Modalities an image drops while
    others of its micro-batch keep them are masked.
    """

    def __init__(self, config: ModelConfig, features: Features) -> None:
        super().__init__()
        d = config.hidden_size
        self.context_patches, self.context_joints = config.context_patches, config.context_joints
        self.modalities = features.modalities
        self.null = nn.Parameter(torch.randn(len(MODALITIES), d) * 0.02)
        self.role = nn.Parameter(torch.randn(len(MODALITIES), d) * 0.02)
        if "text" in self.modalities:
            self.text = _linear(features.text_width, d, bias=True)
            self.text_order = nn.Parameter(torch.randn(MAX_TEXT_TOKENS, d) * 0.02)
        if "cls" in self.modalities:
            self.cls = _linear(features.dino_width, d, bias=True)
            self.cls_to_adaln = _linear(features.dino_width, d, bias=True)
            self.null_cls_to_adaln = nn.Parameter(torch.randn(d) * 0.02)
            self.patches = _linear(features.dino_width, d, bias=True)
        if "pose" in self.modalities:
            self.pose = nn.Sequential(_linear(3, d, bias=True), nn.GELU(), _linear(d, d, bias=True))
            self.pose_position = _linear(4 * POSE_FREQUENCIES, d)
            self.joint = nn.Parameter(torch.randn(config.context_joints, d) * 0.02)
            self.null_joint = nn.Parameter(torch.randn(d) * 0.02)
            self.no_person = nn.Parameter(torch.randn(d) * 0.02)

    def forward(self, conditions: Conditions, rows: int, columns: int, base_grid: float) -> tuple[Tensor, ...]:
        """Return tokens (b, m, d), mask (b, m), positions (b, m, 2) in grid units and the CLS part of adaLN (b, d)."""
        b, device = len(conditions), self.null.device
        keep = conditions.keep
        tokens, masks, positions = [], [], []

        def add(x_bmd: Tensor, mask_bm: Tensor, position: Tensor | None = None) -> None:
            tokens.append(x_bmd)
            masks.append(mask_bm)
            centre = torch.zeros(1, 1, 2, device=device) if position is None else position
            positions.append(centre.expand(b, x_bmd.shape[1], 2))

        for i, name in enumerate(MODALITIES):
            if name not in self.modalities:
                continue
            kept = keep[:, i : i + 1]
            null = self.null[i].expand(b, 1, -1)
            if name == "pose" and conditions.pose is not None:
                person = (conditions.pose[..., 2] > 0).any(1, keepdim=True)
                # "no person" is a statement about the image, a dropped pose is not
                add(torch.where((kept & ~person).unsqueeze(2), self.no_person, null) + self.role[i], ~(kept & person))
                x, position = self._pose(conditions.pose[:, : self.context_joints], rows, columns, base_grid)
                add(x + self.role[i], (kept & person).expand(b, self.context_joints), position)
                continue
            add(null + self.role[i], ~kept)
            if name == "text" and conditions.text is not None:
                x = self.text(_layer_norm(conditions.text)) + self.text_order[: conditions.text.shape[1]]
                add(x + self.role[i], kept & conditions.text_mask)
            elif name == "cls" and conditions.cls is not None:
                add(self.cls(_layer_norm(conditions.cls)).unsqueeze(1) + self.role[i], kept)
            elif name == "patches" and conditions.patches is not None:
                grid = _pool(conditions.patches, self.context_patches)
                x = self.patches(_layer_norm(grid.flatten(1, 2))) + self.role[i]
                cells = _cells(grid.shape[1:3], rows, columns, base_grid, device)
                add(x, kept.expand(b, x.shape[1]), cells.unsqueeze(0))

        cls = torch.zeros(b, self.null.shape[1], device=device)
        if "cls" in self.modalities:
            cls = self.null_cls_to_adaln.expand(b, -1)
            if conditions.cls is not None:
                cls = torch.where(keep[:, 1:2], self.cls_to_adaln(_layer_norm(conditions.cls)).float(), cls)
        dtype = torch.promote_types(tokens[0].dtype, tokens[-1].dtype)
        return torch.cat([x.to(dtype) for x in tokens], 1), torch.cat(masks, 1), torch.cat(positions, 1), cls

    def _pose(self, pose: Tensor, rows: int, columns: int, base_grid: float) -> tuple[Tensor, Tensor]:
        xy, confidence = pose[..., :2], pose[..., 2:].clamp(0, 1)
        found = confidence >= NULL_JOINT_CONFIDENCE
        xy = torch.where(found, xy, 0)
        x = torch.where(found, self.pose(torch.cat((xy, confidence), -1)).float(), self.null_joint)
        octaves = math.pi * 2.0 ** torch.arange(-1, POSE_FREQUENCIES - 1, device=pose.device)
        angles = (xy.unsqueeze(-1) * octaves).flatten(-2)
        waves = torch.where(found, torch.cat((angles.cos(), angles.sin()), -1), 0)
        # on the same normalised grid as the image tokens, as (y, x)
        ratio = math.sqrt(rows / columns)
        # filled and not copied from a list, for which the GPU would have to wait
        span = torch.stack((xy.new_full((), ratio), xy.new_full((), math.sqrt(columns / rows)))) * base_grid / 2
        return x + self.pose_position(waves) + self.joint, xy.flip(-1) * span


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


def _cells(grid: tuple[int, int], rows: int, columns: int, base_grid: float, device: torch.device) -> Tensor:
    """Positions of another grid over the same image: its cells' centres on the image tokens' axes."""
    y = ((torch.arange(grid[0], device=device) + 0.5) / grid[0] * 2 - 1) * math.sqrt(rows / columns)
    x = ((torch.arange(grid[1], device=device) + 0.5) / grid[1] * 2 - 1) * math.sqrt(columns / rows)
    return torch.cartesian_prod(y, x) * (base_grid / 2)
