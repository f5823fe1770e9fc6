"""The demo pose networks: small stand-ins with YOLOX's and DW-LL's exact inputs and outputs, and their ONNX export.

They know nothing but drawn figures (:mod:`tools.demo_pose.train` trains them). Both look at a much reduced
picture, since a figure is large and simple; together they weigh less than a megabyte.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from nanodit.keypoints import JOINTS
from prep.encoders.dwpose import DETECTOR_SIDE, PADDING_GREY, POSE_HEIGHT, POSE_WIDTH

DETECTOR_POOL, DETECTOR_STRIDE = 16, 32
POSE_POOL, POSE_CELL = 4, 8
DETECTOR_OUTPUT = {"output": (8400, 85)}
SIMCC = {"simcc_x": (JOINTS, 2 * POSE_WIDTH), "simcc_y": (JOINTS, 2 * POSE_HEIGHT)}


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
    """BGR 0-255, (B, 3, 640, 640) -> YOLOX's raw output (B, 8400, 85); only the coarsest grid ever speaks."""

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
        """Pooled input (B, 3, 96, 72) -> where each joint is and whether it is in the picture.

        The place is a distribution over columns (B, 133, 36) and one over rows (B, 133, 48); the last output is a logit
        (B, 133).
        """
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
    """Make a parabola over half-pixel bins, (B, 133, bins), its top ``height`` at input index ``place`` (B, 133)."""
    distance = torch.arange(bins, device=place.device) / 40 - place[..., None] / 20  # in twenties of pixels
    return height[..., None] - distance * distance


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
    """Store large float32 initialisers as float16 behind a Cast, which onnxruntime folds away on loading."""
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
