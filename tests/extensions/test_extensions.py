"""What it costs to add something: patches that add a condition, a caption backend, a test and a loss to a copy.

Each ``NAME.patch`` brings a test of its own, ``tests/extensions/NAME_test.py``, which runs in the copy. Where a change
of the product moves a patch's context, refresh it: apply it with ``git apply --3way``, mend it, and write
``git diff --cached`` back into the file.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
# product files that each may touch; of a loss its module, its line in the config, and its keys in base.yaml
MOST = {"depth": 6, "caption_backend": 2, "evaluation_test": 2, "loss": 3}


def touched(patch: Path) -> set[str]:
    """Return the files that a patch changes or adds, without tests."""
    lines = patch.read_text().splitlines()
    files = {line.split(" b/", 1)[1] for line in lines if line.startswith("diff --git ")}
    return {file for file in files if not file.startswith("tests/")}


def test_every_extension_is_here():
    assert {patch.stem for patch in HERE.glob("*.patch")} == set(MOST)


@pytest.mark.slow
@pytest.mark.parametrize("name", MOST)
def test_an_extension_touches_few_files_and_works(name, tmp_path):
    patch = HERE / f"{name}.patch"
    assert len(touched(patch)) <= MOST[name], touched(patch)
    copy = tmp_path / "copy"
    ignored = shutil.ignore_patterns(".git", ".venv*", "quickstart", "experiments", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, copy, ignore=ignored)
    subprocess.run(["git", "init", "--quiet"], cwd=copy, check=True)  # of its own: apply would skip an ignored folder
    subprocess.run(["git", "apply", str(patch)], cwd=copy, check=True)
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/extensions/{name}_test.py"]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
