"""Sources that are gone, replaced or changed during a run, and samples that are tried again; all without Ray."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from nanodit.errors import DataError
from prep.config import PrepConfig
from prep.dataset.layout import Unit, read_members, read_part
from prep.dataset.reader import Dataset
from prep.doctor.places import source_checks
from prep.encoders.demo import ASSETS, DETECTOR, POSE
from prep.images import scan, scan_cache
from prep.images.sources import BadImage
from prep.passes.layers import LayerWorker
from prep.passes.plan import Plan, make_plan, read_manifest, remaining, write_manifest
from prep.passes.publish import publish
from prep.run import current_parts
from tests.prep.passes.test_plan import config, write_images

NETWORKS = {"detector": str(ASSETS / DETECTOR), "pose": str(ASSETS / POSE)}


def compute(plan: Plan) -> None:
    """Commit what is missing, as a run does."""
    write_manifest(plan)
    worker = LayerWorker(plan.config)
    for task in plan.tasks(plan.config.active_layers):
        worker.run(task)


def prepare(settings: PrepConfig, **options: bool) -> Dataset:
    """A run of one process."""
    plan = make_plan(settings, **options)
    write_manifest(plan)
    while plan.missing:
        compute(plan)
        plan = remaining(plan)
    publish(plan, current_parts(plan), "runs/rejects.parquet")
    return Dataset(settings.output)


def poses(tmp_path: Path, **changes) -> PrepConfig:
    """Pixels and poses alone: what starts fastest."""
    return config(tmp_path, layers=["pose"], encoders="production", pose=NETWORKS, **changes)


def sources_of(dataset: Dataset) -> set[str]:
    return {row["source"] for row in dataset.rows()}


def rejects_of(root: Path) -> dict[str, tuple[str, str]]:
    return {row["source"]: (row["stage"], row["reason"]) for row in pq.read_table(root / "rejects.parquet").to_pylist()}


def image(number: int) -> str:
    return f"image-{number:03d}.png"


def test_a_published_image_is_there_whatever_its_suffix(tmp_path, monkeypatch):
    write_images(tmp_path / "source", 3)
    for number, name in enumerate(("photo v1.5", "2019.07.12")):
        (tmp_path / "source" / image(number)).rename(tmp_path / "source" / name)
    settings = poses(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(scan, "is_image_name", lambda name: True)  # once content alone decided
        prepare(settings)
    write_images(tmp_path / "source", 1, first=9)
    (tmp_path / "source" / image(9)).rename(tmp_path / "source" / "new.12")
    plan = make_plan(settings)
    assert {source.name for source in plan.sources.values()} == {"photo v1.5", "2019.07.12", image(2)}
    assert (plan.missing, [line for line in plan.notes if "gone" in line]) == ({}, [])
    assert any("1 other file ignored: 1 .12" in line for line in plan.notes)
    assert len(make_plan(settings, prune=True).sources) == 3
    assert source_checks(settings)[1] == 3


# --- gone, renamed, replaced ------------------------------------------------------------------------------------------


def test_a_sample_whose_source_is_gone_stays_and_prune_drops_it(tmp_path):
    write_images(tmp_path / "source", 6)
    before = prepare(poses(tmp_path))
    (tmp_path / "source" / image(2)).unlink()
    plan = make_plan(poses(tmp_path))
    assert plan.missing == {}
    assert plan.explain()[0] == "1 sources are gone; --prune drops their samples"
    after = prepare(poses(tmp_path))
    assert after.fingerprint == before.fingerprint
    assert sources_of(after) == {image(number) for number in range(6)}

    plan = make_plan(poses(tmp_path), prune=True)
    assert plan.explain()[0] == "1 sources are gone: their samples are dropped"
    assert {unit.layer for unit in plan.missing} == {"px", "pose"}
    assert len(plan.missing) == 2  # one shard
    pruned = prepare(poses(tmp_path), prune=True)
    assert sources_of(pruned) == {image(number) for number in range(6)} - {image(2)}
    assert len(read_manifest(tmp_path / "out")) == 5
    kept = {row["key"]: row["split"] for row in pruned.rows()}
    assert kept.items() <= {row["key"]: row["split"] for row in before.rows()}.items()  # trap 10
    assert make_plan(poses(tmp_path)).notes == []


def test_a_renamed_source_is_not_gone(tmp_path):
    write_images(tmp_path / "source", 3)
    prepare(poses(tmp_path))
    (tmp_path / "source" / image(1)).rename(tmp_path / "source" / "renamed.png")
    plan = make_plan(poses(tmp_path))
    assert (plan.missing, plan.notes) == ({}, [])
    assert sources_of(prepare(poses(tmp_path))) == {image(0), "renamed.png", image(2)}


def test_another_content_under_the_same_name_replaces_the_sample(tmp_path):
    write_images(tmp_path / "source", 4)
    old = prepare(poses(tmp_path))
    write_images(tmp_path / "source", 1, first=9)
    (tmp_path / "source" / image(9)).rename(tmp_path / "source" / image(1))
    plan = make_plan(poses(tmp_path))
    assert plan.notes == ["1 sources have new content: their samples are replaced"]
    new = prepare(poses(tmp_path))
    assert sources_of(new) == sources_of(old)
    assert len({row["key"] for row in old.rows()} - {row["key"] for row in new.rows()}) == 1


def test_what_was_never_made_is_dropped_without_a_word(tmp_path):
    write_images(tmp_path / "source", 4)
    (tmp_path / "out").mkdir()
    write_manifest(make_plan(poses(tmp_path)))
    (tmp_path / "source" / image(1)).unlink()
    plan = make_plan(poses(tmp_path))
    assert len(plan.sources) == 3
    assert plan.notes == []


def test_pixels_that_cannot_be_made_again_are_announced_and_rejected_and_come_back_with_the_file(tmp_path):
    write_images(tmp_path / "source", 6)
    prepare(poses(tmp_path))
    first = make_plan(poses(tmp_path))
    place, keys = next((place, keys) for place, keys in first.shards.items() if len(keys) == 3)
    gone, *_ = (first.sources[key].name for key in keys)
    data = (tmp_path / "source" / gone).read_bytes()
    (tmp_path / "source" / gone).unlink()
    (tmp_path / "out" / Unit(*place, "px").tar).unlink()
    notes = make_plan(poses(tmp_path)).notes
    assert notes[0] == "1 sources are gone; --prune drops their samples"
    assert notes[1].startswith("warning: 1 of them will be lost (source_gone)")
    assert len(prepare(poses(tmp_path))) == 5
    assert rejects_of(tmp_path / "out") == {gone: ("px", "source_gone")}
    assert make_plan(poses(tmp_path)).missing == {}

    (tmp_path / "source" / gone).write_bytes(data)
    plan = make_plan(poses(tmp_path))
    assert plan.missing == {Unit(*place, "px"): "a source that had changed, or could not be read, is back"}
    assert plan.again == [Unit(*place, "px")]
    assert len(prepare(poses(tmp_path))) == 6
    assert rejects_of(tmp_path / "out") == {}


def text_only(plan: Plan) -> None:
    """Commit pixels and captions, not the features of captions."""
    write_manifest(plan)
    worker = LayerWorker(plan.config)
    for task in plan.tasks(("px", "text")):
        worker.run(task)


def test_captions_outlive_their_image_and_sidecar(tmp_path):
    write_images(tmp_path / "source", 3)
    text_only(make_plan(config(tmp_path)))
    for suffix in (".png", ".txt"):
        (tmp_path / "source" / f"image-001{suffix}").unlink()
    plan = make_plan(config(tmp_path))
    assert {unit.layer for unit in plan.missing} == {"t5"}
    assert plan.notes == ["1 sources are gone; --prune drops their samples"]
    (tmp_path / "source" / "image-000.txt").write_text("Another caption.")
    plan = make_plan(config(tmp_path))
    assert {unit.layer for unit in plan.missing} == {"text", "t5"}
    text_only(plan)
    (part,) = [read_part(tmp_path / "out", unit) for unit in plan.recipes if unit.layer == "text"]
    captions = ["Another caption.", "Picture number 1.", "Picture number 2."]
    assert (sorted(part.table["caption"].to_pylist()), part.rejects) == (captions, ())
    (unit,) = [unit for unit in plan.recipes if unit.layer == "text"]
    texts = [data.decode() for _, data in read_members(tmp_path / "out", part, "txt")]
    assert sorted(texts) == captions
    (tmp_path / "out" / unit.part).unlink()  # now nothing knows it any more
    (reject,) = make_plan(config(tmp_path)).expected
    assert (reject.source, reject.reason) == (image(1), "source_gone")


# --- changed during the run (P16) -------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["replaced", "deleted"])
def test_p16_an_image_that_changes_during_the_run_is_refused(tmp_path, change):
    write_images(tmp_path / "source", 4)
    path = tmp_path / "source" / image(1)
    data, other = path.read_bytes(), (tmp_path / "source" / image(3)).read_bytes()
    plan = make_plan(poses(tmp_path))
    path.unlink()
    if change == "replaced":
        path.write_bytes(other + b"\0")
    compute(plan)
    publish(plan, current_parts(plan), "runs/rejects.parquet")
    assert rejects_of(tmp_path / "out") == {image(1): ("px", "changed_during_run")}
    assert sources_of(Dataset(tmp_path / "out")) == {image(0), image(2), image(3)}

    path.write_bytes(data)  # as it was: the same command takes it in
    assert len(prepare(poses(tmp_path))) == 4
    assert rejects_of(tmp_path / "out") == {}


@pytest.mark.parametrize("change", ["replaced", "deleted"])
def test_p16_a_caption_that_changes_during_the_run_is_refused(tmp_path, change):
    write_images(tmp_path / "source", 3)
    path = tmp_path / "source" / "image-001.txt"
    plan = make_plan(config(tmp_path))
    path.unlink()
    if change == "replaced":
        path.write_text("The caption of another picture.")
    text_only(plan)
    (unit,) = [unit for unit in plan.recipes if unit.layer == "text"]
    part = read_part(tmp_path / "out", unit)
    assert [reject.reason for reject in part.rejects] == ["changed_during_run"]
    assert sorted(part.table["caption"].to_pylist()) == ["Picture number 0.", "Picture number 2."]  # nothing stale

    path.write_text("Picture number 1.")
    plan = make_plan(config(tmp_path))
    assert unit in plan.again
    text_only(plan)
    assert len(read_part(tmp_path / "out", unit).table) == 3


def test_p16_a_change_that_the_scan_did_not_notice_is_refused_and_noticed_next_time(tmp_path, monkeypatch):
    """The file system gave a changed file the old times: the px layer sees it, and the scan reads the file again."""
    monkeypatch.setattr(scan_cache, "SETTLED", -3600.0)
    write_images(tmp_path / "source", 3)
    write_manifest(make_plan(poses(tmp_path)))  # a dataset that was begun: what the scan sees is kept
    old = make_plan(poses(tmp_path))
    path, cache = tmp_path / "source" / image(1), tmp_path / "out" / scan_cache.NAME
    path.write_bytes(path.read_bytes() + b"\0")
    table, stat = pq.read_table(cache), path.stat()
    stamp = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns}
    rows = [row | stamp if row["name"] == image(1) else row for row in table.to_pylist()]
    pq.write_table(table.from_pylist(rows, schema=table.schema), cache)
    plan = make_plan(poses(tmp_path))
    assert plan.sources == old.sources
    compute(plan)
    publish(plan, current_parts(plan), "runs/rejects.parquet")
    assert rejects_of(tmp_path / "out") == {image(1): ("px", "changed_during_run")}
    assert make_plan(poses(tmp_path)).again == []  # not for ever
    assert sources_of(prepare(poses(tmp_path))) == {image(number) for number in range(3)}
    assert rejects_of(tmp_path / "out") == {}


# --- tried again ------------------------------------------------------------------------------------------------------


def test_rejects_are_final_until_somebody_asks(tmp_path, monkeypatch):
    write_images(tmp_path / "source", 5)
    from prep.passes import layers

    real = layers.load_canonical

    def failing(folder, source, *arguments):
        if source.name == image(1):
            raise BadImage("out_of_memory", "the worker ran out of memory")
        return real(folder, source, *arguments)

    monkeypatch.setattr(layers, "load_canonical", failing)
    assert len(prepare(poses(tmp_path))) == 4
    monkeypatch.setattr(layers, "load_canonical", real)
    assert make_plan(poses(tmp_path)).missing == {}
    plan = make_plan(poses(tmp_path), retry_rejects=True)
    assert list(plan.missing.values()) == ["what it refused is tried again"]
    assert plan.again == list(plan.missing)
    assert (tmp_path / "out" / plan.again[0].part).exists()  # the plan deletes nothing
    assert len(prepare(poses(tmp_path), retry_rejects=True)) == 5  # and poses follow the pixels

    decided = poses(tmp_path, filters={"min_persons": 1})
    with pytest.raises(DataError, match=r"nothing was accepted.*5 too_few_persons"):
        prepare(decided)
    assert make_plan(decided, retry_rejects=True).missing == {}  # what the config refuses is no failure


def test_a_layer_follows_when_its_upstream_got_other_samples(tmp_path):
    write_images(tmp_path / "source", 3)
    prepare(poses(tmp_path))
    plan = make_plan(poses(tmp_path))
    (unit,) = [unit for unit in plan.recipes if unit.layer == "pose"]
    worker = LayerWorker(plan.config)
    (tmp_path / "out" / unit.part).unlink()
    task = make_plan(poses(tmp_path)).tasks(("pose",))[0]
    monkeyed = [task.sources[0].key]
    worker._wanted = lambda job, writer, items, key: (item for item in items if key(item) not in monkeyed)
    worker.run(task)
    plan = make_plan(poses(tmp_path))
    assert plan.missing == {unit: "the px layer has other samples now"}
    assert len(prepare(poses(tmp_path))) == 3
