"""Ray itself is killed, as for lack of memory: exit code 4, a sentence, and the same command continues."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from prep.run import run
from tests.local_cluster import LocalCluster
from tests.prep.passes.test_plan import write_images
from tests.prep.prepared import prepare
from tests.prep.runs import PROJECT, command, files_of, poses
from tests.processes import left, with_role
from tests.train.sweeps import write_sweep
from tests.train.tiny import write_dataset
from train.__main__ import main
from train.sweep.config import load_sweep
from train.sweep.record import read_record

WAIT = 240  # seconds


def killed(
    arguments: list[str], victim: Callable[[int], list[int]], when: Callable[[], bool],
    number: signal.Signals = signal.SIGKILL, **environment: str,
) -> tuple[int, str]:  # fmt: skip
    """Run a command, send a signal to ``victim`` of it once ``when`` holds; return its exit code and what it said."""
    process = subprocess.Popen(
        arguments, cwd=PROJECT, env=os.environ | environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    deadline = time.monotonic() + WAIT
    while not (when() and (found := victim(process.pid))):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(found[0], number)  # the raylet forks before it starts a worker
    try:
        said, _ = process.communicate(timeout=WAIT)
    finally:
        process.kill()  # one that hangs
    assert "Traceback" not in said
    return process.returncode, said


@pytest.mark.slow
def test_prep_run_says_that_its_ray_died_and_the_same_command_continues(tmp_path, ray_session):
    """First its raylet is killed; then, while the same command goes on, the GCS; then that command ends undisturbed."""
    write_images(tmp_path / "source", 60)
    settings = poses(tmp_path, shard_size=1)
    parts = tmp_path / "out" / "parts"
    committed: dict[Path, int] = {}
    whose = {"raylet": "error: the raylet of this command's own Ray", "gcs_server": "error: the GCS of this command's"}
    for victim, words in whose.items():
        more = len(committed) + 2
        # slow enough that it cannot end by itself meanwhile
        code, said = killed(
            command(settings, "workers=1"), lambda driver, victim=victim: with_role(victim, driver),
            lambda more=more: len(list(parts.glob("*"))) > more, NANODIT_FAULT="px.decode@*:delay",
        )  # fmt: skip
        assert code == 4, said
        error = said.splitlines()[-1]
        assert error.startswith(words)
        assert f"logs/{victim}.out" in error
        assert "Run the same command again: finished units are kept" in error
        assert {path: path.stat().st_mtime_ns for path in committed} == committed
        committed = {path: path.stat().st_mtime_ns for path in parts.glob("*")}
        assert more < len(committed) < 120
    run(settings)
    assert {path: path.stat().st_mtime_ns for path in committed} == committed
    undisturbed = settings.model_copy(update={"output": str(tmp_path / "undisturbed")})
    prepare(undisturbed)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "undisturbed")


@pytest.mark.slow
def test_prep_run_in_a_cluster_says_that_the_raylet_beside_it_died(tmp_path):
    write_images(tmp_path / "source", 24, size=(400, 400))
    settings = poses(tmp_path, shard_size=2)
    parts = tmp_path / "out" / "parts"
    with LocalCluster(nodes=1, environment={"NANODIT_FAULT": "px.decode@*:delay"}) as cluster:
        code, said = killed(
            command(settings, "workers=1"), lambda driver: cluster.raylets, lambda: len(list(parts.glob("*"))) > 2,
            **cluster.environment,
        )  # fmt: skip
    assert code == 4, said
    assert f"error: the raylet of Ray at {cluster.environment['RAY_ADDRESS']} on this machine" in said


@pytest.mark.slow
def test_a_sweep_says_that_its_ray_died_and_goes_on(tmp_path, ray_session):
    dataset = write_dataset(tmp_path / "dataset", encoders="production")
    steps = {"budget": {"steps": 40}}  # at a tenth of a second each the trial cannot end before its Ray is missed
    straight = write_sweep(tmp_path / "straight", dataset, arms={"A": {}}, **steps)
    assert main(["sweep", "--config", str(straight), "--trial", "A-seed0"]) == 0
    file = write_sweep(tmp_path / "killed", dataset, arms={"A": {}}, **steps)
    trial = load_sweep(file).trials_folder / "A-seed0"
    sweep = [sys.executable, "-m", "train", "sweep", "--config", str(file)]
    code, said = killed(
        sweep, lambda driver: with_role("raylet", driver), lambda: any(trial.glob("checkpoints/step-*")),
        NANODIT_FAULT="train.step@A-seed0:delay",
    )  # fmt: skip
    assert code == 4, said
    error = said.splitlines()[-1]
    assert error.startswith("error: the raylet of this command's own Ray")
    assert "The same command with --resume continues: finished trials are kept" in error
    assert main([*sweep[3:], "--resume"]) == 0
    assert (read_record(trial)["status"], read_record(trial)["attempts"]) == ("finished", 2)
    last = Path("checkpoints/step-000040/model.safetensors")
    assert (trial / last).read_bytes() == (straight.parent / "sweep/trials/A-seed0" / last).read_bytes()


@pytest.mark.slow
def test_a_sweep_that_is_asked_to_stop_ends_with_75_and_its_trial_with_it(tmp_path):
    dataset = write_dataset(tmp_path / "dataset", encoders="production")
    file = write_sweep(tmp_path / "stopped", dataset, arms={"A": {}})
    sweep = [sys.executable, "-m", "train", "sweep", "--config", str(file)]
    code, said = killed(
        sweep, lambda driver: [driver] if with_role("trial", driver) else [], lambda: True, signal.SIGTERM
    )
    assert code == 75, said
    assert "stopped by a signal. The same command with --resume continues" in said.splitlines()[-1]
    assert left(set(), str(file.parent), seconds=WAIT) == []
