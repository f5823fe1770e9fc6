"""``captions.short``: a caption of one sentence beside each, a model's or the first sentence, and its features."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nanodit.errors import ConfigError, DataError
from nanodit.files import sha256_bytes
from prep.caption_files import list_captions
from prep.captions.config import CaptionConfig
from prep.captions.mirror import flip_caption
from prep.captions.prompts import prompt_text, short_prompt_text
from prep.captions.quality import Answer, CaptionRules, find_flaw, next_step
from prep.captions.sentences import first_sentence
from prep.config import PrepConfig
from prep.dataset.reader import Dataset
from prep.encoders.registry import build_encoder
from prep.export import export_flat
from prep.passes.cost import estimate, sample_bytes, short_share
from prep.passes.nodes import Node
from prep.passes.placement import plan_passes
from prep.passes.plan import make_plan
from prep.report.report import write_report
from prep.run import run
from prep.verify.verify import verify
from tests.prep.caption_server import CaptionServer
from tests.prep.captioning import (
    FAST,
    caption_config,
    captioning,
    commit_crops,
    run_captions,
    text_parts,
    unit_bytes,
    with_recipes,
)
from tests.prep.passes.test_plan import config, write_images
from tests.prep.prepared import compute_here, prepare
from tests.prep.runs import files_of

LONG = "A man in red stands on the left. He holds a ball in his left hand. The wall is grey."
# long and short captions of all kinds: with a direction, one sentence, no direction, and one that cannot be flipped
TEXTS = (
    LONG,
    "A woman in blue stands on the right.",
    "A dog. It is on the left.",
    "The right moment. A cat on the left.",
)
SHORTS = {text: first_sentence(text) for text in TEXTS}


def write_source(folder: Path) -> None:
    write_images(folder, len(TEXTS))
    for path, text in zip(sorted(folder.glob("*.txt")), TEXTS):
        path.write_text(text)


def sidecars(folder: Path, output: str = "out", short: bool = True, **changes) -> PrepConfig:
    changes |= {"t5": {"batch_size": 3}, "captions": {"short": short}}
    return config(folder, shard_size=8, **changes).model_copy(update={"output": str(folder / output)})


@pytest.fixture
def server() -> Iterator[CaptionServer]:
    with CaptionServer() as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Datasets without short captions, with them, and with flips besides. Read only."""
    folder = tmp_path_factory.mktemp("short")
    write_source(folder / "source")
    prepare(sidecars(folder, "plain", short=False))
    prepare(sidecars(folder))
    prepare(sidecars(folder, "flips", flips=True))
    return folder


def test_the_first_sentence_of_a_caption_that_came_with_an_image_is_the_short_one(folder):
    dataset, plain = Dataset(folder / "out"), Dataset(folder / "plain")
    assert dataset.has_short
    assert not plain.has_short
    encoder = build_encoder(sidecars(folder), "t5", "cpu")
    for row in dataset.rows():
        short = row["caption_short"]
        assert short == SHORTS[row["caption"]] == dataset.read(row, "text/short.txt").decode()
        assert json.loads(dataset.read(row, "text/json"))["short"] == {"from": "sentence"}
        (expected,) = encoder.encode([short])
        np.testing.assert_allclose(dataset.t5_short(row), expected.embedding, atol=2e-3)
        assert row["t5_short_tokens"] == (0 if short == row["caption"] else len(expected.embedding))
    verify(folder / "out")
    verify(folder / "flips")


def test_mirrored_crops_have_short_captions_as_far_as_these_can_be_flipped(folder):
    dataset, encoder = Dataset(folder / "flips"), build_encoder(sidecars(folder), "t5", "cpu")
    stored = []
    for row in dataset.rows():
        assert row["caption_short_flip"] == flip_caption(row["caption_short"])
        if not dataset.flippable(row):
            continue
        wanted = row["caption_short_flip"] or row["caption_flip"]
        (expected,) = encoder.encode([wanted])
        np.testing.assert_allclose(dataset.t5_short(row, flipped=True), expected.embedding, atol=2e-3)
        stored.append((row["t5_short_tokens"] > 0, row["t5_short_flip_tokens"] > 0))
    assert set(stored) == {(True, True), (False, False), (True, False)}


