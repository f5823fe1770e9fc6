"""Crops on their way into an encoder: decoded once, prepared beside the device, the bytes and the blame as ever."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prep.dataset.codecs import decode_pixels, encode_pixels
from prep.dataset.layout import Unit, read_part
from prep.encoders.halving import Halving
from prep.figures.figures import write_figures
from prep.passes import crops
from prep.passes.crops import CropCache, decode_freely, encode_beside
from prep.passes.layers import LayerWorker, ShardTask
from prep.passes.plan import make_plan
from prep.passes.supervisor import Supervisor
from tests.forked import fork_modules
from tests.prep.passes.test_plan import config, write_images

LAYERS = ("px", "text", "t5", "dino", "pose")


def bytes_of(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for folder in ("parts", "bucket_*")
        for path in root.glob(f"{folder}/*")
    }


def compute(settings, layers=LAYERS, **arguments) -> dict[str, bytes]:
    worker = LayerWorker(settings, **arguments)
    for task in make_plan(settings).tasks(layers):
        worker.run(task)
    return bytes_of(Path(settings.output))


@pytest.fixture
def decodes(monkeypatch) -> list[int]:
    """The sizes of the crops' files that are decoded."""
    found: list[int] = []
    decode = crops.decode_pixels
    monkeypatch.setattr(crops, "decode_pixels", lambda data: found.append(len(data)) or decode(data))
    monkeypatch.setattr(crops.decode_batch, "__defaults__", (crops.decode_pixels,))
    return found


# --- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"flips": True, "image": {"format": "jpeg"}}], ids=["webp", "jpeg and flips"])
def test_neither_threads_nor_known_crops_change_a_byte(tmp_path, monkeypatch, changes):
    write_figures(tmp_path / "source", 24, size=96, seed=5, short_captions=True, workers=1)
    more = {"layers": ["text", "dino", "pose"], "shard_size": 10, "dino": {"batch_size": 4}, **changes}
    settings = config(tmp_path, pose={"batch_size": 3}, **more)

    def into(folder: str):
        return settings.model_copy(update={"output": str(tmp_path / folder)})

    monkeypatch.setattr(CropCache, "keep", lambda *arguments: None)
    before = compute(into("before"))
    monkeypatch.undo()
    assert len(before) >= 2 * len(LAYERS)
    assert compute(into("known")) == before
    assert compute(into("threads"), threads=3) == before


def test_webp_is_decoded_alike_by_both_decoders():
    pixels = np.random.default_rng(0).integers(0, 256, (96, 64, 3), dtype=np.uint8)
    for member in ("webp", "jpg"):
        data = encode_pixels(pixels, member)
        np.testing.assert_array_equal(decode_freely(data), decode_pixels(data))
    np.testing.assert_array_equal(decode_freely(encode_pixels(pixels, "webp")), pixels)


# --- decoded once -----------------------------------------------------------------------------------------------------


def test_dino_and_pose_share_one_decode_of_each_crop(tmp_path, decodes):
    write_images(tmp_path / "source", 7)
    settings = config(tmp_path, layers=["dino", "pose"], shard_size=4)
    compute(settings, ("px",))
    compute(settings, ("dino", "pose"))
    assert len(decodes) == 7


def test_a_worker_that_makes_the_crops_decodes_none_but_jpeg(tmp_path, decodes):
    write_images(tmp_path / "source", 4)
    compute(config(tmp_path, layers=["dino", "pose"]))
    assert decodes == []
    lossy = config(tmp_path, layers=["dino", "pose"], image={"format": "jpeg"})
    compute(lossy.model_copy(update={"output": str(tmp_path / "lossy")}))
    assert len(decodes) == 4  # what is stored is not what was cropped


def test_known_crops_are_those_of_one_unit_and_take_bounded_memory():
    cache, crop = CropCache(limit=2500), np.zeros((10, 100), np.uint8)
    cache.open("unit")
    for key in "abcb":
        cache.keep(key, crop)
    assert sorted(cache.known()) == ["a", "b"]  # the first ones: the next layer begins with them
    cache.open("unit")
    assert len(cache.known()) == 2
    cache.open("other")
    assert not cache.known()


# --- beside the device ------------------------------------------------------------------------------------------------


