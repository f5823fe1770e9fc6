"""DWPose: a YOLOX person detector, then DW-LL's 133 whole-body joints of the largest person, both through onnxruntime.

The steps and constants are those of the reference code (github.com/IDEA-Research/DWPose, ControlNet branch, and
mmpose's SimCC codec), batched. Which convention holds where matters to half a pixel, so it is said at each step:

- *index* coordinates: 0 is the centre of the first pixel. The reference works in these.
- *continuous* coordinates: 0 is the left edge of the first pixel, index + 0.5. Everything returned here is in these.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from nanodit.errors import ConfigError, DataError, ResourceError
from nanodit.files import canonical_json, sha256_file
from nanodit.keypoints import JOINTS
from prep.dataset.codecs import npy_bytes
from prep.dataset.layers import LAYERS
from prep.encoders.halving import Halving
from prep.encoders.hub import Reference, check_bytes, download_file, is_hub_file

CODE_VERSION = 2
ENCODER = LAYERS["pose"].encoder
assert ENCODER is not None
BATCH = 4  # images per call of a network that takes any number
GPU_GB = ENCODER.weights_gb + ENCODER.activations_gb

DETECTOR_SIDE = 640
STRIDES = (8, 16, 32)
PADDING_GREY = 114
RESIZE_ROWS = 32  # of the result at a time, so that what lies between stays in the processor's cache
CANDIDATE_SCORE, NMS_IOU, PERSON_SCORE = 0.1, 0.45, 0.3
PERSON_CLASS = 0

POSE_WIDTH, POSE_HEIGHT = 288, 384
BOX_PADDING = 1.25
SIMCC_SPLIT = 2.0  # bins per input pixel
POSE_MEAN = np.array([123.675, 116.28, 103.53], np.float32)  # of RGB
POSE_STD = np.array([58.395, 57.12, 57.375], np.float32)


@dataclass(frozen=True)
class Pose:
    """The largest person of an image, and how many there are.

    ``keypoints`` (133, 3) float32: continuous x and y in pixels of the image, and confidence, a logit-like number
    that can exceed 1. A joint that was not found is (0, 0, 0), and so are all when nobody was found: nothing is
    made up.
    ``boxes`` (persons, 5) float32: x0, y0, x1, y1, score, the largest first.
    """

    keypoints: np.ndarray
    boxes: np.ndarray

    @property
    def persons(self) -> int:
        """How many people the detector found."""
        return len(self.boxes)


def normalise(keypoints: np.ndarray, width: int, height: int) -> np.ndarray:
    """Continuous pixels -> [-1, 1] across the image: ``2 x / width - 1``, which is ``2 (index + 0.5) / width - 1``.

    ``keypoints`` (..., 3) holds x, y and confidence; joints without confidence become (0, 0, 0). Float32, same shape.
    """
    x, y, confidence = np.moveaxis(np.asarray(keypoints, np.float32), -1, 0)
    found = confidence > 0
    normalised = (2 * x / width - 1, 2 * y / height - 1, confidence)
    return np.stack([np.where(found, values, 0) for values in normalised], axis=-1).astype(np.float32)


def denormalise(keypoints: np.ndarray, width: int, height: int) -> np.ndarray:
    """Invert :func:`normalise`: return continuous pixels; joints without confidence stay (0, 0, 0)."""
    x, y, confidence = np.moveaxis(np.asarray(keypoints, np.float32), -1, 0)
    found = confidence > 0
    pixels = ((x + 1) * width / 2, (y + 1) * height / 2, confidence)
    return np.stack([np.where(found, values, 0) for values in pixels], axis=-1).astype(np.float32)


def fingerprint(
    detector: Path | str, pose: Path | str, sha256: Mapping[str, str] | None = None
) -> dict[str, str | int]:
    """Everything that determines the joints; the device is not part of it.

    ``sha256`` gives the hashes of "detector" and "pose" where the files themselves are not on this machine. The name of
    a file that is on the hub alone stands for its hash until that is recorded (``prep/encoders/pins.py``).
    """
    known = sha256 or {}
    given = {"detector": known.get("detector") or _hash(detector), "pose": known.get("pose") or _hash(pose)}
    return {"encoder": "dwpose", "code": CODE_VERSION, **given}


def _hash(file: Path | str) -> str:
    return str(file) if is_hub_file(file) else sha256_file(_existing(Path(file)))


class DWPose:
    """The two networks: RGB images of one size in, one :class:`Pose` per image out.

    ``detector`` takes ``(B, 3, 640, 640)`` and gives YOLOX's raw ``(B, 8400, 85)``; ``pose`` takes
    ``(B, 3, 384, 288)`` and gives ``simcc_x (B, 133, 576)`` and ``simcc_y (B, 133, 768)``. Networks exported for a
    single image run one by one. What does not fit into a GPU is halved, as ``memory`` remembers.

    ``memory_gb`` bounds what each network's arena may take of a GPU (None: what the placement counts with for both),
    ``threads`` are onnxruntime's on the CPU (None: ``OMP_NUM_THREADS``, else one, because actors share the cores; equal
    bytes need equal numbers).

    Raises :class:`ConfigError` for a file that is no such network, :class:`ResourceError` when CUDA was asked for and
    onnxruntime would silently have used the CPU.
    """

    def __init__(
        self,
        detector: Path,
        pose: Path,
        device: str = "cpu",
        memory_gb: float | None = None,
        threads: int | None = None,
    ) -> None:
        self.device = device
        self._files = (Path(detector), Path(pose))
        self._detector, self._pose = (_Network(file, device, memory_gb, threads) for file in self._files)
        self.memory = Halving("DWPose", device)

    def fingerprint(self) -> dict[str, str | int]:
        """See :func:`fingerprint`."""
        return fingerprint(*self._files)

    def detect(self, images: np.ndarray) -> list[Pose]:
        """Find the people in ``images``, (B, H, W, 3) uint8 RGB, and the joints of the largest one in each."""
        boxes = []
        for start in range(0, len(images), BATCH):
            inputs, ratio = letterbox(images[start : start + BATCH])
            for (predictions,) in self.memory.run(self._detector.run, inputs):
                boxes += [person_boxes(prediction, ratio) for prediction in predictions]
        keypoints = np.zeros((len(images), JOINTS, 3), np.float32)
        found = [index for index, candidates in enumerate(boxes) if len(candidates)]
        for start in range(0, len(found), BATCH):
            chosen = found[start : start + BATCH]
            regions = [padded_region(boxes[index][0]) for index in chosen]
            crops = np.stack([crop(images[index], *region) for index, region in zip(chosen, regions)])
            joints = [decode_simcc(*simcc) for simcc in self.memory.run(self._pose.run, crops)]
            for index, points, (centre, scale) in zip(chosen, np.concatenate(joints), regions):
                keypoints[index] = to_image(points, centre, scale)
        return [Pose(points, candidates) for points, candidates in zip(keypoints, boxes)]

    def samples(self, images: np.ndarray, flips: bool = False) -> Iterator[tuple[dict[str, bytes], dict[str, Any]]]:
        """Yield the members and index columns of each of ``images``: the joints of the largest person, all boxes.

        A mirrored image has the same, mirrored, so ``flips`` adds nothing.
        """
        height, width = images.shape[1:3]
        for pose in self.detect(images):
            boxes = [[round(float(value), 3) for value in box] for box in pose.boxes]
            people = canonical_json({"persons": pose.persons, "boxes": boxes}).encode()
            joints = normalise(pose.keypoints, width, height)
            yield {"pose.npy": npy_bytes(joints), "json": people}, {"persons": pose.persons}


def build(
    detector: Path | str,
    pose: Path | str,
    sha256: Mapping[str, str] | None,
    device: str = "cpu",
    memory_gb: float | None = None,
) -> DWPose:
    """Load the two networks, from files or from the hub."""
    known = sha256 or {}
    return DWPose(_onnx_file(detector, known.get("detector")), _onnx_file(pose, known.get("pose")), device, memory_gb)


def _onnx_file(value: str | Path, sha256: str | None) -> Path:
    """Return a network's file on this machine: downloaded from the hub, and checked where its hash is known."""
    path = Path(value)
    if is_hub_file(value):
        reference = Reference.parse(str(value))
        path = download_file(reference, reference.file)
    if sha256:
        check_bytes(path, sha256, str(value))
    return path


