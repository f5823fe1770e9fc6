"""What a run would take: sizes against real tars, rates from logs, and the refusal of what cannot fit."""

from __future__ import annotations

import json
from collections import namedtuple
from pathlib import Path

import pytest

from nanodit.errors import ResourceError
from nanodit.storage import open_storage
from prep.captions.cache import CaptionCache
from prep.config import PrepConfig
from prep.dataset.layers import LAYERS
from prep.passes import cost
from prep.passes.cost import (
    bytes_needed,
    check_room,
    estimate,
    estimated_rate,
    foreseen_times,
    measured_rates,
    pass_times,
    sample_bytes,
    table,
)
from prep.passes.layers import LayerWorker
from prep.passes.nodes import Node
from prep.passes.placement import Pass, plan_passes
from prep.passes.plan import make_plan, write_manifest
from tests.prep.passes.test_plan import config, pretend_committed, write_images

LAPTOP = Node("id", "127.0.0.1", "laptop", 2, driver=True, memory_gb=16)


def full_size(**changes) -> PrepConfig:
    return PrepConfig(source="photos", output="dataset", **changes)


def log(settings: PrepConfig, number: int, *units: dict) -> None:
    folder = Path(settings.output) / "runs" / f"{number:04d}"
    folder.mkdir(parents=True)
    events = [{"event": "start"}, *({"event": "shard", "units": [unit]} for unit in units)]
    lines = [json.dumps(event) for event in events]
    folder.joinpath("log.jsonl").write_text("\n".join([*lines, '{"event": "sha']), encoding="utf-8")  # killed


def lines_of(settings: PrepConfig) -> dict[str, cost.CostLine]:
    plan = make_plan(settings)
    steps, _ = plan_passes(settings, [LAPTOP], {unit.layer for unit in plan.missing})
    return {line.layer: line for line in estimate(plan, steps, settings.output)}


def test_a_full_sample_takes_what_was_measured_on_photographs():
    sizes = {layer: sample_bytes(full_size(), layer, "1024x1024") / 1e6 for layer in full_size().active_layers}
    assert sizes["px"] == pytest.approx(1.03, rel=0.01)
    assert sizes["t5"] == pytest.approx(0.45, rel=0.01)
    assert sizes["dino"] == pytest.approx(1.08, rel=0.02)
    assert sum(sizes.values()) <= 2.7
    assert sample_bytes(full_size(image={"format": "jpeg"}), "px", "1024x1024") < 0.42e6
    assert sample_bytes(full_size(dino={"input_scale": 1.0}), "dino", "1024x1024") == pytest.approx(4.33e6, rel=0.01)


def test_estimates_of_the_features_agree_with_real_tars(tmp_path):
    write_images(tmp_path / "source", 40)
    settings = config(tmp_path, layers=["dino", "pose"], shard_size=40)
    plan = make_plan(settings)
    write_manifest(plan)
    expected = {layer: sample_bytes(settings, layer, "80x56") * 40 for layer in ("dino", "pose")}
    for task in plan.tasks(settings.active_layers):
        LayerWorker(settings).run(task)
    after = make_plan(settings)
    assert not after.missing
    for unit, part in after.parts.items():
        if unit.layer in expected:
            # a tar ends with 1 kB of zeros and is filled up to 10 kB
            assert expected[unit.layer] == pytest.approx(part.tar_bytes, rel=0.05, abs=12 << 10)


def test_only_what_is_missing_is_estimated_and_says_why(tmp_path):
    write_images(tmp_path / "source", 7)
    settings = config(tmp_path)
    pretend_committed(settings)
    assert lines_of(settings) == {}
    assert table([]) == ["nothing to compute: every layer of every shard is current"]
    (tmp_path / "source" / "image-000.txt").write_text("Something else.")
    lines = lines_of(settings)
    assert set(lines) == {"text", "t5"}
    assert (lines["text"].shards, lines["text"].samples, lines["text"].why) == (1, 3, "changed: captions")
    assert lines["t5"].why == "changed: text layer"
    text = table(list(lines.values()), 12.3)
    assert text[0].split()[:4] == ["layer", "shards", "samples", "on"]
    assert "2 x CPU" in text[1]
    assert "(estimate)" in text[1]
    assert text[-1].startswith("total")
    assert text[-1].endswith("12.3 GB free at the output")