def files(count: int, size: int = 2) -> list[list[tuple[str, bytes]]]:
    keyed = [(f"{n}", encode_pixels(np.full((8, 8, 3), n, np.uint8), "webp")) for n in range(count)]
    return [keyed[start : start + size] for start in range(0, count, size)]


def test_the_next_batch_is_prepared_while_the_device_computes():
    """The device gives the first batch back only when the second one has been decoded."""
    second, memory = threading.Event(), Halving("a device", "cuda")

    def on_device(images: np.ndarray) -> list[int]:
        assert images[0, 0, 0, 0] or second.wait(20), "the second batch waits for the first"
        return [int(image[0, 0, 0]) for image in images]

    def encode(images: np.ndarray) -> list[int]:
        if images[0, 0, 0, 0] == 2:
            second.set()
        return [value for part in memory.run(on_device, images) for value in part]

    told: list[list[str]] = []
    with ThreadPoolExecutor(2) as pool:
        results = list(encode_beside(files(5), encode, pool, 2, told.append))
    assert [keys for keys, _, _ in results] == [["0", "1"], ["2", "3"], ["4"]]
    assert [list(values) for _, _, values in results] == [[0, 1], [2, 3], [4]]
    assert told == [["0", "1"], ["0", "1", "2", "3"], ["2", "3"], ["2", "3", "4"], ["4"], []]


def test_a_gpu_computes_one_batch_at_a_time_in_one_thread():
    memory, inside, seen = Halving("a device", "cuda:0"), [], set()

    def on_device(batch: list[int]) -> list[int]:
        inside.append(1)
        assert len(inside) == 1, "two batches at a time"
        seen.add(threading.get_ident())
        time.sleep(0.01)
        inside.pop()
        return batch

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda n: list(memory.run(on_device, [n])), range(8)))
    assert results == [[[n]] for n in range(8)]
    assert len(seen) == 1


def test_an_error_waits_for_what_is_at_work():
    """Samples are tried one by one next, and nothing else may end the process then."""
    running: list[int] = []

    def encode(images: np.ndarray) -> list[int]:
        if images[0, 0, 0, 0] == 0:
            raise ValueError("the first batch")
        running.append(1)
        time.sleep(0.2)
        running.pop()
        return [0] * len(images)

    told: list[list[str]] = []
    with ThreadPoolExecutor(3) as pool:
        with pytest.raises(ValueError, match="the first batch"):
            list(encode_beside(files(6), encode, pool, 3, told.append))
        assert not running
    assert {"0", "1"} <= set(told[-1])  # the suspects are still named


@pytest.mark.parametrize(("action", "reason"), [("segfault", "crashes_worker"), ("hang", "hangs_worker")])
def test_a_crop_that_ends_a_thread_of_a_worker_is_found(tmp_path, monkeypatch, action, reason):
    fork_modules(monkeypatch)
    write_images(tmp_path / "source", 9)
    settings = config(tmp_path, layers=["dino"], shard_size=9, dino={"batch_size": 2}, sample_timeout=1)
    compute(settings, ("px",))
    (task,) = make_plan(settings).tasks(("dino",))
    poison = task.sources[3].key
    monkeypatch.setenv("NANODIT_FAULT", f"crop.decode@{poison}:{action}")
    supervisor = Supervisor(settings, threads=3)
    try:
        (done,) = supervisor.run(ShardTask(task.bucket, task.shard, task.sources, task.recipes))
    finally:
        supervisor.close()
    part = read_part(tmp_path / "out", Unit(task.bucket, task.shard, "dino"))
    assert {reject.key: reject.reason for reject in part.rejects} == {poison: reason}
    assert part.table.num_rows == 8
    assert len(done["deaths"]) == 1


def test_images_of_another_mode_stay_what_they_were(tmp_path):
    """A grey source becomes an RGB crop before it is kept, as when it is read again."""
    (tmp_path / "source").mkdir()
    for number in range(3):
        grey = np.random.default_rng(number).integers(0, 256, (64, 80), dtype=np.uint8)
        Image.fromarray(grey).save(tmp_path / "source" / f"{number}.png")
    settings = config(tmp_path, layers=["dino"])
    together = compute(settings)
    apart = settings.model_copy(update={"output": str(tmp_path / "apart")})
    compute(apart, ("px",))
    assert compute(apart, ("dino",)) == together
