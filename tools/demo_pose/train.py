"""Train the two demo pose networks on drawn figures and export them in DWPose's exact file format.

    python -m tools.demo_pose.train prep/encoders/assets [--minutes 20] [--figures 4000]

A matter of minutes on one core that users need not repeat: the results are part of the package. Training stops by the
clock, so the weights are not reproducible bit by bit; tests hold the committed ones to what they must find.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanodit.console import Progress, say
from prep.encoders.demo import DETECTOR, POSE
from prep.encoders.dwpose import DETECTOR_SIDE, PADDING_GREY, POSE_HEIGHT, POSE_MEAN, POSE_STD, POSE_WIDTH
from prep.figures.figures import draw_figure
from tools.demo_pose.networks import (
    DETECTOR_OUTPUT,
    DETECTOR_POOL,
    DETECTOR_STRIDE,
    POSE_CELL,
    POSE_POOL,
    SIMCC,
    Detector,
    PoseNet,
    export,
)

SEED = 7_000_000  # apart from the seeds that people give to `prep figures`
FIGURE_SIZE = 128
CANVAS = 192  # holds a figure of that size in any shape
BATCH = 32

# What each group of joints counts in the loss: body, feet, face, hands.
JOINT_WEIGHTS = torch.cat([torch.full((n,), w) for n, w in ((17, 1.0), (6, 0.5), (68, 0.1), (42, 0.15))])


# --- figures and how they are disturbed -------------------------------------------------------------------------------


@dataclass
class Figures:
    """Drawn figures in memory.

    ``images`` (N, 3, 192, 192) uint8 with the picture in the top-left corner and 0 elsewhere, ``sizes`` (N, 2) width
    and height, ``joints`` (N, 133, 3) and ``boxes`` (N, 4) as :class:`prep.figures.figures.Figure` has them.
    """

    images: Tensor
    sizes: Tensor
    joints: Tensor
    boxes: Tensor

    @classmethod
    def draw(cls, count: int) -> Figures:
        """Draw ``count`` figures with all the picture shapes there are."""
        images = np.zeros((count, 3, CANVAS, CANVAS), np.uint8)
        sizes, joints, boxes = [], [], []
        with Progress("drawing", count, "figures") as progress:
            for index in range(count):
                figure = draw_figure(SEED, index, FIGURE_SIZE)
                width, height = figure.image.size
                images[index, :, :height, :width] = np.asarray(figure.image).transpose(2, 0, 1)
                sizes.append((width, height))
                joints.append(figure.keypoints)
                boxes.append(figure.box)
                progress.advance()
        stacked = [torch.from_numpy(np.array(values, np.float32)) for values in (sizes, joints, boxes)]
        return cls(torch.from_numpy(images), *stacked)

    def pick(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Float images, sizes, joints and boxes of ``rows``."""
        return self.images[rows].float(), self.sizes[rows], self.joints[rows], self.boxes[rows]


def uniform(low: float, high: float, *shape: int) -> Tensor:
    """Uniform random numbers in [low, high)."""
    return low + (high - low) * torch.rand(shape)


