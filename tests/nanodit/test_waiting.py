"""Threads of OpenMP sleep while they wait: decided before torch is imported, whoever imports it, unless a user has."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import importlib, os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("torch", os.environ.get("OMP_WAIT_POLICY"))
            sys.stdout.flush()
            os._exit(0)

sys.meta_path.insert(0, Watch())
importlib.import_module(sys.argv[1])
print("no torch", os.environ.get("OMP_WAIT_POLICY"))
"""
# entry points, what Ray's workers and other processes unpickle or run first, and what a program may import alone
FIRST = [
    "nanodit.cli", "prep.__main__", "train.__main__", "evaluate.__main__", "prep.passes.worker", "prep.encoders.t5",
    "prep.passes.ray_passes", "train.sweep.actor", "train.model.network", "train.pipeline", "evaluate.metrics.pixels",
]  # fmt: skip
CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def policy(module: str, **variables: str) -> str:
    """Return what stands in the environment when torch is first asked for, or at the end."""
    clean = {name: value for name, value in os.environ.items() if name not in CHOICES}
    command = [sys.executable, "-c", CODE, module]
    done = subprocess.run(command, env=clean | variables, capture_output=True, text=True, check=True)
    return done.stdout.split()[-1]


@pytest.mark.parametrize("module", FIRST)
def test_it_stands_before_torch(module):
    assert policy(module) == "PASSIVE"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [("OMP_WAIT_POLICY", "ACTIVE", "ACTIVE"), ("GOMP_SPINCOUNT", "9", "None"), ("KMP_BLOCKTIME", "1", "None")],
)
def test_what_a_user_has_set_stays(name, value, expected):
    assert policy("train.model.network", **{name: value}) == expected
