"""The flat export, and what other people's libraries make of our tars."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from nanodit.errors import ConfigError, DataError, ResourceError
from nanodit.files import sha256_bytes
from prep.dataset.buckets import Bucket
from prep.dataset.reader import Dataset
from prep.export import export_flat, flat_members, flat_pose, pad_text
from tests.prep.passes.test_plan import config, write_images
from tests.prep.prepared import prepare

PROJECT = Path(__file__).parents[2]
MEMBERS = {"image.npy", "dinov3.npy", "dinov3_patches.npy", "t5h.npy", "t5m.npy", "pose.npy", "json"}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Seven images in three shards and two buckets, with every layer. Read only."""
    folder = tmp_path_factory.mktemp("export")
    write_images(folder / "source", 4)
    write_images(folder / "source", 3, size=(64, 80), first=4)
    prepare(config(folder, layers=["text", "dino", "pose"]))
    return folder / "out"


def tars(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256_bytes(path.read_bytes()) for path in folder.rglob("*.tar")}


def samples(folder: Path) -> dict[str, dict]:
    """Every sample of the tars of a folder as plain webdataset reads it."""
    import webdataset

    urls = sorted(str(path) for path in folder.rglob("*.tar"))
    return {item["__key__"]: item for item in webdataset.WebDataset(urls, shardshuffle=False)}


def load(data: bytes) -> np.ndarray:
    return np.load(io.BytesIO(data), allow_pickle=False)


def test_the_flat_export_has_the_layout_of_prx_tg(root, tmp_path, capsys):
    export_flat(root, tmp_path / "flat")
    dataset = Dataset(root)
    shards = {(row["bucket"], row["shard"]) for row in dataset.rows()}
    assert tars(tmp_path / "flat").keys() == {f"bucket_{bucket}/shard-{shard:06d}.tar" for bucket, shard in shards}
    assert f"wrote 3 of 3 tars to {tmp_path / 'flat'}: 7 samples" in capsys.readouterr().out
    found = samples(tmp_path / "flat")
    assert found.keys() == {row["key"] for row in dataset.rows()}
    widths = {layer: dataset.info["layers"][layer]["width"] for layer in ("t5", "dino")}
    for row in dataset.rows():
        sample, bucket = found[row["key"]], Bucket.parse(row["bucket"])
        assert {name for name in sample if not name.startswith("__")} == MEMBERS
        image = load(sample["image.npy"])
        assert (image.dtype, image.shape) == (np.float16, (3, bucket.height, bucket.width))
        assert 0 <= image.min() < image.max() <= 1
        pixels = np.rint(image.astype(np.float32) * 255).astype(np.uint8).transpose(1, 2, 0)
        assert np.array_equal(pixels, dataset.pixels(row))
        cls, patches = load(sample["dinov3.npy"]), load(sample["dinov3_patches.npy"])
        assert (cls.dtype, cls.shape) == (np.float32, (widths["dino"],))
        assert (patches.dtype, patches.shape) == (np.float32, (row["dino_h"] * row["dino_w"], widths["dino"]))
        assert np.array_equal(patches, dataset.patches(row).reshape(patches.shape))
        hidden, mask = load(sample["t5h.npy"]), load(sample["t5m.npy"])
        assert (hidden.dtype, hidden.shape, mask.dtype, mask.shape) == (
            np.float16,
            (512, widths["t5"]),
            np.uint8,
            (512,),
        )
        assert mask.sum() == row["t5_tokens"]  # trap 3
        assert np.array_equal(hidden[mask.astype(bool)], dataset.t5(row))
        assert not hidden[row["t5_tokens"] :].any()
        pose = load(sample["pose.npy"])
        assert (pose.dtype, pose.shape) == (np.float16, (133, 3))
        about = json.loads(sample["json"])
        assert about["caption"] == row["caption"]
        assert (about["bucket"], about["width"], about["height"]) == (row["bucket"], bucket.width, bucket.height)
        assert about["split"] == row["split"]


