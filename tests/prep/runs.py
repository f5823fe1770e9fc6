"""What the tests of whole runs share: configs, commands, and the hashes of what they wrote."""

import sys
from pathlib import Path

import pyarrow.parquet as pq

from nanodit.files import sha256_file
from prep.config import PrepConfig
from prep.encoders.demo import ASSETS, DETECTOR, POSE
from tests.prep.passes.test_plan import config

PROJECT = Path(__file__).parents[2]
NETWORKS = {"detector": str(ASSETS / DETECTOR), "pose": str(ASSETS / POSE)}
FINISHED = ("dataset.json", "index.parquet", "rejects.parquet", "manifest.parquet", "truth.parquet")


def files_of(root: Path) -> dict[str, str]:
    """Hash of every file of a dataset but those of the folders that the promise of equal bytes leaves out."""
    outside = {"runs", "kept", "readers"}
    paths = (path for path in root.rglob("*") if path.is_file() and path.relative_to(root).parts[0] not in outside)
    return {path.relative_to(root).as_posix(): sha256_file(path) for path in paths}


def command(settings: PrepConfig, *more: str) -> list[str]:
    overrides = [f"{name}={getattr(settings, name)}" for name in ("source", "output", "base", "encoders", "shard_size")]
    overrides += [f"pose.{name}={path}" for name in NETWORKS if (path := getattr(settings.pose, name))]
    return [sys.executable, "-m", "prep", "run", *overrides, f"layers=[{','.join(settings.layers)}]", *more]


def poses(tmp_path: Path, **changes) -> PrepConfig:
    """Pixels and poses alone, the layer that starts fastest."""
    return config(tmp_path, layers=["pose"], encoders="production", pose=NETWORKS, **changes)


def parent_of(process: int) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("PPid:")))


def rejects_of(root: Path) -> dict[str, tuple[str, str]]:
    return {row["source"]: (row["stage"], row["reason"]) for row in pq.read_table(root / "rejects.parquet").to_pylist()}
