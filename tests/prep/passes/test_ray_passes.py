"""prep run as a whole, through Ray: what it promises about its output and about running again."""

import errno
import fcntl
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from nanodit.errors import ConfigError, DataError
from nanodit.files import sha256_bytes
from nanodit.storage import open_storage
from prep.config import PrepConfig
from prep.dataset.buckets import Bucket
from prep.dataset.layers import LAYERS
from prep.dataset.layout import Unit
from prep.dataset.reader import Dataset
from prep.encoders.registry import model_name
from prep.images.scan import describe_file
from prep.passes import ray_passes as pipeline
from prep.passes.layers import ShardTask
from prep.passes.placement import Pass
from prep.passes.plan import make_plan, write_manifest
from prep.run import RunFolder, locked, prepare, print_plan, run
from tests.prep.caption_server import CaptionServer
from tests.prep.passes.test_plan import config, write_images
from tests.prep.runs import FINISHED, files_of, poses

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
    members = sum(len(layer.members) for layer in LAYERS.values())
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
    assert {path.name for path in figures_dataset.iterdir() if path.is_file()} == {*FINISHED, "readers"}
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
    ours = (path.relative_to(root) for path in before)
    assert files_of(root).keys() == {path.as_posix() for path in ours if path.parts[0] not in ("runs", "readers")}


def test_a_new_caption_and_a_new_image_redo_only_what_they_reach(copied, ray_session, capsys):
    copied = copied.model_copy(update={"workers": 1})  # two would load the encoders twice
    source, root = Path(copied.source), Path(copied.output)
    before, rows = files_of(root), {row["source"]: row for row in Dataset(root).rows()}
    edited = rows["figure-000005.png"]
    (source / "figure-000005.txt").write_text("Somebody else entirely, in a green top.")
    mirrored = Image.open(source / "figure-000009.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    mirrored.save(source / "new.png")
    (source / "new.txt").write_text("A new picture.")
    print_plan(copied)
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


@pytest.mark.slow
def test_another_caption_model_redoes_text_and_t5_and_more_images_fill_new_shards(tmp_path, without_ray, capsys):
    write_images(tmp_path / "source", 5)
    root = tmp_path / "out"

    def changed_by(server: CaptionServer) -> dict[str, str]:
        """Run with the server's model; what has other bytes than before, by file."""
        before = files_of(root) if root.exists() else {}
        captions = {"backend": "ollama", "hosts": [server.url], "model": server.model, "overwrite": True}
        run(config(tmp_path, layers=["text", "dino", "pose"], captions=captions))
        return {name: digest for name, digest in files_of(root).items() if before.get(name) != digest}

    with CaptionServer(model="gemma3:27b") as first, CaptionServer(model="llava:7b", digest="e" * 64) as second:
        changed_by(first)
        capsys.readouterr()
        units = {name for name in changed_by(second) if name.startswith(("parts/", "bucket_"))}
        lines = capsys.readouterr().out.splitlines()
        assert {name.split(".")[-2] for name in units} == {"text", "t5"}
        assert [line for line in lines if line.startswith("text ") and "changed: digest, model" in line]
        assert [line for line in lines if line.startswith("t5 ") and "changed: text layer" in line]
        old = {name for name in files_of(root) if name.startswith(("parts/", "bucket_"))}
        write_images(tmp_path / "source", 20, first=5)
        units = {name for name in changed_by(second) if name.startswith(("parts/", "bucket_"))}
        assert units
        assert not units & old
        assert len(Dataset(root)) == 25
        assert len({entry["image"] for entry in second.captioned}) == len(second.captioned) == 25


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


def test_layers_can_be_switched_off(tmp_path, without_ray):
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
    with pytest.raises(ConfigError, match="cannot load the model"):
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


def test_s07_nobody_else_reads_the_token(tmp_path, ray_session):
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o644)
    pipeline.protect_token(token)
    assert token.stat().st_mode & 0o777 == 0o600
    pipeline.protect_token(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_sources_are_hashed_on_the_nodes(tmp_path, ray_session, monkeypatch):
    """What nodes say of files is what the driver says; a run with many new ones asks them, and gives the same bytes."""
    monkeypatch.setattr(pipeline, "BLOCK", 2)
    write_images(tmp_path / "source", 5)
    (tmp_path / "source" / "torn.png").write_bytes(b"\x89PNG")
    names = sorted(path.name for path in (tmp_path / "source").glob("*.png"))
    found: dict[str, dict] = {}
    blocks = 0
    for block in pipeline.read_sources(str(tmp_path / "source"), [*names, "gone.png"], 1 << 26):
        found |= block
        blocks += 1
    assert blocks == 4
    wanted = {name: describe_file(tmp_path / "source", name, 1 << 26) for name in names}
    assert found == {name: value for name, value in wanted.items() if name != "torn.png"}, "no node refuses anything"
    monkeypatch.setattr("prep.images.scan_cache.MANY", 1)
    asked = []
    monkeypatch.setattr(pipeline, "read_sources", lambda folder, names, most: asked.append(names) or iter([found]))
    plan = prepare(config(tmp_path), RunFolder(open_storage(tmp_path / "out"), config(tmp_path)), False)
    assert asked == [names]
    assert plan.sources == make_plan(config(tmp_path)).sources


def test_shards_are_handed_out_some_at_a_time(tmp_path, ray_session, monkeypatch):
    monkeypatch.setattr(pipeline, "TASKS", 2)
    handed, real = [], pipeline._results
    monkeypatch.setattr(pipeline, "_results", lambda *given: handed.append(len(given[2])) or real(*given))
    write_images(tmp_path / "source", 8)
    settings = config(tmp_path, layers=["text"])
    plan = make_plan(settings)
    assert len(plan.shards) == 3
    write_manifest(plan)
    finished = list(pipeline.run_pass(settings, Pass(("px", "text"), "cpu", 1), plan.tasks(("px", "text"))))
    assert handed == [2, 1]
    assert len(finished) == 3
    assert {unit.layer for unit in make_plan(settings).missing} == {"t5"}
