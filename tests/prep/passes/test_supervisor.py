"""Which sample ends a worker, and that nobody else pays for it."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from nanodit.errors import DataError, ResourceError
from nanodit.place import PROJECT
from prep.dataset.layout import Unit, read_part
from prep.passes.layers import LayerWorker, ShardTask
from prep.passes.plan import make_plan
from prep.passes.supervisor import Death, Supervisor
from tests.forked import ForkedPopen, fork_modules
from tests.prep.passes.test_plan import config, write_images

MEMORY = 16 << 30  # more than this process, of which the workers are forked, and less than what a fault allocates


@pytest.fixture
def supervised(tmp_path, monkeypatch):
    """Compute one shard of six images under supervision with a fault at the samples of some positions."""
    fork_modules(monkeypatch)

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
    task, (done,), root = supervised({2: action}, sample_timeout=0.7)
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
    task, (done,), root = supervised(dict.fromkeys(range(6), "delay"))  # six tenths of a second
    assert rejects(root, task) == {}
    assert len(done["deaths"]) == 1


def test_workers_that_die_without_a_guilty_sample_end_with_4(supervised, monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(ResourceError, match=r"3 workers died computing .*px\.tar.*exit code 1"):
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


def test_a_death_before_a_sample_was_begun_is_not_its_fault(supervised, monkeypatch):
    """Workers that die while they load a model, one after another, convict nobody."""
    compute = Supervisor._compute
    calls = []

    def dies_while_loading(self, job):
        calls.append(job)
        if len(calls) == 1:
            return Death("crashes_worker", "px: killed", tuple(source.key for source in job.task.sources))
        if len(calls) <= 6:
            return Death("crashes_worker", "px: killed while loading", ())
        return compute(self, job)

    monkeypatch.setattr(Supervisor, "_compute", dies_while_loading)
    task, (done,), root = supervised({})
    assert rejects(root, task) == {}
    assert done["deaths"]


def test_a_sample_that_raises_what_nobody_foresaw_is_rejected_and_a_defect_is_not(supervised, monkeypatch):
    compute = Supervisor._compute

    def raises(keys: int):
        def fail(self, job):
            bad = [source.key for source in job.task.sources[:keys] if source.key not in job.guilty]
            found = [key for key in bad if job.only in (None, key)]
            if found:
                return Death("fails_worker", "px: ValueError: odd", (found[0],), "Traceback ...")
            return compute(self, job)

        return fail

    monkeypatch.setattr(Supervisor, "_compute", raises(2))
    task, _, root = supervised({})
    assert set(rejects(root, task).values()) == {"fails_worker"}
    assert len(rejects(root, task)) == 2
    (root / Unit(task.bucket, task.shard, "px").part).unlink()
    monkeypatch.setattr(Supervisor, "_compute", raises(6))
    with pytest.raises(RuntimeError, match="sample after sample"):
        supervised({})


def test_a_worker_that_cannot_start_says_why(supervised, tmp_path, monkeypatch):
    broken = tmp_path / "prep" / "passes"
    broken.mkdir(parents=True)
    (broken.parent / "__init__.py").write_text("")
    (broken / "__init__.py").write_text("")
    (broken / "worker.py").write_text("raise ImportError('libcuda is not there')")
    monkeypatch.setattr(subprocess, "Popen", ForkedPopen.__base__)
    monkeypatch.setattr("nanodit.place.PROJECT", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ResourceError, match=r"before or after .*exit code 1.*ImportError: libcuda is not there"):
        supervised({})


def test_a_worker_that_holds_the_interpreter_ends_without_its_supervisor(tmp_path):
    """Only the system can end a process that is stuck in C when its supervisor is killed."""
    code = (
        "import ctypes; from prep.passes import worker; worker.GRACE = 0.5\n"
        "worker.set_alarm(0.5); ctypes.PyDLL(None).sleep(60)"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, timeout=30)
    assert process.returncode == -signal.SIGALRM
