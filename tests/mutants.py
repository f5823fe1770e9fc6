"""Mutants of the code whose numbers are promised: one constant, comparison or operator is changed, and tests must fail.

``python -m tests.mutants [FILE ...]`` tries every mutant of the files in ``TARGETS`` in a copy of the tree, each with
the tests named there, and prints those that no test noticed. A mutant takes seconds, all of them an hour on two cores;
what survived and why is in docs/mutants.md.
"""

from __future__ import annotations

import ast
import multiprocessing
import os
import queue
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SECONDS = 120  # of the tests of a mutant, which may never end
TARGETS = {  # file -> tests that must notice
    "train/method/flow.py": ("tests/train/method/test_flow.py",),
    "train/method/dropout.py": ("tests/train/method/test_dropout.py",),
    "train/method/schedule.py": ("tests/train/method/test_schedule.py",),
    "train/method/ema.py": ("tests/train/method/test_ema.py",),
    "train/method/optim.py": ("tests/train/method/test_optim.py",),
    "train/method/sampling.py": ("tests/train/method/test_sampling.py",),
    "train/method/repa.py": ("tests/train/method/test_repa.py",),
    "train/model/tread.py": ("tests/train/model/test_tread.py",),
    "prep/dataset/buckets.py": ("tests/prep/dataset/test_buckets.py",),
    "prep/encoders/dwpose.py": ("tests/prep/encoders/test_dwpose.py",),
}
NUMBERS = "tests/test_seed.py"
OURS = {"nanodit", "prep", "train", "evaluate", "tests"}
SWAPPED = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """The ``number``-th place of a file at which something can be changed, and the change."""

    file: str
    number: int
    line: int
    before: str
    after: str


class Mutator(ast.NodeTransformer):
    """Changes the ``wanted``-th place, and lists every place it meets; texts and annotations are left alone."""

    def __init__(self, wanted: int = -1) -> None:
        self.wanted, self.places = wanted, []

    def _take(self, node: ast.AST, change) -> ast.AST:
        self.places.append((node.lineno, change))
        if len(self.places) - 1 == self.wanted:
            change(node)
        return node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value:
            node.value = self.visit(node.value)
        return node

    def visit_arguments(self, node: ast.arguments) -> ast.AST:
        node.defaults = [self.visit(default) for default in node.defaults]
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, bool):
            return self._take(node, lambda n: setattr(n, "value", not n.value))
        if isinstance(node.value, int):
            return self._take(node, lambda n: setattr(n, "value", n.value + 1))
        if isinstance(node.value, float):
            return self._take(node, lambda n: setattr(n, "value", n.value * 1.5 if n.value else 1.0))
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        for index, operator in enumerate(node.ops):
            if type(operator) in SWAPPED:
                self._take(node, lambda n, i=index: n.ops.__setitem__(i, SWAPPED[type(n.ops[i])]()))
        return node

    def _operator(self, node):
        self.generic_visit(node)
        if type(node.op) in SWAPPED:
            self._take(node, lambda n: setattr(n, "op", SWAPPED[type(n.op)]()))
        return node

    visit_BinOp = visit_BoolOp = visit_AugAssign = _operator


def mutants(file: str) -> Iterator[Mutant]:
    """Yield every mutant of a file."""
    text = (ROOT / file).read_text(encoding="utf-8")
    counter = Mutator()
    counter.visit(ast.parse(text))
    for number, (line, _) in enumerate(counter.places):
        lines = [ast.unparse(tree).splitlines() for tree in (ast.parse(text), _mutated(text, number))]
        before, after = next(((a, b) for a, b in zip(*lines) if a != b), ("", ""))
        yield Mutant(file, number, line, before.strip(), after.strip())


def _mutated(text: str, number: int) -> ast.AST:
    return ast.fix_missing_locations(Mutator(number).visit(ast.parse(text)))


def survives(mutant: Mutant, copies: queue.Queue[str]) -> bool:
    """Return whether all tests pass on a mutant, in a copy of the tree that nobody else uses meanwhile."""
    copy = Path(copies.get())
    target = copy / mutant.file
    text = (ROOT / mutant.file).read_text(encoding="utf-8")
    try:
        target.write_text(ast.unparse(_mutated(text, mutant.number)), encoding="utf-8")
        child = multiprocessing.get_context("fork").Process(target=_test, args=(copy, mutant.file))
        child.start()
        child.join(SECONDS)
        if child.is_alive():
            child.kill()
            child.join()
        return child.exitcode == 0
    finally:
        target.write_text(text, encoding="utf-8")
        copies.put(str(copy))


def _test(copy: Path, file: str) -> None:
    """Run the tests of a file in a copy of the tree, in a process that already has what takes seconds to import."""
    os.chdir(copy)
    sys.dont_write_bytecode = True
    sys.path[0] = str(copy)
    for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
        del sys.modules[name]
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        options = ["-q", "-x", "-p", "no:cacheprovider", "-k", "not plan"]
        os._exit(pytest.main([*options, *TARGETS[file], NUMBERS]))


def main(files: Sequence[str]) -> None:
    """Try all mutants of ``files``, or of every target, and print a line for each file and each survivor."""
    # here, and not once for each mutant
    import hypothesis  # noqa: F401
    import torch.export  # noqa: F401
    import transformers  # noqa: F401

    workers = max(1, os.cpu_count() or 1)
    copies: queue.Queue[str] = queue.Queue()
    with tempfile.TemporaryDirectory() as folder:
        tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for worker in range(workers):
            copy = Path(folder) / str(worker)
            for name in tracked.splitlines():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
            copies.put(str(copy))
        with ThreadPoolExecutor(workers) as pool:
            for file in files or TARGETS:
                if not survives(Mutant(file, -1, 0, "", ""), copies):
                    sys.exit(f"{file}: its tests fail without any change")
                found = list(mutants(file))
                lived = [m for m, alive in zip(found, pool.map(partial(survives, copies=copies), found)) if alive]
                print(f"{file}: {len(found)} mutants, {len(lived)} survived", flush=True)
                for mutant in lived:
                    print(f"  {mutant.line}: {mutant.before}  ->  {mutant.after}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
