"""Train the two demo pose networks on drawn figures and export them in DWPose's exact file format.

    python -m prep.demo_pose prep/assets [--minutes 20] [--figures 6000]

The detector has YOLOX's inputs and outputs and the pose network DW-LL's, so :class:`prep.dwpose.DWPose` runs them
like the real ones; they know nothing but figures. Both look at a much reduced picture, since a figure is large and
simple. Half a megabyte of float16 weights each at most; training is a matter of minutes on one core, and need not
be repeated by users.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from prep.console import Progress, say
from prep.demo import DETECTOR, POSE
from prep.dwpose import DETECTOR_SIDE, JOINTS, PADDING_GREY, POSE_HEIGHT, POSE_MEAN, POSE_STD, POSE_WIDTH
from prep.figures import draw_figure

SEED = 7_000_000  # apart from the seeds that people give to `prep figures`
FIGURE_SIZE = 128
CANVAS = 192  # holds a figure of that size in any shape
BATCH = 32

DETECTOR_POOL, DETECTOR_STRIDE = 16, 32
POSE_POOL, POSE_CELL = 4, 8
DETECTOR_OUTPUT = {"output": (8400, 85)}
SIMCC = {"simcc_x": (JOINTS, 2 * POSE_WIDTH), "simcc_y": (JOINTS, 2 * POSE_HEIGHT)}
# What each group of joints counts in the loss: body, feet, face, hands.
JOINT_WEIGHTS = torch.cat([torch.full((n,), w) for n, w in ((17, 1.0), (6, 0.5), (68, 0.1), (42, 0.15))])


# --- networks ---------------------------------------------------------------------------------------------------------


def _conv(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=dilation, dilation=dilation, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class _Residual(nn.Module):
    def __init__(self, width: int, dilation: int = 1) -> None:
        super().__init__()
        self.first = _conv(width, width, dilation=dilation)
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(self.first(x)))


class Detector(nn.Module):
    """BGR 0-255, (B, 3, 640, 640) -> YOLOX's raw output (B, 8400, 85); only the coarsest grid (stride 32) ever
    speaks."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            _conv(3, 16), _conv(16, 32, stride=2), _Residual(32, 2), _Residual(32, 4), _Residual(32, 2)
        )
        self.head = nn.Sequential(_conv(64, 40), nn.Conv2d(40, 5, 1))

    def predict(self, pooled: Tensor) -> Tensor:
        """Pooled input (B, 3, 40, 40) -> (B, 5, 20, 20): x, y, log w, log h in cells, and the logit of a person."""
        x = self.trunk((pooled - PADDING_GREY) / 64)
        everywhere = x.mean((2, 3), keepdim=True).expand_as(x)
        return self.head(torch.cat([x, everywhere], dim=1))

    def forward(self, image: Tensor) -> Tensor:
        cells = self.predict(F.avg_pool2d(image, DETECTOR_POOL)).flatten(2).transpose(1, 2)  # (B, 400, 5)
        person = torch.cat([cells[..., :4], cells[..., 4:].sigmoid(), torch.ones_like(cells[..., :1])], dim=-1)
        person = F.pad(person, (0, 79))  # the other 79 classes of COCO
        silent = sum((DETECTOR_SIDE // stride) ** 2 for stride in (8, 16))
        return F.pad(person, (0, 0, silent, 0))


class PoseNet(nn.Module):
    """Normalised RGB, (B, 3, 384, 288) -> SimCC (B, 133, 576) and (B, 133, 768).

    A small U-Net gives one heatmap per joint. Its mean place, finer than the cells, is drawn as a parabola on each
    axis, as high as the confidence: below zero for joints outside the picture.
    """

    def __init__(self) -> None:
        super().__init__()
        # widths are multiples of 16, the block of onnxruntime's convolutions
        self.high = nn.Sequential(_conv(3, 16, stride=2), _Residual(16))  # 48 x 36
        self.middle = nn.Sequential(_conv(16, 48, stride=2), _Residual(48))  # 24 x 18
        self.low = nn.Sequential(_conv(48, 64, stride=2), _Residual(64), _Residual(64, 2))  # 12 x 9
        self.low_to_middle = nn.Conv2d(64, 48, 1)
        self.merge_middle = _Residual(48)
        self.middle_to_high = nn.Conv2d(48, 32, 1)
        self.high_to_high = nn.Conv2d(16, 32, 1)
        self.merge_high = _conv(32, 32)
        self.maps = nn.Conv2d(32, JOINTS, 1)
        self.presence = nn.Linear(2 * 64, JOINTS)
        self.register_buffer("rows", torch.arange(POSE_HEIGHT // POSE_CELL) * POSE_CELL + (POSE_CELL - 1) / 2, False)
        self.register_buffer("columns", torch.arange(POSE_WIDTH // POSE_CELL) * POSE_CELL + (POSE_CELL - 1) / 2, False)

    def predict(self, pooled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pooled input (B, 3, 96, 72) -> where each joint is over columns (B, 133, 36) and rows (B, 133, 48), and the
        logit of its being in the picture (B, 133)."""
        high = self.high(pooled)
        middle = self.middle(high)
        low = self.low(middle)
        middle = self.merge_middle(middle + _double(self.low_to_middle(low)))
        high = self.merge_high(F.relu(self.high_to_high(high) + _double(self.middle_to_high(middle))))
        maps = self.maps(high)
        share = maps.float().flatten(2).softmax(-1).view_as(maps)
        presence = self.presence(torch.cat([low.mean((2, 3)), low.amax((2, 3))], dim=1))
        return share.sum(2), share.sum(3), presence

    def places(self, columns: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Mean x and y, (B, 133) each, in index coordinates of the input."""
        return columns @ self.columns, rows @ self.rows

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        columns, rows, presence = self.predict(F.avg_pool2d(image, POSE_POOL))
        confidence = 1.25 * presence.sigmoid() - 0.25  # .3 is an even chance or nearly, and the absent are negative
        x, y = self.places(columns, rows)
        return _parabola(x, 2 * POSE_WIDTH, confidence), _parabola(y, 2 * POSE_HEIGHT, confidence)


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def _parabola(place: Tensor, bins: int, height: Tensor) -> Tensor:
    """A parabola with its top, ``height``, at input index ``place`` (B, 133) over half-pixel bins: (B, 133, bins)."""
    distance = torch.arange(bins, device=place.device) / 40 - place[..., None] / 20
    return height[..., None] - distance * distance


# --- figures and how they are disturbed -------------------------------------------------------------------------------


@dataclass
class Figures:
    """Drawn figures: ``images`` (N, 3, 192, 192) uint8 with the picture in the top-left corner and 0 elsewhere,
    ``sizes`` (N, 2) width and height, ``joints`` (N, 133, 3) and ``boxes`` (N, 4) in continuous pixels."""

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
    """Bilinear pictures (B, 3, height, width) whose continuous point p shows ``matrix @ p + offset`` of ``images``, and
    ``fill`` beyond their ``sizes``."""
    points = torch.stack(torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")[::-1], -1)
    places = torch.einsum("bij,yxj->byxi", matrix, points) + offset[:, None, None]
    inside = ((places > 0) & (places < sizes[:, None, None])).all(-1)[:, None]
    pictures = F.grid_sample(images, 2 * places / CANVAS - 1, align_corners=False, padding_mode="border")
    return torch.where(inside, pictures, torch.tensor(fill))


def disturb(pictures: Tensor) -> Tensor:
    """Wrong colours, contrast, blur and noise: what a half-trained image model does to a figure; (B, 3, h, w) 0 to
    255."""
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
    rooms = pictures[:, :, :, :1].expand_as(pictures)
    pieces = pictures.unfold(2, height // 5, height // 5).unfold(3, width // 5, width // 5).flatten(2, 3)
    pieces = pieces[:, :, torch.randperm(25)].unflatten(2, (5, 5)).permute(0, 1, 2, 4, 3, 5)
    shuffled = F.interpolate(pieces.flatten(4, 5).flatten(2, 3), (height, width))
    cells = int(uniform(2, 40))
    field = 128 + uniform(0, 70, batch, 1, 1, 1) * torch.randn(batch, 3, cells, cells)  # flat colours to gaudy spots
    noise = F.interpolate(field, (height, width), mode="bilinear")
    white = 128 + uniform(10, 90, batch, 1, 1, 1) * torch.randn_like(pictures)
    kind = torch.randint(4, (batch, 1, 1, 1))
    return torch.where(kind == 0, rooms, torch.where(kind == 1, shuffled, torch.where(kind == 2, noise, white)))


# --- losses -----------------------------------------------------------------------------------------------------------


def detector_loss(net: Detector, figures: Figures, rows: Tensor) -> Tensor:
    """Objectness of the cells round the box's centre and the box itself, on letterboxed figures."""
    images, sizes, _, boxes = figures.pick(rows)
    batch = len(rows)
    # the letterbox of the real thing, often shrunk and moved so that figures are not all full-size
    shrink = torch.where(torch.rand(batch) < 0.4, uniform(0.45, 1.0, batch), torch.ones(batch))
    side = DETECTOR_SIDE // 4  # draw at a quarter of the size and pool by 4 instead of 16
    ratio = side / sizes.amax(1) * shrink
    shift = (side - sizes * ratio[:, None]) * torch.rand(batch, 2) * (shrink < 1)[:, None]
    matrix = torch.eye(2) / ratio[:, None, None]
    pictures = sample(images, sizes, matrix, -shift / ratio[:, None], side, side, math.nan)
    outside = pictures.isnan()
    pictures = disturb(pictures.nan_to_num(PADDING_GREY))
    empty = torch.rand(batch) < 0.3
    pictures = torch.where(empty[:, None, None, None], nobody(pictures), pictures)
    pictures = torch.where(outside, torch.tensor(float(PADDING_GREY)), pictures).flip(1)  # BGR

    output = net.predict(F.avg_pool2d(pictures, DETECTOR_POOL // 4)).float()
    cell = DETECTOR_STRIDE / 4
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


# --- export -----------------------------------------------------------------------------------------------------------


def export(net: nn.Module, path: Path, shape: tuple[int, int], outputs: dict[str, tuple[int, int]]) -> None:
    """Write ``net`` as ONNX with any number of images per batch and float16 weights (computed in float32)."""
    net.float().to(memory_format=torch.contiguous_format).eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    names = ["images", *outputs]
    torch.onnx.export(
        net,
        (torch.zeros(2, 3, *shape),),
        path,
        dynamo=False,  # the dynamo exporter needs onnxscript, which nothing else here does
        opset_version=17,
        input_names=names[:1],
        output_names=list(outputs),
        dynamic_axes={name: {0: "batch"} for name in names},
    )
    model = onnx.load(path)
    for output, sizes in zip(model.graph.output, outputs.values()):  # the exporter forgets what Pad gives
        for dimension, size in zip(output.type.tensor_type.shape.dim[1:], sizes):
            dimension.dim_value = size
    halve_weights(model.graph)
    model.producer_name, model.producer_version = "nanodit demo", ""
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString(deterministic=True))


def halve_weights(graph: onnx.GraphProto) -> None:
    """Store large float32 initialisers as float16 behind a Cast, which onnxruntime folds away when it loads the
    file."""
    casts = []
    for tensor in list(graph.initializer):
        values = numpy_helper.to_array(tensor)
        if tensor.data_type != TensorProto.FLOAT or values.size < 256:
            continue
        half = numpy_helper.from_array(values.astype(np.float16), f"{tensor.name}.half")
        casts.append(helper.make_node("Cast", [half.name], [tensor.name], to=TensorProto.FLOAT))
        graph.initializer.remove(tensor)
        graph.initializer.append(half)
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m prep.demo_pose", description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder of the two ONNX files")
    parser.add_argument("--minutes", type=float, default=20.0, help="training time of both networks together")
    parser.add_argument("--figures", type=int, default=6000, help="figures to train on")
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
