"""Who imports whom: nanodit <- prep <- train <- evaluate, and Ray only where it is meant to be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

# the entry point hands validation to the trainer; imported inside a function, when it is asked for
EXCEPTIONS = {("train/__main__.py", "evaluate")}
ALLOWED = {
    "nanodit": {"nanodit"},
    "prep": {"nanodit", "prep"},
    "train": {"nanodit", "prep", "train"},
    "evaluate": {"nanodit", "prep", "train", "evaluate"},
}
WITH_RAY = {"prep", "train/sweep/sweep.py", "train/sweep/actor.py"}


def imports(tree: ast.AST) -> Iterator[str]:
    """The top-level packages that a syntax tree imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_import_only_themselves_and_those_to_their_left(package):
    files = sorted(Path(package).rglob("*.py"))
    assert files
    for file in files:
        tree = ast.parse(file.read_text())
        for name in set(imports(tree)) & set(ALLOWED) - ALLOWED[package]:
            assert (file.as_posix(), name) in EXCEPTIONS, f"{file} imports {name}"
            at_the_top = ast.Module([node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))], [])
            assert name not in set(imports(at_the_top)), f"{file} imports {name} before it is needed"
        if "ray" in set(imports(tree)):
            assert package in WITH_RAY or file.as_posix() in WITH_RAY, f"{file} imports Ray"
