"""REPA: the state in the middle of the network, through a small head, is aligned with a frozen encoder's patches.

Where the same DINO patches are a condition, copying them solves the task (trap 17), so only images whose patch
condition was dropped count. Source: Yu et al., arXiv 2410.06940.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from nanodit.errors import ConfigError
from train.method.loss import Drawn, Later, Loss, LossConfig, Prediction, Setup, Stretch
from train.model.conditions import Subset
from train.model.tread import take


class RepaConfig(LossConfig):
    """Which state is aligned, how strongly and how long."""

    title: ClassVar[str] = "REPA"

    enabled: bool = False
    weight: float = Field(default=0.5, gt=0)  # at the start
    schedule: Literal["linear", "constant"] = "linear"  # how it gets from there to 0 at `until`
    until: float = Field(default=0.5, gt=0, le=1)  # share of the steps after which nothing of it is computed
    block_index: int = Field(default=-1, ge=-1)  # the state after so many blocks; -1: half of them
    width: int | None = Field(default=None, gt=0)  # of the head's hidden layers; null: twice the model's

    def blocks(self, depth: int) -> int:
        """Return after how many of ``depth`` blocks the state is aligned; raises :class:`ConfigError`."""
        if self.block_index == -1:
            return max(1, depth // 2)
        if not 1 <= self.block_index <= depth:
            raise ConfigError(
                f"repa.block_index {self.block_index}: must be -1, or a number of blocks from 1 to {depth}"
            )
        return self.block_index

    def weight_at(self, step: int, steps: int) -> float:
        """Return the weight in optimiser step ``step`` (0-based) of ``steps``; 0 means that nothing is computed."""
        left = 1 - step / (self.until * steps)
        if not self.enabled or left <= 0:
            return 0.0
        return self.weight * (left if self.schedule == "linear" else 1.0)

    @property
    def on(self) -> bool:
        return self.enabled

    def build(self, setup: Setup) -> list[Loss]:
        """Give the network its head, with the random numbers that come after the network's."""
        model, width = setup.model, setup.model.features.dino_width
        check_alignment(width, setup.table)
        model.repa_head = RepaHead(self, model.config.depth, model.config.hidden_size, width)
        return [RepaLoss(self, model.repa_head, width, model.config.patch_size, setup.table)]


class RepaHead(nn.Module):
    """Maps the state after ``blocks`` blocks (b, n, d) to the encoder's features (b, n, c): a 3-layer SiLU MLP."""

    def __init__(self, config: RepaConfig, depth: int, hidden_size: int, features: int) -> None:
        super().__init__()
        self.blocks = config.blocks(depth)
        width = config.width or 2 * hidden_size
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, features)
        )
        for parameter in self.parameters():
            nn.init.xavier_uniform_(parameter) if parameter.ndim == 2 else nn.init.zeros_(parameter)
            parameter.optimizer_group = "adamw"

    def forward(self, x_bnd: Tensor) -> Tensor:
        return self.mlp(x_bnd)


