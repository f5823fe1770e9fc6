"""gpu-check without a GPU: the rehearsal, and that each kind of check can fail."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import DINOv3ViTModel, T5EncoderModel

import train.check.memory
import train.plan.memory as memory
import train.plan.work as work
from nanodit.allocator import VARIABLES
from nanodit.place import child_environment
from prep.config import PrepConfig
from prep.dataset.layers import PX_MB
from prep.encoders.halving import Halving
from tests.forked import fork_modules
from train.__main__ import main
from train.check import encoders, parity, resume, run, scaling, shortage, syncs
from train.check.encoders import dino_config, t5_config
from train.check.made_up import trainer_of
from train.check.report import Report, Setting, constant, shown, verdicts
from train.hardware import GPUS
from train.model.layers import TimestepEmbedding
from train.plan.made_up import write_made_up

ABSENT = (
    "ray", "lpips", "torchvision", "tensorboard", "rich", "onnxruntime", "scipy", "jinja2", "httpx", "ollama", "fsspec",
)  # fmt: skip
REHEARSAL = ["gpu-check", "--device", "cpu", "--tiny", "--minutes", "60"]  # however busy the machine is


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the parts of a check share: data and random VGG."""
    return tmp_path_factory.mktemp("check")


@pytest.fixture
def setting(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    monkeypatch.setenv("TORCH_HOME", os.environ.get("TORCH_HOME", ""))  # which parts change
    return Setting(torch.device("cpu"), True, folder, 600.0)


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_parts_share_out_ten_minutes():
    evaluation = run.OTHERS
    assert sum(part.seconds for part in run.PARTS) + evaluation == run.MINUTES * 60


@pytest.mark.parametrize("part", [part for part in run.PARTS if part.environment], ids=lambda part: part.name)
def test_the_allocator_of_a_part_is_not_the_users(part, monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, "max_split_size_mb:512")
    seen = run.environment_of(part)
    assert {name: seen[name] for name in VARIABLES if name in seen} == dict(part.environment)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_rehearsal_passes_on_a_cpu(tmp_path, monkeypatch, capfd):
    fork_modules(monkeypatch, "lpips", "pandas", "torch._inductor.compile_fx")
    assert main([*REHEARSAL, "--json", str(tmp_path / "out" / "cpu.jsonl")]) == 0
    lines = lines_of(tmp_path / "out" / "cpu.jsonl")
    assert {line["part"] for line in lines} == {*(part.name for part in run.PARTS), "evaluation"}
    assert [shown(line) for line in lines if line["status"] == "FAIL"] == []
    left_out = {line["name"] for line in lines if line["value"].startswith("left out")}
    assert left_out <= {"tiny, compiled"}, "a compiler may be missing here, nothing else"
    (ratio,) = [line["ratio"] for line in lines if "ratio" in line]
    assert ratio == pytest.approx(1, abs=0.002), "tensors of the meta device and of a CPU"
    said = capfd.readouterr().out
    assert "constants to change\nmemory: tiny, micro-step" in said
    summary = (tmp_path / "out" / "cpu.md").read_text()
    assert "constants to change" in summary
    for text in (said, summary):  # two ceilings measured on this CPU, and the cards of the table
        assert re.search(r"^images/s, scaled from .* TFLOP/s.* tiny$", text, re.MULTILINE)
        assert re.search(r"^GeForce RTX 4090 +[0-9.e+]+$", text, re.MULTILINE)


@pytest.mark.slow
def test_a_broken_estimate_fails_and_says_what_to_change(tmp_path, monkeypatch, capfd):
    def halved(*arguments):
        found = memory.estimate_memory(*arguments)
        return replace(found, activations=found.activations // 2)

    fork_modules(monkeypatch)
    monkeypatch.setattr(train.check.memory, "estimate_memory", halved)
    assert main([*REHEARSAL, "--only", "memory", "--json", str(tmp_path / "cpu.jsonl")]) == 3
    (line,) = lines_of(tmp_path / "cpu.jsonl")
    assert (line["status"], line["constants"]) == ("FAIL", [str(constant(memory, "LikeGpu"))])
    said = capfd.readouterr()
    assert f"FAIL  {constant(memory, 'LikeGpu')}" in said.out
    assert "error: gpu-check: 1 of 1 failed: memory: tiny, micro-step" in said.err


@pytest.mark.slow
def test_it_runs_on_a_machine_with_few_packages(tmp_path):
    few = (
        "import subprocess, sys\n"
        "from importlib.machinery import PathFinder\n"
        f"ABSENT = {ABSENT}\n"
        "class Few(PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        "        return None if name.partition('.')[0] in ABSENT else super().find_spec(name, path, target)\n"
        "sys.meta_path[:] = [Few if finder is PathFinder else finder for finder in sys.meta_path]\n"
        "from tests.forked import ForkedPopen\n"
        "subprocess.Popen = ForkedPopen\n"
        "from train.__main__ import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    only = "card,syncs,memory,encoders,evaluation"
    command = [sys.executable, "-c", few, *REHEARSAL, "--only", only, "--json", str(tmp_path / "cpu.jsonl")]
    subprocess.run(command, env=child_environment(), check=True)
    left_out = {line["name"]: line["value"] for line in lines_of(tmp_path / "cpu.jsonl") if "left out" in line["value"]}
    assert left_out == {
        "perceptual loss": "left out: lpips and torchvision not installed",
        "pose": "left out: onnxruntime is not installed",
    }


@pytest.mark.slow
def test_other_arithmetic_on_the_device_fails(setting, monkeypatch, capsys):
    made = []

    def trainer(config, data, device):
        built = trainer_of(config, data, device)
        if not made:  # the device's
            with torch.no_grad():
                built.model.patch_embedding.weight *= 1.01
        made.append(built)
        return built

    monkeypatch.setattr(parity, "trainer_of", trainer)
    report = Report("parity")
    parity.check(setting, report)
    failed = {line["name"] for line in report.lines if line["status"] == "FAIL"}
    assert {"losses in fp32", "gradients in fp32"} <= failed
    assert "one step of Muon in torch.float32" not in failed, "whose gradients are given"


@pytest.mark.slow
def test_a_wait_in_a_micro_step_fails_and_says_where(setting, monkeypatch, capsys):
    usual = TimestepEmbedding.forward
    monkeypatch.setattr(TimestepEmbedding, "forward", lambda self, t: usual(self, t + t.sum().item() * 0))
    report = Report("syncs")
    syncs.check(setting, report)
    found = {line["name"]: line for line in report.lines}
    assert found["micro-steps"]["status"] == "FAIL"
    assert found["micro-steps"]["value"].startswith("train/model/network.py:")


def test_a_part_that_does_not_end_is_ended(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "LEAST", 0.5)
    started = time.monotonic()
    with open(tmp_path / "kept", "w") as kept:
        options = ["--device", "cpu", "--tiny", "--folder", str(tmp_path), "--seconds", "0.1"]
        (line,) = run._in_process(run.PARTS[1], options, 0.1, kept)
    assert (line["status"], line["value"]) == ("FAIL", "ended after its limit of 0 s")
    assert time.monotonic() - started < 60
    assert lines_of(tmp_path / "kept") == [line]


def test_what_a_part_raises_is_a_line(setting, capsys):
    def wrong(setting, report):
        raise ValueError("a defect\nof two lines")

    def lacking(setting, report):
        import no_such_package  # noqa: F401

    for name in ("wrong", "lacking"):
        run.run_part(name, setting, {"wrong": wrong, "lacking": lacking})
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["status"], first["value"]) == ("FAIL", "ValueError: a defect")
    assert (second["status"], second["value"]) == ("NOTE", "no_such_package is not installed")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--device", "cpu"], "add --tiny"),
        (["--device", "cpu", "--tiny", "--only", "card,speeed"], "--only speeed: there are card, parity"),
        (["--device", "cpu", "--tiny", "--minutes", "0"], "--minutes 0: must be more than 0"),
        ([], "torch sees no GPU"),
    ],
)
def test_wrong_usage(options, says, capsys):
    assert main(["gpu-check", *options]) == 2
    assert says in capsys.readouterr().err