def test_rates_of_earlier_runs_replace_the_built_in_ones(tmp_path):
    write_images(tmp_path / "source", 6)
    settings = config(tmp_path)
    guess = lines_of(settings)["px"]
    assert "seconds" not in guess.measured
    log(settings, 1, {"layer": "px", "samples": 30, "seconds": 10.0, "device": "cpu"})
    log(settings, 2, {"layer": "px", "samples": 10, "seconds": 10.0, "device": "cpu"})
    line = lines_of(settings)["px"]
    assert line.seconds == pytest.approx(6 / 2 / 2)  # two samples a second, two workers, one shard each
    assert "seconds" in line.measured
    assert table([line])[1].split()[:7] == ["px", "2", "6", "2", "x", "CPU", "2s"]
    assert table([line])[1].count("(estimate)") == 1  # the size
    # what a GPU does says nothing about a CPU
    log(settings, 3, {"layer": "t5", "samples": 1000, "seconds": 1.0, "device": "cuda"})
    assert "seconds" not in lines_of(settings)["t5"].measured
    assert measured_rates(open_storage(settings.output))["t5", "cuda"] == 1000


def test_sizes_of_current_units_replace_the_built_in_ones(tmp_path):
    write_images(tmp_path / "source", 3)
    settings = config(tmp_path)
    plan = make_plan(settings)
    write_manifest(plan)
    for task in plan.tasks(("px", "text")):
        LayerWorker(settings).run(task)
    write_images(tmp_path / "source", 3, first=3)
    lines = lines_of(settings)
    written = next(Path(settings.output).glob("bucket_*/*.px.tar")).stat().st_size
    assert lines["px"].samples == 3
    assert lines["px"].gb * 1e9 == pytest.approx(written)
    assert "gb" in lines["px"].measured
    assert "gb" not in lines["t5"].measured


def test_rates_follow_the_size_the_scale_and_the_share_of_a_card():
    cpu, whole = Pass(("px",), "cpu", 1), Pass(("dino",), "cuda", 1, gpus=1.0)
    half = Pass(("dino",), "cuda", 2, gpus=0.5)
    assert estimated_rate(full_size(base=512), "px", cpu) == 4 * estimated_rate(full_size(), "px", cpu)
    full = full_size(dino={"input_scale": 1.0})
    assert estimated_rate(full, "dino", whole) == estimated_rate(full_size(), "dino", whole) / 4
    assert estimated_rate(full_size(), "dino", half) == estimated_rate(full_size(), "dino", whole) / 2


def test_a_gpu_is_no_faster_than_the_cpus_beside_it():
    record = LAYERS["pose"].encoder
    assert record.beside_ms > 0
    assert LAYERS["dino"].encoder.beside_ms > 0
    few, many = (Pass(("pose",), "cuda", 1, cpus=cpus, gpus=1.0) for cpus in (0.1, 8.0))
    assert estimated_rate(full_size(), "pose", few) == pytest.approx(0.1 * 1000 / record.beside_ms)
    assert estimated_rate(full_size(base=512), "pose", few) == pytest.approx(
        min(25.0, 4 * 0.1 * 1000 / record.beside_ms)
    )
    assert estimated_rate(full_size(), "pose", many) == LAYERS["pose"].rates["cuda"]