def sample(
    images: Tensor, sizes: Tensor, matrix: Tensor, offset: Tensor, height: int, width: int, fill: float
) -> Tensor:
    """Bilinear pictures (B, 3, height, width) whose continuous point p shows ``matrix @ p + offset`` of ``images``.

    Beyond the ``sizes`` (B, 2) of the images they show ``fill``.
    """
    points = torch.stack(torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")[::-1], -1)
    places = torch.einsum("bij,yxj->byxi", matrix, points) + offset[:, None, None]
    inside = ((places > 0) & (places < sizes[:, None, None])).all(-1)[:, None]
    pictures = F.grid_sample(images, 2 * places / CANVAS - 1, align_corners=False, padding_mode="border")
    return torch.where(inside, pictures, torch.tensor(fill))


def disturb(pictures: Tensor) -> Tensor:
    """Wrong colours, contrast, blur and noise, as a half-trained image model's: (B, 3, h, w), 0 to 255."""
    batch, _, height, width = pictures.shape
    mean = pictures.mean((2, 3), keepdim=True)
    gain = uniform(0.6, 1.2, batch, 1, 1, 1) * uniform(0.9, 1.1, batch, 3, 1, 1)
    pictures = (pictures - mean) * gain + mean + torch.randn(batch, 1, 1, 1) * 15 + torch.randn(batch, 3, 1, 1) * 10
    if torch.rand(()) < 0.6:  # one blur per batch is cheap, and there are many batches
        factor = float(uniform(1.2, 4.0))
        small = F.interpolate(
            pictures, (round(height / factor), round(width / factor)), mode="bilinear", antialias=True
        )
        if torch.rand(()) < 0.7:
            small = small + torch.randn_like(small) * uniform(0, 25, batch, 1, 1, 1) * (
                torch.rand(batch, 1, 1, 1) < 0.6
            )
        pictures = F.interpolate(small, (height, width), mode="bilinear")
    blobs = F.interpolate(torch.randn(batch, 3, 6, 6), (height, width), mode="bicubic") * uniform(0, 25, batch, 1, 1, 1)
    noise = torch.randn_like(pictures) * uniform(0, 20, batch, 1, 1, 1) * (torch.rand(batch, 1, 1, 1) < 0.5)
    return (pictures + blobs * (torch.rand(batch, 1, 1, 1) < 0.5) + noise).clamp(0, 255)


def nobody(pictures: Tensor) -> Tensor:
    """Turn pictures (B, 3, h, w) into some that show no figure: empty rooms, shuffled pieces, noise, colour fields."""
    batch, _, height, width = pictures.shape
    border = 0 if torch.rand(()) < 0.5 else width - 1
    rooms = pictures[:, :, :, border : border + 1].expand_as(pictures)
    pieces = pictures.unfold(2, height // 5, height // 5).unfold(3, width // 5, width // 5).flatten(2, 3)
    pieces = pieces[:, :, torch.randperm(25)].unflatten(2, (5, 5)).permute(0, 1, 2, 4, 3, 5)
    shuffled = F.interpolate(pieces.flatten(4, 5).flatten(2, 3), (height, width))
    fields = []  # from flat colours to gaudy spots, of two sizes per batch
    for part in (batch // 2, batch - batch // 2):
        cells = [int(2 ** uniform(1, 5.3)) for _ in range(2)]
        field = 128 + uniform(0, 80, part, 1, 1, 1) * torch.randn(part, 3, *cells)
        fields.append(F.interpolate(field, (height, width), mode="bilinear"))
    spots = torch.cat(fields)
    white = 128 + uniform(10, 90, batch, 1, 1, 1) * torch.randn_like(pictures)
    kind = torch.randint(6, (batch, 1, 1, 1))
    return torch.where(kind == 0, rooms, torch.where(kind == 1, shuffled, torch.where(kind == 2, white, spots)))


# --- losses -----------------------------------------------------------------------------------------------------------


def detector_loss(net: Detector, figures: Figures, rows: Tensor) -> Tensor:
    """Objectness of the cells round the box's centre and the box itself, on letterboxed figures."""
    images, sizes, _, boxes = figures.pick(rows)
    batch = len(rows)
    # the letterbox of the real thing, often shrunk and moved so that figures are not all full-size
    shrink = torch.where(torch.rand(batch) < 0.4, uniform(0.45, 1.0, batch), torch.ones(batch))
    reduced = 8  # draw at an eighth of the size and pool by 2 instead of 16
    side = DETECTOR_SIDE // reduced
    ratio = side / sizes.amax(1) * shrink
    shift = (side - sizes * ratio[:, None]) * torch.rand(batch, 2) * (shrink < 1)[:, None]
    matrix = torch.eye(2) / ratio[:, None, None]
    pictures = sample(images, sizes, matrix, -shift / ratio[:, None], side, side, math.nan)
    outside = pictures.isnan()
    pictures = disturb(pictures.nan_to_num(PADDING_GREY))
    empty = torch.rand(batch) < 0.4
    pictures = torch.where(empty[:, None, None, None], nobody(pictures), pictures)
    pictures = torch.where(outside, torch.tensor(float(PADDING_GREY)), pictures).flip(1)  # BGR

    output = net.predict(F.avg_pool2d(pictures, DETECTOR_POOL // reduced)).float()
    cell = DETECTOR_STRIDE / reduced
    boxes = (boxes * ratio[:, None] + shift.repeat(1, 2)) / cell
    centre, size = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]).clamp(min=0.1)
    grid = torch.stack(torch.meshgrid(torch.arange(20), torch.arange(20), indexing="ij")[::-1])  # x, y
    near = (grid + 0.5 - centre[:, :, None, None]).abs().amax(1) < 1.5
    positive = near & ~empty[:, None, None]
    target = torch.cat([centre[:, :, None, None] - grid, size.log()[:, :, None, None].expand(-1, -1, 20, 20)], dim=1)
    error = (output[:, :4] - target).abs() * torch.tensor([0.5, 0.5, 2.0, 2.0]).view(1, 4, 1, 1)
    box_loss = (error.sum(1) * positive).sum() / positive.sum().clamp(min=1)
    presence = F.binary_cross_entropy_with_logits(output[:, 4], positive.float(), reduction="none")
    return box_loss + presence.sum((1, 2)).mean() / 4


def pose_loss(net: PoseNet, figures: Figures, rows: Tensor) -> Tensor:
    """Cross-entropy of each joint's place per axis, its mean error in cells, and whether it is in the picture."""
    images, sizes, joints, boxes = figures.pick(rows)
    batch = len(rows)
    height, width = POSE_HEIGHT // POSE_POOL, POSE_WIDTH // POSE_POOL
    centre, extent = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    size = torch.maximum(extent[:, 0] / 0.75, extent[:, 1]) * 1.25 * uniform(0.82, 1.25, batch)
    centre = centre + uniform(-0.07, 0.07, batch, 2) * size[:, None]
    angle = torch.randn(batch) * 0.1
    stretch = torch.exp(torch.randn(batch, 2) * 0.05)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(batch, 2, 2)
    matrix = turn * (stretch * (size / height)[:, None])[:, None, :]
    offset = centre - matrix @ torch.tensor([width / 2, height / 2])
    pictures = sample(images, sizes, matrix, offset, height, width, math.nan)
    outside = pictures.isnan()
    pictures = torch.where(outside, torch.tensor(0.0), disturb(pictures.nan_to_num(128.0)))
    pictures = (pictures - torch.from_numpy(POSE_MEAN)[:, None, None]) / torch.from_numpy(POSE_STD)[:, None, None]

    columns, rows_, presence = net.predict(pictures)
    target = torch.einsum("bij,bnj->bni", torch.linalg.inv(matrix), joints[..., :2] - offset[:, None]) * POSE_POOL - 0.5
    limits = torch.tensor([POSE_WIDTH, POSE_HEIGHT])
    inside = ((target > 0) & (target < limits)).all(-1) & (joints[..., 2] > 0)
    weight = inside * JOINT_WEIGHTS
    total = weight.sum()
    loss = 2 * F.binary_cross_entropy_with_logits(
        presence.float(), inside.float(), weight=JOINT_WEIGHTS.expand(batch, -1)
    )
    for axis, (share, cells, mean) in enumerate(
        zip((columns, rows_), (net.columns, net.rows), net.places(columns, rows_))
    ):
        bump = torch.exp(-((cells - target[..., axis, None]) / POSE_CELL).square())
        bump = bump / bump.sum(-1, keepdim=True).clamp(min=1e-6)
        entropy = -(bump * (share + 1e-6).log()).sum(-1)
        distance = (mean - target[..., axis]).abs() / POSE_CELL
        loss = loss + ((entropy + distance) * weight).sum() / total
    return loss


def train(name: str, net: nn.Module, loss_of: Callable, figures: Figures, minutes: float, rate: float) -> None:
    """Train ``net`` for ``minutes`` with AdamW, a short warm-up and a cosine; ends in evaluation mode."""
    net.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.02)
    start, losses, order, step = time.monotonic(), [], torch.empty(0, dtype=torch.long), 0
    with Progress(name, None, "steps") as progress:
        while (done := (time.monotonic() - start) / (60 * minutes)) < 1:
            if len(order) < BATCH:
                order = torch.randperm(len(figures.images))
            rows, order = order[:BATCH], order[BATCH:]
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * done))
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(net, figures, rows)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            losses = [*losses[-99:], float(loss)]
            step += 1
            progress.update(step, loss=round(sum(losses) / len(losses), 4))
    net.eval()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.demo_pose.train", description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder of the two ONNX files")
    parser.add_argument("--minutes", type=float, default=20.0, help="training time of both networks together")
    parser.add_argument("--figures", type=int, default=4000, help="figures to train on")
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    figures = Figures.draw(arguments.figures)
    detector, pose = Detector(), PoseNet()
    train("detector", detector, detector_loss, figures, arguments.minutes * 0.25, 4e-3)
    export(detector, arguments.output / DETECTOR, (DETECTOR_SIDE, DETECTOR_SIDE), DETECTOR_OUTPUT)
    train("pose", pose, pose_loss, figures, arguments.minutes * 0.75, 4e-3)
    export(pose, arguments.output / POSE, (POSE_HEIGHT, POSE_WIDTH), SIMCC)
    for name in (DETECTOR, POSE):
        say(f"{arguments.output / name}: {(arguments.output / name).stat().st_size} bytes")


if __name__ == "__main__":
    main()
