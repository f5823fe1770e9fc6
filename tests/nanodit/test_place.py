"""Code of others under the names of our packages: beside the project, before it, and over its files."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanodit import __version__, place
from nanodit.errors import ConfigError
from nanodit.place import PACKAGES, PROJECT, claim, hides, overwritten, shadow
from prep.doctor.places import project_check
from tests.prep.passes.test_plan import write_images

FOREIGN = "raise SystemExit('this is somebody else')\n"


@pytest.fixture
def strangers(tmp_path: Path) -> Path:
    """A working directory that is also on the path of Python, with a package, a file and a folder of our names."""
    folder = tmp_path / "strangers"
    (folder / "evaluate").mkdir(parents=True)
    for name in ("evaluate/__init__.py", "evaluate/__main__.py", "train.py"):
        (folder / name).write_text(FOREIGN)
    (folder / "prep").mkdir()  # of data: a namespace package
    return folder


def python(folder: Path, *arguments: str, path: str | None = None) -> subprocess.CompletedProcess:
    """Run Python in ``folder``, by default with the folder before the project on its path."""
    environment = os.environ | {"PYTHONPATH": path or f"{folder}{os.pathsep}{PROJECT}"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_command_starts_our_packages(strangers, package):
    done = python(strangers, "-m", "nanodit", package, "--help")
    assert done.stdout.startswith(f"usage: nanodit {package} "), done.stderr
    assert done.returncode == 0


def test_a_package_finds_the_others(tmp_path):
    """``python -m train`` in a folder with another evaluate, ``python -m evaluate`` in one with a train.py."""
    code = (
        "import sys; from nanodit.place import claim; claim('train', 'evaluate'); import evaluate.records, train.model"
    )
    for name in ("train", "evaluate"):
        (tmp_path / f"{name}.py").write_text(FOREIGN)
    done = python(tmp_path, "-c", code)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("package", "stranger"), [("train", "evaluate"), ("evaluate", "train")])
def test_the_packages_claim_each_other(tmp_path, package, stranger):
    (tmp_path / f"{stranger}.py").write_text(FOREIGN)
    verb = ["run", "--config", "nowhere.yaml"] if package == "train" else ["report", "nowhere"]
    code = (
        f"import sys, importlib.util; from {package}.__main__ import main; main({verb})\n"
        f"print(importlib.util.find_spec('{stranger}').origin)"
    )
    done = python(tmp_path, "-c", code)
    assert done.stdout.strip() == str(PROJECT / stranger / "__init__.py"), done.stderr


def test_a_name_that_is_taken_already_is_refused(monkeypatch, strangers):
    code = "import sys, types\nsys.modules['train'] = types.ModuleType('train')\nfrom nanodit.cli import main\n"
    done = python(strangers, "-c", f"{code}sys.exit(main(['train', 'plan']))")
    assert done.returncode == 2
    assert done.stderr.startswith("error: train is ")
    assert done.stderr.count("\n") == 1


def test_children_run_ours(strangers, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(strangers))
    environment = place.child_environment(TEST_VARIABLE="1")
    assert environment["TEST_VARIABLE"] == "1"
    for module in PACKAGES:
        command = [*place.child_command(module), "--help"]
        done = subprocess.run(command, cwd=strangers, env=environment, capture_output=True, text=True, timeout=400)
        assert done.stdout.startswith(f"usage: nanodit {module} "), done.stderr


def test_what_is_ours_is_left_alone():
    before = list(sys.path)
    assert [shadow(name) for name in PACKAGES] == ["", "", ""]
    claim(*PACKAGES)
    assert sys.path == before
    assert not hides(str(PROJECT))
    check = project_check()
    assert (check.status, check.found) == ("OK", f"{__version__} in {PROJECT}")


def test_a_folder_that_hides_ours_is_known(strangers, tmp_path):
    assert hides(str(strangers))
    assert not hides(str(tmp_path))


@pytest.mark.slow
def test_rays_workers_run_ours(strangers):
    """Ray puts the working directory first on their path."""
    (strangers / "prep.py").write_text(FOREIGN)
    write_images(strangers / "images", 4)
    overrides = ["source=images", "output=out", "base=64", "encoders=demo", "layers=[pose]", "shard_size=4"]
    done = python(strangers, "-m", "nanodit", "prep", "run", *overrides, "workers=1")
    assert done.returncode == 0, done.stderr
    assert (strangers / "out" / "dataset.json").is_file()


# --- an installed wheel, in miniature


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    """A site-packages in which nanodit's wheel has put two modules of evaluate and one of prep."""
    record = []
    for name in ("prep/__init__.py", "evaluate/__init__.py", "evaluate/config.py", "evaluate/suite/pose.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")
        digest = base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).decode().rstrip("=")
        record.append(f"{name},sha256={digest},{path.stat().st_size}\n")
    info = tmp_path / f"nanodit-{__version__}.dist-info"
    info.mkdir()
    (info / "RECORD").write_text("".join(record) + f"{info.name}/RECORD,,\n")
    monkeypatch.setattr(place, "PROJECT", tmp_path)
    return tmp_path


def test_an_intact_wheel_is_accepted(site):
    assert overwritten(*PACKAGES) is None


def test_files_that_another_wheel_took_are_named_with_it(site):
    for name in ("__init__.py", "config.py"):
        (site / "evaluate" / name).write_text(FOREIGN)
    other = site / "evaluate-0.4.3.dist-info"
    other.mkdir()
    (other / "RECORD").write_text("evaluate/__init__.py,sha256=x,1\nevaluate/hub.py,,\n")
    (site / "numpy-2.0.0.dist-info").mkdir()
    (site / "numpy-2.0.0.dist-info" / "RECORD").write_text("numpy/__init__.py,,\n")
    found, fix = overwritten(*PACKAGES)
    assert "evaluate/__init__.py and evaluate/config.py" in found
    assert found.endswith("overwritten by evaluate-0.4.3")
    assert fix.startswith("uninstall that, then run pip install --force-reinstall --no-deps")
    assert overwritten("prep") is None, "prep does without evaluate"


def test_files_that_an_uninstallation_took_are_missed(site):
    (site / "evaluate" / "__init__.py").unlink()
    found, fix = overwritten("evaluate")
    assert "evaluate/__init__.py" in found
    assert fix.startswith("run pip install --force-reinstall")


def test_the_doctor_says_so(site, monkeypatch):
    (site / "evaluate" / "config.py").write_text(FOREIGN)
    check = project_check()
    assert (check.name, check.status) == ("nanodit", "WARN")
    assert "pip install --force-reinstall" in check.fix


def test_a_command_of_an_overwritten_wheel_is_refused(site, monkeypatch):
    monkeypatch.setattr(place, "shadow", lambda name: "")
    (site / "evaluate" / "config.py").write_text(FOREIGN)
    claim("prep")
    with pytest.raises(ConfigError, match=r"evaluate/config\.py in .*: run pip install"):
        claim(*PACKAGES)