class RepaLoss(Loss):
    """The alignment of the state with DINO's patches, (b, n, ``width``) on the token grid."""

    name, needs, projects = "repa", "teacher", True

    def __init__(
        self, config: RepaConfig, head: RepaHead, width: int, patch_size: int, table: Mapping[Subset, float]
    ) -> None:
        self.config, self.head, self.width, self.patch_size = config, head, width, patch_size
        self.share = counted_share(table)

    def weight(self, step: int, steps: int) -> float:
        return self.config.weight_at(step, steps)

    def values(self, prediction: Prediction) -> Tensor:
        teacher, conditions = prediction.prepared.get("teacher"), prediction.conditions
        if teacher is None:
            return torch.zeros_like(prediction.t)
        prediction.note("repa", len(prediction.t), prediction.projected)
        return alignment_loss(prediction.projected, teacher, conditions.keeps("patches"), prediction.keep_ids)

    def logged(self, measured: float, images: int, weight: float, subsets: Sequence[Subset]) -> dict[str, float]:
        return alignment_values(measured, weight, subsets)

    def prepare(self, drawn: Drawn) -> Later | None:
        if self.weight(drawn.step, drawn.steps) > 0 and any(map(counts, drawn.subsets)):
            rows, columns = (side // self.patch_size for side in drawn.size)
            return Later(drawn.conditions.only({"patches"}), lambda stored: resample(stored.patches, rows, columns))
        return None

    def largest(self, images: int, size: tuple[int, int], device: torch.device) -> Tensor:
        columns, rows = (side // self.patch_size for side in size)
        return torch.zeros(images, rows * columns, self.width, device=device)

    def one_image(self) -> Callable[..., Tensor]:
        head = copy.deepcopy(self.head).to("meta")
        width = head.mlp[0].in_features

        def project(projected: Tensor) -> Tensor:
            return head(torch.empty(1, projected.shape[1], width, device="meta", requires_grad=True))

        return project

    def expected_flops(self, stretch: Stretch, count: Callable[..., Any]) -> Any:
        last = min(stretch.end, self.config.until * stretch.steps)
        seen = max(0.0, last - stretch.start) / (stretch.end - stretch.start)
        token = count("repa", torch.empty(1, 1, 1, device="meta"))
        return seen * self.share * stretch.tokens_after(self.head.blocks) * token

    def announce(self, steps: int, layers: Mapping[str, Any]) -> list[str]:
        weight = self.config.weight
        course = "falling to 0 at" if self.config.schedule == "linear" else "constant until"
        return [
            f"repa: weight {weight:g} on the {self.share:.0%} of the images whose patches are dropped, so "
            f"{weight * self.share:.3f} an image, {course} step {self.config.until * steps:.0f}"
        ]


def resample(patches_bhwc: Tensor, rows: int, columns: int) -> Tensor:
    """Return a patch grid on the token grid, (b, rows * columns, c): each cell the mean of the patches it overlaps."""
    if patches_bhwc.shape[1:3] != (rows, columns):
        grid = F.interpolate(patches_bhwc.permute(0, 3, 1, 2), size=(rows, columns), mode="area")
        patches_bhwc = grid.permute(0, 2, 3, 1)
    return patches_bhwc.flatten(1, 2)


def alignment_loss(
    projected_bnc: Tensor, teacher_bnc: Tensor, keeps_patches: Tensor, keep_ids_bk: Tensor | None
) -> Tensor:
    """Return each image's ``1 - mean cosine`` over its tokens, float32 (b,); 0 where its patches are a condition.

    A routed state has k of the n tokens: the teacher's are then those of the same places.
    """
    if projected_bnc.shape[1] < teacher_bnc.shape[1]:
        teacher_bnc = take(teacher_bnc, keep_ids_bk)
    cosine = F.cosine_similarity(projected_bnc.float(), teacher_bnc.float(), dim=2).mean(1)
    return (1 - cosine) * ~keeps_patches


def counts(subset: Subset) -> bool:
    """Say whether an image that keeps these conditions counts: its patches must not be among them."""
    return "patches" not in subset


def counted_share(table: Mapping[Subset, float]) -> float:
    """Return the share of the images that count."""
    return sum(share for subset, share in table.items() if counts(subset))


def alignment_values(mean: float, weight: float, subsets: Iterable[Subset]) -> dict[str, float]:
    """Return what to log of a step's mean over all images: that over those that count, and its effective weight."""
    counted = [counts(subset) for subset in subsets]
    share = sum(counted) / len(counted)
    return {"train/repa_loss": mean / share, "train/repa_weight": weight * share} if weight * share > 0 else {}


def check_alignment(dino_width: int | None, table: Mapping[Subset, float]) -> None:
    """Raise :class:`ConfigError` where there is nothing to align with, or no image that counts."""
    if dino_width is None:
        raise ConfigError(
            "repa: the dataset has no DINO patches; add dino to its `layers`, or set repa.enabled to false"
        )
    if counted_share(table) == 0:
        raise ConfigError(
            "repa: the dropout table keeps the patches of every image, and only images that drop them count; give "
            "another subset a share in `conditioning`, or set repa.enabled to false"
        )
