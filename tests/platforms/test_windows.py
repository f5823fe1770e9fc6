"""Windows as far as Linux can show it: one sentence where a command cannot work, and the ones that can, do."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prep.dataset.reader import Dataset
from tests.platforms.windows import MODULES
from tests.train.tiny import write_config, write_dataset
from train.__main__ import main

VERBS = {
    "prep": "run plan figures doctor report verify versions exclude captions export",
    "train": "run plan sample sweep export gpu-check", "evaluate": "run compare report",
}  # fmt: skip
REFUSED = [
    "train run --config configs/train/quickstart.yaml", "train sweep --config configs/sweep/quick.yaml",
    "train gpu-check", "train plan --measure --config configs/train/quickstart.yaml",
    "prep run --config configs/prep/quickstart.yaml", "prep plan --config configs/prep/quickstart.yaml", "prep doctor",
    "prep verify --repair --dataset nowhere", "prep versions nowhere --drop 0123 --yes",
    "prep versions nowhere --older-than 0d --yes", "prep exclude nowhere 0123",
    "prep captions nowhere --write-txt --to x",
]  # fmt: skip


def on_windows(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process that sees what Windows has."""
    environment = {name: value for name, value in os.environ.items() if name != "NANODIT_FAULT"}
    return subprocess.run(
        [sys.executable, "tests/platforms/windows.py", *command], capture_output=True, text=True, env=environment
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of three steps."""
    folder = tmp_path_factory.mktemp("windows")
    config = write_config(folder / "c.yaml", write_dataset(folder / "dataset"), folder / "run")
    assert main(["run", "--config", str(config), "train.steps=3"]) == 0
    return folder / "run"


def test_the_view_lacks_what_it_says(tmp_path):
    (tmp_path / "prep").mkdir()
    for line in ("import fcntl", "import resource", "from os import fork", "import os; os.getuid()",
                 "import signal; signal.SIGKILL", "import select; select.poll"):  # fmt: skip
        (tmp_path / "prep" / "__main__.py").write_text(line)
        tried = subprocess.run(
            [sys.executable, str(Path("tests/platforms/windows.py").resolve()), "prep"],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
        )  # fmt: skip
        assert tried.returncode == 1, line
        assert any(name in tried.stderr.splitlines()[-1] for name in ("No module named", "no attribute", "import name"))


@pytest.mark.parametrize("command", ["nanodit", *VERBS, *(f"nanodit {name}" for name in VERBS)])
def test_every_entry_point_says_what_it_can(command):
    verbs = ["", *VERBS.get(command.removeprefix("nanodit "), "").split()]
    one_by_one = " + ".join(f"{command} {verb} --help" for verb in verbs)
    said = on_windows(*one_by_one.split())
    assert said.returncode == 0, said.stderr
    started = [line for line in said.stdout.splitlines() if line.startswith("usage: ")]
    assert len(started) == len(verbs)
    for line, verb in zip(started, verbs):
        assert line.startswith(f"usage: nanodit {command.removeprefix('nanodit').strip()}".strip())
        assert f" {verb}" in line


@pytest.mark.parametrize("command", REFUSED)
def test_what_cannot_work_says_so_in_one_sentence(command):
    refused = on_windows("nanodit", *command.split())
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"error: nanodit {' '.join(command.split()[:2])}")
    assert "inside WSL2 (`wsl --install`" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_sample_draws_the_same_pixels(run, tmp_path):
    key = Dataset(run.parent / "dataset").rows("holdout")[0]["key"]
    options = ["sample", "--checkpoint", str(run), "--key", key, "--steps", "2", "--output"]
    assert main([*options, str(tmp_path / "linux.png")]) == 0
    drawn = on_windows("train", *options, str(tmp_path / "windows.png"))
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "windows.png").read_bytes() == (tmp_path / "linux.png").read_bytes()


def test_export_writes_the_folder(run, tmp_path):
    exported = on_windows("train", "export", "--checkpoint", str(run), "--output", str(tmp_path / "man"))
    assert exported.returncode == 0, exported.stderr
    assert (tmp_path / "man" / "README.md").exists()


@pytest.mark.slow
def test_an_evaluation_is_made_and_shown(run, tmp_path):
    few = ["samples=4", "heldout_loss.bins=2", "heldout_loss.conditions=[all]", "heldout_loss.gap=[]"]
    command = ["run", "--checkpoint", str(run), "--tests", "heldout_loss", "--output", str(tmp_path)]
    made = on_windows("evaluate", *command, *few)
    assert made.returncode == 0, made.stderr
    shown = on_windows("nanodit", "evaluate", "report", str(tmp_path), "--output", str(tmp_path / "page.html"))
    assert shown.returncode == 0, shown.stderr
    assert "heldout" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_versions_are_listed(run):
    listed = on_windows("prep", "versions", str(run.parent / "dataset"))
    assert listed.returncode == 0, listed.stderr
    assert Dataset(run.parent / "dataset").fingerprint[:16] in listed.stdout


def test_figures_are_drawn(tmp_path):
    drawn = on_windows("prep", "figures", str(tmp_path / "figures"), "--count", "2", "--size", "64")
    assert drawn.returncode == 0, drawn.stderr
    assert len([*(tmp_path / "figures").glob("*.txt")]) == 2


def test_modules_of_posix_are_imported_where_it_is_known():
    known = {"nanodit/posix.py", "prep/doctor/node.py", "prep/doctor/rules.py", "prep/passes/worker.py"}
    found = set()
    for package in ("nanodit", "prep", "train", "evaluate"):
        for file in Path(package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import) and {alias.name for alias in node.names} & MODULES:
                    found.add(file.as_posix())
    assert found == known
