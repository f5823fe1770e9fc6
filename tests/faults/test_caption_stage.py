"""Captions on a cluster of three raylets with a fake card each, by servers that the actors start: everything is killed.

The servers answer alike everywhere, so the bytes are those of an undisturbed run; those of real cards may differ in
words. What is killed takes its server and that one's runner along.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nanodit.files import sha256_bytes
from nanodit.place import PROJECT
from prep.captions.hosts import control_picture
from tests.local_cluster import LocalCluster
from tests.prep.caption_server import MODEL, CaptionServer
from tests.prep.captioning import caption_config, commit_crops, run_captions, text_parts, unit_bytes
from tests.prep.fake_ollama import install, processes, requests, wait_for_none

SHARDS, SIZE, MORE = 3, 16, 80
DIGEST = sha256_bytes(json.dumps({"model": MODEL, "layers": []}).encode())

DRIVER = """
import json, sys
from pathlib import Path
from prep.passes.caption_stage import caption_units
from prep.passes.ray_captions import ask_all
from prep.passes.ray_passes import ray_session
from tests.faults.test_caption_stage import config_of
from tests.prep.captioning import commit_crops, with_recipes
from nanodit.errors import run_command

def main():
    config = config_of(Path(sys.argv[1]))
    tasks = with_recipes(config, commit_crops(config, int(sys.argv[2]), int(sys.argv[3])))
    with ray_session():
        for units in caption_units(config, tasks, 3, lambda counts: print(json.dumps(counts), flush=True), ask_all):
            print(units, flush=True)

sys.exit(run_command(main))
"""


def config_of(folder: Path):
    folder.mkdir(exist_ok=True)
    return caption_config(folder, "auto", digest=DIGEST, patience=60.0, timeout=30.0)


class Site:
    """A cluster, the program on its PATH, and runs on it."""

    def __init__(self, folder: Path, cluster: LocalCluster, program: Path) -> None:
        self.folder, self.cluster, self.program, self.log = folder, cluster, program, folder / "log"

    def start(self, name: str, shards: int = SHARDS, size: int = SIZE) -> subprocess.Popen:
        command = [sys.executable, "-c", DRIVER, str(self.folder / name), str(shards), str(size)]
        environment = os.environ | self.cluster.environment
        with open(self.folder / f"{name}.txt", "a") as file:
            return subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=file, stderr=subprocess.STDOUT)

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.txt").read_text()

    def asked(self) -> list[dict]:
        return [entry for entry in requests(self.log) if entry.get("event") == "asked"]

    def answered(self) -> Counter[str]:
        """How often each picture was captioned."""
        entries = (entry for entry in requests(self.log) if entry.get("status") == 200 and entry["image"])
        return Counter(entry["image"] for entry in entries if entry["image"] != sha256_bytes(control_picture()))

    def forget(self) -> None:
        for path in self.log.glob("*.jsonl"):
            path.unlink()

    def wait(self, condition: Callable[[], bool], driver: subprocess.Popen, name: str, seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert driver.poll() is None, f"ended with {driver.returncode}:\n{self.said(name)}"
            assert time.monotonic() < end, f"waited {seconds} s in vain:\n{self.said(name)}"
            time.sleep(0.1)  # what is looked at is all of /proc

    def kill(self, driver: subprocess.Popen, name: str, raylet: int, what: str) -> None:
        """Kill the actor of a raylet while its server is asked, or first the raylet; the server goes too.

        No answer is given from before until the actor has ended: one on its way to the cache would be asked for again.
        """
        found: list[tuple[int, int]] = []

        def find() -> bool:
            servers = {entry["pid"] for entry in self.asked()}
            found.extend((server, actor) for server in servers if parent_of(actor := self.owner(server)) == raylet)
            return bool(found)

        self.wait(find, driver, name)
        server, actor = found[0]
        hold = self.log / "hold"
        hold.touch()
        self.wait(lambda: self.waiting(server) > 0, driver, name)
        time.sleep(1.0)  # for answers that were given before
        os.kill(actor if what == "actor" else raylet, signal.SIGKILL)
        self.wait(lambda: not (group_lives(server) or alive(actor)), driver, name, seconds=60)
        hold.unlink()

    def waiting(self, server: int) -> int:
        """How many questions a server has not answered."""
        entries = [entry for entry in requests(self.log) if entry["pid"] == server and entry.get("image")]
        return sum(1 if entry.get("event") == "asked" else -1 for entry in entries if entry.get("event") != "serve")

    def owner(self, server: int) -> int:
        """The actor of a server: who holds the other end of its watchdog's pipe."""
        watchdog = parent_of(server)
        try:
            lifeline = Path(f"/proc/{watchdog}/cmdline").read_bytes().split(b"\0")[4].decode()
        except (OSError, IndexError):  # it has ended
            return 0
        pipe = links(watchdog).get(lifeline)
        for path in Path("/proc").glob("[0-9]*"):
            if pipe and int(path.name) != watchdog and pipe in links(int(path.name)).values():
                return int(path.name)
        return 0


def group_lives(leader: int) -> bool:
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    return True


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def links(process: int) -> dict[str, str]:
    """What the descriptors of a process are."""
    try:
        return {path.name: os.readlink(path) for path in Path(f"/proc/{process}/fd").iterdir()}
    except OSError:
        return {}


def parent_of(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


@pytest.fixture
def site(tmp_path) -> Iterator[Site]:
    for name in ("bin", "log", "models"):
        (tmp_path / name).mkdir()
    program = install(tmp_path / "bin")
    environment = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "OLLAMA_MODELS": str(tmp_path / "models"),
        "FAKE_OLLAMA": str(tmp_path / "log"), "PYTHONPATH": str(PROJECT),
    }  # fmt: skip
    (tmp_path / "log" / "seconds").write_text("0.4")
    with LocalCluster(nodes=3, environment=environment, vram_gb=24) as cluster:
        yield Site(tmp_path, cluster, program)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_whatever_is_killed_each_sample_is_captioned_once_and_no_server_is_left(site):
    # the driver: what it had started ends with it
    driver = site.start("left", size=MORE)
    site.wait(lambda: len(processes(site.program)) == 6, driver, "left")  # three servers and their runners
    driver.kill()
    driver.wait()
    assert wait_for_none(site.program) == []
    pulled = [entry["pulled"] for entry in requests(site.log) if entry.get("pulled")]
    assert pulled == [MODEL]  # the raylets share one store

    site.forget()
    driver = site.start("disturbed")
    head, *others = site.cluster.raylets
    site.kill(driver, "disturbed", head, "actor")  # Ray starts another one in its place
    for raylet in others:
        site.kill(driver, "disturbed", raylet, "raylet")
    assert driver.wait(timeout=300) == 0, site.said("disturbed")
    assert wait_for_none(site.program) == []
    assert "an actor was killed, or died with its node" in site.said("disturbed")
    assert set(site.answered().values()) == {1}
    assert len(site.answered()) == SHARDS * SIZE

    disturbed = config_of(site.folder / "disturbed")
    tasks = commit_crops(disturbed, SHARDS, SIZE)
    assert sum(part.table.num_rows for part in text_parts(disturbed, tasks)) == SHARDS * SIZE
    with CaptionServer(digest=DIGEST) as server:  # by a server that was named, without a cluster
        (site.folder / "undisturbed").mkdir()
        undisturbed = caption_config(site.folder / "undisturbed", [server.url])
        run_captions(undisturbed, commit_crops(undisturbed, SHARDS, SIZE))
    assert unit_bytes(disturbed) == unit_bytes(undisturbed)
