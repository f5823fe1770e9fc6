"""Fault P13: a batch that does not fit into a GPU is halved, the results stay and the user is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from nanodit.errors import ResourceError
from prep.config import PrepConfig
from prep.dataset.layout import read_part
from prep.encoders.demo import ASSETS, build_dino, build_t5
from prep.encoders.dinov3 import DINOv3Encoder
from prep.encoders.dwpose import DWPose
from prep.encoders.halving import Halving
from prep.encoders.registry import build_encoder
from prep.encoders.t5 import T5Encoder
from prep.figures.figures import draw_figure, write_figures
from prep.passes.layers import LayerWorker, ShardTask
from prep.passes.plan import make_plan


class Small:
    """A device that holds ``room`` items at a time; remembers what it was asked for."""

    def __init__(self, room: int, error: Callable[[], Exception] = torch.OutOfMemoryError) -> None:
        self.room, self.error, self.asked = room, error, []

    def __call__(self, items: list[int]) -> list[int]:
        self.asked.append(len(items))
        if len(items) > self.room:
            raise self.error()
        return [item * 10 for item in items]


def test_batches_are_halved_once_and_stay_in_order() -> None:
    device, memory = Small(3), Halving("DINO", "cuda:1")
    results = [result for _ in range(2) for part in memory.run(device, list(range(16))) for result in part]
    assert results == [10 * item for item in range(16)] * 2
    assert device.asked == [16, 8, 4] + [2] * 16  # what did not fit is not tried again
    note = memory.take_note()
    assert "DINO: batches of 4 do not fit into the free memory of cuda:1; continuing with 2" in note
    assert memory.take_note() is None  # said once


def test_odd_batches_lose_nothing() -> None:
    for count in range(8):
        for room in range(1, 8):
            parts = Halving("T5", "cuda").run(Small(room), list(range(count)))
            assert [item for part in parts for item in part] == [10 * item for item in range(count)]


def test_one_item_that_does_not_fit_is_a_lack_of_resources() -> None:
    with pytest.raises(ResourceError, match=r"T5: a single item does not fit.*cuda:0.*device cpu") as caught:
        list(Halving("T5", "cuda:0").run(Small(0), [1, 2]))
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    "message",
    [
        "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer of size 4194304",
        "CUDA error: out of memory",
        "CUDNN failure 4000: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    ],
)
def test_what_has_no_class_of_its_own_is_understood_on_a_gpu_alone(message: str) -> None:
    def full() -> Exception:
        return RuntimeError(message)

    assert list(Halving("DWPose", "cuda:0").run(Small(1, full), [1, 2])) == [[10], [20]]
    # main memory belongs to everybody on the machine: whoever supervises the worker decides
    with pytest.raises(RuntimeError, match=message[:10].replace("[", r"\[")):
        list(Halving("DWPose", "cpu").run(Small(1, full), [1, 2]))


def test_other_errors_pass() -> None:
    with pytest.raises(ZeroDivisionError):
        list(Halving("T5", "cuda").run(Small(1, ZeroDivisionError), [1, 2]))


# --- the encoders ---


def limit(module: torch.nn.Module, room: int) -> list[int]:
    """Let a network's forward run out of memory above ``room`` items; returns the list of sizes it is asked for."""
    asked: list[int] = []

    def check(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        asked.append(len(next(iter(kwargs.values()))))
        if asked[-1] > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    module.register_forward_pre_hook(check, with_kwargs=True)
    return asked


def test_dino_gives_the_same_features_in_halves(tmp_path: Path) -> None:
    build_dino(tmp_path / "dino")
    encoder = DINOv3Encoder(tmp_path / "dino", input_scale=1.0)
    images = np.random.default_rng(0).integers(0, 256, (7, 128, 160, 3), dtype=np.uint8)
    whole = encoder.encode(images)
    asked = limit(encoder.model, 2)
    for parts, expected in zip(encoder.encode(images), whole):
        assert parts.shape == expected.shape
        np.testing.assert_allclose(parts, expected, atol=1e-5)
    assert asked == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    assert "DINO: batches of 3" in encoder.memory.take_note()


def test_t5_gives_the_same_features_in_halves(tmp_path: Path) -> None:
    build_t5(tmp_path / "t5", ("a", "red", "blue", "ball"))
    encoder = T5Encoder(tmp_path / "t5")
    captions = ["A red ball.", "A blue ball. " * 20, "A ball.", "a red", "blue"]
    whole = encoder.encode(captions)
    limit(encoder.model, 2)
    parts = encoder.encode(captions)
    assert len(parts) == len(whole)
    for part, expected in zip(parts, whole):
        assert part.truncated == expected.truncated
        np.testing.assert_allclose(part.embedding.astype(np.float32), expected.embedding.astype(np.float32), atol=1e-3)


def test_dwpose_gives_the_same_joints_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = DWPose(ASSETS / "demo_yolox.onnx", ASSETS / "demo_dw_ll.onnx")
    images = np.stack([np.asarray(draw_figure(3, index, 128).image.resize((128, 128))) for index in range(5)])
    whole = encoder.detect(images)
    assert sum(pose.persons for pose in whole) >= 4
    for network in (encoder._detector, encoder._pose):
        run = network.run

        def full(inputs: np.ndarray, run: Callable = run) -> list[np.ndarray]:
            if len(inputs) > 1:
                raise torch.OutOfMemoryError
            return run(inputs)

        monkeypatch.setattr(network, "run", full)
    for part, expected in zip(encoder.detect(images), whole):
        np.testing.assert_allclose(part.keypoints, expected.keypoints, atol=1e-4)
        np.testing.assert_allclose(part.boxes, expected.boxes, atol=1e-4)
    assert encoder.memory.limit == 1


def test_a_worker_reports_what_it_had_to_do(tmp_path: Path) -> None:
    """The unit is committed as ever, and its record for log and user says that batches were halved."""
    write_figures(tmp_path / "figures", 6, size=96, seed=2, short_captions=True, workers=1)
    config = PrepConfig(
        source=str(tmp_path / "figures"), output=str(tmp_path / "dataset"), base=64, encoders="demo", layers=["dino"]
    )
    plan = make_plan(config)
    worker = LayerWorker(config)
    done: list[dict] = []
    for task in plan.tasks(("px", "dino")):
        worker.run(ShardTask(task.bucket, task.shard, task.sources, {"px": task.recipes["px"]}))
        if not done:
            encoder = build_encoder(config, "dino", "cpu")
            limit(encoder.model, 1)
            worker._encoders["dino"] = encoder
        done += worker.run(task)
    notes = [unit["note"] for unit in done if "note" in unit]
    assert len(notes) == 1
    assert "DINO: batches of" in notes[0]
    for unit in plan.recipes:
        assert read_part(config.output, unit) is not None
