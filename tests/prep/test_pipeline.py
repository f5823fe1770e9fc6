"""prep run as a whole, through Ray: what it promises about its output, about running again, and about being killed."""

import errno
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from prep import pipeline, sources
from prep.buckets import Bucket
from prep.demo import ASSETS, DETECTOR, POSE
from prep.encoders import model_name
from prep.errors import ConfigError, DataError
from prep.files import sha256_bytes, sha256_file
from prep.layers import Job, LayerWorker, ShardTask
from prep.placement import Pass
from prep.plan import make_plan
from prep.run import explain, locked, run
from prep.settings import PrepConfig
from prep.shards import LAYERS, Dataset, Unit, read_part
from tests.prep.test_plan import config, write_images

PROJECT = Path(__file__).parents[2]
NETWORKS = {"detector": str(ASSETS / DETECTOR), "pose": str(ASSETS / POSE)}
FINISHED = ("dataset.json", "index.parquet", "rejects.parquet", "manifest.parquet", "truth.parquet")


def files_of(root: Path) -> dict[str, str]:
    """Hash of every file of a dataset but those of ``runs/``, the only place for what differs between runs."""
    paths = (path for path in root.rglob("*") if path.is_file() and "runs" not in path.relative_to(root).parts)
    return {path.relative_to(root).as_posix(): sha256_file(path) for path in paths}


def command(settings: PrepConfig, *more: str) -> list[str]:
    overrides = [f"{name}={getattr(settings, name)}" for name in ("source", "output", "base", "encoders", "shard_size")]
    overrides += [f"pose.{name}={path}" for name in NETWORKS if (path := getattr(settings.pose, name))]
    return [sys.executable, "-m", "prep", "run", *overrides, f"layers=[{','.join(settings.layers)}]", *more]


def poses(tmp_path: Path, **changes) -> PrepConfig:
    """Pixels and poses alone, the layer that starts fastest."""
    return config(tmp_path, layers=["pose"], encoders="production", pose=NETWORKS, **changes)


def parent_of(process: int) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("PPid:")))


def rejects_of(root: Path) -> dict[str, tuple[str, str]]:
    return {row["source"]: (row["stage"], row["reason"]) for row in pq.read_table(root / "rejects.parquet").to_pylist()}


# --- the dataset ------------------------------------------------------------------------------------------------------


def test_every_sample_has_every_layer_and_the_index_describes_it(figures_dataset, figures_folder):
    dataset = Dataset(figures_dataset)
    rows = dataset.rows()
    assert len(rows) == len(dataset) == 80
    assert dataset.layers == tuple(LAYERS)
    assert [row["key"] for row in rows] == sorted(row["key"] for row in rows)
    assert {row["bucket"] for row in rows} == set(dataset.info["buckets"])
    widths = {layer: dataset.info["layers"][layer]["width"] for layer in ("t5", "dino")}
    for row in rows:
        bucket = Bucket.parse(row["bucket"])
        source = figures_folder / row["source"]
        assert row["key"] == sha256_bytes(source.read_bytes())[:32]
        assert row["caption"] == source.with_suffix(".txt").read_text().strip()
        assert dataset.pixels(row).shape == (bucket.height, bucket.width, 3)
        text = dataset.t5(row)
        assert (text.shape, text.dtype) == ((row["t5_tokens"], widths["t5"]), np.float16)
        cls, patches = dataset.cls(row), dataset.patches(row)
        assert (cls.shape, cls.dtype) == ((widths["dino"],), np.float32)
        assert (patches.shape, patches.dtype) == ((row["dino_h"], row["dino_w"], widths["dino"]), np.float32)
        pose = dataset.pose(row)
        assert (pose.shape, pose.dtype) == ((133, 3), np.float32)
        assert row["persons"] == 1
    counts = dataset.info["counts"]
    assert counts == {"samples": 80, "train": 64, "holdout": 16, "rejects": 0}
    assert [len(dataset.rows(split)) for split in ("train", "holdout")] == [64, 16]
    assert sum(bucket["samples"] for bucket in dataset.info["buckets"].values()) == 80


