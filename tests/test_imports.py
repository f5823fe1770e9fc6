"""Who imports whom: nanodit <- prep <- train <- evaluate, inside them floor by floor, and Ray in few places."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.conftest import LONG

PACKAGES = ("nanodit", "prep", "train", "evaluate")  # each imports itself and those to its left
# The command and the trainer's entry point know more than they import from: inside functions, when it is asked for.
EXCEPTIONS = {"nanodit/cli.py": {"prep", "train", "evaluate"}, "train/__main__.py": {"evaluate"}}
WITH_RAY = {"prep/passes/ray_passes.py", "train/sweep/sweep.py", "train/sweep/actor.py"}
INSTALLED_AS = {"PIL": "pillow", "pillow_heif": "pillow-heif", "yaml": "pyyaml"}

# Each package from the ground up: a file imports from its own folder and from floors below its own.
FLOORS = {
    "nanodit": [
        "allocator errors keypoints", "files posix", "config console storage faults svg rng place", "lock openmp pages",
        "cli", "__main__",
    ],
    "prep": [
        "dataset figures", "images", "captions", "config", "encoders", "passes", "doctor",
        "run report verify versions exclude caption_files", "export", "__main__",
    ],
    "train": [
        "hardware", "model", "method data", "config", "checkpoint", "loop", "draw plan sweep", "run check", "__main__",
    ],
    "evaluate": [
        "statistics subject", "records", "metrics", "drawing", "suite", "votes", "config report", "run",
        "validation trial sweep blind", "__main__",
    ],
}  # fmt: skip
FACES = {"train/pipeline.py"}  # names of old that exported models import


def files(package: str) -> list[Path]:
    found = sorted(Path(package).rglob("*.py"))
    assert found
    return found


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted names that a syntax tree imports; of ``from a import b`` both ``a`` and ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def upward(file: str, tree: ast.AST) -> list[str]:
    """Return what a file imports of its own package that is neither in its folder nor on a floor below."""
    package, _, rest = file.removesuffix(".py").partition("/")
    floor_of = {name: level for level, names in enumerate(FLOORS[package]) for name in names.split()}
    place = rest.partition("/")[0]
    wrong = []
    for name in sorted(set(imports(tree))):
        other = name.split(".")
        if other[0] != package or len(other) < 2 or other[1] == place:
            continue
        if other[1] in floor_of and floor_of[other[1]] >= floor_of[place]:
            wrong.append(f"{file} imports {name}")
    return wrong


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_themselves_and_those_to_their_left(package):
    for file in files(package):
        tree = ast.parse(file.read_text())
        names = {name.partition(".")[0] for name in imports(tree)}
        for name in names & {*PACKAGES[PACKAGES.index(package) + 1 :]}:
            assert name in EXCEPTIONS.get(file.as_posix(), ()), f"{file} imports {name}"
            at_the_top = ast.Module([node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))], [])
            assert name not in {top.partition(".")[0] for top in imports(at_the_top)}, f"{file} imports {name} too soon"
        assert "ray" not in names or file.as_posix() in WITH_RAY, f"{file} imports Ray"


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_imported_is_declared(package):
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = {Requirement(line).name for line in (*project["dependencies"], *extras["export"], *extras["s3"])}
    names = {name.partition(".")[0] for file in files(package) for name in imports(ast.parse(file.read_text()))}
    others = {INSTALLED_AS.get(name, name) for name in names - {*PACKAGES} - sys.stdlib_module_names}
    assert others <= declared  # so that nothing imports tools or tests either


@pytest.mark.parametrize("package", PACKAGES)
def test_files_import_from_their_folder_and_from_the_floors_below(package):
    places = {name for names in FLOORS[package] for name in names.split()}
    wrong = []
    for file in files(package):
        if file.as_posix() in FACES or file.as_posix() == f"{package}/__init__.py":
            continue
        place = file.relative_to(package).parts[0].removesuffix(".py")
        assert place in places, f"{file}: give it a floor in {__file__}"
        wrong += upward(file.as_posix(), ast.parse(file.read_text()))
    assert not wrong, "\n".join(wrong)


def test_an_upward_import_is_seen():
    assert upward("prep/images/sources.py", ast.parse("def later():\n    from prep.passes import plan"))
    assert upward("train/loop/trainer.py", ast.parse("from train.plan.plan import plan"))
    assert upward("train/draw/draw.py", ast.parse("import train.sweep.sweep"))
    assert not upward("train/draw/draw.py", ast.parse("from train.draw.request import DrawRequest\nimport train.model"))


# with all modalities, as a checkpoint is measured before it is read
WITHOUT_WEIGHTS = """, torch
from train.model.config import ModelConfig
from train.model.modalities import MODALITIES, Features
from train.model.network import build_model
with torch.device("meta"):
    build_model(ModelConfig(depth=1, output_conv=True), Features(64, {name: 8 for name in MODALITIES}))"""


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("nanodit.cli, prep.__main__, prep.config", {"torch", "transformers", "ray", "httpx"}),
        (f"train.run, train.draw.draw, evaluate.run{WITHOUT_WEIGHTS}", {"torch._dynamo", "transformers", "ray"}),
        (
            "evaluate.config, evaluate.report.report, evaluate.sweep.report",
            {"transformers", "onnxruntime", "ray", "scipy.stats"},
        ),
    ],
)
def test_what_takes_seconds_is_imported_where_it_is_used(modules, heavy):
    code = f"import sys, {modules}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not heavy & set(done.stdout.split())


def test_the_tests_that_begin_first_exist():
    assert [name for name in LONG if not Path("tests", name).is_file()] == []
