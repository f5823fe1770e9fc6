"""``prep doctor``: each thing that can be wrong is made wrong, and is found with its fix."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from PIL import Image

from nanodit.config import load_config
from nanodit.errors import ConfigError, DataError
from nanodit.lock import locked
from nanodit.storage import open_storage
from prep.config import PrepConfig
from prep.doctor import doctor as doctor_module
from prep.doctor import models as models_module
from prep.doctor.check import Check, exit_code, fail, ok, show, to_json, warn, without_secrets
from prep.doctor.doctor import CheckTask, caption_servers, cluster, doctor, pass_check
from prep.doctor.models import check_model, check_network, lpips_checks
from prep.doctor.node import examine_node, read_gpus, read_ollama_memory
from prep.doctor.places import disk_check, lock_check, output_check, place_checks, source_checks
from prep.doctor.rules import Needs, clock_difference, cluster_checks, named, needs_of, node_checks
from prep.encoders.backbones import ALEXNET, VGG16
from prep.passes.nodes import Node
from prep.passes.placement import DEMO_WORKER_GB
from prep.run import print_plan
from tests.local_cluster import LocalCluster

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FULL_SIZE = Needs({"t5": 1.8, "dino": 1.7, "pose": 2.2}, memory_gb=4.0, workers=None, device="auto")
GPU = {"name": "NVIDIA GeForce RTX 4090", "driver": "580.95", "capability": "8.9", "memory": 24.5e9, "free": 23e9}
PATIENT = 40.0  # seconds: what is found does not depend on how busy the machine is

HEALTHY = {
    "host": "box",
    "time": 1000.0,
    "python": "3.11.7",
    "packages": {"ray": "2.60.0", "torch": "2.15.0", "transformers": "5.23.0"},
    "unmet": [],
    "runtimes": ["onnxruntime-gpu"],
    "gpus": [GPU],
    "gpu_error": "",
    "ollama_memory": 0.0,
    "probe": {
        "end": "",
        "late": False,
        "torch": "2.15.0",
        "cuda": "13.2",
        "onnxruntime": "1.31.1",
        "provider": "CUDAExecutionProvider",
    },
    "compiler": True,
    "ollama": True,
    "cpus": 8,
    "memory": 64e9,
    "memory_free": 60e9,
    "shm_free": 32e9,
    "open_files": [1024, 1048576],
    "listening": {"6379": [], "8265": []},
    "auth_mode": "",
    "open_token_files": [],
}


@contextmanager
def server(answer: Callable[[str, str, dict[str, str]], tuple[int, dict[str, str], Any]]) -> Iterator[tuple[str, list]]:
    """A web server on a free port: ``answer(method, path, headers)`` gives status, headers and a JSON value."""
    seen: list[tuple[str, str, dict[str, str]]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            request = (self.command, self.path, {name.lower(): value for name, value in self.headers.items()})
            seen.append(request)
            status, headers, value = answer(*request)
            body = json.dumps(value).encode()
            self.send_response(status)
            for name, text in (
                {"Content-Type": "application/json", "Content-Length": str(len(body))} | headers
            ).items():
                self.send_header(name, text)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *arguments: Any) -> None:
            """Quiet."""

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.daemon_threads = True
    threading.Thread(target=web.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{web.server_port}", seen
    finally:
        web.shutdown()
        web.server_close()


def config(**values: Any) -> PrepConfig:
    return PrepConfig(**{"source": ".", "output": "."} | values)


def find(checks: list[Check], name: str) -> Check:
    (check,) = [check for check in checks if check.name == name]
    return check


def judge(change: dict[str, Any], needs: Needs = FULL_SIZE, joined: bool = False) -> list[Check]:
    return node_checks(HEALTHY | change, needs, joined)


# --- one machine ------------------------------------------------------------------------------------------------------


def test_a_healthy_machine_has_nothing_to_mend() -> None:
    checks = judge({})
    assert {check.status for check in checks} == {"OK"}
    assert not any(check.fix for check in checks)


PROBE = HEALTHY["probe"]
NO_CUDA = {name: value for name, value in PROBE.items() if name != "torch"}
SICK = {
    "no GPU": ({"gpus": []}, "gpu", "WARN", 0, "install its driver"),
    "GPU lost": ({"gpus": [], "gpu_error": "GPU0: GPU is lost."}, "gpu", "FAIL", 4, "reboot"),
    "torch for CPUs": ({"probe": PROBE | {"cuda": None}}, "cuda", "FAIL", 2, "pip install torch torchvision"),
    "old driver": ({"probe": PROBE | {"torch_error": "driver too old"}}, "cuda", "FAIL", 4, "update the NVIDIA driver"),
    "torch broken": ({"probe": NO_CUDA | {"torch_error": "libcudart.so.13"}}, "torch", "FAIL", 2, "pip install"),
    "machine busy": ({"probe": {"end": "no answer within 10 s", "late": True}}, "torch", "WARN", 0, "idle"),
    "GPU hangs": ({"probe": {"end": "", "late": True, "torch": "2.15.0", "cuda": "13.2"}}, "cuda", "WARN", 0, "reboot"),
    "Turing": ({"gpus": [GPU | {"capability": "7.5"}]}, "bf16", "WARN", 0, "batch_size"),
    "GPU memory taken": ({"gpus": [GPU | {"free": 2e9}], "ollama_memory": 17e9}, "vram", "WARN", 0, "ollama stop"),
    "no compiler": ({"compiler": False}, "compiler", "WARN", 0, "build-essential"),
    "two onnxruntimes": ({"runtimes": ["onnxruntime", "onnxruntime-gpu"]}, "onnxruntime", "FAIL", 2, "uninstall"),
    "CUDA ignored": ({"probe": PROBE | {"provider": "CPUExecutionProvider"}}, "onnxruntime", "FAIL", 2, "uninstall"),
    "package missing": ({"unmet": ["ray>=2.60 (not installed)"]}, "packages", "FAIL", 2, "make install"),
    "no memory": ({"memory_free": 2e9}, "memory", "FAIL", 4, "close other programs"),
    "many workers": ({"gpus": [], "memory_free": 13e9}, "memory", "WARN", 0, "workers=3"),
    "Docker's 64 MB": ({"shm_free": 64e6}, "shared_memory", "WARN", 0, "--shm-size=11g"),
    "few files": ({"open_files": [256, 1024]}, "open_files", "WARN", 0, "ulimit -n"),
    "Ray not joined": ({"listening": {"6379": ["127.0.0.1"], "8265": []}}, "ports", "WARN", 0, "RAY_ADDRESS=auto"),
    "public dashboard": ({"listening": {"6379": [], "8265": ["0.0.0.0"]}}, "dashboard", "WARN", 0, "dashboard-host="),
    "no authentication": ({"auth_mode": "disabled"}, "dashboard", "WARN", 0, "RAY_AUTH_MODE=token"),
    "token for all": ({"open_token_files": ["/home/a/.ray/auth_token"]}, "token_files", "WARN", 0, "chmod 600"),
}  # fmt: skip


@pytest.mark.parametrize("illness", SICK)
def test_every_illness_is_named_with_one_fix(illness: str) -> None:
    change, name, status, code, fix = SICK[illness]
    checks = judge(change)
    check = find(checks, name)
    assert (check.status, check.code) == (status, code)
    assert fix in check.fix
    assert all(check.fix for check in checks if check.status != "OK")


def test_a_gpu_that_must_be_there_is_a_failure_without_one() -> None:
    required = Needs(FULL_SIZE.vram_gb, 4.0, None, device="cuda")
    assert find(judge({"gpus": []}, required), "gpu").status == "FAIL"
    assert find(judge({"gpus": []}, Needs({}, 0.0, None, "auto", slow=False)), "gpu").status == "OK"
    # in a cluster any machine may have it
    assert find(judge({"gpus": []}, required, joined=True), "gpu").status == "OK"


def test_where_a_run_starts_caption_servers_their_program_must_be_there() -> None:
    assert not [check for check in judge({"ollama": False}) if check.name == "ollama"]
    starts = replace(FULL_SIZE, ollama="gemma3:27b")
    assert "pulls gemma3:27b" in find(judge({}, starts), "ollama").found
    alone = find(judge({"ollama": False}, starts), "ollama")
    assert (alone.status, alone.code) == ("FAIL", 2)
    assert "ollama.com/download" in alone.fix
    assert find(judge({"ollama": False}, starts, joined=True), "ollama").status == "WARN"  # others may have it
    auto = config(captions={"backend": "ollama", "hosts": "auto"})
    assert needs_of(auto).ollama == "gemma3:27b"
    assert not needs_of(config(captions={"hosts": "auto"})).ollama
    never = pass_check(auto, [Node("id", "10.0.0.1", "box", 8, 1, 24, 32, ollama=False)])
    assert (never.status, never.code) == ("FAIL", 2)
    assert "no machine has Ollama (box)" in never.found


def test_dashboards_on_loopback_addresses_are_as_they_should_be() -> None:
    listening = {"6379": ["192.168.1.4"], "8265": ["127.0.0.1", "::1"]}
    checks = judge({"listening": listening}, joined=True)
    assert find(checks, "dashboard").status == find(checks, "ports").status == "OK"


def test_what_nvidia_smi_prints_is_read() -> None:
    table = "NVIDIA GeForce RTX 3060, 580.95.05, 8.6, 12288, 11000\nNVIDIA GB10, 580.95, 12.1, [N/A], [N/A]\n"
    first, second = read_gpus(table)
    assert first["memory"] == 12288 * 2**20
    assert first["capability"] == "8.6"
    assert second["free"] is None
    assert second["name"] == "NVIDIA GB10"
    assert find(judge({"gpus": [second]}), "vram").status == "OK"
    assert read_ollama_memory("/usr/bin/ollama, 1000\npython3, 500\n/usr/lib/ollama/runner, 24, 7\n") == 1007 * 2**20
    assert read_ollama_memory("/usr/bin/ollama, [N/A]\n") == 0


def test_this_machine_is_measured() -> None:
    with socket.create_server(("0.0.0.0", 0)) as listener:
        facts = examine_node()
        from prep.doctor.node import _listening

        assert _listening(listener.getsockname()[1]) == ["0.0.0.0"]
    assert json.loads(json.dumps(facts)) == facts  # plain values travel
    assert facts["probe"]["provider"] in ("CPUExecutionProvider", "CUDAExecutionProvider")
    assert facts["unmet"] == []
    assert len(facts["runtimes"]) == 1
    assert 0 < facts["memory_free"] <= facts["memory"]
    assert set(HEALTHY) == set(facts), "the rules above are tested on facts of the same shape"


def test_a_sick_gpu_driver_costs_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'Unable to determine the device handle for GPU0: GPU is lost.'\nexit 15\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    facts = examine_node()
    assert facts["gpus"] == []
    assert "GPU is lost" in facts["gpu_error"]
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr("prep.doctor.node.SMI_SECONDS", 0.2)
    monkeypatch.setattr("prep.doctor.node.PROBE_SECONDS", 0.2)
    start = time.monotonic()
    facts = examine_node()
    assert time.monotonic() - start < 50  # the program sleeps for a minute
    assert "does not answer" in facts["gpu_error"]
    assert facts["probe"]["late"]


# --- a cluster --------------------------------------------------------------------------------------------------------


def test_nodes_with_other_versions_and_clocks_are_named() -> None:
    other = HEALTHY | {"python": "3.12.1", "packages": HEALTHY["packages"] | {"torch": "2.14.0"}, "time": 940.0}
    machines = {"a": HEALTHY, "b": other, "c": HEALTHY, "d": TimeoutError("no answer within 11 seconds")}
    checks = cluster_checks(machines, FULL_SIZE, before=999.0, after=1003.0)
    python, torch = (check for check in checks if check.name == "versions")
    assert (python.status, python.code, python.found) == ("FAIL", 2, "Python is 3.11.7, but 3.12.1 on b")
    assert (torch.status, torch.found) == ("WARN", "torch is 2.15.0, but 2.14.0 on b")
    assert "on b by 59 s" in find(checks, "clock").found
    silent = find(checks, "node")
    assert (silent.node, silent.status, silent.code) == ("d", "FAIL", 4)


def test_equal_nodes_are_fine_and_one_gpu_is_enough() -> None:
    machines = {"a": HEALTHY | {"gpus": []}, "b": HEALTHY}
    assert {check.status for check in cluster_checks(machines, FULL_SIZE, 999.0, 1001.0)} == {"OK"}
    alone = cluster_checks({"a": HEALTHY | {"gpus": []}}, FULL_SIZE, 999.0, 1001.0)
    assert [(check.name, check.status) for check in alone] == [("gpu", "WARN")]


def test_a_clock_is_only_wrong_beyond_the_time_that_asking_took() -> None:
    assert clock_difference(1000.0, 999.0, 1004.0) == 0
    assert clock_difference(990.0, 999.0, 1004.0) == 9
    assert clock_difference(1010.0, 999.0, 1004.0) == 6


def test_lpips_networks_are_looked_for_and_the_fix_says_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    missing = lpips_checks()
    assert [(check.name, check.status) for check in missing] == [("lpips_metric", "WARN"), ("lpips_loss", "WARN")]
    for check, backbone in zip(missing, (ALEXNET, VGG16)):
        assert str(backbone.path) in check.found
        assert check.fix == backbone.remedy
        assert f"https://download.pytorch.org/models/{backbone.file}" in check.fix
    for backbone in (ALEXNET, VGG16):
        backbone.path.parent.mkdir(parents=True, exist_ok=True)
        backbone.path.write_bytes(b"another network")
    assert all("not the published network" in check.found for check in lpips_checks())
    own = hashlib.sha256(b"another network").hexdigest()[:8]
    for name, backbone in (("ALEXNET", ALEXNET), ("VGG16", VGG16)):
        renamed = replace(backbone, file=f"network-{own}.pth")
        renamed.path.write_bytes(b"another network")
        monkeypatch.setattr(models_module, name, renamed)
    assert [check.status for check in lpips_checks()] == ["OK", "OK"]


def test_machines_have_the_names_people_know() -> None:
    error = TimeoutError()
    machines = {
        "10.0.0.1": {"host": "box"},
        "10.0.0.2": {"host": "box"},
        "10.0.0.3": {"host": "nas"},
        "10.0.0.4": error,
    }
    assert list(named(machines)) == ["box (10.0.0.1)", "box (10.0.0.2)", "nas", "10.0.0.4"]


def test_no_cluster_at_the_address_is_found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_module, "examine_node", lambda: HEALTHY)
    start = time.monotonic()
    checks = list(cluster(FULL_SIZE, f"127.0.0.1:{dead_port()}", config()))
    assert time.monotonic() - start < 50  # Ray itself tries for a minute
    assert find(checks, "ray").code == 4
    assert "RAY_ADDRESS" in find(checks, "ray").found
    assert find(checks, "packages").status == "OK"  # this machine is looked at all the same


def doctor_of(environment: dict[str, str], join_seconds: float) -> Callable[[], dict[str, dict[str, Any]]]:
    """Start a process with this environment; what is returned waits for the checks by name that it prints."""
    script = (
        "from tests.prep.doctor.test_doctor import PATIENT, config, doctor, doctor_module\n"
        f"doctor_module.LIMIT, doctor_module.JOIN_SECONDS = 2 * PATIENT, {join_seconds}\n"
        "doctor_module.NODE_SECONDS = PATIENT\n"
        "doctor(config(encoders='demo'), as_json=True)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | environment,
    )  # fmt: skip

    def wait() -> dict[str, dict[str, Any]]:
        printed, _ = process.communicate(timeout=200)
        # the document alone is on stdout, whatever Ray says
        return {check["name"]: check for check in json.loads(printed)["checks"]}

    return wait


@pytest.mark.slow
def test_the_machines_of_a_running_ray_are_examined() -> None:
    with LocalCluster(nodes=2) as running:
        stranger = doctor_of(running.environment | {"RAY_AUTH_TOKEN": "0" * 32}, 7.0)
        checks = doctor_of(running.environment, PATIENT)()
        stranger = stranger()
        assert checks["ray"]["found"] == "2 nodes on 1 machine"
        assert (checks["packages"]["node"], checks["packages"]["status"]) == (socket.gethostname(), "OK")
    assert stranger["ray"]["status"] == "FAIL"
    assert "token" in stranger["ray"]["fix"]
    assert stranger["packages"]["status"] == "OK"  # of this machine


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list]:
    """A hub with an open model, a gated one and a broken one, behind an empty cache."""

    def answer(method: str, path: str, headers: dict[str, str]) -> tuple[int, dict[str, str], Any]:
        if path.startswith("/api/"):  # which agents there are: the client asks now and then
            return 404, {}, {}
        _, _owner, name, _, revision, file = path.split("/")
        if name == "open" and revision != "main":
            return 404, {"X-Error-Code": "RevisionNotFound"}, {}
        if name == "open" or headers.get("authorization") == "Bearer hf_accepted":
            if file == "model.safetensors":
                return 200, {"X-Repo-Commit": COMMIT, "X-Linked-Size": "2900000000", "ETag": '"e"'}, {}
            return 404, {"X-Error-Code": "EntryNotFound"}, {}
        if name == "pickled":
            return 404, {"X-Error-Code": "EntryNotFound"}, {}
        if name == "busy":
            return 503, {}, {}
        if name.startswith("dinov3"):
            return 403, {"X-Error-Code": "GatedRepo"}, {}
        return 401, {"X-Error-Code": "RepoNotFound"}, {}

    with server(answer) as (url, seen):
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        yield seen


def test_a_model_that_can_be_downloaded_is_fine(hub: list) -> None:
    check = check_model(config(), "t5", "org/open")
    assert (check.status, check.name) == ("OK", "model_t5")
    assert check.found == "org/open will be downloaded at the first run (0123456, 2.9 GB)"
    assert not [path for method, path, _ in hub if method != "HEAD" and "resolve" in path], "nothing is downloaded"


def test_a_gated_model_names_the_licence_the_login_and_the_way_without(
    hub: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    gated = "facebook/dinov3-vitl16-pretrain-lvd1689m"
    check = check_model(config(), "dino", gated)
    assert (check.status, check.code) == ("FAIL", 2)
    assert f"https://huggingface.co/{gated}" in check.fix
    assert "`hf auth login`" in check.fix
    assert "production-ungated.yaml" in check.fix
    monkeypatch.setenv("HF_TOKEN", "hf_accepted")
    assert check_model(config(), "dino", gated).status == "OK"


@pytest.mark.parametrize(
    ("name", "code", "found"),
    [
        ("org/typo", 2, "the hub shows you no model org/typo"),
        ("org/pickled", 2, "no weights that can be read"),
        ("org/busy", 4, "the hub answers 503"),
        ("no such folder", 2, "neither a folder here nor a name"),
    ],
)
def test_models_that_cannot_be_had_are_told_apart(hub: list, name: str, code: int, found: str) -> None:
    check = check_model(config(), "t5", name)
    assert (check.status, check.code) == ("FAIL", code)
    assert found in check.found
    assert check.fix


def test_a_revision_that_is_gone_is_named(hub: list) -> None:
    check = check_model(config(t5={"revision": "v9"}), "t5", "org/open")
    assert "no revision v9" in check.found
    assert "t5.revision" in check.fix


def test_a_model_in_the_cache_asks_nobody(hub: list, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "models--org--model"
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    (snapshot / "config.json").write_text("{}")
    assert check_model(config(), "t5", "org/model").status == "FAIL"  # half a download
    asked = len(hub)
    (snapshot / "model.safetensors").write_bytes(b"weights")
    assert check_model(config(), "t5", "org/model").found == "org/model is in the cache (0123456)"
    assert len(hub) == asked


def test_machines_without_network_are_told_what_to_do(hub: list, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = f"http://127.0.0.1:{dead_port()}"
    monkeypatch.setattr(constants, "ENDPOINT", dead)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", dead + "/{repo_id}/resolve/{revision}/{filename}")
    check = check_model(config(), "dino", "facebook/dinov3-vitl16-pretrain-lvd1689m")
    assert check.code == 4
    assert "does not answer" in check.found
    assert "licence" in check.fix
    assert "HF_HOME" in check.fix
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    check = check_model(config(), "t5", "org/open")
    assert check.code == 2
    assert "HF_HUB_OFFLINE" in check.found
    assert "unset" in check.fix


def test_folders_and_demo_encoders_need_no_hub(tmp_path: Path) -> None:
    assert check_model(config(), "t5", None).status == "OK"
    assert check_model(config(), "t5", str(tmp_path)).code == 2
    (tmp_path / "config.json").write_text("{}")
    assert check_model(config(), "t5", str(tmp_path)).status == "OK"


def test_pose_networks_are_judged_by_their_bytes(hub: list, tmp_path: Path) -> None:
    path = tmp_path / "yolox_l.onnx"
    assert check_network(config(), "detector", str(path)).code == 3
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    assert "Git LFS pointer" in check_network(config(), "detector", str(path)).found
    path.write_bytes(b"another network")
    assert "authors published 7860ae79de6c" in check_network(config(), "detector", str(path)).found
    path = path.rename(tmp_path / "mine.onnx")
    assert check_network(config(), "detector", str(path)).status == "OK"
    assert check_network(config(), "pose", None).status == "OK"
    assert check_network(config(), "pose", "yzd-v/DWPose:dw-ll_ucoco_384.onnx").code == 2
    assert check_network(config(), "pose", "org/open:model.safetensors").status == "OK"


# --- captions ---------------------------------------------------------------------------------------------------------


def ollama(models: dict[str, str], version: str = "0.12.3") -> Any:
    """A server that speaks Ollama's wire format about the models (name -> digest) that it has."""

    def answer(method: str, path: str, headers: dict[str, str]) -> tuple[int, dict[str, str], Any]:
        if path == "/api/tags":
            entries = [{"name": name, "model": name, "digest": digest, "size": 17e9} for name, digest in models.items()]
            return 200, {}, {"models": entries}
        if path == "/api/version":
            return 200, {}, {"version": version}
        if path == "/api/ps":
            return 200, {}, {"models": [{"name": name, "model": name, "size_vram": 17e9} for name in models]}
        return 404, {}, {"error": "not found"}

    return server(answer)


