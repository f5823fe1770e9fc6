"""DWPose's preprocessing, decoding and coordinates, proved on analytic networks that read single pixels."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper

from nanodit.errors import ConfigError, DataError, ResourceError
from prep.config import PrepConfig
from prep.dataset.layers import LAYERS
from prep.encoders import dwpose
from prep.encoders.dwpose import DWPose, Pose, denormalise, normalise
from prep.encoders.registry import build_encoder

BOX = 128  # side of the analytic detector's boxes, in pixels of its input


NEAREST = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}


def save_network(path: Path, nodes: list, constants: dict, inputs: tuple, outputs: dict) -> Path:
    """An ONNX file from nodes written as (operator, inputs, output, attributes)."""
    batch = inputs[0]
    graph = helper.make_graph(
        [helper.make_node(operator, taken, [given], **attributes) for operator, taken, given, attributes in nodes],
        path.stem,
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, inputs)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, (batch, *shape)) for name, shape in outputs.items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


def red_detector(path: Path, batch: int | str = "batch") -> Path:
    """Sees a person of 128 x 128 input pixels on every coarse cell that is red, if it is fed BGR from 0 to 255."""
    tail = np.zeros((1, 1, 80), np.float32)
    tail[..., 0] = 1  # class 0 is certain
    nodes = [
        # red minus green: white, grey and blue give 0; padding counts only if it is exactly 114 in every channel
        ("Conv", ["input", "difference"], "redness", {"kernel_shape": [1, 1]}),
        ("AveragePool", ["redness"], "pooled", {"kernel_shape": [32, 32], "strides": [32, 32]}),
        ("Relu", ["pooled"], "objectness", {}),
        ("Reshape", ["objectness", "column"], "score", {}),  # (B, 400, 1)
        ("Mul", ["score", "zero"], "nothing", {}),
        ("Add", ["nothing", "geometry"], "box", {}),
        ("Add", ["nothing", "tail"], "classes", {}),
        ("Concat", ["box", "score", "classes"], "coarse", {"axis": 2}),
        ("Pad", ["coarse", "finer"], "output", {}),
    ]
    constants = {
        "difference": np.array([0, -1, 1], np.float32).reshape(1, 3, 1, 1) / 255,
        "column": np.array([0, 400, 1], np.int64),
        "zero": np.array(0, np.float32),
        "geometry": np.array([0.5, 0.5, math.log(BOX / 32), math.log(BOX / 32)], np.float32).reshape(1, 1, 4),
        "tail": tail,
        "finer": np.array([0, 8000, 0, 0, 0, 0], np.int64),
    }
    return save_network(path, nodes, constants, (batch, 3, 640, 640), {"output": (8400, 85)})


def bright_pose(path: Path, channel: int, batch: int | str = "batch") -> Path:
    """Finds all joints where one colour of the input is brightest, and says how bright (0 to 1), if it is fed
    RGB normalised with ImageNet's mean and deviation in that order."""
    nodes = [
        ("Mul", ["input", "std"], "scaled", {}),
        ("Add", ["scaled", "mean"], "colours", {}),
        ("Conv", ["colours", "only"], "brightness", {"kernel_shape": [1, 1]}),  # (B, 1, 384, 288)
        ("ReduceMax", ["brightness"], "columns", {"axes": [2], "keepdims": 0}),
        ("ReduceMax", ["brightness"], "rows", {"axes": [3], "keepdims": 0}),
        ("Resize", ["columns", "", "twice"], "wide", NEAREST),
        ("Resize", ["rows", "", "twice"], "tall", NEAREST),
        ("Tile", ["wide", "joints"], "simcc_x", {}),
        ("Tile", ["tall", "joints"], "simcc_y", {}),
    ]
    constants = {
        "std": np.array([58.395, 57.12, 57.375], np.float32).reshape(1, 3, 1, 1),
        "mean": np.array([123.675, 116.28, 103.53], np.float32).reshape(1, 3, 1, 1),
        "only": np.eye(3, dtype=np.float32)[channel].reshape(1, 3, 1, 1) / 255,
        "twice": np.array([1, 1, 2], np.float32),
        "joints": np.array([1, 133, 1], np.int64),
    }
    outputs = {"simcc_x": (133, 576), "simcc_y": (133, 768)}
    return save_network(path, nodes, constants, (batch, 3, 384, 288), outputs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("onnx")


@pytest.fixture(scope="module")
def analytic(folder: Path) -> DWPose:
    return DWPose(red_detector(folder / "red.onnx"), bright_pose(folder / "green.onnx", channel=1))


def picture(height: int, width: int, person: tuple[float, float], joint: tuple[int, int]) -> np.ndarray:
    """Black, with a red block for the detector round ``person`` (x, y in relative coordinates) and one green pixel."""
    image = np.zeros((height, width, 3), np.uint8)
    cell = 32 * max(height, width) / 640  # pixels per cell
    x, y = (math.floor(place * side / cell) for place, side in zip(person, (width, height)))
    image[round(y * cell) : round((y + 1) * cell), round(x * cell) : round((x + 1) * cell)] = (255, 0, 0)
    image[joint[1], joint[0], 1] = 255
    return image


# --- detector input and output ---


def test_trap_08_yolox_gets_bgr_0_255_on_grey_114() -> None:
    image = np.full((1, 30, 60, 3), (250, 20, 5), np.uint8)
    inputs, ratio = dwpose.letterbox(image)
    assert ratio == pytest.approx(640 / 60)
    assert inputs.shape == (1, 3, 640, 640)
    assert inputs.dtype == np.float32
    for channel, value in enumerate((5, 20, 250)):  # trap 8: blue first, not normalised
        assert (inputs[0, channel, :320] == value).all()
    assert (inputs[0, :, 320:] == 114).all()  # trap 8: the picture at the top left, grey 114 elsewhere


def test_letterbox_samples_like_cv2_resize() -> None:
    image = np.random.default_rng(0).integers(0, 256, (1, 48, 88, 3), dtype=np.uint8)
    inputs, ratio = dwpose.letterbox(image)
    height, width = int(48 * ratio), int(88 * ratio)
    pixels = torch.from_numpy(image[..., ::-1].copy()).permute(0, 3, 1, 2).double()
    expected = F.interpolate(pixels, size=(height, width), mode="bilinear", align_corners=False).round().numpy()
    assert np.abs(inputs[:, :, :height, :width] - expected).max() <= 1  # fixed-point arithmetic on 8-bit images


@pytest.mark.parametrize(
    ("height", "width", "sha256"),
    [
        (64, 87, "be5e9d9be58a7e38"),
        (474, 640, "d5ca1aaa64a64025"),
        (97, 131, "a8be2bd0a06d0222"),
        (33, 400, "f176d6709bbad206"),
    ],
)
def test_resize_is_cv2_resize_to_the_bit(height: int, width: int, sha256: str) -> None:
    """The hashes are of ``cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)``, OpenCV 5.0.0."""
    image = np.random.default_rng(0).integers(0, 256, (97, 131, 3), dtype=np.uint8)
    assert hashlib.sha256(dwpose.resize(image, height, width).tobytes()).hexdigest().startswith(sha256)


def test_a_large_image_is_reduced() -> None:
    inputs, ratio = dwpose.letterbox(np.full((2, 1280, 640, 3), 7, np.uint8))
    assert ratio == 0.5
    assert (inputs[:, :, :, :320] == 7).all()
    assert (inputs[:, :, :, 320:] == 114).all()


@pytest.mark.parametrize(("row", "stride", "cell"), [(0, 8, (0, 0)), (6400 + 41, 16, (1, 1)), (8399, 32, (19, 19))])
def test_boxes_are_decoded_per_stride(row: int, stride: int, cell: tuple[int, int]) -> None:
    prediction = np.zeros((8400, 85), np.float32)
    prediction[row, :6] = (0.25, 0.75, math.log(3), math.log(5), 0.9, 0.8)
    (person,) = dwpose.person_boxes(prediction, ratio=2.0)
    centre = np.array([(cell[0] + 0.25) * stride, (cell[1] + 0.75) * stride])
    half = np.array([3 * stride, 5 * stride]) / 2
    np.testing.assert_allclose(person[:4], np.concatenate([centre - half, centre + half]) / 2, rtol=1e-5)
    assert person[4] == pytest.approx(0.72)  # objectness times class


def test_only_likely_people_are_kept_the_largest_first() -> None:
    prediction = np.zeros((8400, 85), np.float32)

    def put(column: int, size: float, objectness: float, person: float, other: float = 0) -> None:
        prediction[8000 + column, :7] = (0.5, 0.5, math.log(size), math.log(size), objectness, person, other)

    put(2, 2, 0.9, 1.0)
    put(3, 2, 0.8, 1.0)  # half beside the first: overlap 1/3, kept
    put(8, 4, 0.5, 1.0)
    put(9, 4.2, 0.4, 1.0)  # mostly the same place as the one before: suppressed
    put(13, 8, 0.9, 0.3)  # .27: unlikely
    put(16, 3, 1.0, 0.05, 0.95)  # surely something else
    people = dwpose.person_boxes(prediction, ratio=1.0)
    np.testing.assert_allclose(people[:, 4], [0.5, 0.9, 0.8], rtol=1e-6)
    np.testing.assert_allclose(people[:, 2] - people[:, 0], [128, 64, 64], rtol=1e-5)


# --- pose input and output ---


def test_region_is_a_quarter_larger_and_three_by_four() -> None:
    centre, size = dwpose.padded_region(np.array([10, 20, 50, 120, 0.9], np.float32))
    np.testing.assert_allclose(centre, [30, 70])
    np.testing.assert_allclose(size, [125 * 0.75, 125])
    _, size = dwpose.padded_region(np.array([0, 0, 90, 30], np.float32))
    np.testing.assert_allclose(size, [112.5, 150])


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.7])
def test_crop_samples_like_cv2_warp_affine(scale: float) -> None:
    image = np.random.default_rng(1).integers(0, 256, (70, 110, 3), dtype=np.uint8)
    centre, size = np.array([40.3, 30.7]), np.array([288.0, 384.0]) * scale
    x = centre[0] + (np.arange(288) - 144) * scale  # index coordinates: whole numbers are pixel centres
    y = centre[1] + (np.arange(384) - 192) * scale
    grid = torch.from_numpy(np.stack(np.broadcast_arrays(2 * x / 109 - 1, (2 * y / 69 - 1)[:, None]), -1))[None]
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].double()
    expected = F.grid_sample(pixels, grid, align_corners=True, padding_mode="zeros")[0].numpy()
    colours = dwpose.crop(image, centre, size) * dwpose.POSE_STD[:, None, None] + dwpose.POSE_MEAN[:, None, None]
    assert np.abs(colours - expected).max() < 0.51  # rounded to whole levels, black beyond the picture