def test_a_short_caption_that_cannot_be_flipped_leaves_the_long_one_to_the_mirrored_crop(folder):
    dataset = Dataset(folder / "flips")
    row = next(row for row in dataset.rows() if row["caption"] == LONG) | {"caption_short_flip": None}
    assert np.array_equal(dataset.t5_short(row, flipped=True), dataset.t5(row, flipped=True))


def test_what_was_there_without_short_captions_stays_byte_for_byte(folder):
    dataset, plain = Dataset(folder / "out"), Dataset(folder / "plain")
    for ours, theirs in zip(dataset.rows(), plain.rows(), strict=True):
        for layer in plain.layers:
            for member in plain.members(layer):
                if (layer, member) != ("text", "json"):  # which says where the short caption is from
                    assert dataset.read(ours, f"{layer}/{member}") == plain.read(theirs, f"{layer}/{member}")
    ours, theirs = files_of(folder / "out"), files_of(folder / "plain")
    assert {name for name in theirs if ".px." in name} <= dict(ours.items() & theirs.items()).keys()
    assert not [name for name in plain.table.column_names if "short" in name]
    assert not any(
        "short" in json.dumps(recipe) for recipe in make_plan(sidecars(folder, "plain", False)).recipes.values()
    )
    assert "short" not in (folder / "plain" / "dataset.json").read_text()
    with tarfile.open(next((folder / "flips").glob("*/*.t5.tar"))) as tar:
        names = [name.partition(".")[2] for name in tar.getnames()]
    assert names == ["t5.npy", "t5_flip.npy", "t5_short.npy", "t5_short_flip.npy"] * len(TEXTS)


@pytest.mark.parametrize("flips", [False, True])
def test_switching_it_on_encodes_the_short_captions_alone_and_gives_the_bytes_of_a_run_from_nothing(
    folder, tmp_path, monkeypatch, flips
):
    from prep.passes import layers

    texts = []
    build = layers.build_encoder

    def building(*arguments):
        encoder = build(*arguments)
        encode = encoder.encode
        if arguments[1] == "t5":
            encoder.encode = lambda batch: texts.extend(batch) or encode(batch)
        return encoder

    monkeypatch.setattr(layers, "build_encoder", building)
    later = sidecars(folder, flips=flips).model_copy(update={"output": str(tmp_path / "later")})
    prepare(later.model_copy(update={"captions": CaptionConfig()}))
    assert set(texts) == {*TEXTS, *(filter(None, map(flip_caption, TEXTS)) if flips else ())}
    texts.clear()
    plan = prepare(later)
    assert {unit.layer: why for unit, why in plan.missing.items()} == {
        "text": "changed: short", "t5": "changed: short, text layer"
    }  # fmt: skip
    own = {short for text, short in SHORTS.items() if short != text}
    mirrored = {flip_caption(short) for short in own} - own - {None}
    assert set(texts) == (own | mirrored if flips else own)
    whole, ours = files_of(folder / ("flips" if flips else "out")), files_of(tmp_path / "later")
    assert ours == whole
    texts.clear()
    prepare(later.model_copy(update={"captions": CaptionConfig()}))  # and off again
    assert not texts
    assert ours != files_of(tmp_path / "later")


def test_a_mended_caption_gets_another_short_one(folder, tmp_path):
    write_source(tmp_path / "source")
    prepare(sidecars(tmp_path))
    (tmp_path / "source" / "image-000.txt").write_text("A house. A tree.")
    prepare(sidecars(tmp_path))
    row = next(row for row in Dataset(tmp_path / "out").rows() if row["source"] == "image-000.png")
    assert (row["caption"], row["caption_short"]) == ("A house. A tree.", "A house.")