def captions(*hosts: str, **values: Any) -> Any:
    return config(captions={"backend": "ollama", "hosts": list(hosts), "model": "gemma3:27b"} | values).captions


def test_a_host_with_the_model_is_fine_and_gets_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_API_KEY", "secret-of-another-host")
    with ollama({"gemma3:27b": "a418f5838eaf7fe2cfe0a3046c8384b68ba43a4435542c942f9db00a5f342203"}) as (url, seen):
        (check,) = caption_servers(captions(url))
    assert (check.status, check.node) == ("OK", url)
    assert check.found == "0.12.3 has gemma3:27b (a418f5838eaf); models hold 17.0 GB of GPU memory now"
    assert not any("authorization" in headers for _, _, headers in seen)


def test_a_host_may_be_named_without_a_scheme() -> None:
    with ollama({"gemma3:27b": "a" * 64}) as (url, _):
        (check,) = caption_servers(captions(url.removeprefix("http://")))
    assert check.found.startswith("0.12.3 has gemma3:27b")


def test_hosts_without_the_model_with_another_build_or_version_are_named() -> None:
    good, other = {"gemma3:27b": "a" * 64}, {"gemma3:27b": "b" * 64}
    with ollama(good) as (one, _), ollama(other) as (two, _), ollama({"llama3:8b": "c" * 64}) as (three, _):
        checks = caption_servers(captions(one, two, three))
        assert [check.status for check in checks] == ["OK", "OK", "FAIL", "FAIL"]
        assert checks[2].code == 2
        assert checks[2].node == three
        assert "ollama pull gemma3:27b" in checks[2].fix
        assert checks[3].name == "caption_model"
        assert "different builds" in checks[3].found
        pinned = caption_servers(captions(one, digest="d" * 64))
        assert find(pinned, "caption_model").code == 2
    with ollama(good) as (one, _), ollama(good, version="0.9.0") as (two, _):
        check = find(caption_servers(captions(one, two)), "caption_model")
        assert check.status == "WARN"
        assert "0.12.3 and 0.9.0" in check.found


