"""Networks of YOLOX-L's and DW-LL's size and interfaces with random weights: what DWPose costs, not what it finds.

The detector reports one person in the middle of every picture, so that the pose network has work to do.
Sources: Ge et al., YOLOX, arXiv 2107.08430 (CSPDarknet, depth and width 1); Jiang et al., RTMPose, arXiv 2303.07399
(CSPNeXt-l and a SimCC head at 384 x 288).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanodit.keypoints import JOINTS
from prep.encoders.dwpose import DETECTOR_SIDE, POSE_HEIGHT, POSE_WIDTH, STRIDES

SIZES = {"detector": 54.2e6, "pose": 32e6}  # parameters as published, within a tenth
CLASSES = 80


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, batch norm, SiLU."""
    layer = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.SiLU())


class Residual(nn.Module):
    """Two convolutions beside the input; ``large`` makes the second a depthwise 5 x 5, as CSPNeXt does."""

    def __init__(self, width: int, *, large: bool = False, add: bool = True) -> None:
        super().__init__()
        first, second = conv(width, width, 1), conv(width, width)
        if large:
            first, second = (
                conv(width, width),
                nn.Sequential(conv(width, width, 5, groups=width), conv(width, width, 1)),
            )
        self.layers, self.add = nn.Sequential(first, second), add

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.add else self.layers(x)