def test_each_pass_says_its_device_and_its_time(tmp_path):
    """A layer that fits no card is on CPUs, and the line of its pass says how long that takes."""
    write_images(tmp_path / "source", 6)
    settings = config(
        tmp_path, layers=["text", "dino"], captions={"backend": "ollama", "digest": "d" * 64, "overwrite": True}
    )
    plan = make_plan(settings)
    card = Node("id", "127.0.0.1", "laptop", 2, 1, 8, driver=True, memory_gb=16)
    steps, _ = plan_passes(settings, [card])
    lines = estimate(plan, steps, settings.output)
    assert pass_times(lines, steps) == [
        "pass 1 of 4: px 0s (estimate) on 2 x CPU",
        "pass 2 of 4: dino 0s (estimate) on 2 x GPU",
        "pass 3 of 4: text 45s (estimate) on 1 x caption slot",
        "pass 4 of 4: t5 0s (estimate) on 2 x GPU",
    ]
    assert pass_times(lines[:1], steps[:1]) == []  # the table's total says it
    full, small = full_size(layers=["dino", "pose"]), Node("id", "127.0.0.1", "laptop", 8, 1, 2, memory_gb=64)
    steps, remarks = plan_passes(full, [small])
    cpus, gpu = foreseen_times(full, steps, 10_000)
    assert [step.device for step in steps] == ["cpu", "cuda"]
    assert any("pose needs" in remark and "runs on CPUs" in remark for remark in remarks)
    assert cpus == "px 2m 05s + pose 1h 09m = 1h 11m on 8 x CPU"
    assert gpu == "dino 6m 40s on 1 x GPU"


def test_cached_captions_are_not_waited_for(tmp_path):
    write_images(tmp_path / "source", 6)
    captions = {
        "backend": "ollama", "model": "gemma3:27b", "digest": "d" * 64, "overwrite": True,
        "hosts": ["http://192.0.2.1:11434", {"url": "http://192.0.2.2:11434", "slots": 2}],
    }  # fmt: skip
    settings = config(tmp_path, captions=captions)
    line = lines_of(settings)["text"]
    assert (line.actors, line.samples) == (3, 6)
    assert line.seconds == pytest.approx(6 * 7.5 / 3)
    plan = make_plan(settings)
    unit = next(unit for unit in plan.missing if unit.layer == "text")
    recipe = {name: plan.recipes[unit][name] for name in cost.CACHED_BY}
    for key in plan.shards[unit.bucket, unit.shard]:
        CaptionCache(settings.output, recipe).write(key, [])
    log(settings, 1, {"layer": "text", "samples": 10, "seconds": 100.0, "device": "captions"})
    line = lines_of(settings)["text"]
    assert line.seconds == pytest.approx(3 * 10 / 3)
    assert line.why.endswith("3 captions are cached")


def test_what_cannot_fit_is_refused_with_numbers(tmp_path, monkeypatch):
    write_images(tmp_path / "source", 6)
    settings = config(tmp_path)
    plan = make_plan(settings)
    check_room(plan)
    usage = namedtuple("usage", "total used free")
    needed = sum(bytes_needed(plan).values())
    monkeypatch.setattr(cost.shutil, "disk_usage", lambda path: usage(10**9, 10**9, int(needed) - 1))
    with pytest.raises(
        ResourceError, match=r"out has [\d.]+ [kM]B free.*takes about [\d.]+ [kM]B \(px .*image.format=jpeg"
    ):
        check_room(plan)
    monkeypatch.setattr(cost.shutil, "disk_usage", lambda path: usage(10**9, 0, int(needed) + 1))
    check_room(plan)


def test_tars_that_are_replaced_need_no_room(tmp_path):
    write_images(tmp_path / "source", 3)
    settings = config(tmp_path)
    plan = make_plan(settings)
    write_manifest(plan)
    for task in plan.tasks(("px", "text")):
        LayerWorker(settings).run(task)
    (tmp_path / "source" / "image-000.txt").write_text("Something else.")
    needed = bytes_needed(make_plan(settings))
    assert needed["text"] <= 0
    assert needed["t5"] > 0
