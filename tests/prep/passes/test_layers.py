"""The computation of layers: one decode of every source, batches within a shard, one model for all."""

import pytest

from nanodit.errors import ConfigError
from prep.dataset.layout import Unit, read_part
from prep.images import sources
from prep.passes.layers import Job, LayerWorker, ShardTask
from prep.passes.plan import make_plan
from tests.prep.passes.test_plan import config, write_images


def test_trap_06_every_source_is_decoded_once(tmp_path, monkeypatch):
    """Pixels are decoded for the first layer; the others read its crops, and need the sources no more."""
    write_images(tmp_path / "source", 4)
    settings = config(tmp_path, layers=["text", "dino", "pose"], shard_size=4)
    (task,) = make_plan(settings).tasks(settings.active_layers)
    decoded = []
    decode = sources.decode
    monkeypatch.setattr(sources, "decode", lambda *arguments: decoded.append(1) or decode(*arguments))
    worker = LayerWorker(settings)
    worker.run(ShardTask(task.bucket, task.shard, task.sources, {"px": task.recipes["px"]}))
    assert len(decoded) == 4  # trap 6
    for source in task.sources:
        (tmp_path / "source" / source.name).unlink()
    worker.run(task)
    assert len(decoded) == 4
    for layer in settings.active_layers:
        assert read_part(tmp_path / "out", Unit(task.bucket, task.shard, layer)).table.num_rows == 4


def test_encoders_work_in_batches_that_do_not_span_shards(tmp_path, monkeypatch):
    write_images(tmp_path / "source", 7)
    settings = config(tmp_path, layers=["dino"], shard_size=5, dino={"batch_size": 2})
    plan = make_plan(settings)
    tasks = plan.tasks(settings.active_layers)
    worker = LayerWorker(settings)
    sizes = []
    encoder = worker._encoder(Job(tasks[0], "dino"))
    encode = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda images: sizes.append(len(images)) or encode(images))
    for task in tasks:
        worker.run(task)
    assert sizes == [2, 2, 1, 2]  # trap 6: batches, and five and two images in two shards


def test_a_worker_with_another_model_than_the_plan_refuses(tmp_path):
    """Features of two models must never meet in a layer, wherever a worker found its model."""
    write_images(tmp_path / "source", 2)
    settings = config(tmp_path, layers=["dino"])
    (task,) = make_plan(settings).tasks(settings.active_layers)
    other = settings.model_copy(update={"dino": settings.dino.model_copy(update={"input_scale": 2.0})})
    with pytest.raises(ConfigError, match="the dino encoder of this worker is"):
        LayerWorker(other).run(task)
    assert read_part(tmp_path / "out", Unit(task.bucket, task.shard, "px")) is not None
    assert read_part(tmp_path / "out", Unit(task.bucket, task.shard, "dino")) is None