def test_an_earlier_version_without_them_is_named(tmp_path):
    """As of a run that was trained before they were switched on: preparing them once more would not help it."""
    write_source(tmp_path / "source")
    prepare(sidecars(tmp_path, short=False))
    before = Dataset(tmp_path / "out").fingerprint
    prepare(sidecars(tmp_path))
    with pytest.raises(DataError, match=rf"version {before[:16]} of .* train on the version that it makes"):
        Dataset(tmp_path / "out", before).with_short_captions()


# --- written by a model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["ollama", "openai"])
def test_a_model_is_asked_for_it_in_the_same_conversation(tmp_path, server, backend):
    url = server.url + ("/v1" if backend == "openai" else "")
    settings = caption_config(tmp_path, [url], backend=backend, short=True)
    tasks = commit_crops(settings, shards=1, size=3)
    run_captions(settings, tasks)
    (part,) = text_parts(settings, tasks)
    rows = part.table.to_pylist()
    longs, shorts = ([entry for entry in server.captioned if bool(entry["before"]) is after] for after in (False, True))
    assert (len(rows), len(longs), len(shorts)) == (3, 3, 3)
    assert {entry["prompt"] for entry in longs} == {prompt_text(None)}
    assert {entry["prompt"] for entry in shorts} == {short_prompt_text(None)}
    assert {tuple(entry["before"]) for entry in shorts} == {(prompt_text(None), row["caption"]) for row in rows}
    assert sorted(entry["image"] for entry in longs) == sorted(entry["image"] for entry in shorts)
    assert all(5 <= len(row["caption_short"].split()) <= 30 < len(row["caption"].split()) for row in rows)
    assert not any(row["caption_short"] == first_sentence(row["caption"]) for row in rows)
    assert part.recipe["short_prompt"] == sha256_bytes(short_prompt_text(None).encode())
    made = unit_bytes(settings)
    again = settings.model_copy(update={"output": str(tmp_path / "again")})
    run_captions(again, commit_crops(again, shards=1, size=3))
    assert unit_bytes(again) == made


def test_switching_it_on_asks_for_the_short_captions_alone(tmp_path, server):
    settings = caption_config(tmp_path, [server.url])
    tasks = commit_crops(settings, shards=2, size=3)
    run_captions(settings, tasks)
    before = [part.table["caption"].to_pylist() for part in text_parts(settings, tasks)]
    server.log.clear()
    later = settings.model_copy(update={"captions": settings.captions.model_copy(update={"short": True})})
    run_captions(later, tasks)
    assert len(server.captioned) == 6
    assert all(entry["before"] for entry in server.captioned)
    assert [part.table["caption"].to_pylist() for part in text_parts(later, tasks)] == before
    server.log.clear()
    stricter = later.model_copy(update={"captions": later.captions.model_copy(update={"short_max_words": 29})})
    run_captions(stricter, tasks)
    assert not server.captioned  # what was answered is judged again


@pytest.mark.parametrize("fault", ["short", "empty", "refusal", "500"])
def test_an_answer_that_is_no_short_caption_leaves_the_first_sentence_and_is_counted(tmp_path, server, capsys, fault):
    server.short_fault = fault
    settings = caption_config(tmp_path, [server.url], short=True)
    tasks = commit_crops(settings, shards=1, size=2)
    run_captions(settings, tasks)
    (part,) = text_parts(settings, tasks)
    reason = {"short": "caption_too_short", "empty": "caption_empty", "refusal": "caption_refused"}
    reason = reason.get(fault, "caption_failed")
    assert not part.rejects
    for row in part.table.to_pylist():
        assert row["caption_short"] == first_sentence(row["caption"])
    assert "2 short captions are the first sentence of the long one" in (said := capsys.readouterr().out)
    assert f"2 {reason}" in said
    assert len([entry for entry in server.log if entry.get("before")]) >= 4  # asked twice


@pytest.mark.parametrize("quoted", ['"{}"', "“{}”"])
def test_quotation_marks_around_all_of_a_short_caption_are_no_part_of_it(quoted):
    text, rules = "A man in red stands near a wall.", CaptionRules(5, 30, {}, 0.5, short=True)
    assert next_step([Answer(quoted.format(text), "stop", {})], rules).text == text
    sign = 'A sign says "Stop" in red'
    assert next_step([Answer(sign, "stop", {})], rules).text == sign
    assert next_step([Answer(quoted.format(text), "stop", {})], replace(rules, short=False)).text == quoted.format(text)


