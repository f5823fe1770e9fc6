"""The command ``nanodit``: the same as ``python -m`` with its packages."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import subprocess
import sys
import tomllib

import pytest

import nanodit
from nanodit.cli import main
from nanodit.place import PACKAGES, PROJECT


def test_help_names_the_packages_and_the_configs(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert all(f" {package} " in printed for package in PACKAGES)
    assert "nanodit/configs" in printed


def test_the_version_stands_in_one_place(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"nanodit {nanodit.__version__}\n"
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "nanodit.__version__"}
    assert importlib.metadata.version("nanodit") == nanodit.__version__


@pytest.mark.parametrize("arguments", [[], ["draw"], ["--quiet"], ["prep"], ["evaluate", "run"]])
def test_wrong_usage_is_2(capsys, arguments):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage: nanodit" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["prep", "verify", "--dataset", "nowhere"], ["evaluate", "report", "nowhere"]], ids=" ".join
)
def test_exit_codes_are_those_of_the_package(capsys, arguments):
    assert main(arguments) in (2, 3)
    assert capsys.readouterr().err.startswith("error: nowhere")


def test_nothing_heavy_is_imported_before_a_package_is_asked_for():
    code = (
        "import sys, nanodit, nanodit.cli\n"
        "print(*{'torch', 'ray', 'numpy', 'pydantic', 'yaml', 'rich', 'prep', 'train', 'evaluate'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("package", PACKAGES)
def test_a_signal_while_a_package_is_imported_gives_75(tmp_path, package, number):
    """Sent by the first file of the package itself."""
    code = (
        "import os, sys, nanodit.place\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "nanodit.place.claim = lambda *names: None\n"
        "from nanodit.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    (tmp_path / f"{package}.py").write_text(f"import os\nos.kill(os.getpid(), {int(number)})\n")
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-c", code, package, "run"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 75, done.stderr
    assert done.stderr.startswith("error: stopped by a signal")