def test_the_bytes_are_those_of_a_plain_tar_without_time_or_owner(root, tmp_path):
    """As exports have always been: one begun by an earlier version goes on, and equal datasets give equal files."""
    export_flat(root, tmp_path / "flat")
    dataset, expected = Dataset(root), {}
    for name in tars(tmp_path / "flat"):
        with tarfile.open(tmp_path / "plain.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for row in dataset.rows():
                if name == f"bucket_{row['bucket']}/shard-{row['shard']:06d}.tar":
                    for member, content in flat_members(dataset, row).items():
                        info = tarfile.TarInfo(f"{row['key']}.{member}")  # mtime, uid and gid 0, mode 0644, no names
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
        expected[name] = sha256_bytes((tmp_path / "plain.tar").read_bytes())
    assert len(expected) == 3
    assert tars(tmp_path / "flat") == expected


def test_poses_are_on_the_pixel_grid_of_prx_tg():
    """The middle of the first pixel is -1 there; here it is the left edge."""
    width, height = 80, 56
    ours = np.array([[2 * 0.5 / width - 1, 2 * 0.5 / height - 1, 0.9], [2 * 40.5 / width - 1, 0.0, 1.7], [0, 0, 0]])
    theirs = flat_pose(ours.astype(np.float32), Bucket(width, height))
    assert np.allclose(theirs[0], [-1, -1, 0.9], atol=1e-3)
    assert np.allclose(theirs[1, ::2], [2 * 40 / width - 1, 1.7], atol=1e-3)
    assert not theirs[2].any()


def test_more_tokens_than_the_layout_has_room_for_are_refused():
    with pytest.raises(DataError, match="has 513 text tokens"):
        pad_text(np.zeros((513, 2), np.float16), {"key": "1"})


def test_p11_a_killed_export_continues_with_the_same_bytes(root, tmp_path):
    export_flat(root, tmp_path / "whole")
    code = (
        "import os, signal, sys\nfrom prep import export\nwrite, done = export._write_shard, []\n"
        "members = export.flat_members\n"
        "def dying(data, row):\n    done.append(row)\n"
        "    if len(done) == 5: os.kill(os.getpid(), signal.SIGKILL)\n    return members(data, row)\n"
        "export.flat_members = dying\nexport.export_flat(sys.argv[1], sys.argv[2])"
    )
    done = subprocess.run([sys.executable, "-c", code, root, tmp_path / "cut"], cwd=PROJECT, timeout=60)
    assert done.returncode == -signal.SIGKILL
    before = tars(tmp_path / "cut")
    assert 0 < len(before) < 3
    assert list((tmp_path / "cut").rglob(".*.tmp-*"))
    times = {name: (tmp_path / "cut" / name).stat().st_mtime_ns for name in before}
    export_flat(root, tmp_path / "cut")
    assert tars(tmp_path / "cut") == tars(tmp_path / "whole")
    assert {name: (tmp_path / "cut" / name).stat().st_mtime_ns for name in before} == times
    assert not list((tmp_path / "cut").rglob(".*.tmp-*"))


def test_only_an_empty_folder_of_its_own_is_written_to(root, tmp_path):
    photos = tmp_path / "photos"
    write_images(photos, 1)
    with pytest.raises(ConfigError, match=r"not empty and holds no export \(image-000\.png is there"):
        export_flat(root, photos)
    shutil.copytree(root, tmp_path / "dataset")
    log = tmp_path / "dataset" / "runs" / "0001" / "config.yaml"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(f"source: {photos}")
    for place in (tmp_path / "dataset" / "flat", photos / "flat"):
        with pytest.raises(ConfigError, match="lies inside"):
            export_flat(tmp_path / "dataset", place)
        assert not place.exists()
    for place in ("/dev/full/x", photos / "image-000.txt" / "flat", "/proc/flat"):
        with pytest.raises(ResourceError, match=r"cannot be written: .*\. Choose another folder"):
            export_flat(root, place)


def test_the_export_of_another_dataset_is_not_mixed_in(root, tmp_path, monkeypatch):
    export_flat(root, tmp_path / "flat")
    marker = tmp_path / "flat" / "flat.json"
    marker.write_text(json.dumps({"dataset": "another"}))
    with pytest.raises(ConfigError, match="holds the export of a dataset with fingerprint another"):
        export_flat(root, tmp_path / "flat")
    shutil.copytree(root, tmp_path / "dataset")
    with pytest.raises(ConfigError, match="is not empty and holds no export"):
        export_flat(root, tmp_path / "dataset")


def test_p14_an_export_that_does_not_fit_is_refused_before_it_begins(root, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(1 << 18))
    with pytest.raises(ResourceError, match=r"the export takes 0\.0 GB; 0\.0 GB are free"):
        export_flat(root, tmp_path / "flat")
    assert tars(tmp_path / "flat") == {}


def test_a_dataset_without_some_layers_is_exported_without_them(tmp_path):
    write_images(tmp_path / "source", 2)
    prepare(config(tmp_path))
    export_flat(tmp_path / "out", tmp_path / "flat")
    for sample in samples(tmp_path / "flat").values():
        assert {name for name in sample if not name.startswith("__")} == {"image.npy", "t5h.npy", "t5m.npy", "json"}


READ = """
import glob, sys
from datasets import load_dataset
for path in sorted(glob.glob(sys.argv[1] + "/bucket_*/*.tar")):
    rows = list(load_dataset("webdataset", data_files={"train": path}, split="train", streaming=True))
    names = sorted(name for name in rows[0] if not name.startswith("__"))
    print(path.rsplit("/", 1)[1], len(rows), *names)
"""


@pytest.mark.parametrize("what", ["layers", "flat"])
def test_hugging_face_datasets_opens_every_tar(root, tmp_path, what):
    folder = root
    if what == "flat":
        folder = tmp_path / "flat"
        export_flat(root, folder)
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", READ, folder], cwd="/", env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == [path.name for path in sorted(folder.glob("bucket_*/*.tar"))]
    members = {name: [] for name in ("px", "text", "t5", "dino", "pose")} if what == "layers" else {"tar": []}
    for name, count, *columns in lines:
        members[name.split(".")[1]].append((int(count), columns))
    expected = {
        "px": ["webp"], "text": ["json", "txt"], "t5": ["t5.npy"],
        "dino": ["cls.npy", "dino.npy", "dino_scale.npy"], "pose": ["json", "pose.npy"], "tar": sorted(MEMBERS),
    }  # fmt: skip
    for layer, found in members.items():
        assert sum(count for count, _ in found) == 7
        assert all(columns == expected[layer] for _, columns in found)


def test_plain_webdataset_opens_every_layer(root):
    import webdataset

    dataset = Dataset(root)
    rows, seen = {row["key"]: row for row in dataset.rows()}, 0
    for path in sorted(root.glob("bucket_*/*.tar")):
        layer = path.name.split(".")[1]
        for sample in webdataset.WebDataset(str(path), shardshuffle=False):
            for member in dataset.members(layer):
                assert sample[member] == dataset.read(rows[sample["__key__"]], f"{layer}/{member}")
                seen += 1
    assert seen == 7 * sum(len(dataset.members(layer)) for layer in dataset.layers)