def test_one_dead_host_of_two_is_survived_and_one_of_one_is_not() -> None:
    dead = f"http://127.0.0.1:{dead_port()}"
    with ollama({"gemma3:27b": "a" * 64}) as (url, _):
        checks = caption_servers(captions(url, dead))
    assert [check.status for check in checks] == ["OK", "WARN"]
    assert checks[1].node == dead
    (check,) = caption_servers(captions(dead))
    assert (check.status, check.code) == ("FAIL", 4)
    assert "ollama serve" in check.fix


def test_a_host_that_never_answers_costs_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prep.doctor.models.SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        (check,) = caption_servers(captions(f"http://127.0.0.1:{silent.getsockname()[1]}"))
    assert check.code == 4
    assert "no answer" in check.found


def test_openai_servers_are_asked_for_their_models() -> None:
    def answer(method: str, path: str, headers: dict[str, str]) -> tuple[int, dict[str, str], Any]:
        return 200, {}, {"data": [{"id": "gemma3:27b", "root": "google/gemma-3-27b-it"}]}

    with server(answer) as (url, _):
        (check,) = caption_servers(captions(url, backend="openai"))
        assert (check.name, check.status) == ("openai", "OK")
        (check,) = caption_servers(captions(url, backend="openai", model="other"))
        assert check.code == 2
        assert "has no model other" in check.found