def test_trap_08_dw_ll_gets_rgb_with_imagenet_mean_and_std() -> None:
    image = np.full((384, 288, 3), (250, 20, 5), np.uint8)
    inputs = dwpose.crop(image, np.array([144.0, 192.0]), np.array([288.0, 384.0]))
    assert inputs.shape == (3, 384, 288)
    assert inputs.dtype == np.float32
    # trap 8: red first, with the mean and deviation of that order
    expected = [(250 - 123.675) / 58.395, (20 - 116.28) / 57.12, (5 - 103.53) / 57.375]
    np.testing.assert_allclose(inputs[:, 200, 100], expected, rtol=1e-5)


def test_trap_08_confidence_is_the_smaller_maximum_and_may_exceed_one() -> None:
    simcc_x, simcc_y = np.zeros((1, 133, 576), np.float32), np.zeros((1, 133, 768), np.float32)
    simcc_x[0, 0, 101], simcc_y[0, 0, 700] = 3.0, 1.5
    simcc_x[0, 1, 5] = 2.0  # nothing on the other axis
    simcc_x[0, 2], simcc_y[0, 2] = -1.0, 4.0
    joints = dwpose.decode_simcc(simcc_x, simcc_y)[0]
    np.testing.assert_array_equal(joints[0], [50.5, 350.0, 1.5])
    np.testing.assert_array_equal(joints[1:3], 0)  # not found, and nothing made up


