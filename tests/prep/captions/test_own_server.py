"""A server of one's own: that it starts, finds or pulls the model once, and never outlives its owner."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nanodit.errors import ConfigError, ResourceError
from nanodit.place import PROJECT
from prep.captions.own_server import OwnServer, digest_here, find_model, has_program
from prep.captions.servers import OllamaServer
from tests.prep.caption_server import MODEL
from tests.prep.fake_ollama import manifest, processes, requests, wait_for_none

OPTIONS = {"num_ctx": 4096, "num_predict": 10, "temperature": 0.0, "seed": 0}


def ask(url: str) -> str:
    """One question, so that the model is loaded."""

    async def caption() -> str:
        server = OllamaServer(url, MODEL, 10.0, None)
        try:
            return (await server.caption(b"jpeg", "What is there?", OPTIONS)).text
        finally:
            await server.close()

    return asyncio.run(caption())


def find(url: str, lines: list[str]) -> str:
    return asyncio.run(find_model(url, MODEL, 10.0, lines.append))


def test_it_starts_pulls_answers_and_ends_with_its_runner(program, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    server, lines = OwnServer(slots=2), []
    url = server.start()
    digest = find(url, lines)
    assert digest == hashlib.sha256(manifest(MODEL).read_bytes()).hexdigest()
    assert len(lines) == 1
    assert lines[0].endswith(f"pulls {MODEL}")
    assert find(url, lines) == digest
    assert len(lines) == 1  # it is there
    assert len(ask(url).split()) > 50
    assert len(processes(program)) == 2
    assert not server.ended
    server.close()
    assert server.ended
    assert processes(program) == []
    assert [entry["cuda"] for entry in requests(tmp_path / "log") if entry.get("event") == "serve"] == ["3"]


def test_a_port_that_is_taken_meanwhile_is_left_to_its_owner(program, tmp_path):
    (tmp_path / "log" / "busy").write_text("2")
    server = OwnServer(slots=1)
    try:
        assert server.start().startswith("http://127.0.0.1:")
        assert len(processes(program)) == 1
    finally:
        server.close()
    (tmp_path / "log" / "busy").write_text("100")
    with pytest.raises(ResourceError, match=r"does not run on .*address already in use"):
        server.start()
    assert wait_for_none(program) == []


def test_two_processes_with_one_store_pull_once(program, tmp_path):
    (tmp_path / "log" / "pull").write_text("4")  # seconds, in which the other one gets there
    code = "from prep.captions.own_server import digest_here; import sys; print(digest_here(sys.argv[1], 10.0))"
    pulling = [
        subprocess.Popen([sys.executable, "-c", code, MODEL], cwd=PROJECT, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    digests = {process.communicate(timeout=60)[0].split()[-1] for process in pulling}
    assert digests == {hashlib.sha256(manifest(MODEL).read_bytes()).hexdigest()}
    assert [entry["pulled"] for entry in requests(tmp_path / "log") if entry.get("pulled")] == [MODEL]
    assert wait_for_none(program) == []


def test_a_model_that_cannot_be_pulled_is_named(program, tmp_path):
    manifest(MODEL).parent.mkdir(parents=True)
    manifest(MODEL).with_name(".partial").touch()  # as of another program that pulls
    with pytest.raises(ConfigError, match=f"cannot pull {MODEL}: digest mismatch.*captions.model"):
        digest_here(MODEL, 10.0)
    assert wait_for_none(program) == []


def test_without_the_program_its_place_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not has_program()
    with pytest.raises(ConfigError, match=r"has no program ollama: install it from https://ollama.com/download"):
        OwnServer(slots=1).start()


def test_a_server_that_ends_by_itself_takes_its_runner_along_and_can_be_started_again(program):
    server = OwnServer(slots=1)
    find(server.start(), [])
    ask(server.url)
    os.kill(min(processes(program)), signal.SIGKILL)  # the runner, which was forked later, is left behind
    end = time.monotonic() + 10
    while not server.ended and time.monotonic() < end:
        time.sleep(0.02)
    assert server.ended
    assert processes(program) == []
    ask(server.start())
    server.close()
    assert wait_for_none(program) == []


OWNER = """
import sys, time
from prep.captions.own_server import OwnServer
from tests.prep.captions.test_own_server import ask, find
server = OwnServer(slots=1)
find(server.start(), [])
ask(server.url)
print("ready", flush=True)
time.sleep(600)
"""


def test_nothing_is_left_of_it_when_its_owner_is_killed(program):
    owner = subprocess.Popen([sys.executable, "-c", OWNER], cwd=PROJECT, stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline().strip() == "ready"
    assert len(processes(program)) == 2
    owner.kill()
    owner.wait()
    assert wait_for_none(program) == []


def test_its_watchdog_is_nobodys_child_and_in_nobodys_session(program):
    """Ray ends the children of a worker that ends, and a terminal its session."""
    server = OwnServer(slots=1)
    server.start()
    try:
        (serve,) = processes(program)
        parent = int(Path(f"/proc/{serve}/stat").read_text().rpartition(")")[2].split()[1])
        assert b"watchdog" in Path(f"/proc/{parent}/cmdline").read_bytes()
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        assert str(parent) not in children
        assert len({os.getsid(0), os.getsid(parent), os.getsid(serve)}) == 3
    finally:
        server.close()


def test_the_lock_is_waited_for(program, tmp_path):
    """While one process pulls, the other one does not give up: it finds the model then."""
    from prep.captions.own_server import store_lock

    server, lines = OwnServer(slots=1), []
    url = server.start()
    with store_lock():
        thread = threading.Thread(target=find, args=(url, lines))
        thread.start()
        while not [entry for entry in requests(tmp_path / "log") if entry.get("path") == "/api/tags"]:
            time.sleep(0.02)
        time.sleep(0.5)
        manifest(MODEL).parent.mkdir(parents=True)
        manifest(MODEL).write_text(json.dumps({"model": MODEL}))
    thread.join(timeout=10)
    server.close()
    assert lines == []
    assert [entry for entry in requests(tmp_path / "log") if entry.get("pulled")] == []