# --- places -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.TXT").write_text("A black square.")
    return folder


def test_a_source_is_counted_and_a_missing_one_named(photos: Path, tmp_path: Path) -> None:
    for name in ("0.xmp", "0.CR2"):
        (photos / name).write_bytes(b"II*\0")
    (photos / "copy.png").write_bytes((photos / "0.png").read_bytes())
    checks, images = source_checks(config(source=str(photos), base=64))
    assert images == 3
    assert find(checks, "source").found == f"3 images in {photos}; 2 other files ignored: 1 .CR2, 1 .xmp"
    assert "1 of 4 sources (1 duplicate)" in find(checks, "refused").found
    assert source_checks(config(source=str(tmp_path / "nowhere")))[0][0].code == 2
    (tmp_path / "empty").mkdir()
    assert source_checks(config(source=str(tmp_path / "empty")))[0][0].code == 3


def test_images_without_a_caption_stop_the_doctor_as_they_stop_the_run(photos: Path, tmp_path: Path) -> None:
    def checks(on_missing: str) -> list[Check]:
        captions = {"on_missing": on_missing}
        return place_checks(config(source=str(photos), output=str(tmp_path / "set"), base=64, captions=captions))

    assert find(checks("error"), "captions").status == "OK"
    (photos / "1.TXT").rename(photos / "._1.txt")  # a Mac's, and nobody's caption
    check = find(checks("error"), "captions")
    assert check.code == 3
    assert "1 of 3 images have no usable caption (1 caption_missing): 1.png has no caption" in check.found
    assert "captions.on_missing=reject" in check.fix
    assert find(checks("reject"), "captions").status == "WARN"
    (photos / "2.TXT").unlink()  # more than max_reject_rate, but the user has chosen to leave them out
    assert (find(checks("reject"), "captions").status, find(checks("reject"), "refused").status) == ("WARN", "WARN")
    (photos / "0.TXT").unlink()
    check = find(checks("reject"), "refused")
    assert check.code == 3
    assert "nothing was accepted" in check.found