# --- detector ---------------------------------------------------------------------------------------------------------


def letterbox(images: np.ndarray) -> tuple[np.ndarray, float]:
    """Images (B, H, W, 3) uint8 RGB -> YOLOX's input (B, 3, 640, 640) float32, and pixels of it per pixel of an image.

    Scaled into the top-left corner, grey 114 around; BGR from 0 to 255, not normalised.
    """
    batch, height, width, _ = images.shape
    ratio = min(DETECTOR_SIDE / height, DETECTOR_SIDE / width)
    size = (max(1, int(height * ratio)), max(1, int(width * ratio)))
    inputs = np.empty((batch, 3, DETECTOR_SIDE, DETECTOR_SIDE), np.float32)
    for image, canvas in zip(images, inputs):
        _resize_into(image, canvas[::-1, : size[0], : size[1]])
    inputs[:, :, size[0] :] = PADDING_GREY
    inputs[:, :, : size[0], size[1] :] = PADDING_GREY
    return inputs, ratio


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, C) uint8 -> (height, width, C) uint8: bilinear with half-pixel centres, to the bit as ``cv2.resize``.

    In OpenCV's fixed-point arithmetic (``modules/imgproc/src/resize.cpp``, INTER_LINEAR on 8 bits): rounding otherwise
    moves one pixel in fifty by a grey level, and that moves boxes by a tenth of a pixel.
    """
    resized = np.empty((height, width, image.shape[2]), np.uint8)
    _resize_into(image, resized.transpose(2, 0, 1))
    return resized


def _resize_into(image: np.ndarray, planes: np.ndarray) -> None:
    """Write :func:`resize` of ``image`` into ``planes`` (C, height, width), of any type."""
    channels, height, width = planes.shape
    # columns as one axis of (channel, column), so that all that follows is over long rows
    *columns, across, across_other = _fixed_point_taps(width, image.shape[1])
    left, right = ((taken * channels + np.arange(channels)[:, None]).ravel() for taken in columns)
    across, across_other = (np.tile(weight, channels) for weight in (across, across_other))
    above, below, down, down_other = _fixed_point_taps(height, image.shape[0])
    pixels = image.reshape(len(image), -1)
    for start in range(0, height, RESIZE_ROWS):
        block = slice(start, start + RESIZE_ROWS)
        first, last = above[start], below[block][-1]
        taken = pixels[first : last + 1]
        rows = np.multiply(taken.take(left, axis=1), across, dtype=np.int32)
        rows += np.multiply(taken.take(right, axis=1), across_other, dtype=np.int32)
        rows >>= 4
        parts = [rows.take(places[block] - first, axis=0) for places in (above, below)]
        for part, weight in zip(parts, (down, down_other)):
            part *= weight[block, None]
            part >>= 16
        total = parts[0]
        total += parts[1]
        total += 2
        total >>= 2
        planes[:, block] = total.reshape(-1, channels, width).transpose(1, 0, 2)


def _fixed_point_taps(count: int, limit: int) -> tuple[np.ndarray, ...]:
    """Return the two neighbours (count,) of each place on one axis, and their weights in 2048ths."""
    places = ((np.arange(count) + 0.5) * (1 / (count / limit)) - 0.5).astype(np.float32)
    first = np.floor(places)
    second_weight = (places - first).astype(np.float32)
    weights = [np.rint(weight * np.float32(2048)).astype(np.int32) for weight in (1 - second_weight, second_weight)]
    return *(np.clip(first + step, 0, limit - 1).astype(np.int64) for step in (0, 1)), *weights


def _anchor_grid() -> tuple[np.ndarray, np.ndarray]:
    """Cell (8400, 2) as x, y and stride (8400, 1) of every prediction: rows of the finest grid first."""
    cells, strides = [], []
    for stride in STRIDES:
        side = DETECTOR_SIDE // stride
        rows, columns = np.divmod(np.arange(side * side), side)
        cells.append(np.stack([columns, rows], axis=1))
        strides.append(np.full((side * side, 1), stride))
    return np.concatenate(cells).astype(np.float32), np.concatenate(strides).astype(np.float32)


CELLS, CELL_STRIDES = _anchor_grid()


def person_boxes(prediction: np.ndarray, ratio: float) -> np.ndarray:
    """YOLOX's raw output for one image, (8400, 85), -> people (P, 5), the largest first.

    A person is x0, y0, x1, y1 in pixels of the image, and a score. Columns of the output are x, y, log w, log h
    relative to the cell and its stride, objectness, and 80 class probabilities.
    """
    score = prediction[:, 4] * prediction[:, 5 + PERSON_CLASS]
    likely = np.flatnonzero(score > CANDIDATE_SCORE)
    centre = (prediction[likely, :2] + CELLS[likely]) * CELL_STRIDES[likely]
    size = np.exp(prediction[likely, 2:4]) * CELL_STRIDES[likely]
    boxes = np.concatenate([centre - size / 2, centre + size / 2], axis=1) / ratio
    kept = suppress(boxes, score[likely])
    kept = kept[score[likely][kept] > PERSON_SCORE]
    people = np.concatenate([boxes[kept], score[likely][kept, None]], axis=1).astype(np.float32)
    area = (people[:, 2] - people[:, 0]) * (people[:, 3] - people[:, 1])
    return people[np.argsort(-area, kind="stable")]


def suppress(boxes: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Greedy non-maximum suppression: indices of the boxes (n, 4) kept, best score first.

    Sizes count inclusive pixels (+ 1), as in the reference.
    """
    x0, y0, x1, y1 = boxes.T
    areas = (x1 - x0 + 1) * (y1 - y0 + 1)
    order = np.argsort(-scores, kind="stable")
    kept = []
    while len(order):
        best, rest = order[0], order[1:]
        kept.append(best)
        width = np.maximum(0, np.minimum(x1[best], x1[rest]) - np.maximum(x0[best], x0[rest]) + 1)
        height = np.maximum(0, np.minimum(y1[best], y1[rest]) - np.maximum(y0[best], y0[rest]) + 1)
        overlap = width * height
        order = rest[overlap / (areas[best] + areas[rest] - overlap) <= NMS_IOU]
    return np.array(kept, dtype=np.int64)


