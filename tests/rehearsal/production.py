"""The full-size pipeline from photographs to a report, without a GPU, a hub or real weights: does it all fit together?

    python -m tests.rehearsal.production --output DIR [--photos FOLDER] [--only STAGE,...]

Encoders of the real sizes with random weights lie on a local hub in the hub's own layout, captions come from a server
that speaks Ollama's wire format, and the shipped configs/prep/production.yaml and configs/train/production.yaml run
with no override but folders, the caption model, the length of the training, its pictures (one instead of eight: 15
TFLOP each) and those of the evaluation (of two samples instead of eight, in two steps instead of eight). Each stage is
a command of its own; what it took stands beside what the plans had said. An hour and a half on two cores, 12 GB of
memory and 15 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from prep.dataset.layers import LAYERS
from prep.encoders.demo import pieces
from prep.encoders.hub import Reference
from prep.encoders.weights import quiet_transformers
from tests.prep.caption_server import THINGS, VERBS, WORDS, CaptionServer
from tests.prep.hub_server import HubServer, serve
from tests.rehearsal.networks import write_detector, write_pose
from tests.rehearsal.photographs import write_photographs
from train.check.backbones import write_random_vgg
from train.check.encoders import dino_config, t5_config

MODEL = "rehearsal:latest"
SECONDS = 2.0  # between two looks at the memory of all processes, which take a twentieth of a second
PROMPT = "A woman in a red coat stands before a white wall."
DRAWN = """
import sys
from diffusers import DiffusionPipeline
folder, prompt, output = sys.argv[1:]
pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
pipeline(prompt, seed=0, num_inference_steps=4).images[0].save(output)
"""


@dataclass(frozen=True)
class Stage:
    """What a stage took: seconds, seconds of processors, the largest memory of its processes in GB, GB written."""

    name: str
    seconds: float
    processor_seconds: float
    memory_gb: float
    written_gb: float
    status: int


def write_models(folder: Path) -> None:
    """Write all models that production asks the hub for, and VGG-16 where torch.hub looks; kept where they lie."""
    from transformers import DINOv3ViTModel, T5EncoderModel, T5Tokenizer

    for layer, kind, config in (("t5", T5EncoderModel, t5_config(False)), ("dino", DINOv3ViTModel, dino_config(False))):
        if not (folder / layer / "model.safetensors").is_file():
            torch.manual_seed(0)
            with quiet_transformers():
                kind(config).save_pretrained(folder / layer)
    if not (folder / "t5" / "tokenizer.json").is_file():
        known = ["The", "a", *f"{WORDS} {THINGS} {VERBS}".split()]  # the words of the captions: a token each
        T5Tokenizer(vocab=pieces(known), extra_ids=0, model_max_length=512).save_pretrained(folder / "t5")
    write_detector(folder / "pose" / "detector.onnx")
    write_pose(folder / "pose" / "pose.onnx")
    write_random_vgg(folder / "torch")


def start_hub(models: Path) -> HubServer:
    """Serve the models under the names that production asks for."""
    hub, _ = serve()
    for layer in ("t5", "dino"):
        hub.push(LAYERS[layer].encoder.model, {path.name: path for path in (models / layer).iterdir()})
    files: dict[str, dict[str, Path]] = {}
    for network, reference in LAYERS["pose"].encoder.files.items():
        wanted = Reference.parse(reference)
        files.setdefault(wanted.model, {})[wanted.file] = models / "pose" / f"{network}.onnx"
    for model, given in files.items():
        hub.push(model, given)
    return hub


def processes(root: int) -> list[int]:
    """Return a process and all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue  # it has ended
            children.setdefault(parent, []).append(int(entry.name))
    found = [root]
    for process in found:
        found += children.get(process, [])
    return found


def memory_gb(root: int) -> float:
    """Return the memory of a process and its descendants in GB, shared pages counted once (PSS)."""
    total = 0
    for process in processes(root):
        try:
            match = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{process}/smaps_rollup").read_text(), re.MULTILINE)
        except OSError:
            continue
        total += int(match[1]) * 1024 if match else 0
    return total / 1e9


