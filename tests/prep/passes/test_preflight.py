"""Before a run: full, read-only and unshared storage are refused; during one they end it with nothing damaged (P14).

The disks are real: small tmpfs mounts, and mount namespaces that see another output than the driver. Where this process
may not mount, those tests are skipped.
"""

from __future__ import annotations

import errno
import json
import resource
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from nanodit import storage
from nanodit.errors import ConfigError, ResourceError, resource_error
from prep.__main__ import main
from prep.passes.cost import bytes_needed
from prep.passes.layers import LayerWorker
from prep.passes.plan import make_plan, write_manifest
from prep.passes.preflight import look, preflight
from tests.prep.passes.test_plan import config, write_images

PROJECT = Path(__file__).parents[3]
LOOK = "import json, sys; from prep.passes.preflight import look; print(json.dumps(look(*json.load(sys.stdin))))"


def nodes(*preparations: str):
    """Nodes that are processes of their own, each after a shell command in a mount namespace of its own."""

    def on_every_node(function, *arguments, timeout):
        answers = {}
        for number, preparation in enumerate(preparations):
            command = ["unshare", "-m", "sh", "-c", f'{preparation}; exec "$0" -c "$1"', sys.executable, LOOK]
            done = subprocess.run(
                command, input=json.dumps(arguments), capture_output=True, text=True, cwd=PROJECT, timeout=timeout
            )
            answers[f"node{number}"] = json.loads(done.stdout) if done.returncode == 0 else RuntimeError(done.stderr)
        return answers

    return on_every_node


def here(function, *arguments, timeout):
    """A cluster of this process alone."""
    return {"only": function(*arguments)}