def test_the_doctor_looks_for_captions_where_the_run_does(photos: Path, tmp_path: Path) -> None:
    def check(**captions: Any) -> Check:
        settings = config(source=str(photos), output=str(tmp_path), base=64, captions=captions)
        return find(place_checks(settings), "captions")

    (photos / "1.TXT").unlink()
    assert "captions.backend=ollama or openai" in check().fix
    (photos / "metadata.csv").write_text("file_name,text\n1.png,A red square.\n")
    assert check().status == "OK"
    assert "1 caption_missing): 1.png has no caption (looked for 1.txt)" in check(**{"from": ["txt"]}).found
    (photos / "2.TXT").write_text(" ")  # it is there, and no caption
    assert "1 of 3 images have no usable caption (1 caption_empty): 2.TXT has no text" in check().found


def test_images_that_are_too_small_for_the_base_are_seen(photos: Path, tmp_path: Path) -> None:
    def checks(base: int) -> list[Check]:
        return place_checks(config(source=str(photos), output=str(tmp_path / "set"), base=base))

    assert "refused" not in [check.name for check in checks(64)]
    check = find(checks(1024), "refused")
    assert check.code == 3
    assert "3 of 3 sources were rejected (3 too_small), for example 0.png: 64x64 would be enlarged 16.00" in check.found