def test_the_truth_is_mapped_through_the_crop(figures_dataset):
    """The judge of the pose is the truth; the detector, which saw only the crop, must agree with it."""
    dataset = Dataset(figures_dataset)
    truth = dataset.truth()
    assert truth.keys() == {row["key"] for row in dataset.rows()}
    errors = []
    for row in dataset.rows():
        size = np.array([Bucket.parse(row["bucket"]).width, Bucket.parse(row["bucket"]).height])
        joints = np.array(truth[row["key"]]["keypoints"]).reshape(133, 3)
        found = dataset.pose(row)
        seen = (joints[:, 2] > 0) & (found[:, 2] > 0.3)
        assert ((joints[joints[:, 2] > 0, :2] >= 0) & (joints[joints[:, 2] > 0, :2] <= size)).all()
        box = np.array(truth[row["key"]]["box"]).reshape(2, 2)
        assert (box[0] >= 0).all()
        assert (box[1] <= size).all()
        if seen[:17].any():
            places = (found[:17, :2] + 1) / 2 * size
            errors.append(np.median(np.abs(places - joints[:17, :2])[seen[:17]]) / (box[1] - box[0]).max())
    assert len(errors) >= 72
    assert np.median(errors) < 0.05


def test_plain_webdataset_reads_every_member_as_the_index_says(figures_dataset):
    """No import of ours: the format is documented by the libraries that read it."""
    code = """
import glob, hashlib, sys
import pyarrow.parquet as pq
import webdataset as wds
root = sys.argv[1]
rows = {row["key"]: row for row in pq.read_table(f"{root}/index.parquet").to_pylist()}
members = sorted(name.removesuffix("/offset") for name in next(iter(rows.values())) if name.endswith("/offset"))
read = 0
for url in sorted(glob.glob(f"{root}/bucket_*/*.tar")):
    layer, data = url.split(".")[-2], open(url, "rb").read()
    for sample in wds.WebDataset(url, shardshuffle=False):
        row = rows[sample["__key__"]]
        for member in [name for name in members if name.startswith(layer + "/")]:
            value = sample[member.split("/", 1)[1]]
            start, length = row[member + "/offset"], row[member + "/length"]
            assert value == data[start : start + length], (url, member)
            assert hashlib.sha256(value).hexdigest() == row[member + "/sha256"]
            read += 1
assert read == len(rows) * len(members), (read, len(rows), members)
print("read", read, "prep" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, figures_dataset], capture_output=True, text=True, cwd="/", timeout=120
    )
    assert done.returncode == 0, done.stderr
    members = sum(map(len, LAYERS.values()))
    assert done.stdout.split() == ["read", str(80 * members), "False"]


def test_published_files_hold_no_path_time_or_host(figures_dataset, figures_config):
    words = [str(Path(figures_config.source).parent), socket.gethostname(), str(Path.home())]
    for path in [*figures_dataset.glob("*.*"), *figures_dataset.glob("parts/*")]:
        text = path.read_text() if path.suffix == ".json" else ""
        if path.suffix == ".parquet":  # compressed: look at what it says
            table = pq.read_table(path)
            text = str(table.to_pylist()) + str(table.schema.metadata)
        assert text
        for word in words:
            assert word not in text, path.name
    assert {path.name for path in figures_dataset.iterdir() if path.is_file()} == set(FINISHED)
    (run_folder,) = (path for path in (figures_dataset / "runs").iterdir() if path.is_dir())
    assert {path.name for path in run_folder.iterdir()} == {"config.yaml", "log.jsonl"}


# --- running again ----------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(figures_dataset, figures_folder, figures_config, tmp_path) -> PrepConfig:
    """The config of a copy of the figures and their dataset, to be changed."""
    shutil.copytree(figures_folder, tmp_path / "source")
    shutil.copytree(figures_dataset, tmp_path / "out")
    return figures_config.model_copy(update={"source": str(tmp_path / "source"), "output": str(tmp_path / "out")})


def test_the_second_run_computes_nothing_and_says_so(copied, capsys):
    root = Path(copied.output)
    own = (".lock", "scan.parquet")  # of the runs
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file() and path.name not in own}
    run(copied)
    output = capsys.readouterr().out
    assert "nothing to compute: every layer of every shard is current" in output
    assert "wrote nothing (already complete)" in output.splitlines()[-1]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert files_of(root).keys() == {path.relative_to(root).as_posix() for path in before if "runs" not in path.parts}


def test_a_new_caption_and_a_new_image_redo_only_what_they_reach(copied, ray_session, capsys):
    source, root = Path(copied.source), Path(copied.output)
    before, rows = files_of(root), {row["source"]: row for row in Dataset(root).rows()}
    edited = rows["figure-000005.png"]
    (source / "figure-000005.txt").write_text("Somebody else entirely, in a green top.")
    mirrored = Image.open(source / "figure-000009.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    mirrored.save(source / "new.png")
    (source / "new.txt").write_text("A new picture.")
    explain(copied)
    shards = len(make_plan(copied).shards)
    lines = capsys.readouterr().out.splitlines()
    assert f"text: 1 of {shards} shards: changed: captions" in lines
    assert f"pose: 1 of {shards} shards: not computed yet" in lines
    run(copied)
    after = files_of(root)
    changed = {name for name in before if after[name] != before[name]}
    units = [Unit(edited["bucket"], edited["shard"], layer) for layer in ("text", "t5")]
    published = {"index.parquet", "manifest.parquet", "dataset.json"}
    assert changed == {path for unit in units for path in (unit.tar, unit.part)} | published
    new = {row["source"]: row for row in Dataset(root).rows()}
    place = new["new.png"]["bucket"], new["new.png"]["shard"]
    assert place not in {(row["bucket"], row["shard"]) for row in rows.values()}
    units = [Unit(*place, layer) for layer in LAYERS]
    assert set(after) - set(before) == {path for unit in units for path in (unit.tar, unit.part)}
    assert new["figure-000005.png"]["caption"] == "Somebody else entirely, in a green top."
    assert {name: row["split"] for name, row in rows.items()} == {name: new[name]["split"] for name in rows}  # trap 10

    # without the new image its shard is gone
    (source / "new.png").unlink()
    run(copied, prune=True)
    assert set(files_of(root)) == set(before)
    assert {row["source"] for row in Dataset(root).rows()} == set(rows)


@pytest.mark.parametrize("layer", ["t5", "dino", "pose"])
def test_models_are_called_what_they_are(figures_dataset, figures_config, tmp_path, layer):
    assert Dataset(figures_dataset).info["layers"][layer]["model"] == "demo"
    given = {"detector": "own.onnx"} if layer == "pose" else {"model": str(tmp_path)}
    section = getattr(figures_config, layer).model_copy(update=given)
    for encoders in ("demo", "production"):  # a folder is recorded by its content
        own = figures_config.model_copy(update={layer: section, "encoders": encoders})
        assert model_name(own, layer, {"content": "00"}) == ("dwpose" if layer == "pose" else "local")
    hub = figures_config.model_copy(update={"encoders": "production"})
    assert model_name(hub, layer, {"model": "org/name"}) == ("dwpose" if layer == "pose" else "org/name")


def test_layers_can_be_switched_off(tmp_path, ray_session):
    write_images(tmp_path / "source", 5)
    settings = poses(tmp_path)
    run(settings)
    dataset = Dataset(tmp_path / "out")
    assert dataset.layers == ("px", "pose")
    assert "caption" not in dataset.table.column_names
    with pytest.raises(DataError, match=r"has no t5/t5\.npy: its layers are px, pose"):
        dataset.t5(dataset.rows()[0])
    assert dataset.truth() is None


def test_two_runs_at_once_are_refused(tmp_path):
    write_images(tmp_path / "source", 1)
    with locked(tmp_path / "out"), pytest.raises(ConfigError, match=f"another prep run .process {os.getpid()}"):
        run(config(tmp_path))
    descriptor = os.open(tmp_path / "out" / "runs" / ".lock", os.O_RDWR)  # released, and only then free
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)


def test_an_error_in_an_actor_keeps_its_message_and_exit_code(tmp_path, ray_session):
    write_images(tmp_path / "source", 2)
    (tmp_path / "model").mkdir()
    settings = config(tmp_path, layers=["dino"], dino={"model": str(tmp_path / "model")})
    with pytest.raises(ConfigError, match="cannot load the (DINOv3 encoder|model)"):
        run(settings)
    assert not (tmp_path / "out" / "index.parquet").exists()
    log = (tmp_path / "out" / "runs" / "0001" / "log.jsonl").read_text()
    assert '"event": "failed"' in log


@pytest.mark.parametrize(
    ("failure", "message"),
    [(OSError(errno.ENOSPC, "No space left on device"), "No space left"), (MemoryError(), "out of memory")],
)
def test_a_lack_of_room_in_an_actor_is_no_defect(tmp_path, monkeypatch, failure, message):
    write_images(tmp_path / "source", 1)
    settings = poses(tmp_path)
    (task,) = make_plan(settings).tasks(settings.active_layers)
    actor = pipeline.actor_class(settings, Pass(settings.active_layers, "cpu", actors=1))()

    def fail(task: ShardTask) -> None:
        raise failure

    monkeypatch.setattr(actor.supervisor, "run", fail)
    answer = actor({"task": [task.to_json()]})
    assert answer["exit_code"] == [4]
    assert message in answer["error"][0]
    failure = OSError(errno.EIO, "Input/output error")
    with pytest.raises(OSError, match="Input/output"):
        actor({"task": [task.to_json()]})


# --- bad input (P01, P02, P04, P18) -----------------------------------------------------------------------------------


def test_p01_p02_bad_files_become_rows_and_the_run_goes_on(tmp_path, ray_session):
    from tests.prep.test_sources import animation, encoded, png_with_header

    source = tmp_path / "source"
    write_images(source, 6)
    good = Image.fromarray(np.random.default_rng(99).integers(0, 256, (80, 80, 3), dtype=np.uint8))
    jpeg = encoded(good, "JPEG")
    bad = {
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "empty.png": b"",
        "page.jpg": b"<html></html>",
        "._image-000.png": b"\0\5\x16\7",
        "moving.gif": animation("GIF"),
        "bomb.png": png_with_header(50_000, 50_000),
        "copy.png": (source / "image-003.png").read_bytes(),
    }
    for name, data in bad.items():
        (source / name).write_bytes(data)
    run(poses(tmp_path, max_reject_rate=0.5))
    assert len(Dataset(tmp_path / "out")) == 6
    assert rejects_of(tmp_path / "out") == {
        "cut.jpg": ("px", "truncated"),
        "empty.png": ("source", "empty"),
        "page.jpg": ("source", "not_an_image"),
        "._image-000.png": ("source", "hidden"),
        "moving.gif": ("source", "animated"),
        "bomb.png": ("source", "too_many_pixels"),
        "image-003.png": ("source", "duplicate"),
    }
    before = files_of(tmp_path / "out")
    with pytest.raises(DataError, match=r"6 of 12 sources were rejected .* above max_reject_rate 0.45"):
        run(poses(tmp_path, max_reject_rate=0.45))
    assert files_of(tmp_path / "out") == before  # what was published stays


@pytest.mark.slow
def test_p04_images_without_a_usable_caption_are_left_out_when_allowed(tmp_path, ray_session):
    source = tmp_path / "source"
    write_images(source, 6)
    (source / "image-000.txt").unlink()
    (source / "image-001.txt").write_bytes(b"caf\xe9")
    (source / "image-002.txt").write_text("word " * 10_000)
    settings = config(tmp_path, captions={"on_missing": "reject"}, t5={"max_tokens": 64})
    run(settings)
    dataset = Dataset(tmp_path / "out")
    assert len(dataset) == 4
    assert rejects_of(tmp_path / "out") == {
        "image-000.png": ("text", "caption_missing"),
        "image-001.png": ("text", "caption_not_utf8"),
    }
    long = next(row for row in dataset.rows() if row["source"] == "image-002.png")
    assert (long["t5_tokens"], long["t5_truncated"]) == (64, True)
    for row in dataset.rows():  # trap 3: the mask of a caption is the length of the features of that very caption
        assert len(dataset.t5(row)) == row["t5_tokens"] > 1

    (source / "image-000.txt").write_text("Found again.")  # a repaired sample comes back by running again
    run(settings)
    assert len(Dataset(tmp_path / "out")) == 5


def test_hidden_files_of_other_systems_are_rows_that_do_not_count(tmp_path, ray_session):
    """A folder from a Mac has a hidden file beside every picture and every caption."""
    write_images(tmp_path / "source", 2)
    hidden = [f"._image-{number:03d}{suffix}" for number in range(2) for suffix in (".png", ".txt")]
    hidden += [".DS_Store", "Thumbs.db"]
    for name in hidden:
        (tmp_path / "source" / name).write_bytes(b"\0\5\x16\7")
    run(poses(tmp_path, max_reject_rate=0.0))
    assert Dataset(tmp_path / "out").info["counts"]["samples"] == 2
    assert rejects_of(tmp_path / "out") == dict.fromkeys(hidden, ("source", "hidden"))
    for path in (tmp_path / "source").glob("image-*"):
        path.unlink()
    with pytest.raises(DataError, match=r"nothing was accepted.* 6 of 6 sources were rejected \(6 hidden\)"):
        run(poses(tmp_path), prune=True)


def test_missing_captions_close_the_gate_before_anything_is_computed(tmp_path):
    write_images(tmp_path / "source", 4)
    for number in range(3):
        (tmp_path / "source" / f"image-{number:03d}.txt").unlink()
    with pytest.raises(DataError, match=r"3 of 4 sources were rejected \(3 caption_missing\)"):
        run(config(tmp_path, captions={"on_missing": "reject"}))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["runs"]


def test_p18_nothing_accepted_ends_with_numbers_and_publishes_nothing(tmp_path, ray_session):
    (tmp_path / "source").mkdir()
    with pytest.raises(DataError, match="holds no files"):
        run(config(tmp_path))
    write_images(tmp_path / "source", 3, size=(20, 20))
    with pytest.raises(DataError, match=r"nothing was accepted.*3 of 3 sources were rejected \(3 too_small\)"):
        run(config(tmp_path))
    for name in FINISHED:
        assert not (tmp_path / "out" / name).exists()
    assert pq.read_table(tmp_path / "out" / "runs" / "0002" / "rejects.parquet").num_rows == 3


def test_p18_a_single_image_makes_a_dataset_and_a_warning(tmp_path, ray_session, capsys):
    write_images(tmp_path / "source", 1)
    run(poses(tmp_path))
    assert Dataset(tmp_path / "out").info["counts"] == {"samples": 1, "train": 1, "holdout": 0, "rejects": 0}
    output = capsys.readouterr().out
    assert "warning: 1 samples are too few for a holdout" in output
    assert "warning: buckets with a single sample: 80x56" in output


# --- being killed (P10, P11) ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_p11_a_killed_run_continues_and_ends_with_the_same_bytes(
    figures_dataset, figures_config, tmp_path, ray_session
):
    settings = figures_config.model_copy(update={"output": str(tmp_path / "out")})
    parts = tmp_path / "out" / "parts"
    process = subprocess.Popen(command(settings), cwd=PROJECT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and len(list(parts.glob("*.parquet"))) < 12 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    time.sleep(2)  # Ray's processes follow their driver
    committed = {path: path.stat().st_mtime_ns for path in parts.glob("*.parquet")}
    assert len(committed) >= 12
    assert not (tmp_path / "out" / "index.parquet").exists()
    run(settings)
    assert files_of(tmp_path / "out") == files_of(figures_dataset)
    assert {path: path.stat().st_mtime_ns for path in committed} == committed  # nothing is computed twice


@pytest.mark.slow
def test_a_run_asked_to_stop_ends_with_75_and_continues(tmp_path, ray_session):
    write_images(tmp_path / "source", 30, size=(400, 400))
    settings = poses(tmp_path, shard_size=1)
    process = subprocess.Popen(command(settings), cwd=PROJECT, stderr=subprocess.PIPE, text=True)
    parts = tmp_path / "out" / "parts"
    while process.poll() is None and not list(parts.glob("*.parquet")):
        time.sleep(0.01)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "The same command continues" in errors
    assert not (tmp_path / "out" / "index.parquet").exists()
    run(settings)
    assert len(Dataset(tmp_path / "out")) == 30


@pytest.mark.parametrize("moment", ["shards.before_tar", "shards.before_part"])
def test_p11_a_kill_between_the_steps_of_a_commit_leaves_no_half_unit(tmp_path, ray_session, moment):
    """The second unit dies: the first is committed, nothing of the second counts, and the rest is as undisturbed."""
    write_images(tmp_path / "source", 5)
    settings = poses(tmp_path)
    code = """