class Stage(nn.Module):
    """A cross-stage partial block: half of the channels pass by ``count`` residual layers."""

    def __init__(self, inputs: int, outputs: int, count: int, *, large: bool = False, add: bool = True) -> None:
        super().__init__()
        half = outputs // 2
        self.left, self.right = conv(inputs, half, 1), conv(inputs, half, 1)
        self.layers = nn.Sequential(*(Residual(half, large=large, add=add) for _ in range(count)))
        self.attention = nn.Conv2d(outputs, outputs, 1) if large else None
        self.out = conv(outputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((self.layers(self.left(x)), self.right(x)), 1)
        if self.attention is not None:
            x = x * F.hardsigmoid(self.attention(x.mean((2, 3), keepdim=True)))
        return self.out(x)


class Pooled(nn.Module):
    """Spatial pyramid pooling over 5, 9 and 13 pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.out = conv(width, width // 2, 1), conv(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.out(torch.cat((x, *(F.max_pool2d(x, side, 1, side // 2) for side in (5, 9, 13))), 1))


class Detector(nn.Module):
    """YOLOX-L: (B, 3, 640, 640) -> (B, 8400, 85)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(12, 64)
        self.dark2 = nn.Sequential(conv(64, 128, stride=2), Stage(128, 128, 3))
        self.dark3 = nn.Sequential(conv(128, 256, stride=2), Stage(256, 256, 9))
        self.dark4 = nn.Sequential(conv(256, 512, stride=2), Stage(512, 512, 9))
        self.dark5 = nn.Sequential(conv(512, 1024, stride=2), Pooled(1024), Stage(1024, 1024, 3, add=False))
        self.lateral, self.merge4 = conv(1024, 512, 1), Stage(1024, 512, 3, add=False)
        self.reduce, self.merge3 = conv(512, 256, 1), Stage(512, 256, 3, add=False)
        self.down3, self.out4 = conv(256, 256, stride=2), Stage(512, 512, 3, add=False)
        self.down4, self.out5 = conv(512, 512, stride=2), Stage(1024, 1024, 3, add=False)
        self.stems = nn.ModuleList(conv(width, 256, 1) for width in (256, 512, 1024))
        two = lambda: nn.Sequential(conv(256, 256), conv(256, 256))  # noqa: E731
        self.classes, self.boxes = (nn.ModuleList(two() for _ in STRIDES) for _ in range(2))
        self.to_class = nn.ModuleList(nn.Conv2d(256, CLASSES, 1) for _ in STRIDES)
        self.to_box = nn.ModuleList(nn.Conv2d(256, 5, 1) for _ in STRIDES)
        self.register_buffer("found", _one_person())

    def forward(self, images: Tensor) -> Tensor:
        x = torch.cat([images[..., i::2, j::2] for j in (0, 1) for i in (0, 1)], 1)
        c3 = self.dark3(self.dark2(self.stem(x)))
        c4 = self.dark4(c3)
        p5 = self.lateral(self.dark5(c4))
        p4 = self.reduce(self.merge4(torch.cat((_double(p5), c4), 1)))
        p3 = self.merge3(torch.cat((_double(p4), c3), 1))
        n4 = self.out4(torch.cat((self.down3(p3), p4), 1))
        n5 = self.out5(torch.cat((self.down4(n4), p5), 1))
        outputs = []
        for level, feature in enumerate((p3, n4, n5)):
            x = self.stems[level](feature)
            box = self.to_box[level](self.boxes[level](x))
            kind = self.to_class[level](self.classes[level](x))
            outputs.append(torch.cat((box, kind), 1).flatten(2))
        made = torch.cat(outputs, 2).transpose(1, 2)
        made = 1e-3 * made + self.found
        return torch.cat((made[..., :4], made[..., 4:].sigmoid()), 2)


def _one_person() -> Tensor:
    """Return what is added to the raw predictions, (8400, 85): a person of 320 x 560 pixels in the middle."""
    found = torch.zeros(sum((DETECTOR_SIDE // stride) ** 2 for stride in STRIDES), 5 + CLASSES)
    found[:, 4:] = -12
    cell = len(found) - (DETECTOR_SIDE // STRIDES[-1]) ** 2 // 2 - DETECTOR_SIDE // STRIDES[-1] // 2
    found[cell, 2:4] = torch.tensor([320.0, 560.0]).div(STRIDES[-1]).log()
    found[cell, 4:6] = 12
    return found


class PoseNetwork(nn.Module):
    """DW-LL: (B, 3, 384, 288) -> SimCC (B, 133, 576) and (B, 133, 768)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 32, stride=2), conv(32, 32), conv(32, 64))
        widths, counts = (64, 128, 256, 512, 1024), (3, 6, 6, 3)
        stages = []
        for inputs, outputs, count in zip(widths, widths[1:], counts):
            middle = [Pooled(outputs)] if outputs == widths[-1] else []
            stages += [conv(inputs, outputs, stride=2), *middle]
            stages += [Stage(outputs, outputs, count, large=True, add=outputs != widths[-1])]
        self.stages = nn.Sequential(*stages)
        self.joints = nn.Conv2d(widths[-1], JOINTS, 7, padding=3)
        self.token = nn.Linear(POSE_HEIGHT * POSE_WIDTH // 32**2, 256)
        self.values, self.gates = nn.Linear(256, 512), nn.Linear(256, 512)
        self.keys, self.out = nn.Linear(256, 128), nn.Linear(512, 256)
        self.x, self.y = nn.Linear(256, 2 * POSE_WIDTH), nn.Linear(256, 2 * POSE_HEIGHT)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.token(self.joints(self.stages(self.stem(images))).flatten(2))
        keys = self.keys(tokens)
        weights = F.relu(keys @ keys.transpose(1, 2) / 128**0.5) ** 2 / JOINTS
        tokens = tokens + self.out(F.silu(self.gates(tokens)) * (weights @ F.silu(self.values(tokens))))
        return self.x(tokens), self.y(tokens)


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def write(path: Path, build: Callable[[], nn.Module], shape: tuple[int, int], outputs: tuple[str, ...]) -> None:
    """Write a network from a seed as ONNX, for any number of images a batch; kept where it lies already."""
    if path.is_file():
        return
    torch.manual_seed(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.onnx.export(
        build().eval(),
        (torch.zeros(1, 3, *shape),),
        temporary,
        dynamo=False,  # the dynamo exporter needs onnxscript, which nothing else here does
        opset_version=17,
        input_names=["images"],
        output_names=list(outputs),
        dynamic_axes={name: {0: "batch"} for name in ("images", *outputs)},
    )
    temporary.rename(path)


def write_detector(path: Path) -> None:
    """Write YOLOX-L's stand-in."""
    write(path, Detector, (DETECTOR_SIDE, DETECTOR_SIDE), ("output",))


def write_pose(path: Path) -> None:
    """Write DW-LL's stand-in."""
    write(path, PoseNetwork, (POSE_HEIGHT, POSE_WIDTH), ("simcc_x", "simcc_y"))
