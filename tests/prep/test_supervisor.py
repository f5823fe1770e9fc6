"""Which sample ends a worker, and that nobody else pays for it."""

import os
import signal
import threading
from pathlib import Path

import pytest

from prep.errors import DataError, ResourceError
from prep.layers import LayerWorker, ShardTask
from prep.plan import make_plan
from prep.shards import Unit, read_part
from prep.supervisor import Supervisor
from tests.prep.test_plan import config, write_images

MEMORY = 3 << 30


@pytest.fixture
def supervised(tmp_path, monkeypatch):
    """Compute one shard of six images under supervision with a fault at the samples of some positions."""

    def compute(faults: dict[int, str], **changes) -> tuple[ShardTask, list[dict], Path]:
        write_images(tmp_path / "source", 6)
        settings = config(tmp_path, layers=["dino"], shard_size=6, dino={"batch_size": 4}, **changes)
        (task,) = make_plan(settings).tasks(("px",))
        places = [f"px.decode@{task.sources[index].key}:{action}" for index, action in faults.items()]
        monkeypatch.setenv("NANODIT_FAULT", ",".join(places))
        supervisor = Supervisor(settings, memory_limit=MEMORY)
        try:
            return task, supervisor.run(task), tmp_path / "out"
        finally:
            supervisor.close()

    return compute


def rejects(root: Path, task: ShardTask) -> dict[str, str]:
    return {reject.key: reject.reason for reject in read_part(root, Unit(task.bucket, task.shard, "px")).rejects}


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        ("segfault", "crashes_worker"),
        ("kill", "crashes_worker"),
        ("hang", "hangs_worker"),
        ("allocate", "out_of_memory"),
    ],
)
def test_p12_a_poison_sample_is_rejected_and_no_innocent_one(supervised, action, reason):
    task, (done,), root = supervised({2: action}, sample_timeout=1.5)
    assert rejects(root, task) == {task.sources[2].key: reason}
    assert read_part(root, Unit(task.bucket, task.shard, "px")).table.num_rows == 5
    assert len(done["deaths"]) == 1


def test_p12_several_poison_samples_of_one_shard_are_all_found(supervised):
    task, _, root = supervised({0: "segfault", 5: "segfault"})
    assert set(rejects(root, task)) == {task.sources[0].key, task.sources[5].key}


def test_the_bytes_without_poison_are_those_of_a_run_that_never_saw_it(supervised, tmp_path):
    """Batches are formed over what is left: four of the five, then one."""
    settings_of = lambda folder: config(folder, layers=["dino"], shard_size=6, dino={"batch_size": 4})  # noqa: E731
    supervised({1: "segfault"})
    settings = settings_of(tmp_path)
    plan = make_plan(settings)
    (task,) = plan.tasks(("dino",))
    LayerWorker(settings).run(task)
    unit = Unit(task.bucket, task.shard, "dino")
    first = read_part(tmp_path / "out", unit)
    clean = tmp_path / "clean"
    clean.mkdir()
    (clean / "source").symlink_to(tmp_path / "source")
    innocent = ShardTask(
        task.bucket,
        task.shard,
        (task.sources[0], *task.sources[2:]),
        make_plan(settings_of(clean)).tasks(("px", "dino"))[0].recipes,
    )
    LayerWorker(settings_of(clean)).run(innocent)
    assert read_part(clean / "out", unit).tar_sha256 == first.tar_sha256


def test_a_killed_worker_is_nobodys_fault(supervised, monkeypatch):
    """Somebody kills the child from outside: the suspects are tried alone and found innocent."""
    ask = Supervisor._compute
    seen = []

    def kill_the_first(self, job):
        if not seen:
            self._start()
            seen.append(self._process.pid)
            threading.Timer(0.3, os.kill, (self._process.pid, signal.SIGKILL)).start()
        return ask(self, job)

    monkeypatch.setattr(Supervisor, "_compute", kill_the_first)
    task, (done,), root = supervised({})
    assert rejects(root, task) == {}
    assert len(done["deaths"]) == 1


def test_workers_that_die_without_a_guilty_sample_end_with_4(supervised, monkeypatch):
    monkeypatch.setattr("prep.supervisor.sys.executable", "/bin/false")
    with pytest.raises(ResourceError, match="3 workers died computing .*px.tar .*exit code 1"):
        supervised({})


def test_an_error_of_the_worker_keeps_its_message_and_kind(supervised, tmp_path):
    task, _, _ = supervised({})
    settings = config(tmp_path, layers=["dino"], shard_size=6)
    (task,) = make_plan(settings).tasks(("dino",))
    for name in ("px", "dino"):
        (tmp_path / "out" / Unit(task.bucket, task.shard, name).part).unlink(missing_ok=True)
    supervisor = Supervisor(settings)
    with pytest.raises(DataError, match=r"disappeared while .*dino.tar was computed"):
        supervisor.run(task)
    supervisor.close()


def test_a_worker_ends_with_its_supervisor(tmp_path):
    write_images(tmp_path / "source", 2)
    supervisor = Supervisor(config(tmp_path, layers=["dino"]))
    supervisor._start()
    process = supervisor._process
    supervisor._connection.close()
    assert process.wait(timeout=30) == 0