import sys
from pathlib import Path
from prep.config import load_config
from prep.layers import Job, LayerWorker, ShardTask
from prep.plan import make_plan, write_manifest
from prep.settings import PrepConfig
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
def test_p11_a_kill_while_publishing_is_repaired(tmp_path, ray_session, moment):
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


@pytest.mark.parametrize(("victim", "message"), [("worker", "a worker died"), ("actor", "an actor died")])
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
    run(undisturbed)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "undisturbed")


# --- one decode -------------------------------------------------------------------------------------------------------


def test_trap_06_every_source_is_decoded_once(tmp_path, monkeypatch):
    """Pixels are decoded for the first layer; the others read its crops, and need the sources no more."""
    write_images(tmp_path / "source", 4)
    settings = config(tmp_path, layers=["text", "dino", "pose"], shard_size=4)
    (task,) = make_plan(settings).tasks(settings.active_layers)
    decoded = []
    decode = sources.decode
    monkeypatch.setattr(sources, "decode", lambda *arguments: decoded.append(1) or decode(*arguments))
    worker = LayerWorker(settings)
    worker.run(ShardTask(task.bucket, task.shard, task.sources, {"px": task.recipes["px"]}))
    assert len(decoded) == 4  # trap 6
    for source in task.sources:
        (tmp_path / "source" / source.name).unlink()
    worker.run(task)
    assert len(decoded) == 4
    for layer in settings.active_layers:
        assert read_part(tmp_path / "out", Unit(task.bucket, task.shard, layer)).table.num_rows == 4