def test_a_unit_that_is_made_again_keeps_its_first_sentences(tmp_path, server):
    """Its T5 features are not made again where its recipe stays; a changed recipe asks about them."""
    server.short_fault = "500"
    settings = caption_config(tmp_path, [server.url], short=True)
    tasks = commit_crops(settings, shards=1, size=2)
    run_captions(settings, tasks)
    made = unit_bytes(settings)
    server.short_fault = None
    again = [replace(task, again=("text",)) for task in with_recipes(settings, tasks)]
    assert list(captioning(settings, again))
    assert unit_bytes(settings) == made
    changed = settings.model_copy(update={"captions": settings.captions.model_copy(update={"short_max_words": 29})})
    run_captions(changed, tasks)
    assert all(row["caption_short"] not in row["caption"] for row in text_parts(changed, tasks)[0].table.to_pylist())


def test_a_bad_short_caption_is_asked_for_once_more(tmp_path, server):
    server.faults = {2: "preamble"}
    settings = caption_config(tmp_path, [server.url], short=True, slots=1)
    tasks = commit_crops(settings, shards=1, size=1)
    run_captions(settings, tasks)
    (row,) = text_parts(settings, tasks)[0].table.to_pylist()
    assert row["caption_short"] != first_sentence(row["caption"])
    assert [bool(entry["before"]) for entry in server.captioned] == [False, True, True]
    assert server.captioned[2]["options"]["temperature"] == settings.captions.reask_temperature


def test_a_short_caption_follows_the_caption_that_an_image_has_in_the_end(tmp_path, server):
    """Of two images with one caption the second is asked again; its short caption follows that other answer.

    Both answers are in the cache before short captions are switched on, and the first one comes first.
    """
    server.faults = {1: "same", 2: "same"}
    settings = caption_config(tmp_path, [server.url])
    tasks = commit_crops(settings, shards=1, size=2)
    run_captions(settings, tasks)
    assert len(server.captioned) == 3
    later = settings.model_copy(update={"captions": settings.captions.model_copy(update={"short": True})})
    run_captions(later, tasks)
    said = {(entry["before"][1], entry["answer"]) for entry in server.captioned if entry["before"]}
    rows = text_parts(later, tasks)[0].table.to_pylist()
    assert len({row["caption"] for row in rows}) == 2
    assert {(row["caption"], row["caption_short"]) for row in rows} < said
    assert len(server.captioned) == 3 + len(said) == 3 + 3  # one of them after the caption that is the other image's