def test_more_than_half_damaged_stops_the_doctor_as_it_stops_the_run(photos: Path, tmp_path: Path) -> None:
    settings = config(source=str(photos), output=str(tmp_path / "set"), base=64)
    for number in range(2):
        (photos / f"{number}.png").write_bytes(b"<html>")
    check = find(place_checks(settings), "refused")
    assert check.code == 3
    assert "2 of 3 sources were rejected (2 not_an_image)" in check.found
    with pytest.raises(DataError, match=re.escape(check.found)):
        print_plan(settings)


def test_a_folder_that_takes_too_long_is_looked_at_in_part(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prep.doctor.places.SCAN_SECONDS", -1.0)
    monkeypatch.setattr("prep.doctor.places.AT_A_TIME", 2)
    checks, images = source_checks(config(source=str(photos), output=str(tmp_path / "set"), base=64))
    assert "2 images in" in checks[0].found
    assert "as far as 3 s reach; 1 more files to look at" in checks[0].found.replace("-1 s", "3 s")
    assert images == 3


def test_the_doctor_shows_no_progress_of_its_scan(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place_checks(config(source=str(photos), output=str(photos.parent / "set"), base=64))
    assert capsys.readouterr().out == ""


def test_outputs_that_cannot_be_written_are_named(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "data" / "set"
    assert output_check(config(source=str(photos), output=str(output))).status == "OK"
    assert not list(tmp_path.glob("data*")), "the doctor changes nothing"
    assert output_check(config(source=str(photos), output=str(photos / "set"))).code == 2
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert output_check(config(source=str(photos), output=str(blocked / "set"))).code == 4
    # /proc takes no files from anybody, root included
    assert output_check(config(source=str(photos), output="/proc/set")).code == 4


def test_a_disk_without_room_is_named(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = config(source=str(photos), output=str(tmp_path / "set"))
    assert disk_check(place, 3).status == "OK"
    check = disk_check(place, 10**9)
    assert check.status == "WARN"
    assert "2700000.0 GB" in check.found
    assert "image.format=jpeg" in check.fix
    small = disk_check(config(source=str(photos), output=str(tmp_path / "set"), base=64), 1000)
    assert "take about 0.1 GB" in small.found
    monkeypatch.setattr("prep.doctor.places.DISK_LEAST", 1e18)
    assert disk_check(place, 3).code == 4


def test_another_run_is_seen_and_not_disturbed(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    assert lock_check(storage).status == "OK"
    assert not (tmp_path / "runs").exists()
    with locked(tmp_path):
        check = lock_check(storage)
        assert check.status == "WARN"
        assert f"process {os.getpid()}" in check.found
    assert lock_check(storage).status == "OK"
    with locked(tmp_path), open(tmp_path / "runs" / ".lock") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_names_do_not_move_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    show(warn("source", "a\x1b[2J.png cannot be read", "rename \x07it"))
    assert r"a\x1b[2J.png" in (out := capsys.readouterr().out)
    assert r"rename \x07it" in out
    assert out.replace("\n", "").isprintable()


def test_without_a_config_the_places_are_left_out() -> None:
    (check,) = place_checks(config())
    assert (check.name, check.status) == ("dataset", "WARN")


# --- the whole --------------------------------------------------------------------------------------------------------


def dead_port() -> int:
    """A port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_the_exit_code_is_that_of_what_is_mended_first() -> None:
    resource, data, setup = (fail("x", code, "", "") for code in (4, 3, 2))
    assert exit_code([ok("a", ""), warn("b", "", "")]) == 0
    assert exit_code([resource]) == 4
    assert exit_code([resource, data]) == 3
    assert exit_code([resource, data, setup]) == 2


def test_the_document_is_stable() -> None:
    text = to_json([ok("disk", "62 GB free"), fail("ollama", 4, "no answer", "start it")])
    assert json.loads(text) == {
        "schema": 1,
        "status": "FAIL",
        "exit_code": 4,
        "checks": [
            {"name": "disk", "node": "", "status": "OK", "found": "62 GB free", "fix": ""},
            {"name": "ollama", "node": "", "status": "FAIL", "found": "no answer", "fix": "start it"},
        ],
    }
    assert json.loads(to_json([]))["status"] == "OK"


def test_no_secret_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghij")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    monkeypatch.setenv("SOME_TOKEN_SWITCH", "1")
    check = warn("x", "1 sent hf_abcdefghij to https://user:pa55@host/v1", "key wJalrXUtnFEMI")
    clean = without_secrets(check)
    assert (clean.found, clean.fix) == ("1 sent *** to https://***@host/v1", "key ***")


def test_a_server_that_repeats_the_key_does_not_get_it_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("GATEWAY_API_KEY", "sk-0123456789")
    monkeypatch.setattr(doctor_module, "examine_node", lambda: HEALTHY)
    with server(lambda method, path, headers: (400, {}, {"error": f"bad: {headers['authorization']}"})) as (url, seen):
        settings = captions(url, backend="openai", api_key_variable="GATEWAY_API_KEY").model_dump()
        whole = config(encoders="demo", layers=["text"], captions=settings)
        assert doctor(whole, as_json=False) == doctor(whole, as_json=True) == 2
    assert seen[0][2]["authorization"] == "Bearer sk-0123456789"
    printed = "".join(capsys.readouterr())
    assert "bad: Bearer ***" in printed
    assert "sk-0123456789" not in printed


def test_lines_are_aligned_and_plain_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    show(ok("token_files", "none that other users can read"))
    show(Check("ollama", "FAIL", "no answer " * 20, "do this", node="http://a:1", code=4))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "  OK    token files      none that other users can read"
    assert lines[1].startswith("  FAIL  ollama           http://a:1: no answer no answer")
    assert lines[-1] == f"{' ' * 25}-> do this"
    assert max(map(len, lines)) <= 116
    assert "\x1b" not in "".join(lines)


def test_checks_that_hang_or_break_hide_no_others() -> None:
    slow, broken, refused = (
        CheckTask("slow", lambda: time.sleep(60)),
        CheckTask("broken", lambda: 1 / 0),
        CheckTask("refused", lambda: (_ for _ in ()).throw(ConfigError("set it right"))),
    )
    for task in (slow, broken, refused):
        task.start()
    (check,) = slow.result(time.monotonic() + 0.2)
    assert check.status == "WARN"
    assert "in time" in check.found
    assert "ZeroDivisionError" in broken.result(time.monotonic() + 5)[0].found
    assert refused.result(time.monotonic() + 5)[0].code == 2


@pytest.mark.parametrize("example", ["production", "production-ungated", "quickstart"])
def test_the_doctor_judges_the_shipped_configs(
    example: str,
    hub: list,
    tmp_path: Path,
    photos: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_not_accepted_anywhere")
    if example != "production":  # measuring takes seconds, and once is enough
        monkeypatch.setattr(doctor_module, "examine_node", lambda: HEALTHY)
    overrides = [f"source={photos}", f"output={tmp_path / 'set'}", "captions.backend=sidecar"]
    settings = load_config(PrepConfig, f"configs/prep/{example}.yaml", overrides)
    monkeypatch.setattr(doctor_module, "LIMIT", 2 * PATIENT)
    monkeypatch.setattr("prep.doctor.models.SECONDS", PATIENT)
    monkeypatch.setattr("prep.doctor.node.PROBE_SECONDS", PATIENT)
    for path in photos.glob("*.png"):
        Image.open(path).resize((settings.base, settings.base)).save(path)
    code = doctor(settings, as_json=True)
    text = capfd.readouterr().out
    report = json.loads(text)
    assert report["exit_code"] == code
    assert "hf_not_accepted" not in text
    names = [check["name"] for check in report["checks"]]
    expected = (
        "packages gpu onnxruntime memory shared_memory open_files ports dashboard token_files model_t5 model_dino "
    )
    expected += "passes dwpose_detector dwpose_pose lpips_metric lpips_loss captions source output disk lock"
    assert [name for name in expected.split() if name not in names] == []
    assert all(check["fix"] for check in report["checks"] if check["status"] != "OK")
    assert (code == 0) is (example == "quickstart")
    dino = next(check for check in report["checks"] if check["name"] == "model_dino")
    assert ("licence" in dino["fix"]) is (example == "production")


def test_a_caption_model_that_the_run_unloads_is_no_shortage() -> None:
    facts = HEALTHY | {"gpus": [GPU | {"free": 1e9}], "ollama_memory": 17e9}
    assert find(judge(facts, FULL_SIZE), "vram").status == "WARN"
    unloaded = find(judge(facts, replace(FULL_SIZE, unloads=True)), "vram")
    assert unloaded.status == "OK"
    assert "Ollama holds 17.0 GB, and is asked to unload" in unloaded.found
    assert not needs_of(config()).unloads
    assert needs_of(config(captions={"backend": "ollama"})).unloads


def test_the_time_of_each_pass_is_told_on_its_device() -> None:
    card = Node("id", "127.0.0.1", "here", 8, 1, 12, memory_gb=64, driver=True)
    check = pass_check(config(), [card])
    assert check.status == "OK"
    assert check.found.startswith("1,000 images: px 12s + text 0s = 13s on 8 x CPU, then t5 17s + dino ")
    assert check.found.endswith("on 2 x GPU (estimates)")
    small = pass_check(config(), [replace(card, vram_gb=2)])
    assert small.status == "WARN"
    assert "pose needs 2.2 GB of GPU memory and fits no GPU" in small.found
    assert re.search(r"pose 6m 57s.* on 8 x CPU, then", small.found)
    never = pass_check(config(placement={"device": "cuda"}), [replace(card, gpus=0, vram_gb=0)])
    assert (never.status, never.code) == ("FAIL", 4)


def test_needs_follow_the_config() -> None:
    small, large = needs_of(config(encoders="demo")), needs_of(config(layers=["dino"], workers=3))
    assert small.memory_gb == DEMO_WORKER_GB
    assert (small.slow, large.slow) == (False, True)
    assert set(small.vram_gb) == {"t5", "dino", "pose"}
    assert large.memory_gb > 1
    assert set(large.vram_gb) == {"dino"}
    assert large.workers == 3
