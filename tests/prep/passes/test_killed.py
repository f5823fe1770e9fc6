"""``prep run`` killed (P10, P11): the bytes of an undisturbed run, and nothing computed twice."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from nanodit.errors import DataError
from prep.dataset.reader import Dataset
from prep.passes.plan import make_plan
from prep.run import run
from tests.prep.passes.test_plan import write_images
from tests.prep.prepared import prepare
from tests.prep.runs import PROJECT, command, files_of, parent_of, poses
from tests.processes import below, left


@pytest.mark.slow
def test_p11_a_killed_run_continues_and_ends_with_the_same_bytes(
    figures_dataset, figures_config, tmp_path, ray_session
):
    settings = figures_config.model_copy(update={"output": str(tmp_path / "out")})
    parts = tmp_path / "out" / "parts"
    process = subprocess.Popen(command(settings, "workers=1"), cwd=PROJECT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 400
    while process.poll() is None and len(list(parts.glob("*.parquet"))) < 12 and time.monotonic() < deadline:
        time.sleep(0.02)
    others = {(one.pid, one.begun) for one in below(process.pid).values() if one.role}  # less Ray's agents
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert left(others, seconds=60) == []  # Ray's processes follow their driver
    committed = {path: path.stat().st_mtime_ns for path in parts.glob("*.parquet")}
    assert len(committed) >= 12
    assert not (tmp_path / "out" / "index.parquet").exists()
    run(settings)
    assert files_of(tmp_path / "out") == files_of(figures_dataset)
    assert {path: path.stat().st_mtime_ns for path in committed} == committed  # nothing is computed twice


@pytest.mark.parametrize("moment", ["shards.before_tar", "shards.before_part"])
def test_p11_a_kill_between_the_steps_of_a_commit_leaves_no_half_unit(tmp_path, without_ray, moment):
    """The second unit dies: the first is committed, nothing of the second counts, and the rest is as undisturbed."""
    write_images(tmp_path / "source", 5)
    settings = poses(tmp_path)
    code = """
import sys
from pathlib import Path
from nanodit.config import load_config
from prep.passes.layers import Job, LayerWorker, ShardTask
from prep.passes.plan import make_plan, write_manifest
from prep.config import PrepConfig
config = load_config(PrepConfig, None, sys.argv[1:])
plan = make_plan(config)
Path(config.output).mkdir()
write_manifest(plan)
for task in plan.tasks(("px",)):
    LayerWorker(config).run(task)
"""
    arguments = [sys.executable, "-c", code, *command(settings)[4:]]
    environment = os.environ | {"NANODIT_FAULT": f"{moment}:kill:2"}
    assert subprocess.run(arguments, cwd=PROJECT, env=environment, timeout=60).returncode == -signal.SIGKILL
    plan = make_plan(settings)
    assert [unit.shard for unit in plan.parts] == [0]
    assert sorted(f"{unit.layer} {unit.shard}" for unit in plan.missing) == ["pose 0", "pose 1", "px 1"]
    run(settings)
    undisturbed = settings.model_copy(update={"output": str(tmp_path / "undisturbed")})
    run(undisturbed)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "undisturbed")


@pytest.mark.parametrize("moment", ["publish.after_index", "publish.after_rejects", "publish.after_dataset"])
def test_p11_a_kill_while_publishing_is_repaired(tmp_path, without_ray, moment):
    write_images(tmp_path / "source", 4)
    settings, root = poses(tmp_path), tmp_path / "out"
    run(settings)
    before = files_of(root)
    for name in ("index.parquet", "rejects.parquet", "dataset.json"):
        (root / name).unlink()
    environment = os.environ | {"NANODIT_FAULT": f"{moment}:kill"}
    killed = subprocess.run(command(settings), cwd=PROJECT, env=environment, capture_output=True, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    if moment != "publish.after_dataset":
        with pytest.raises(DataError, match="is not a finished dataset"):
            Dataset(root)
    run(settings)
    assert files_of(root) == before


@pytest.mark.parametrize(("victim", "message"), [("worker", "a worker died"), ("actor", "an actor was killed")])
def test_p10_a_killed_worker_or_actor_costs_nothing_but_its_time(tmp_path, ray_session, capsys, victim, message):
    write_images(tmp_path / "source", 24, size=(400, 400))
    settings = poses(tmp_path, shard_size=2)
    killed: list[int] = []

    def kill_one() -> None:
        while not killed and not (tmp_path / "out" / "index.parquet").exists():
            for path in (tmp_path / "out").glob("bucket_*/.*.tmp-*"):
                worker = int(path.name.rsplit("-", 1)[1])  # the name says which process is writing
                killed.append(worker if victim == "worker" else parent_of(worker))
                os.kill(killed[0], signal.SIGKILL)
                return
            time.sleep(0.001)

    thread = threading.Thread(target=kill_one)
    thread.start()
    run(settings)
    thread.join()
    assert killed
    assert killed[0] != os.getpid()
    assert message in capsys.readouterr().out
    undisturbed = settings.model_copy(update={"output": str(tmp_path / "undisturbed")})
    prepare(undisturbed)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "undisturbed")
