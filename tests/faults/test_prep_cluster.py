"""A three-node cluster, two poison images, and everything killed once: the dataset is that of an undisturbed run."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from prep.config import PrepConfig
from prep.dataset.reader import Dataset
from prep.images.scan import scan
from prep.passes.supervisor import Supervisor
from prep.run import run
from tests.local_cluster import LocalCluster
from tests.prep.passes.test_plan import write_images
from tests.prep.prepared import compute_here
from tests.prep.runs import NETWORKS, files_of

PROJECT = Path(__file__).parents[2]
IMAGES, SHARD = 100, 2
POISON = {"image-007.png": "segfault", "image-053.png": "hang"}
REASONS = {"image-007.png": "crashes_worker", "image-053.png": "hangs_worker"}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cluster") / "source"
    write_images(folder, IMAGES, size=(96, 80))
    return folder


@pytest.fixture(scope="module")
def environment(source) -> dict[str, str]:
    """What every process of every run has: the same two images end whoever decodes them."""
    keys = {item.name: item.key for item in scan(source, 10**6).sources}
    faults = ",".join(f"px.decode@{keys[name]}:{action}" for name, action in POISON.items())
    return {"NANODIT_FAULT": faults, "OMP_NUM_THREADS": "1"}


def start(config: PrepConfig, environment: dict[str, str], log: Path) -> subprocess.Popen:
    fields = config.model_dump(mode="json", include={"source", "output", "base", "shard_size", "sample_timeout"})
    networks = [f"pose.{name}={path}" for name, path in NETWORKS.items()]
    overrides = [*(f"{name}={value}" for name, value in fields.items()), "layers=[pose]", *networks]
    with open(log, "a") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "prep", "run", *overrides],
            cwd=PROJECT, env=os.environ | environment, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip


def committed(root: Path) -> int:
    return len(list((root / "parts").glob("*.parquet")))


def wait_for(condition, process: subprocess.Popen, log: Path, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"the run ended with {process.returncode}:\n{log.read_text()}"
        assert time.monotonic() < end, f"waited {seconds} s in vain:\n{log.read_text()}"
        time.sleep(0.02)


def children(root: Path) -> list[int]:
    """The processes whose temporary files are there: those that compute for actors."""
    return [int(path.name.rsplit("-", 1)[1]) for path in root.glob("bucket_*/.*.tmp-*")]


def writers(root: Path) -> list[int]:
    """The processes of actors at work: the parents of those that compute."""
    return [parent for child in children(root) if (parent := parent_of(child))]


def parent_of(process: int) -> int:
    """The parent of a process, 0 for one that has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("PPid:")))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_p10_p11_p12_killed_driver_actor_and_node_change_nothing(source, environment, tmp_path, monkeypatch):
    fields = {"source": str(source), "base": 64, "shard_size": SHARD, "sample_timeout": 3, "layers": ["pose"]}
    disturbed = PrepConfig(output=str(tmp_path / "disturbed"), **fields)
    undisturbed = PrepConfig(output=str(tmp_path / "undisturbed"), pose=NETWORKS, **fields)
    root, log = Path(disturbed.output), tmp_path / "log.txt"
    total = 2 * (IMAGES // SHARD)  # px and pose

    def at(share: float, process: subprocess.Popen) -> None:
        wait_for(lambda: committed(root) >= share * total, process, log)

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    compute_here(monkeypatch, Supervisor)
    with ThreadPoolExecutor(1) as pool, LocalCluster(nodes=3, environment=environment) as cluster:
        alone = pool.submit(run, undisturbed)  # beside the others: most of its time it waits for the one that hangs
        for share in (0.1, 0.4):
            driver = start(disturbed, cluster.environment, log)
            at(share, driver)
            driver.send_signal(signal.SIGKILL)
            driver.wait()
            assert not (root / "index.parquet").exists()
        driver = start(disturbed, cluster.environment, log)
        at(0.5, driver)
        actors: list[int] = []
        wait_for(lambda: actors.extend(writers(root)) or actors, driver, log)
        os.kill(actors[-1], signal.SIGKILL)
        at(0.65, driver)
        os.kill(cluster.raylets[2], signal.SIGKILL)
        at(0.9, driver)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        last = start(disturbed, cluster.environment, log)
        assert last.wait(timeout=240) == 0, log.read_text()
        alone.result()
    assert "an actor was killed" in log.read_text()
    assert files_of(root) == files_of(Path(undisturbed.output))
    rejects = {row["source"]: row["reason"] for row in pq.read_table(root / "rejects.parquet").to_pylist()}
    assert rejects == REASONS  # the poison images, and no innocent one
    assert len(Dataset(root)) == IMAGES - len(POISON)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_node_that_joins_takes_part(source, tmp_path):
    """What computes on the first node is stopped meanwhile, so that something is left to do."""
    fields = {"source": str(source), "base": 64, "shard_size": SHARD, "layers": ["pose"]}
    config = PrepConfig(output=str(tmp_path / "out"), **fields)
    root, log = Path(config.output), tmp_path / "log.txt"
    with LocalCluster(nodes=1, environment={"NANODIT_FAULT": "px.decode@*:delay", "OMP_NUM_THREADS": "1"}) as cluster:
        driver = start(config, cluster.environment, log)
        wait_for(lambda: committed(root) > 2, driver, log)
        found: list[int] = []
        wait_for(lambda: found.extend(children(root)) or found, driver, log)
        os.kill(found[0], signal.SIGSTOP)
        raylet = cluster.add_node()
        wait_for(lambda: raylet in map(parent_of, writers(root)), driver, log)
        os.kill(found[0], signal.SIGCONT)
        assert driver.wait(timeout=240) == 0, log.read_text()
    assert len(Dataset(root)) == IMAGES