def test_constants_are_found_where_they_stand():
    found = constant(work, "SLOW")
    file, _, line = found.place.partition(":")
    assert file == "train/plan/work.py"
    assert Path(file).read_text().splitlines()[int(line) - 1].startswith("SLOW = ")
    with pytest.raises(ValueError, match="has no constant GONE"):
        constant(work, "GONE")


def test_an_estimate_is_judged_by_its_ratio(capsys):
    report = Report("speed")
    for measured in (0.14, 0.15, 0.6, 0.61):
        report.estimate("rate", 0.3, measured, "", constant(work, "SLOW"), low=0.5, high=2.0)
    assert [line["status"] for line in report.lines] == ["FAIL", "PASS", "PASS", "FAIL"]
    assert verdicts(report.lines)[1].split() == ["speed:", "rate", "0.3", "0.14", "0.47", "FAIL", *found_words()]
    assert verdicts([]) == ["no estimate was measured"]


def found_words() -> list[str]:
    return str(constant(work, "SLOW")).split()


def test_the_stages_of_a_checkpoint_are_those_of_the_code_that_writes_it(setting, monkeypatch, capsys):
    usual = resume.checkpoint.sync_file
    monkeypatch.setattr(resume.checkpoint, "sync_file", lambda file: (time.sleep(0.1), usual(file)))
    report = Report("resume")
    resume._stages(setting, report)
    (line,) = report.lines
    found = re.findall(r"([a-z ]+) ([0-9.e-]+) s", line["value"].split(":")[1])
    seconds = {name.strip(): float(value) for name, value in found}
    assert line["status"] == "PASS"
    assert list(seconds) == [*resume.STAGES]
    assert seconds["fsync"] >= 0.4 > sum(seconds.values()) - seconds["fsync"], "five files, late by a tenth each"
    monkeypatch.setitem(resume.STAGES, "hashes", ())  # as if the code hashed by another function
    resume._stages(setting, report)
    assert report.lines[-1]["status"] == "FAIL"