@pytest.fixture
def disk(tmp_path):
    """Mount small disks: ``disk(folder, "size=1m")``."""
    mounted = []

    def mount(folder: Path, options: str) -> None:
        folder.mkdir(exist_ok=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"this process may not mount: {done.stderr.strip()}")
        mounted.append(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture
def namespaces():
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("this process may not have a mount namespace")


def prepared(tmp_path, **changes):
    write_images(tmp_path / "source", changes.pop("count", 6))
    settings = config(tmp_path, **changes)
    Path(settings.output).mkdir(exist_ok=True)
    return settings, make_plan(settings)


def test_a_healthy_cluster_passes_and_nothing_is_left_behind(tmp_path, namespaces):
    settings, plan = prepared(tmp_path)
    preflight(settings, plan, nodes("true", "true"))
    assert list(Path(settings.output).iterdir()) == []


def test_a_node_that_does_not_see_the_output_is_named(tmp_path, namespaces):
    settings, plan = prepared(tmp_path)
    with pytest.raises(ResourceError, match=r"output .* is not shared.*Mount one shared folder") as refusal:
        preflight(settings, plan, nodes("true", f"mount -t tmpfs none {settings.output}"))
    assert refusal.value.exit_code == 4
    assert list(Path(settings.output).iterdir()) == []


def test_a_node_that_cannot_write_or_does_not_see_the_source_is_named(tmp_path, namespaces):
    settings, plan = prepared(tmp_path)
    bind = f"mount --bind {settings.output} {settings.output} && mount -o remount,bind,ro {settings.output}"
    with pytest.raises(ResourceError, match=r"cannot be written: Read-only file system\. It is mounted read-only"):
        preflight(settings, plan, nodes(bind))
    with pytest.raises(ResourceError, match=r"source .* cannot be read \(image-.*No such file.*every node"):
        preflight(settings, plan, nodes(f"mount -t tmpfs none {settings.source}"))


def test_64_mb_of_shared_memory_are_refused(tmp_path, namespaces):
    settings, plan = prepared(tmp_path)
    with pytest.raises(ResourceError, match=r"/dev/shm has 64 MB and Ray needs at least 75.*--shm-size"):
        preflight(settings, plan, nodes("mount -t tmpfs -o size=64m none /dev/shm"))


def test_a_node_that_does_not_answer_is_named(tmp_path):
    settings, plan = prepared(tmp_path)
    with pytest.raises(ResourceError, match="node abcdefgh did not answer: no answer within 60 seconds"):
        preflight(settings, plan, lambda *_, timeout: {"abcdefgh12": TimeoutError("no answer within 60 seconds")})


def test_an_output_that_reaches_only_one_way_is_refused(tmp_path):
    settings, plan = prepared(tmp_path)

    def one_way(function, *arguments, timeout):
        answer = look(*arguments)
        (Path(settings.output) / answer["name"]).unlink()
        return {"only": answer}

    with pytest.raises(ResourceError, match="the driver does not see what this node writes"):
        preflight(settings, plan, one_way)


def test_a_source_that_changed_since_the_plan_is_no_nodes_fault(tmp_path):
    settings, plan = prepared(tmp_path)
    (Path(settings.source) / next(iter(plan.sources.values())).name).unlink()
    preflight(settings, plan, here)


def test_a_submitted_job_needs_an_absolute_output(tmp_path, monkeypatch):
    settings, plan = prepared(tmp_path)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")  # as Ray sets it for the driver of a job
    preflight(settings, plan, here)
    with pytest.raises(ConfigError, match=r"output datasets/x is relative.*absolute path"):
        preflight(settings.model_copy(update={"output": "datasets/x"}), plan, here)


def test_a_read_only_output_is_refused_at_the_driver(tmp_path, disk):
    settings, plan = prepared(tmp_path)
    disk(Path(settings.output), "size=1m,ro")
    with pytest.raises(ResourceError, match="It is mounted read-only"):
        preflight(settings, plan, here)


def test_a_disk_that_cannot_hold_what_is_missing_is_refused_with_numbers(tmp_path, disk):
    settings, plan = prepared(tmp_path)
    disk(Path(settings.output), "size=32k")
    with pytest.raises(ResourceError, match=r"has .* kB free, and what is missing takes about .* MB \(px .*\)"):
        preflight(settings, plan, here)


def test_a_full_disk_and_an_exhausted_quota_are_refused(tmp_path, disk, monkeypatch):
    settings, plan = prepared(tmp_path)
    # no file system with quotas can be mounted everywhere, so this one is pretended
    exhausted = OSError(errno.EDQUOT, "Disk quota exceeded")
    with monkeypatch.context() as patch:
        patch.setattr(storage.LocalFolder, "write", lambda *_: (_ for _ in ()).throw(exhausted))
        with pytest.raises(ResourceError, match=r"Disk quota exceeded\. Make room, raise the quota"):
            preflight(settings, plan, here)
    disk(Path(settings.output), "size=64k")
    monkeypatch.setattr("prep.passes.preflight.check_room", lambda plan: None)  # the estimate was too small
    (Path(settings.output) / "other").write_bytes(bytes(64 << 10))
    with pytest.raises(ResourceError, match="No space left on device"):
        preflight(settings, plan, here)


# --- in the middle of a run -------------------------------------------------------------------------------------------


def compute_until_it_fails(settings) -> OSError | None:
    plan = make_plan(settings)
    write_manifest(plan)
    worker = LayerWorker(settings)
    for task in plan.tasks(("px", "text")):
        try:
            worker.run(task)
        except OSError as error:
            return error
    return None


def units(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.tar"))}


def nothing_is_damaged(settings) -> None:
    """Every committed unit is whole: its tar opens to the end and has the size and hash that its part says."""
    root = Path(settings.output)
    for path in root.rglob("*.tar"):
        with tarfile.open(path) as tar:
            assert len(tar.getmembers()) > 0
    parts = list((root / "parts").glob("*.parquet"))
    assert len(make_plan(settings).parts) == len(parts)


@pytest.mark.parametrize("room", [None, 16, 32, 56, 72])  # kB: the disk is full within a tar, at its end, at its part
def test_no_room_in_the_middle_of_a_run_damages_nothing_and_the_run_continues(tmp_path, disk, room):
    settings, _ = prepared(tmp_path, count=24, shard_size=6)
    calm = settings.model_copy(update={"output": str(tmp_path / "calm")})
    assert compute_until_it_fails(calm) is None

    output = Path(settings.output)
    largest = max(len(data) for data in units(Path(calm.output)).values())
    if room is not None:
        disk(output, f"size={2 * largest // 1024 + room}k")
        error = compute_until_it_fails(settings)
    else:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, before[1]))
        try:
            error = compute_until_it_fails(settings)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error is not None
    assert resource_error(error).exit_code == 4
    nothing_is_damaged(settings)
    assert not list(output.rglob(".*.tmp-*"))  # a full disk is not kept full

    if room is not None:
        subprocess.run(["mount", "-o", "remount,size=20m", output], check=True)
    assert compute_until_it_fails(settings) is None
    assert units(output) == units(Path(calm.output))


# --- through Ray ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_on_the_nodes_of_a_real_cluster(tmp_path, ray_session):
    from prep.passes.ray_passes import on_every_node

    settings, plan = prepared(tmp_path)
    preflight(settings, plan, on_every_node)
    assert list(Path(settings.output).iterdir()) == []


@pytest.mark.slow
def test_a_run_that_fills_the_disk_ends_with_4_and_the_same_command_continues(tmp_path, disk, without_ray, capsys):
    write_images(tmp_path / "source", 40)  # noise, which takes more room than the photographs of the estimate
    settings = config(tmp_path, layers=["pose"], shard_size=10)
    output = Path(settings.output)
    disk(output, f"size={sum(bytes_needed(make_plan(settings)).values()) // 1024 + 100:.0f}k")
    overrides = [f"{name}={getattr(settings, name)}" for name in ("source", "output", "base", "encoders", "shard_size")]
    command = ["run", *overrides, "layers=[pose]", "workers=1"]
    # with Ray, whose actors meet the full disk
    first = subprocess.run([sys.executable, "-m", "prep", *command], cwd=PROJECT, capture_output=True, text=True)
    assert first.returncode == 4, first.stdout + first.stderr
    assert "No space left on device" in first.stderr
    nothing_is_damaged(settings)
    subprocess.run(["mount", "-o", "remount,size=20m", output], check=True)
    assert main(command) == 0, capsys.readouterr().err
    assert (output / "index.parquet").exists()
