"""Whole runs in this process: ``prep run`` with everything but Ray, so that a test can break in at any moment."""

import errno
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from nanodit.errors import DataError, Interrupted, ResourceError
from prep.config import PrepConfig
from prep.dataset.reader import Dataset
from prep.images.scan import Reject
from prep.passes.layers import LayerWorker
from prep.passes.nodes import Node
from prep.passes.plan import make_plan, write_manifest
from prep.passes.publish import gate, publish
from prep.run import current_parts, print_plan, run
from prep.verify.verify import verify
from tests.prep.caption_server import CaptionServer
from tests.prep.captioning import FAST
from tests.prep.passes.test_plan import config, write_images
from tests.prep.prepared import LocalPipeline, compute_here
from tests.prep.runs import NETWORKS, files_of, poses, rejects_of
from tests.prep.verify.test_verify import publish_again


@pytest.fixture
def pipeline(monkeypatch) -> LocalPipeline:
    return compute_here(monkeypatch)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three images with captions."""
    write_images(tmp_path / "source", 3)
    return tmp_path / "source"


def refuse(pipeline: LocalPipeline, path: Path, layer: str, settings: PrepConfig, **options: bool) -> None:
    """Run while a source file is another one as long as a layer is computed."""
    good = path.read_bytes()

    def change(layers: tuple[str, ...]) -> None:
        if layer in layers:
            path.write_bytes(b"x" + good)

    pipeline.before = change
    run(settings, **options)
    pipeline.before = lambda layers: None
    path.write_bytes(good)


def stop(layers: tuple[str, ...]) -> None:
    raise KeyboardInterrupt


def sources_of(settings: PrepConfig) -> list[str]:
    return [row["source"] for row in sorted(Dataset(settings.output).rows(), key=lambda row: row["source"])]


ALL = ["image-000.png", "image-001.png", "image-002.png"]


# --- nothing is lost without a word (P11, P16) ------------------------------------------------------------------------


def test_p16_a_refused_image_that_is_back_is_taken_in_though_the_run_that_does_it_is_stopped(folder, pipeline):
    settings = poses(folder.parent)
    refuse(pipeline, folder / ALL[1], "px", settings)
    assert rejects_of(Path(settings.output)) == {ALL[1]: ("px", "changed_during_run")}
    pipeline.before = stop
    with pytest.raises(Interrupted):
        run(settings)
    pipeline.before = lambda layers: None
    run(settings)
    assert sources_of(settings) == ALL
    assert rejects_of(Path(settings.output)) == {}
    verify(settings.output)


def test_p16_an_image_that_is_back_is_taken_in_with_a_lost_tar_and_the_layers_after_it(folder, pipeline):
    settings = poses(folder.parent)
    refuse(pipeline, folder / ALL[1], "px", settings)
    for tar in Path(settings.output).glob("bucket_*/*.px.tar"):
        tar.unlink()
    run(settings)
    assert sources_of(settings) == ALL
    verify(settings.output)


def test_p16_a_change_reaches_the_last_of_four_layers_in_one_run(folder, pipeline):
    """With a filter for persons px makes pose, pose makes text, and text makes t5."""
    settings = config(folder.parent, layers=["text", "pose"], filters={"min_persons": 0}, pose=NETWORKS)
    refuse(pipeline, folder / ALL[1], "px", settings)
    assert sources_of(settings) == [ALL[0], ALL[2]]
    run(settings)
    assert sources_of(settings) == ALL
    before = files_of(Path(settings.output))
    run(settings)
    assert files_of(Path(settings.output)) == before


def test_p11_a_sample_that_is_nowhere_is_found_by_verify_and_stops_publishing(folder, pipeline, capsys):
    settings = poses(folder.parent)
    refuse(pipeline, folder / ALL[1], "px", settings)
    root = Path(settings.output)
    verify(root)
    publish_again(root, "rejects.parquet", pq.read_table(root / "rejects.parquet").slice(1))
    with pytest.raises(DataError):
        verify(root)
    assert "is neither here nor refused" in capsys.readouterr().out
    plan = make_plan(settings)
    LayerWorker(settings).run(plan.tasks(("px",))[0])  # px has three samples, pose says nothing about one of them
    with pytest.raises(DataError, match=f"1 samples are neither complete nor refused, for example {ALL[1]}"):
        publish(plan, current_parts(plan), "runs/rejects.parquet")
    run(settings)
    assert sources_of(settings) == ALL
    verify(root)


# --- samples whose files are gone -------------------------------------------------------------------------------------


def remove(folder: Path, number: int) -> None:
    """Delete an image with its caption."""
    for suffix in ("png", "txt"):
        (folder / f"image-{number:03d}.{suffix}").unlink()


@pytest.mark.parametrize("cause", ["retry_rejects", "restored"])
def test_p16_captions_of_gone_samples_outlive_that_their_unit_is_made_again(folder, pipeline, cause):
    settings = config(folder.parent, layers=["text"], captions={"on_missing": "reject"})
    caption = folder / "image-000.txt"
    if cause == "retry_rejects":
        caption.write_text("")
        run(settings)
    else:
        refuse(pipeline, caption, "text", settings)
    assert sources_of(settings) == ALL[1:]
    remove(folder, 1)
    for _ in range(2):
        run(settings, retry_rejects=cause == "retry_rejects")
        assert sources_of(settings) == (ALL if cause == "restored" else ALL[1:])
    captions = {row["source"]: row["caption"] for row in Dataset(settings.output).rows()}
    assert captions[ALL[1]] == "Picture number 1."


def test_p16_an_image_deleted_with_its_caption_after_an_interrupted_run_is_refused(folder, pipeline):
    settings = config(folder.parent, layers=["text"])
    plan = make_plan(settings)
    write_manifest(plan)
    LayerWorker(settings).run(plan.tasks(("px",))[0])
    remove(folder, 1)
    for _ in range(2):
        run(settings)
        assert sources_of(settings) == [ALL[0], ALL[2]]
        assert rejects_of(Path(settings.output)) == {ALL[1]: ("text", "source_gone")}
    verify(settings.output)
    write_images(folder, 3)  # it is back
    run(settings)
    assert sources_of(settings) == ALL


# --- what storage says ------------------------------------------------------------------------------------------------


def test_p16_what_cannot_be_read_for_a_moment_is_taken_in_by_the_next_run(folder, pipeline, monkeypatch):
    settings = poses(folder.parent)
    read = Path.read_bytes

    def stale(path: Path) -> bytes:
        if path.name == ALL[1]:
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", stale)
    run(settings)
    assert rejects_of(Path(settings.output)) == {ALL[1]: ("px", "unreadable")}
    monkeypatch.setattr(Path, "read_bytes", read)
    run(settings)
    assert sources_of(settings) == ALL


@pytest.mark.parametrize("name", ["px.parquet", "index.parquet", "manifest.parquet"])
def test_p11_a_record_that_cannot_be_read_for_a_moment_costs_no_sample(folder, pipeline, monkeypatch, name):
    settings = poses(folder.parent)
    run(settings)
    (folder / ALL[1]).unlink()
    before, read = files_of(Path(settings.output)), Path.read_bytes

    def broken(path: Path) -> bytes:
        if path.name.endswith(name):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", broken)
    with pytest.raises(ResourceError, match=rf"{name} cannot be read: Input/output error"):
        run(settings)
    monkeypatch.setattr(Path, "read_bytes", read)
    run(settings)
    assert files_of(Path(settings.output)) == before


# --- the gate (P18) ---------------------------------------------------------------------------------------------------


def test_p18_the_plan_stops_where_the_run_would_and_writes_no_report(folder):
    settings = poses(folder.parent)
    for name in ALL[:2]:
        (folder / name).write_bytes(b"\0")
    with pytest.raises(DataError, match=r"nothing was published: 2 of 3 sources were rejected \(2 not_an_image\)"):
        print_plan(settings)
    (folder / ALL[2]).write_bytes(b"\0")
    with pytest.raises(DataError, match="nothing was accepted, so nothing was published: 3 of 3 sources"):
        print_plan(settings)
    assert not list(folder.parent.glob("out/**/rejects.parquet"))


def test_p18_a_source_that_two_layers_refuse_counts_once(folder):
    rejects = [Reject(name, layer, "crashes_worker", "") for name in ALL[:2] for layer in ("dino", "pose")]
    gate(poses(folder.parent, max_reject_rate=0.5), rejects, 4, None)
    with pytest.raises(DataError, match=r"2 of 4 sources were rejected \(4 crashes_worker\)"):
        gate(poses(folder.parent, max_reject_rate=0.4), rejects, 4, None)


def test_only_damage_counts_towards_the_limit(folder):
    reasons = ["hidden", "duplicate", "linked_folder", "too_small", "too_elongated", "blurred", "links_splits"]
    chosen = [Reject(f"{number}.png", "source", reason, "") for number, reason in enumerate(reasons)]
    captions = [Reject(f"c{number}.png", "text", "caption_missing", "") for number in range(3)]
    seen = len(chosen) + len(captions) + 2
    strict = poses(folder.parent, max_reject_rate=0.0)
    gate(strict, chosen + captions, seen, None)
    damaged = Reject("torn.png", "source", "truncated", "")
    with pytest.raises(DataError, match=r"1 of 2 sources were rejected \(1 truncated\)"):
        gate(strict, [*chosen, *captions, damaged], seen, None)
    generated = config(folder.parent, captions={"backend": "ollama"}, max_reject_rate=0.5)
    with pytest.raises(DataError, match=r"3 of 5 sources were rejected \(3 caption_missing\)"):  # nobody chose that
        gate(generated, chosen + captions, seen, None)
    with pytest.raises(DataError, match=r"nothing was accepted.* 7 of 7"):
        gate(strict, chosen, len(chosen), None)


# --- refused captions, and what killed runs leave ---------------------------------------------------------------------


@pytest.mark.parametrize("retry", [False, True])
def test_p17_only_who_asks_for_it_has_refused_pictures_captioned_again(folder, pipeline, retry):
    alone = folder.parent / "alone"
    alone.mkdir()
    write_images(alone / "source", 1)
    with CaptionServer() as server:
        captions = {"backend": "ollama", "hosts": [server.url], "overwrite": True} | FAST
        run(config(alone, layers=["text"], captions=captions))
        (picture,) = {request["image"] for request in server.log if request.get("image")}
        server.poison = {picture: "short"}  # of image-000.png
        settings = config(folder.parent, layers=["text"], captions=captions, max_reject_rate=0.9)
        refuse(pipeline, folder / ALL[1], "px", settings)
        assert set(rejects_of(Path(settings.output))) == set(ALL[:2])
        asked = len(server.log)
        run(settings, retry_rejects=retry)
        assert sources_of(settings) == ALL[1:]
        again = [request for request in server.log[asked:] if request.get("image") == picture]
        assert bool(again) == retry


def captions_in(root: Path) -> dict[str, tuple[str, dict]]:
    """The caption of every sample, and where it is from, by the name of its source."""
    dataset = Dataset(root)
    return {row["source"]: (row["caption"], json.loads(dataset.read(row, "text/json"))) for row in dataset.rows()}


def test_a_backend_fills_exactly_what_is_missing(folder, pipeline, capsys):
    """NAME.txt are kept, a description inside an image too; what cannot be used counts as missing."""
    write_images(folder, 4, first=3)
    for number in (1, 4, 5):
        (folder / f"image-{number:03d}.txt").unlink()
    (folder / "image-002.txt").write_text("\u200b")
    (folder / "image-004.caption").write_text("From another tool.")
    with CaptionServer() as server:
        captions = {"backend": "ollama", "hosts": [server.url]} | FAST
        settings = config(folder.parent, layers=["text"], captions=captions, shard_size=4)
        run(settings)
        said = capsys.readouterr().out
        assert "4 of 7 images came with a caption; ollama writes the others (captions.overwrite=true" in said
        assert (
            "captions that came with images and cannot be used: 1 (1 caption_empty): image-002.txt has no text" in said
        )
        found = captions_in(Path(settings.output))
        assert {name for name, (_, origin) in found.items() if origin["backend"] == "ollama"} == {
            "image-001.png", "image-002.png", "image-005.png"
        }  # fmt: skip
        assert len(server.captioned) == 3
        assert found["image-000.png"][0] == "Picture number 0."
        assert (found["image-004.png"][0], found["image-004.png"][1]["from"]) == ("From another tool.", "caption")
        info = json.loads((Path(settings.output) / "dataset.json").read_text())
        assert info["layers"]["text"]["backend"] == "ollama"
        verify(settings.output)

        before, asked = files_of(Path(settings.output)), len(server.captioned)
        run(settings)
        assert files_of(Path(settings.output)) == before
        (folder / "image-001.txt").write_text("By hand, at last.")  # which makes one shard's text again
        run(settings)
        assert len(server.captioned) == asked
        assert captions_in(Path(settings.output))["image-001.png"][0] == "By hand, at last."
        assert [name for name, (_, origin) in captions_in(Path(settings.output)).items() if "model" in origin] == [
            name for name in found if name in ("image-002.png", "image-005.png")
        ]
        (folder / "image-000.png").unlink()
        (folder / "image-000.txt").unlink()
        run(settings)
        assert captions_in(Path(settings.output))["image-000.png"][0] == "Picture number 0."  # it outlives its file

        overwritten = settings.model_copy(update={"captions": settings.captions.model_copy(update={"overwrite": True})})
        run(overwritten)
        assert {origin["backend"] for _, origin in captions_in(Path(settings.output)).values()} == {"ollama"}
        assert len(server.captioned) == 7


def test_a_dataset_whose_images_all_have_captions_needs_no_backend(folder, pipeline):
    """And one that was made from NAME.txt alone is the same with a backend named, to the last byte."""
    settings = config(folder.parent, layers=["text"])
    run(settings)
    captions = {"backend": "ollama", "hosts": ["http://127.0.0.1:9"]} | FAST
    named = config(folder.parent, layers=["text"], captions=captions)
    assert make_plan(named).missing == {}
    other = named.model_copy(update={"output": str(folder.parent / "other")})
    run(other)
    units = [{name: hash_ for name, hash_ in files_of(Path(root)).items() if "shard-" in name}
             for root in (settings.output, other.output)]  # fmt: skip
    assert units[0] == units[1]
    assert len(units[0]) == 6


def test_a_caption_server_on_the_card_leaves_it_to_the_passes(folder, pipeline, monkeypatch, capsys):
    """Its model is loaded for the captions alone: neither while crops are encoded before, nor for T5 afterwards."""
    card = Node("id", "127.0.0.1", "here", 2, 1, 8, memory_gb=8, driver=True)
    pipeline.cluster_nodes = lambda: [card]
    monkeypatch.setattr("prep.run.CARD_SECONDS", 0.0)
    loaded: dict[tuple[str, ...], bool] = {}
    with CaptionServer() as server:
        server.loaded = True  # by whoever used it last
        pipeline.before = lambda layers: loaded.update({layers: server.loaded})
        captions = {"backend": "ollama", "hosts": [server.url], "overwrite": True} | FAST
        run(config(folder.parent, layers=["text", "dino"], captions=captions))
        assert loaded == {("px",): False, ("dino",): False, ("t5",): False}
        assert len(server.captioned) == 3
        paths = [request["path"] for request in server.log]
        assert paths.count("/api/generate") == 2
        assert paths.index("/api/generate") < paths.index("/api/chat")
    assert "pass 2 of 4: dino" in capsys.readouterr().out


def test_p11_a_tar_of_an_abandoned_base_does_not_stay_for_ever(folder, pipeline, monkeypatch):
    write_images(folder, 3, size=(200, 160))
    settings = poses(folder.parent)
    run(settings)
    before = files_of(Path(settings.output))

    def die(moment: str, *more: str) -> None:
        if moment == "shards.before_part":
            raise KeyboardInterrupt

    monkeypatch.setattr("prep.dataset.writer.fault", die)
    with pytest.raises(Interrupted):
        run(settings.model_copy(update={"base": 128}))
    assert len(list(Path(settings.output).glob("bucket_*/*.px.tar"))) == 2
    monkeypatch.setattr("prep.dataset.writer.fault", lambda moment, *more: None)
    run(settings)
    assert files_of(Path(settings.output)) == before
    verify(settings.output)


def test_p11_a_split_that_was_never_published_does_not_outlive_its_seed(folder, pipeline, monkeypatch):
    write_images(folder, 12)
    first, second = poses(folder.parent), poses(folder.parent, holdout=0.4, seed=5)
    clean = second.model_copy(update={"output": str(folder.parent / "clean")})
    run(clean)

    def die(moment: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("prep.passes.publish.fault", die)
    with pytest.raises(Interrupted):
        run(first)
    assert [path.name for path in Path(first.output).glob("*.*")] != []
    monkeypatch.setattr("prep.passes.publish.fault", lambda moment: None)
    run(second)
    assert files_of(Path(second.output)) == files_of(Path(clean.output))
    published = {row["key"]: row["split"] for row in Dataset(second.output).rows()}
    run(first)  # from now on every sample stays on its side (trap 10), also when dataset.json is lost
    assert {row["key"]: row["split"] for row in Dataset(first.output).rows()} == published
    (Path(first.output) / "dataset.json").unlink()
    run(first)
    assert {row["key"]: row["split"] for row in Dataset(first.output).rows()} == published


def test_p15_a_change_of_base_that_is_given_up_leaves_the_dataset_as_it_was(tmp_path, pipeline):
    write_images(tmp_path / "source", 4, size=(200, 160))
    settings = poses(tmp_path)
    run(settings)
    write_images(tmp_path / "source", 4, size=(200, 160), first=4)  # grown: its shards are not those of a first run
    run(settings)
    before = files_of(Path(settings.output))
    pipeline.before = stop
    with pytest.raises(Interrupted):
        run(settings.model_copy(update={"base": 128}))
    assert files_of(Path(settings.output)) != before  # the manifest has the new places
    assert make_plan(settings).missing == {}
    run(settings)
    assert files_of(Path(settings.output)) == before
