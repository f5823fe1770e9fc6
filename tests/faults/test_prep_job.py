"""``ray job submit`` of the production config with demo encoders, captioned by servers of others and by its own."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from prep.dataset.reader import Dataset
from tests.prep.fake_ollama import install, requests, wait_for_none
from tests.prep.passes.test_plan import write_images

PROJECT = Path(__file__).parents[2]
IMAGES = 40
RAY = str(Path(sys.executable).parent / "ray")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def answer(address: str, environment: dict[str, str], path: str) -> Any:
    """What Ray's dashboard says there; None while it does not answer."""
    token = {"Authorization": f"Bearer {environment['RAY_AUTH_TOKEN']}"}
    try:
        with urlopen(Request(address + path, headers=token), timeout=10) as reply:
            return json.load(reply)
    except OSError:
        return None


@pytest.fixture
def cluster(tmp_path) -> Iterator[tuple[str, dict[str, str]]]:
    """A head started as people do, with a dashboard on loopback; its address and the environment to reach it."""
    port, dashboard, client, agent = free_ports(4)
    environment = os.environ | {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16), "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": f"/tmp/ray-{secrets.token_hex(3)}", "FAKE_OLLAMA": str(tmp_path / "log"),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # or it ends after half a minute: an idle actor is not drained
        "PATH": f"{tmp_path / 'bin'}:{Path(RAY).parent}:{os.environ['PATH']}",
        "OLLAMA_MODELS": str(tmp_path / "models"),
    }  # fmt: skip
    for name in ("bin", "log"):
        (tmp_path / name).mkdir()
    install(tmp_path / "bin")
    head = subprocess.Popen(
        [
            RAY, "start", "--head", "--block", f"--port={port}", "--num-cpus=1", "--include-dashboard=true",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}",
            f"--dashboard-agent-listen-port={agent}", f"--temp-dir={environment['RAY_TMPDIR']}",
        ],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    address = f"http://127.0.0.1:{dashboard}"
    try:
        end = time.monotonic() + 120
        while answer(address, environment, "/api/jobs/") is None:
            assert time.monotonic() < end, "the head did not answer"
            assert head.poll() is None, f"ray start ended with {head.returncode}"
            time.sleep(0.2)
        yield address, environment
    finally:
        head.send_signal(signal.SIGTERM)  # with --block it ends its own processes, and nobody else's
        try:
            head.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)


@pytest.fixture
def caption_servers(tmp_path) -> Iterator[list[tuple[str, Path]]]:
    """Three of unequal speed; the second is gone after its seventh request."""
    processes, servers = [], []
    for number, (seconds, more) in enumerate([(0.05, ()), (0.1, ("--always", "8=die")), (0.2, ())]):
        log = tmp_path / f"captions-{number}.log"
        command = [sys.executable, "tests/prep/caption_server.py", "--port", "0", "--seconds", str(seconds)]
        process = subprocess.Popen(
            [*command, "--slots", "1", "--log", str(log), *more], cwd=PROJECT, stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        servers.append((process.stdout.readline().split()[-1], log))
    yield servers
    for process in processes:
        process.kill()
        process.wait()


PACK = """
import sys
from pathlib import Path
from ray._private.runtime_env.packaging import create_package, get_uri_for_directory
folder = sys.argv[1]
print(get_uri_for_directory(folder, include_gitignore=True))
create_package(folder, Path(sys.argv[2]), include_gitignore=True)
"""


def test_a_job_takes_code_and_configs_with_it_and_nothing_else(tmp_path):
    """By Ray's own packer: what lies beside them is private, large, or has no end."""
    clone, package = tmp_path / "clone", tmp_path / "package.zip"
    for name in ("nanodit", "prep", "train", "evaluate", "configs"):
        shutil.copytree(PROJECT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", ".rayignore", "cluster.yaml"):
        shutil.copy(PROJECT / name, clone)
    wanted = {path.relative_to(clone).as_posix() for path in clone.rglob("*") if path.is_file()}
    wanted -= {".gitignore", ".rayignore"}
    (clone / "my.yaml").write_text("extends: configs/prep/production.yaml\n")
    for name in ("hf_token", ".env", "token.txt", "configs/hf_token", "configs/.env.local", "prep/server.key"):
        (clone / name).write_text("secret")
    for name in ("holiday pictures/a.png", "out/bucket_64x64/shard-000000.px.tar", "runs/x/model.safetensors"):
        (clone / name).parent.mkdir(parents=True)
        (clone / name).write_bytes(bytes(1 << 20))
    os.mkfifo(clone / "pipe")
    (clone / "self").symlink_to(clone / "self")
    (clone / "above").symlink_to(clone)
    command = [sys.executable, "-c", PACK, str(clone), str(package)]
    packed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert packed.returncode == 0, packed.stderr
    with zipfile.ZipFile(package) as archive:
        assert {name for name in archive.namelist() if not name.endswith("/")} == wanted | {"my.yaml"}
    assert package.stat().st_size < 4 << 20


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_submitted_job_ends_with_0_and_captions_nothing_twice(cluster, caption_servers, tmp_path):
    write_images(tmp_path / "source", IMAGES, size=(96, 80))
    hosts = ", ".join(url for url, _ in caption_servers)
    said = submit(tmp_path, cluster, "named", [f"captions.hosts=[{hosts}]", "captions.slots=1"])
    served = [json.loads(line) for _, log in caption_servers for line in log.read_text().splitlines()]
    answered = Counter(entry["image"] for entry in served if entry.get("status") == 200 and entry["image"])
    assert len(answered) == IMAGES
    assert set(answered.values()) == {1}  # nothing is captioned twice
    assert "hosts 2 of 3" in said

    own = ["captions.hosts=auto", "placement.vram_gb.captions=0.1", "layers=[text]"]  # the first had all
    said = submit(tmp_path, cluster, "auto", own)
    started = requests(tmp_path / "log")
    answered = Counter(entry["image"] for entry in started if entry.get("status") == 200 and entry["image"])
    assert len(answered) == IMAGES
    assert set(answered.values()) == {1}
    assert [entry["pulled"] for entry in started if entry.get("pulled")] == ["gemma3:27b"]
    assert "gemma3:27b is pinned to" in said
    assert wait_for_none(tmp_path / "bin" / "ollama") == []


def submit(folder: Path, cluster: tuple[str, dict[str, str]], name: str, more: list[str]) -> str:
    """Submit a job that prepares the pictures with generated captions, and return what it said when it ended with 0."""
    address, environment = cluster
    overrides = [
        f"source={folder}/source", f"output={folder}/{name}", "encoders=demo", "base=64", "shard_size=8",
        "captions.backend=ollama", "captions.overwrite=true", *more,
    ]  # fmt: skip
    # the command line of the README; the interpreter is that of the cluster, and the config is uploaded
    job = subprocess.run(
        [
            RAY, "job", "submit", "--address", address, "--working-dir", ".", "--submission-id", name, "--",
            sys.executable, "-m", "prep", "run", "--config", "configs/prep/production.yaml", *overrides,
        ],
        cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert job.returncode == 0, job.stdout + job.stderr
    assert answer(address, environment, f"/api/jobs/{name}")["driver_exit_code"] == 0
    assert len(Dataset(folder / name)) == IMAGES
    return job.stdout
