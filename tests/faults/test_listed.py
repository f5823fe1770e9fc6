"""Every fault of the list has a test, which exists and is not skipped."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.faults.listed import LISTED

ROOT = Path(__file__).parents[2]
COUNTS = {"P": 18, "T": 17, "E": 9, "S": 10}


def test_no_fault_is_left_out():
    assert {*LISTED} == {f"{part}{number:02d}" for part, count in COUNTS.items() for number in range(1, count + 1)}
    assert len(LISTED) == 54


@pytest.mark.parametrize("fault", LISTED)
def test_a_fault_has_a_test(fault):
    assert any(LISTED[fault].values()), "none is named"
    for file, names in LISTED[fault].items():
        found = {
            node.name: node for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)
        }
        assert set(names) <= set(found), file
        for name in names:
            marks = [ast.unparse(mark) for mark in found[name].decorator_list]
            left_out = [mark for mark in marks if "skip" in mark or "xfail" in mark]
            assert all("sys.platform" in mark for mark in left_out), name
