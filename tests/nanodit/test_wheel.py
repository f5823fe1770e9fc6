"""The wheel: it holds every file of the packages, works in an empty folder, and says who has overwritten it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from evaluate.config import EvaluateConfig
from nanodit import __version__
from nanodit.config import find_config, load_config
from nanodit.place import PACKAGES, PROJECT

CONTENT = [*PACKAGES, "nanodit", "configs", "pyproject.toml", "README.md", "LICENSE"]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]


def tracked(*places: str) -> list[str]:
    command = ["git", "ls-files", *places]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout.splitlines()


def build(source: Path, output: Path) -> tuple[Path, str]:
    """Build a wheel without a network; its path, and what was printed."""
    command = [*PIP, "wheel", "--verbose", "--no-deps", "--no-index", "--no-build-isolation", "-w", output, source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return next(output.glob("*.whl")), done.stdout + done.stderr


def install(wheel: Path, site: Path) -> None:
    command = [*PIP, "install", "--quiet", "--no-deps", "--no-index", "--target", site, "--upgrade", wheel]
    subprocess.run(command, check=True, capture_output=True, timeout=200)


def command(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run the installed script in a folder."""
    return subprocess.run(
        [sys.executable, site / "bin" / "nanodit", *arguments],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, str]:
    """The wheel of a copy of the tracked files: what a build leaves in a clone would be in the next one."""
    source = tmp_path_factory.mktemp("source")
    for name in tracked(*CONTENT):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (PROJECT / name).is_symlink():
            target.symlink_to(os.readlink(PROJECT / name))
        elif (PROJECT / name).is_file():
            target.write_bytes((PROJECT / name).read_bytes())
    return build(source, tmp_path_factory.mktemp("wheels"))


@pytest.mark.slow
def test_it_holds_every_file_without_a_warning(built):
    wheel, printed = built
    assert wheel.name == f"nanodit-{__version__}-py3-none-any.whl"
    assert "importable" not in printed
    assert "SetuptoolsDeprecationWarning" not in printed
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    packages = {name for name in tracked("nanodit", *PACKAGES) if (PROJECT / name).is_file()}
    assert files == packages | {f"nanodit/{name}" for name in tracked("configs")}


@pytest.mark.slow
def test_it_works_in_an_empty_folder_and_refuses_when_another_one_overwrote_it(built, tmp_path):
    site, folder = tmp_path / "site", tmp_path / "empty"
    folder.mkdir()
    install(built[0], site)
    done = command(site, folder, "prep", "figures", "figures", "--count", "2", "--size", "32")
    assert done.returncode == 0, done.stderr
    assert len(list((folder / "figures").glob("*.png"))) == 2
    assert command(site, folder, "evaluate", "--help").stdout.startswith("usage: nanodit evaluate")

    other = tmp_path / "other"
    (other / "evaluate").mkdir(parents=True)
    for name in ("__init__.py", "__main__.py"):
        (other / "evaluate" / name).write_text("raise SystemExit('this is somebody else')\n")
    (other / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "evaluate"\nversion = "0.4.3"\n[tool.setuptools]\npackages = ["evaluate"]\n'
    )
    with zipfile.ZipFile(build(other, tmp_path / "wheels")[0]) as wheel:
        wheel.extractall(site)  # as pip does outside --target: file over file
    for package in ("evaluate", "train"):
        done = command(site, folder, package, "run", "--checkpoint" if package == "evaluate" else "--config", "nowhere")
        assert done.returncode == 2
        assert "evaluate/__init__.py and evaluate/__main__.py in" in done.stderr
        assert "overwritten by evaluate-0.4.3: uninstall that" in done.stderr
        assert done.stderr.count("\n") == 1
    assert command(site, folder, "prep", "--help").returncode == 0


def test_shipped_configs_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "configs/evaluate/pulse.yaml"
    assert find_config(name) == PROJECT / "nanodit" / name
    assert load_config(EvaluateConfig, name) != EvaluateConfig()
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text("{}\n")
    assert load_config(EvaluateConfig, name) == EvaluateConfig()
    assert find_config("configs/evaluate/none.yaml") == Path("configs/evaluate/none.yaml")