def test_a_run_knows_short_captions_from_plan_to_report(tmp_path, server, monkeypatch, capsys):
    compute_here(monkeypatch)
    write_images(tmp_path / "source", 4)
    for path in sorted((tmp_path / "source").glob("*.txt"))[1:]:
        path.unlink()
    (tmp_path / "source" / "image-000.txt").write_text(LONG)
    captions = {"backend": "ollama", "hosts": [server.url], "short": True} | FAST
    settings = config(tmp_path, layers=["text"], captions=captions)
    run(settings)
    dataset = Dataset(settings.output)
    assert {row["source"]: row["caption_short"] for row in dataset.rows()}["image-000.png"] == first_sentence(LONG)
    assert len([entry for entry in server.captioned if entry["before"]]) == 3
    verify(settings.output)
    write_report(settings.output, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Short captions have a median of" in page
    assert all(row["caption_short"] in page for row in dataset.rows())
    capsys.readouterr()
    list_captions(settings.output)
    assert "(short: A man in red stands on the left.)" in capsys.readouterr().out
    export_flat(settings.output, tmp_path / "flat")
    assert "short captions and their features are left out" in capsys.readouterr().out
    assert not make_plan(settings).missing
    off = settings.model_copy(update={"captions": settings.captions.model_copy(update={"short": False})})
    assert set(make_plan(off).missing.values()) >= {"changed: short, text layer"}


def test_the_plan_foresees_what_they_take(tmp_path):
    write_source(tmp_path / "source")
    prepare(sidecars(tmp_path, short=False))
    settings = replace_encoders(sidecars(tmp_path))
    share = short_share(settings, "t5")
    assert 0.1 < share < 0.2
    assert short_share(sidecars(tmp_path, short=False), "t5") == short_share(settings, "dino") == 0
    more = sample_bytes(settings, "t5", "64x64") / sample_bytes(
        replace_encoders(sidecars(tmp_path, short=False)), "t5", "64x64"
    )
    assert 1.1 < more < 1.25
    texts = [
        sample_bytes(sidecars(tmp_path, short=on, flips=flips), "text", "64x64")
        for flips in (False, True)
        for on in (False, True)
    ]
    assert texts[0] == 512 * (1 + 3 + 1 + 1)
    assert [text - texts[0] for text in texts[1:]] == [1024, 2048, 4096]
    plan = make_plan(sidecars(tmp_path))
    laptop = Node("id", "127.0.0.1", "laptop", 2, driver=True, memory_gb=16)
    steps, _ = plan_passes(plan.config, [laptop], {unit.layer for unit in plan.missing})
    (ours,) = [line for line in estimate(plan, steps, tmp_path / "nothing") if line.layer == "t5"]
    whole = replace(plan, missing=dict.fromkeys(plan.missing, "not computed yet"))
    (all_of_it,) = [line for line in estimate(whole, steps, tmp_path / "nothing") if line.layer == "t5"]
    assert ours.seconds == pytest.approx(all_of_it.seconds * share / (1 + share))


def replace_encoders(settings: PrepConfig) -> PrepConfig:
    return settings.model_copy(update={"encoders": "production"})


# --- the gate and the prompt ------------------------------------------------------------------------------------------


def test_a_short_caption_is_one_sentence_of_a_few_words():
    rules = CaptionRules(5, 30, {}, 0.5, short_prompt_text(None), short=True)

    def flaw(text: str) -> tuple[str, str]:
        found = find_flaw(Answer(text, "stop", {}), rules)
        return (found.reason, found.detail) if found else ("", "")

    assert flaw("A woman in a red coat walks along a grey wall.")[0] == ""
    assert flaw("A woman in a red coat walks along a grey wall")[0] == ""  # as people write
    assert flaw("A woman in a red coat. She walks along a wall.")[0] == "caption_sentences"
    assert flaw("A woman.") == ("caption_too_short", "2 words, captions.short_min_words is 5")
    assert flaw("A woman " + "and a woman in red by a wall " * 2 + "and a " + "tall thin old grey " * 4)[0]
    many = (
        "A man, a dog, seven cats, one bird, three trees, a car, two houses, a lake, five boats, grass, hills and rain"
    )
    assert flaw(many)[0] == ""
    assert flaw(f"{many}, with so much more beside it that nobody has asked about")[1].endswith(
        "captions.short_max_words is 30"
    )
    assert flaw("Here is a short caption: a woman walks along a wall.")[0] == "caption_preamble"
    assert flaw("I'm sorry, but I can't help with describing this image.")[0] == "caption_refused"
    assert flaw("Name the main subject with what is most striking about it.")[0] == "caption_echo"


def test_its_prompt_is_the_shipped_one_or_a_file(tmp_path):
    assert "one short sentence" in short_prompt_text(None)
    (tmp_path / "mine.txt").write_text("In short?")
    assert short_prompt_text(str(tmp_path / "mine.txt")) == "In short?"
    with pytest.raises(ConfigError, match=r"captions\.short_prompt .*nowhere\.txt is no file"):
        short_prompt_text(str(tmp_path / "nowhere.txt"))
    (tmp_path / "mine.txt").write_text(" ")
    with pytest.raises(ConfigError, match=r"captions\.short_prompt .* is empty"):
        short_prompt_text(str(tmp_path / "mine.txt"))
    with pytest.raises(ValueError, match="short_min_words 9 is above short_max_words 8"):
        CaptionConfig(short_min_words=9, short_max_words=8)