def test_what_stays_after_a_lack_of_memory_fails(setting, monkeypatch, capsys):
    kept = []
    usual = shortage._held

    def held(setting):  # as much again stays: the tests before this one may have left any amount
        size = usual(setting)
        kept.append(torch.ones(size, dtype=torch.uint8))
        return size

    monkeypatch.setattr(shortage, "_held", held)
    report = Report("shortage")
    shortage._in_a_step(setting, report)
    status = {line["name"]: line["status"] for line in report.lines}
    assert status.pop("tensors again") == "FAIL"
    assert set(status.values()) == {"PASS"}


@pytest.mark.slow
def test_another_size_of_halves_fails(setting, monkeypatch, capsys):
    monkeypatch.setattr(Halving, "_halve", lambda self, tried: setattr(self, "limit", 3))
    report = Report("shortage")
    shortage._halving(setting, report)
    assert [line["status"] for line in report.lines if line["name"].endswith(", halving")] == ["FAIL", "FAIL"]


@pytest.mark.slow
def test_a_process_that_cannot_share_the_card_fails(setting, monkeypatch, capsys):
    encoders.made_up_encoder(setting, "dino")
    started = time.monotonic()
    monkeypatch.setattr(encoders, "child_command", lambda module: [sys.executable, "-c", "raise SystemExit(1)"])
    report = Report("encoders")
    encoders._together(setting, report, "dino", 1.0)
    (line,) = report.lines
    assert (line["status"], line["value"]) == ("FAIL", "exit codes [1, 1]")
    assert time.monotonic() - started < 60


def measured_on(name: str, kinds: str = "") -> list[dict]:
    """Lines of a card and of a preset of which a step took a second for ten images."""
    lines = [{"part": "card", "name": "card", "value": f"NVIDIA {name}, capability 9.0, 80 GB"}]
    one = work.Work(matrix=1e14, moved=1e11, attention=2e13, elementwise=1e12)
    lines += [{"part": "speed", "name": "a, work", "value": "", "preset": "a", "work": one, "images": 10, "alone": 1.0}]
    return lines + ([{"part": "speed", "name": "time by kind", "value": kinds}] if kinds else [])


def test_a_card_scales_to_itself_and_each_kind_by_what_bounds_it():
    here, there = GPUS["H100 80GB HBM3"], GPUS["GeForce RTX 4090"]
    rows = dict(line.rsplit(None, 1) for line in scaling.scaled(measured_on("H100 80GB HBM3"))[1:])
    assert len(rows) == len(GPUS)
    assert rows["H100 80GB HBM3"] == "10"
    one = work.Work(matrix=1e14, moved=1e11, attention=2e13, elementwise=1e12)
    flops, size = here.tflops / there.tflops, here.bandwidth / there.bandwidth
    for kind, expected in (("matrix products", flops), ("attention", flops), ("elementwise", size)):
        assert scaling.factor(one, here, there, {kind: 0.4}) == pytest.approx(expected)
    moves = one._replace(moved=1e13)
    assert scaling.factor(moves, here, there, {"matrix products": 1.0}) == pytest.approx(size), "bound by its bytes"
    mixed = measured_on("H100 80GB HBM3", "elementwise 50%, matrix products 25%, attention 25%")
    rate = float(re.search(r"^GeForce RTX 4090 +([0-9.]+)$", "\n".join(scaling.scaled(mixed)), re.MULTILINE)[1])
    assert rate == pytest.approx(10 / (0.5 * size + 0.5 * flops), rel=1e-3)


def test_an_unknown_card_is_known_by_its_ceilings():
    lines = measured_on("RTX 9999")
    assert scaling.scaled(lines) == ["no time to scale to other cards: it takes the parts card and speed"]
    card = GPUS["L40S"]
    values = {"copy": f"{card.bandwidth} GB/s", "torch.bfloat16 products": f"{card.tflops} TFLOP/s"}
    lines += [{"part": "card", "name": name, "value": value} for name, value in values.items()]
    rows = dict(line.rsplit(None, 1) for line in scaling.scaled(lines)[1:])
    assert rows["L40S"] == "10"


def test_the_encoders_are_of_real_size():
    with torch.device("meta"):
        t5, dino = T5EncoderModel(t5_config(False)), DINOv3ViTModel(dino_config(False))
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (t5, dino)]
    assert sizes == [334_939_648, 303_129_600]


def test_made_up_pixels_take_the_bytes_of_photographs(setting):
    for base in (256, 1024):
        prep = PrepConfig(source=".", output="none", base=base, encoders="demo", layers=["pose"])
        bucket = f"{base}x{base}"
        data = write_made_up(prep, setting.folder / f"photographs-{base}", {bucket: (2, 0)})
        for row in data.rows("train"):
            assert row["px/webp/length"] == pytest.approx(PX_MB["webp"] * 1e6 * (base / 1024) ** 2, rel=0.1)
            assert data.pixels(row).shape == (base, base, 3)
