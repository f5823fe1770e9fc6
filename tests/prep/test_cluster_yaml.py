"""cluster.yaml against Ray's own schema, its start commands in a real shell, and what `ray job submit` uploads."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from nanodit.config import parse_yaml

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
CLUSTER = parse_yaml(TEXT, "cluster.yaml")
SUBMIT = (
    "ray job submit --address http://127.0.0.1:8265 --working-dir . -- "
    "python -m prep run --config configs/prep/production.yaml"
)


def stub(folder: Path, name: str, script: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def start(tmp_path: Path, commands: str, cards: list[str]) -> list[dict[str, str]]:
    """Run start commands as Ray does, with stubs for what they call; the options of every `ray start`."""
    binaries = tmp_path / "home" / ".nanodit" / "venv" / "bin"
    stub(binaries, "ray", f'echo "RAY_AUTH_MODE=$RAY_AUTH_MODE CARD=$CUDA_VISIBLE_DEVICES $@" >> {tmp_path}/calls')
    answer = "printf '" + "".join(f"{card}\\n" for card in cards) + "'" if cards else "exit 9"
    stub(binaries, "nvidia-smi", answer)
    stub(binaries, "nproc", "echo 16")
    environment = {"HOME": str(tmp_path / "home"), "PATH": os.environ["PATH"], "RAY_HEAD_IP": "10.0.0.1"}
    for command in CLUSTER[commands]:
        # as in ray.autoscaler._private.command_runner: one shell for each, in parentheses
        subprocess.run(["bash", "-c", f"true && export OMP_NUM_THREADS=1 && ({command})"], check=True, env=environment)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0].endswith("stop")
    return [
        dict(word.lstrip("-").split("=", 1) if "=" in word else (word.lstrip("-"), "") for word in call.split(" "))
        | {"resources": (re.search(r"--resources=(\{.*?\})", call) or ["", "{}"])[1]}
        for call in calls[1:]
    ]


def test_rays_own_validation_accepts_it():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(CLUSTER)
    validate_config(config)
    assert config["available_node_types"][config["head_node_type"]]["min_workers"] == 2
    unknown = CLUSTER | {"head_ips": []}
    with pytest.raises(Exception, match="head_ips"):
        validate_config(prepare_config(unknown))


def test_a_worker_starts_one_ray_node_per_card_with_its_memory(tmp_path):
    first, second = start(tmp_path, "worker_start_ray_commands", ["24564", "12288"])
    assert (first["CARD"], second["CARD"]) == ("0", "1")
    assert (json.loads(first["resources"]), json.loads(second["resources"])) == ({"vram_gb": 23}, {"vram_gb": 12})
    assert first["num-gpus"] == second["num-gpus"] == "1"
    assert first["num-cpus"] == second["num-cpus"] == "8"  # the host's CPUs are shared, not counted twice
    assert first["address"] == "10.0.0.1:6379"
    assert first["temp-dir"] != second["temp-dir"]  # or they unpack the job's code over each other
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < int(first["memory"]) < memory / 2
    assert int(first["memory"]) != 2**31 - 1  # what some awks make of more


def test_a_worker_without_cards_starts_one_ray_node(tmp_path):
    (only,) = start(tmp_path, "worker_start_ray_commands", [])
    assert (only["num-gpus"], only["num-cpus"], only["resources"]) == ("0", "16", "{}")


@pytest.mark.parametrize("cards", [[], ["12288"]])
def test_the_head_needs_no_gpu(tmp_path, cards):
    head, *more = start(tmp_path, "head_start_ray_commands", cards)
    assert "head" in head
    assert head["num-gpus"] == "0"
    assert head["dashboard-host"] == "127.0.0.1"
    assert head["autoscaling-config"] == "~/ray_bootstrap_config.yaml"
    assert len(more) == len(cards)
    assert int(head["num-cpus"]) * (1 + len(cards)) == 16


def test_nothing_starts_without_the_token_and_only_its_owner_reads_it(tmp_path):
    for number, commands in enumerate(("head_start_ray_commands", "worker_start_ray_commands")):
        for call in start(tmp_path / str(number), commands, ["12288"]):
            assert call["RAY_AUTH_MODE"] == "token"
    assert "~/.ray/auth_token" in CLUSTER["file_mounts"]
    home = tmp_path / "home"
    (home / ".ray").mkdir(parents=True)
    token = home / ".ray" / "auth_token"
    token.write_text("secret")  # readable by all, as `ray get-auth-token --generate` leaves it
    subprocess.run(["bash", "-c", CLUSTER["setup_commands"][0]], check=True, env={"HOME": str(home)})
    assert token.stat().st_mode & 0o777 == 0o600
    assert (home / ".ray").stat().st_mode & 0o777 == 0o700
    assert "0.0.0.0" not in "\n".join(line for line in TEXT.splitlines() if not line.lstrip().startswith("#"))


def test_all_nodes_install_the_same_ray_and_the_projects_dependencies(tmp_path):
    install = CLUSTER["setup_commands"][2]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (pin,) = re.findall(r"'(ray\[.*?\]==.*?)'", install)
    (needed,) = (Requirement(text) for text in project["dependencies"] if Requirement(text).name == "ray")
    pinned = Requirement(pin)
    assert needed.extras == pinned.extras
    assert needed.specifier.contains(str(pinned.specifier).removeprefix("=="))
    source = tmp_path / ".nanodit" / "source"
    source.mkdir(parents=True)
    shutil.copy(ROOT / "pyproject.toml", source)
    binaries = tmp_path / ".nanodit" / "venv" / "bin"
    stub(binaries, "pip", "true")
    (binaries / "python").symlink_to(shutil.which("python3.11") or os.sys.executable)
    subprocess.run(["bash", "-c", install], check=True, env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]})
    assert (source / "requirements.txt").read_text().splitlines() == project["dependencies"]


def test_a_job_takes_the_code_and_no_secrets_models_or_images(tmp_path):
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    clone = tmp_path / "clone"
    kept = ["prep/run.py", "prep/encoders/assets/demo.onnx", "configs/prep/base.yaml", "my.yaml", "my.yml"]
    left = [
        ".env", ".env.local", "server.pem", "prep/.env", "models/yolox_l.onnx", "photos/a.jpg",
        "datasets/x/index.parquet", "experiments/run/model.safetensors", ".git/config",
        ".venv/bin/python", "prep/__pycache__/run.pyc", "pyproject.toml",
    ]  # fmt: skip
    for name in kept + left:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_text("x")
    for name in (".gitignore", ".rayignore"):
        shutil.copy(ROOT / name, clone)
    package = tmp_path / "package.zip"
    create_package(str(clone), package, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    with zipfile.ZipFile(package) as archive:
        sent = {name for name in archive.namelist() if not name.endswith("/")}
    assert sent == {*kept}


def test_the_readme_has_the_submit_line():
    assert SUBMIT in (ROOT / "README.md").read_text(encoding="utf-8")