# --- both together ---


@pytest.mark.parametrize(
    ("height", "width"), [(64, 64), (48, 88), (88, 48), (100, 100), (90, 160), (200, 120), (640, 640), (300, 900)]
)
def test_trap_08_a_bright_pixel_is_found_where_it_is(analytic: DWPose, height: int, width: int) -> None:
    generator = np.random.default_rng(height * width)
    for _ in range(4):
        person = generator.uniform(0.3, 0.7, 2)
        # within the region of 128 input pixels round the red block
        reach = 0.35 * BOX * max(height, width) / 640
        joint = [round(p * side + generator.uniform(-reach, reach)) for p, side in zip(person, (width, height))]
        (pose,) = analytic.detect(picture(height, width, tuple(person), tuple(joint))[None])
        assert pose.persons == 1
        place = pose.keypoints[:, :2] - (joint[0] + 0.5, joint[1] + 0.5)  # continuous: the pixel's centre
        assert np.abs(place).max() <= 0.5
        assert pose.keypoints.shape == (133, 3)
        assert (pose.keypoints[:, 2] > 0.3).all()


def test_trap_08_channels_reach_the_networks_in_their_order(folder: Path) -> None:
    image = picture(128, 128, (0.5, 0.5), (70, 60))
    swapped = np.ascontiguousarray(image[..., ::-1])
    detector = red_detector(folder / "red2.onnx")
    green = DWPose(detector, bright_pose(folder / "green2.onnx", channel=1))
    assert green.detect(image[None])[0].persons == 1
    assert green.detect(swapped[None])[0].persons == 0  # a blue block is no person
    # the red block's middle is found by the pose network that looks for red, not by the one that looks for blue
    red = DWPose(detector, bright_pose(folder / "red_joint.onnx", channel=0)).detect(image[None])[0]
    block = np.argwhere(image[..., 0] == 255)[:, ::-1]
    assert (red.keypoints[0, :2] >= block.min(0)).all()
    assert (red.keypoints[0, :2] <= block.max(0) + 1).all()
    assert red.keypoints[0, 2] == pytest.approx(1, abs=0.01)