def disk_gb(folder: Path) -> float:
    """Return the size of the files in a folder in GB; links count nothing."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink()) / 1e9


def processor_seconds() -> float:
    """Return the seconds of processors of all commands that have ended; a busy machine does not stretch them."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run(name: str, command: Sequence[str], output: Path, environment: Mapping[str, str]) -> Stage:
    """Run a command with its output in a file of ``output``, and measure it."""
    print(f"{name} ...", flush=True)
    before, started, peak = disk_gb(output), time.monotonic(), 0.0
    used = processor_seconds()
    with open(output / f"{name.replace(' ', '-')}.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **environment})
        while process.poll() is None:
            peak = max(peak, memory_gb(process.pid))
            with suppress(subprocess.TimeoutExpired):
                process.wait(SECONDS)
    seconds, used = time.monotonic() - started, processor_seconds() - used
    stage = Stage(name, seconds, used, peak, disk_gb(output) - before, process.returncode)
    print(f"{name}: {stage.seconds:.0f} s, {peak:.1f} GB, exit {stage.status}", flush=True)
    return stage


def stages(output: Path, photos: Path) -> dict[str, list[str]]:
    """Return the commands by name."""
    tool = [sys.executable, "-m", "nanodit"]
    dataset, experiment = output / "dataset", output / "run"
    prep = ["--config", "configs/prep/production.yaml", f"source={photos}", f"output={dataset}"]
    prep += ["captions.backend=ollama", "captions.overwrite=true", f"captions.model={MODEL}"]
    train = ["--config", "configs/train/production.yaml", f"dataset={dataset}", f"output={experiment}"]
    train += ["train.steps=2", "train.grad_accumulation_steps=2", "visual_debug.count=1"]
    few = ["samples=2", "sampler.steps=2"]
    draw = ["--prompt", PROMPT, "--size", "1024x1024", "--steps", "4", "--output"]
    return {
        "prep doctor": [*tool, "prep", "doctor", *prep],
        "prep plan": [*tool, "prep", "plan", *prep],
        "prep run": [*tool, "prep", "run", *prep],
        "prep report": [*tool, "prep", "report", "--dataset", str(dataset), "--output", str(output / "dataset.html")],
        "prep verify": [*tool, "prep", "verify", "--dataset", str(dataset)],
        "train plan": [*tool, "train", "plan", *train],
        "train run": [*tool, "train", "run", *train],
        "train sample": [*tool, "train", "sample", "--checkpoint", str(experiment), *draw, str(output / "picture.png")],
        "train export": [*tool, "train", "export", "--checkpoint", str(experiment), "--output", str(output / "export")],
        "diffusers": [sys.executable, "-c", DRAWN, str(output / "export"), PROMPT, str(output / "diffusers.png")],
        "evaluate run": [*tool, "evaluate", "run", "--checkpoint", str(experiment), "--tier", "pulse", *few],
        "evaluate report": [*tool, "evaluate", "report", str(experiment), "--output", str(output / "report.html")],
    }


def table(done: Sequence[Stage], output: Path) -> str:
    """Return Markdown: what each stage took, and what the two plans had said."""
    lines = ["| stage | seconds | of processors | GB of memory | GB written | exit |", "|---|---|---|---|---|---|"]
    for one in done:
        took = f"{one.seconds:.0f} | {one.processor_seconds:.0f}"
        lines.append(f"| {one.name} | {took} | {one.memory_gb:.1f} | {one.written_gb:.2f} | {one.status} |")
    for name in ("prep-plan", "train-plan"):
        log = output / f"{name}.log"
        if log.is_file():
            lines += ["", f"`{name.replace('-', ' ')}` had said:", "", "```", log.read_text().rstrip(), "```"]
    return "\n".join(lines)


def main() -> int:
    """Run the stages; 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--photos", type=Path, help="a folder of photographs (default: made from scikit-image's)")
    parser.add_argument("--only", help="stages, separated by commas; what went before must lie in the output")
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    photos = (arguments.photos or output / "photos").resolve()
    output.mkdir(parents=True, exist_ok=True)
    if not arguments.photos:
        write_photographs(photos)
    write_models(output / "models")
    hub = start_hub(output / "models")
    commands, done = stages(output, photos), []
    wanted = arguments.only.split(",") if arguments.only else list(commands)
    if unknown := set(wanted) - set(commands):
        parser.error(f"unknown stages {', '.join(sorted(unknown))}; there are {', '.join(commands)}")
    with CaptionServer(model=MODEL, words=180) as captions:
        environment = {
            "HF_ENDPOINT": hub.url, "HF_HOME": str(output / "hub"), "OLLAMA_HOST": captions.url,
            "TORCH_HOME": str(output / "models" / "torch"), "PYTHONPATH": os.getcwd(),
        }  # fmt: skip
        for name in wanted:
            done.append(run(name, commands[name], output, environment))
            (output / "stages.json").write_text(json.dumps([asdict(one) for one in done], indent=1))
    (output / "table.md").write_text(table(done, output) + "\n")
    print(table(done, output))
    return int(any(one.status for one in done))


if __name__ == "__main__":
    sys.exit(main())