# --- joints -----------------------------------------------------------------------------------------------------------


def padded_region(box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return centre and size (both x, y) of the region that the pose network sees for a box (x0, y0, x1, y1, ...).

    A quarter larger, then widened or heightened to the network's shape of 3:4.
    """
    x0, y0, x1, y1 = box[:4].astype(np.float64)
    centre = np.array([x0 + x1, y0 + y1]) / 2
    width, height = (x1 - x0) * BOX_PADDING, (y1 - y0) * BOX_PADDING
    aspect = POSE_WIDTH / POSE_HEIGHT
    size = (width, width / aspect) if width > height * aspect else (height * aspect, height)
    return centre, np.array(size)


def crop(image: np.ndarray, centre: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Cut a region of ``image``, uint8 RGB (H, W, 3), as the pose network's input, normalised float32 (3, 384, 288).

    The reference's affine map without rotation: index ``(288, 384) / 2`` of the input lies on index ``centre`` of
    the image (``cv2.warpAffine``: whole numbers are pixel centres), bilinear, black outside. Without rotation it is
    separable.
    """
    (above, below), row_weights = _taps(POSE_HEIGHT, centre[1], size[1], image.shape[0])
    columns, column_weights = _taps(POSE_WIDTH, centre[0], size[0], image.shape[1])
    channels = image.transpose(2, 0, 1)
    tall = channels[:, above] * row_weights[0][:, None] + channels[:, below] * row_weights[1][:, None]
    # gathering columns would jump about in memory; a matrix with two entries per column is faster
    mixture = np.zeros((image.shape[1], POSE_WIDTH), np.float32)
    np.add.at(mixture, (columns, np.arange(POSE_WIDTH)), column_weights)
    pixels = tall.reshape(-1, image.shape[1]) @ mixture
    np.rint(pixels, out=pixels)  # the reference warps 8-bit images
    pixels = pixels.reshape(3, POSE_HEIGHT, POSE_WIDTH)
    pixels -= POSE_MEAN[:, None, None]
    pixels /= POSE_STD[:, None, None]
    return pixels


def _taps(count: int, centre: float, size: float, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the two neighbours (2, count) of each sampling place on one axis and their weights, 0 beyond the image."""
    places = centre + (np.arange(count) - count / 2) * (size / count)
    first = np.floor(places).astype(np.int64)
    taps = np.stack([first, first + 1])
    weights = np.stack([first + 1 - places, places - first])
    inside = (taps >= 0) & (taps < limit)
    return np.clip(taps, 0, limit - 1), np.where(inside, weights, 0).astype(np.float32)


def decode_simcc(simcc_x: np.ndarray, simcc_y: np.ndarray) -> np.ndarray:
    """SimCC outputs (B, 133, 576) and (B, 133, 768) -> joints (B, 133, 3): index x and y in the input, confidence.

    The place is the highest bin on each axis, the confidence the smaller of the two heights (DWPose; rtmlib takes their
    mean). Not found (0, 0, 0) where that is not positive. Source: SimCC, arXiv 2107.03332, section 3.
    """
    place = np.stack([simcc_x.argmax(-1), simcc_y.argmax(-1)], axis=-1) / SIMCC_SPLIT
    confidence = np.minimum(simcc_x.max(-1), simcc_y.max(-1))[..., None]
    joints = np.concatenate([place, confidence], axis=-1)
    return np.where(confidence > 0, joints, 0).astype(np.float32)


def to_image(joints: np.ndarray, centre: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Map joints (133, 3) from index coordinates of the input back to continuous coordinates of the image."""
    found = joints[:, 2:] > 0
    places = joints[:, :2] / (POSE_WIDTH, POSE_HEIGHT) * size + centre - size / 2 + 0.5
    return np.concatenate([np.where(found, places, 0), joints[:, 2:]], axis=1).astype(np.float32)


# --- onnxruntime ------------------------------------------------------------------------------------------------------


# onnxruntime's errors share no base class of their own
_UNLOADABLE = (ort_errors.Fail, ort_errors.InvalidArgument, ort_errors.InvalidGraph, ort_errors.InvalidProtobuf)


def session_options(device: str, threads: int | None = None) -> ort.SessionOptions:
    """Return the options of a session on a device; see :class:`DWPose`."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or int(os.environ.get("OMP_NUM_THREADS") or 1)
    options.log_severity_level = 3
    # beside a GPU only inputs and outputs lie in main memory, where an arena would keep the largest for ever
    options.enable_cpu_mem_arena = not device.startswith("cuda")
    return options


def providers(device: str, memory_gb: float | None = None) -> list[str | tuple[str, dict[str, str]]]:
    """Return what computes a session on a device, with its options.

    Source: https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html, "Configuration Options".
    """
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return ["CPUExecutionProvider"]
    options = {
        "device_id": index or "0",
        # just what is asked for, and no more than was booked, leaves room for the other workers of a GPU; beyond the
        # limit an allocation fails, and batches are halved
        "arena_extend_strategy": "kSameAsRequested",
        "gpu_mem_limit": str(int((memory_gb or GPU_GB) * 1e9)),
        # the default, EXHAUSTIVE, times all kernels with their workspaces for every shape: that takes memory and the
        # first seconds, and what wins, and so the last bits, may differ from one process to the next
        "cudnn_conv_algo_search": "HEURISTIC",
        "use_tf32": "0",  # which would move joints
    }
    return [("CUDAExecutionProvider", options)]


class _Network:
    """One ONNX file on one device."""

    def __init__(self, path: Path, device: str, memory_gb: float | None, threads: int | None) -> None:
        kind = device.partition(":")[0]
        if kind == "cuda":
            import torch  # noqa: F401 - brings the CUDA libraries into the process that onnxruntime looks for
        options = session_options(device, threads)
        try:
            self._session = ort.InferenceSession(str(_existing(path)), options, providers=providers(device, memory_gb))
        except _UNLOADABLE as error:
            raise ConfigError(f"onnxruntime cannot load {path}: {str(error).splitlines()[0]}") from error
        if kind == "cuda" and self._session.get_providers()[0] != "CUDAExecutionProvider":
            raise ResourceError(
                f"onnxruntime cannot use {device} and would have used the CPU. Install onnxruntime-gpu alone "
                "(pip uninstall onnxruntime onnxruntime-gpu; pip install onnxruntime-gpu) and the CUDA it asks for, "
                "or choose the device cpu"
            )
        (self._input,) = self._session.get_inputs()
        self._path = path
        # cuDNN chooses kernels, and the arena grows, once per shape: the short last batch is filled up
        self._fill, self._largest = kind == "cuda" and self._input.shape[0] != 1, 0

    def run(self, inputs: np.ndarray) -> Sequence[np.ndarray]:
        """Compute the outputs for ``inputs`` (B, 3, H, W); one by one when the file was exported for one image."""
        if tuple(self._input.shape[2:]) != inputs.shape[2:]:
            raise ConfigError(
                f"{self._path} takes {self._input.shape}, not (B, 3, {inputs.shape[2]}, {inputs.shape[3]})"
            )
        count = len(inputs)
        if self._fill and count < self._largest:
            inputs = np.concatenate([inputs, np.zeros((self._largest - count, *inputs.shape[1:]), np.float32)])
        step = 1 if self._input.shape[0] == 1 else len(inputs)
        parts = [
            self._session.run(None, {self._input.name: inputs[start : start + step]})
            for start in range(0, len(inputs), step)
        ]
        self._largest = max(self._largest, count)
        return [np.concatenate(output)[:count] if len(output) > 1 else output[0][:count] for output in zip(*parts)]


def _existing(path: Path) -> Path:
    if not Path(path).is_file():
        raise DataError(
            f"{path} does not exist; DWPose needs yolox_l.onnx and dw-ll_ucoco_384.onnx (or the demo networks)"
        )
    return Path(path)