def test_encoders_work_in_batches_that_do_not_span_shards(tmp_path, monkeypatch):
    write_images(tmp_path / "source", 7)
    settings = config(tmp_path, layers=["dino"], shard_size=5, dino={"batch_size": 2})
    plan = make_plan(settings)
    tasks = plan.tasks(settings.active_layers)
    worker = LayerWorker(settings)
    sizes = []
    encoder = worker._encoder(Job(tasks[0], "dino"))
    encode = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda images: sizes.append(len(images)) or encode(images))
    for task in tasks:
        worker.run(task)
    assert sizes == [2, 2, 1, 2]  # trap 6: batches, and five and two images in two shards


def test_a_worker_with_another_model_than_the_plan_refuses(tmp_path):
    """Features of two models must never meet in a layer, wherever a worker found its model."""
    write_images(tmp_path / "source", 2)
    settings = config(tmp_path, layers=["dino"])
    (task,) = make_plan(settings).tasks(settings.active_layers)
    other = settings.model_copy(update={"dino": settings.dino.model_copy(update={"input_scale": 2.0})})
    with pytest.raises(ConfigError, match="the dino encoder of this worker is"):
        LayerWorker(other).run(task)
    assert read_part(tmp_path / "out", Unit(task.bucket, task.shard, "px")) is not None
    assert read_part(tmp_path / "out", Unit(task.bucket, task.shard, "dino")) is None


def test_s07_nobody_else_reads_the_token(tmp_path, ray_session):
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o644)
    pipeline.protect_token(token)
    assert token.stat().st_mode & 0o777 == 0o600
    pipeline.protect_token(tmp_path / "none")
    assert not (tmp_path / "none").exists()
