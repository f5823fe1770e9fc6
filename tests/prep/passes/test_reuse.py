"""A mended caption computes the T5 batch that holds it, and nothing else; the bytes are those of a run from nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from prep.config import PrepConfig
from prep.dataset.layout import Unit, read_part
from prep.passes.layers import Job, LayerWorker
from prep.passes.plan import make_plan
from tests.prep.passes.test_plan import config, write_images

IMAGES, BATCH = 10, 4


@pytest.fixture(params=[False, True], ids=["plain", "flips"])
def settings(tmp_path: Path, request: pytest.FixtureRequest) -> PrepConfig:
    write_images(tmp_path / "source", IMAGES)
    for number, path in enumerate(sorted((tmp_path / "source").glob("*.txt"))):
        path.write_text(f"A picture with the number {number} and a red ball on the left.")
    return config(tmp_path, layers=["text"], shard_size=IMAGES, t5={"batch_size": BATCH}, flips=request.param)


def encoded(settings: PrepConfig, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Compute what is missing, and return the batches of captions that the encoder was given."""
    worker, batches = LayerWorker(settings), []
    for task in make_plan(settings).tasks(settings.active_layers):
        with monkeypatch.context() as patch:
            if "t5" in task.recipes:
                encoder = worker._encoder(Job(task, "t5"))
                encode = encoder.encode
                patch.setattr(
                    encoder, "encode", lambda texts, encode=encode: batches.append(list(texts)) or encode(texts)
                )
            worker.run(task)
    return batches


def unit_of(settings: PrepConfig) -> Unit:
    (place,) = make_plan(settings).shards
    return Unit(*place, "t5")


def files(settings: PrepConfig) -> tuple[bytes, bytes]:
    """Return the tar and the index part."""
    unit = unit_of(settings)
    return tuple((Path(settings.output) / name).read_bytes() for name in (unit.tar, unit.part))


def mend(settings: PrepConfig, position: int) -> str:
    """Rewrite the caption of the image whose key is at a position of the shard; returns the new caption."""
    plan = make_plan(settings)
    (keys,) = plan.shards.values()
    path = Path(settings.source, plan.sources[keys[position]].name).with_suffix(".txt")
    text = (
        "Somebody looked at the picture and wrote down what is in it: two chairs, a blue ball and a dog on the right."
    )
    path.write_text(text)
    return text


def test_one_batch_is_computed_and_the_tar_is_that_of_a_run_from_nothing(
    settings: PrepConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = encoded(settings, monkeypatch)
    assert sum(map(len, first)) == IMAGES * (1 + settings.flips)
    before, text = files(settings), mend(settings, 5)
    batches = encoded(settings, monkeypatch)
    assert len(batches) == 1 + settings.flips
    assert len(batches[0]) == BATCH
    assert text in batches[0]
    fresh = settings.model_copy(update={"output": str(tmp_path / "fresh")})
    encoded(fresh, monkeypatch)
    assert files(settings) == files(fresh) != before


def test_nothing_is_taken_from_another_encoder_or_from_a_damaged_tar(
    settings: PrepConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded(settings, monkeypatch)
    mend(settings, 5)
    shorter = settings.model_copy(update={"t5": settings.t5.model_copy(update={"max_tokens": 5})})
    assert len(encoded(shorter, monkeypatch)) == 3 * (1 + settings.flips)
    encoded(settings, monkeypatch)
    mend(settings, 1)
    part = read_part(settings.output, unit_of(settings))
    place = part.table["t5/t5.npy/offset"][9].as_py()  # in the third batch; the caption is in the first
    path = Path(settings.output) / part.unit.tar
    data = bytearray(path.read_bytes())
    data[place + 200] ^= 1
    path.write_bytes(data)
    assert len(encoded(settings, monkeypatch)) == 2 * (1 + settings.flips)


def test_a_unit_that_records_no_batches_is_computed_whole(
    settings: PrepConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prep.passes.layers.inputs_hash", lambda batch: "of another version")
    encoded(settings, monkeypatch)
    monkeypatch.undo()
    mend(settings, 5)
    assert len(encoded(settings, monkeypatch)) == 3 * (1 + settings.flips)