def test_nobody_is_nobody(analytic: DWPose) -> None:
    images = np.random.default_rng(0).integers(90, 120, (3, 64, 80, 3), dtype=np.uint8)
    for pose in analytic.detect(images):
        assert pose.persons == 0
        assert pose.boxes.shape == (0, 5)
        assert not pose.keypoints.any()


def test_batches_are_made_of_single_images(analytic: DWPose, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(5)
    images = [picture(64, 80, tuple(generator.uniform(0.3, 0.7, 2)), (40, 32)) for _ in range(7)]
    images[3] = np.zeros_like(images[3])
    together = analytic.detect(np.stack(images))
    assert [pose.persons for pose in together] == [1, 1, 1, 0, 1, 1, 1]
    for image, pose in zip(images, together):
        (alone,) = analytic.detect(image[None])
        np.testing.assert_allclose(pose.keypoints, alone.keypoints, atol=1e-5)
        np.testing.assert_allclose(pose.boxes, alone.boxes, atol=1e-5)


def test_networks_exported_for_one_image_run_one_by_one(folder: Path, analytic: DWPose) -> None:
    single = DWPose(red_detector(folder / "red1.onnx", batch=1), bright_pose(folder / "green1.onnx", 1, batch=1))
    images = np.stack([picture(64, 64, (0.5, 0.5), (x, 30)) for x in range(25, 40, 3)])
    for one, many in zip(single.detect(images), analytic.detect(images)):
        np.testing.assert_array_equal(one.keypoints, many.keypoints)


# --- coordinates and errors ---


def test_normalised_coordinates_are_continuous_and_invert() -> None:
    keypoints = np.zeros((133, 3), np.float32)
    index = np.array([[0, 0], [99, 49], [20, 10]])
    keypoints[:3, :2], keypoints[:3, 2] = index + 0.5, (0.5, 1.7, 0.9)
    normalised = normalise(keypoints, width=100, height=50)
    expected = 2 * (index + 0.5) / (100, 50) - 1
    np.testing.assert_allclose(normalised[:3, :2], expected, atol=1e-6)
    np.testing.assert_array_equal(normalised[:, 2], keypoints[:, 2])
    assert not normalised[3:].any()  # absent joints are nowhere, not in the corner
    np.testing.assert_allclose(denormalise(normalised, 100, 50), keypoints, atol=1e-5)


def test_fingerprint_is_made_of_contents(folder: Path, tmp_path: Path) -> None:
    detector, pose = red_detector(tmp_path / "a.onnx"), bright_pose(tmp_path / "b.onnx", 1)
    first = DWPose(detector, pose).fingerprint()
    assert first == dwpose.fingerprint(detector, pose)
    assert str(tmp_path) not in str(first)
    assert first != dwpose.fingerprint(detector, bright_pose(tmp_path / "c.onnx", 2))


def test_a_missing_or_broken_network_is_explained(tmp_path: Path, folder: Path) -> None:
    good = red_detector(tmp_path / "red.onnx")
    with pytest.raises(DataError, match=r"missing\.onnx does not exist"):
        DWPose(tmp_path / "missing.onnx", good)
    (tmp_path / "broken.onnx").write_bytes(b"no protobuf")
    with pytest.raises(ConfigError, match=r"broken\.onnx"):
        DWPose(tmp_path / "broken.onnx", good)
    pose = bright_pose(tmp_path / "green.onnx", 1)
    with pytest.raises(ConfigError, match="640"):  # the two files the wrong way round
        DWPose(pose, good).detect(np.zeros((1, 64, 64, 3), np.uint8))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_is_not_silently_replaced_by_the_cpu(tmp_path: Path) -> None:
    detector, pose = red_detector(tmp_path / "a.onnx"), bright_pose(tmp_path / "b.onnx", 1)
    with pytest.raises(ResourceError, match="onnxruntime-gpu"):
        DWPose(detector, pose, device="cuda")


def test_a_gpu_is_asked_for_with_options_chosen_on_purpose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sessions get the device, a limit of memory, and kernels that are chosen without timing them."""
    files = red_detector(tmp_path / "a.onnx"), bright_pose(tmp_path / "b.onnx", 1)
    asked, session = [], dwpose.ort.InferenceSession

    class Gpu(session):
        """A session on the CPU that says it is on the GPU that was asked for."""

        def __init__(self, path: str, options: Any, providers: list) -> None:
            asked.append((options, providers))
            super().__init__(path, options, providers=["CPUExecutionProvider"])

        def get_providers(self) -> list[str]:
            return [asked[-1][1][0][0]]

    monkeypatch.setattr(dwpose.ort, "InferenceSession", Gpu)
    encoder = DWPose(*files, device="cuda:1", memory_gb=1.5)
    assert len(asked) == 2
    for options, ((provider, chosen),) in asked:
        assert provider == "CUDAExecutionProvider"
        assert chosen == {
            "device_id": "1", "arena_extend_strategy": "kSameAsRequested", "gpu_mem_limit": "1500000000",
            "cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0",
        }  # fmt: skip
        assert not options.enable_cpu_mem_arena
    assert encoder.device == encoder.memory.device == "cuda:1"
    images = np.stack([picture(64, 64, (0.5, 0.5), (x, 30)) for x in (25, 30, 35)])
    for one, other in zip(encoder.detect(images), DWPose(*files).detect(images)):  # the GPU's thread, batches filled up
        np.testing.assert_array_equal(one.keypoints, other.keypoints)
    DWPose(*files, device="cuda")
    record = LAYERS["pose"].encoder
    ((_, chosen),) = asked[-1][1]
    assert float(chosen["gpu_mem_limit"]) == pytest.approx((record.weights_gb + record.activations_gb) * 1e9)


def test_the_cpu_is_given_as_many_threads_as_it_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert dwpose.session_options("cpu").intra_op_num_threads == 3
    assert dwpose.session_options("cpu", threads=5).intra_op_num_threads == 5
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert dwpose.session_options("cpu").intra_op_num_threads == 1  # actors share the cores
    assert dwpose.session_options("cpu").enable_cpu_mem_arena
    assert dwpose.providers("cpu") == ["CPUExecutionProvider"]


def test_the_users_word_about_memory_limits_the_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr(dwpose, "_Network", lambda path, device, memory_gb, threads: given.append(memory_gb))
    fields = {"source": "a", "output": "b", "encoders": "demo"}
    build_encoder(PrepConfig(**fields), "pose", "cpu")
    build_encoder(PrepConfig(**fields, placement={"vram_gb": {"pose": 3.0}}), "pose", "cpu")
    assert given == [None, None, 3.0, 3.0]


def test_persons_counts_boxes() -> None:
    assert Pose(np.zeros((133, 3), np.float32), np.zeros((2, 5), np.float32)).persons == 2
