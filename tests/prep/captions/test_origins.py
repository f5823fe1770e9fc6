"""Captions that came with images: which files and descriptions they are read from, in which order."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from nanodit.errors import DataError
from nanodit.storage import open_storage
from prep.captions import tables
from prep.captions.config import CaptionConfig
from prep.captions.sidecar import ORIGINS, BadCaption, SidecarCaptions, kept_caption, look_all_captions
from prep.captions.tables import MAX_TEXT
from prep.config import PrepConfig
from prep.images.descriptions import MAX_BYTES, xmp_description
from prep.images.scan import describe_file, read_all, scan
from prep.images.scan_cache import ScanCache
from prep.images.sources import read_header
from prep.passes.layers import LayerWorker
from prep.passes.plan import make_plan, write_manifest
from tests.prep.passes.test_plan import config

XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/">
<dc:title><rdf:Alt><rdf:li xml:lang="x-default">A title</rdf:li></rdf:Alt></dc:title>
<dc:description><rdf:Alt>{}</rdf:Alt></dc:description>
</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>"""
DEFAULT = '<rdf:li xml:lang="x-default">{}</rdf:li>'


def xmp(text: str) -> bytes:
    return XMP.format(DEFAULT.format(text)).encode()


def iptc(text: str) -> bytes:
    """The APP13 segment of a JPEG with an IPTC caption."""
    data = text.encode()
    records = b"\x1c\x01\x5a\x00\x03\x1b%G" + b"\x1c\x02\x78" + struct.pack(">H", len(data)) + data
    body = (
        b"Photoshop 3.0\x008BIM\x04\x04\x00\x00"
        + struct.pack(">I", len(records))
        + records
        + b"\0" * (len(records) % 2)
    )
    return b"\xff\xed" + struct.pack(">H", len(body) + 2) + body


def write_image(path: Path, seed: int = 0, **inside: str) -> None:
    """A picture of noise, with descriptions inside it."""
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 80, 3), dtype=np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    options: dict = {}
    if "exif" in inside:
        exif = image.getexif()
        exif[270] = inside["exif"].encode() if not inside["exif"].isascii() else inside["exif"]
        options["exif"] = exif
    if "xmp" in inside:
        options["xmp"] = xmp(inside["xmp"])
        if path.suffix == ".png":
            info = PngImagePlugin.PngInfo()
            info.add_itxt("XML:com.adobe.xmp", xmp(inside["xmp"]).decode())
            options = {**options, "pnginfo": info}
            del options["xmp"]
    image.save(path, **options)
    if "iptc" in inside:
        data = path.read_bytes()
        path.write_bytes(data[:2] + iptc(inside["iptc"]) + data[2:])


def fill(folder: Path, *origins: str) -> None:
    """An image ``one/a.jpg`` that has a caption named after each of the origins, and another image without any."""
    inside = {kind: f"Written in {kind}." for kind in ("xmp", "iptc", "exif") if kind in origins}
    write_image(folder / "one" / "a.jpg", **inside)
    write_image(folder / "b.jpg", seed=1)
    if "txt" in origins:
        (folder / "one" / "a.txt").write_text("Written in txt.")
    if "caption" in origins:
        (folder / "one" / "a.caption").write_text("Written in caption.")
    if "metadata" in origins:
        row = {"file_name": "one/a.jpg", "text": "Written in metadata."}
        (folder / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    if "json" in origins:
        (folder / "one" / "a.json").write_text(json.dumps({"caption": "Written in json."}))


def found(folder: Path, origins: tuple[str, ...] = ORIGINS) -> dict[str, str]:
    """What is said of each image: by opening it, and by the plan, which must agree."""
    captions = SidecarCaptions(folder, origins)
    listed = scan(folder, 10**6)
    assert [reject.source for reject in listed.rejects] == []
    planned = look_all_captions(captions, listed.sources, read_all)
    answers = {}
    for source, plan in zip(listed.sources, planned):
        try:
            caption = captions.caption(source.name)
        except BadCaption as bad:
            answers[source.name], expected = bad.reason, str(bad)
        else:
            answers[source.name], expected = caption.text, caption.fingerprint
            assert kept_caption(caption.text, expected) == caption
        assert str(plan) == expected
    return answers


@pytest.mark.parametrize("origin", ORIGINS)
def test_a_caption_is_found_wherever_it_is(tmp_path, origin):
    fill(tmp_path, origin)
    assert found(tmp_path) == {"b.jpg": "caption_missing", "one/a.jpg": f"Written in {origin}."}
    others = tuple(other for other in ORIGINS if other != origin)
    assert found(tmp_path, others) == {"b.jpg": "caption_missing", "one/a.jpg": "caption_missing"}


def test_the_first_in_order_counts(tmp_path):
    fill(tmp_path, *ORIGINS)
    for start, origin in enumerate(ORIGINS):
        assert found(tmp_path, ORIGINS[start:])["one/a.jpg"] == f"Written in {origin}."
    chosen = CaptionConfig.model_validate({"from": ["exif", "json"]})
    assert chosen.origins == ("json", "exif")  # the order is always the same
    assert CaptionConfig().origins == ORIGINS


def test_a_bad_caption_is_not_passed_over(tmp_path):
    fill(tmp_path, *ORIGINS)
    (tmp_path / "one" / "a.txt").write_text("\u200b")
    assert found(tmp_path)["one/a.jpg"] == "caption_empty"


def test_a_reject_names_where_it_looked(tmp_path):
    fill(tmp_path)
    with pytest.raises(BadCaption) as bad:
        SidecarCaptions(tmp_path).caption("one/a.jpg")
    for words in ("one/a.txt", "one/a.caption", "metadata.jsonl", "metadata.csv", "one/a.json", "XMP/IPTC/EXIF"):
        assert words in bad.value.detail
    with pytest.raises(BadCaption) as bad:
        SidecarCaptions(tmp_path, ["txt"]).caption("one/a.jpg")
    assert bad.value.detail == "one/a.jpg has no caption (looked for one/a.txt)"


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("metadata.csv", 'file_name,text\none/a.jpg,"Two lines,\nquoted."\n', "Two lines, quoted."),
        ("one/metadata.csv", "\ufefffile_name,caption,size\n./a.jpg,In its folder.,3\n", "In its folder."),
        ("metadata.jsonl", '\n{"file_name": "one/a.jpg", "caption": "By caption."}\n', "By caption."),
        ("metadata.jsonl", '{"image_path": "one/a.jpg", "caption": "As sd-scripts."}', "As sd-scripts."),
        (
            "one/metadata.jsonl",
            '{"file_name": "a.jpg", "text": "First."}\n{"file_name": "a.jpg", "text": "Last."}',
            "Last.",
        ),
        ("metadata.jsonl", '{"file_name": "a.jpg", "text": "Of another folder."}', "caption_missing"),
        ("metadata.jsonl", '{"file_name": "one/a.jpg", "text": null}', "caption_missing"),
        ("metadata.jsonl", '{"file_name": "one/a.jpg", "text": "\u200b"}', "caption_empty"),
        ("metadata.jsonl", '{"file_name": "one/a.jpg"', "caption_damaged"),
        ("metadata.jsonl", "[]", "caption_damaged"),
        ("metadata.jsonl", " " * (MAX_TEXT + 1), "caption_damaged"),
        ("metadata.csv", "name,text\none/a.jpg,x\n", "caption_damaged"),
        ("metadata.csv", 'file_name,text\none/a.jpg,"' + "x" * (MAX_TEXT + 1), "caption_damaged"),
        ("one/a.json", '{"caption": "A hat.", "tags": "hat, red"}', "A hat., hat, red"),
        ("one/a.json", '{"tags": ["hat", "red"]}', "hat, red"),
        ("one/a.json", '{"url": "http://x"}', "caption_missing"),
        ("one/a.json", "[" * 100_000, "caption_damaged"),
        ("one/a.json", "{", "caption_damaged"),
        ("one/a.JSON", '{"text": "Capitals."}', "Capitals."),
        ("one/meta_cap.json", '{"a": {"caption": "By its stem."}}', "By its stem."),
        ("meta_lat.json", '{"one/a": {"tags": "below"}}', "below"),
        ("meta_lat.json", '{"a": {"tags": "of another folder"}}', "caption_missing"),
        ("one/metadata.json", '{"FOLDER/one/a.jpg": {"caption": "By its path."}}', "By its path."),
        ("one/metadata.json", '{"version": 1}', "caption_missing"),
    ],
)
def test_tables_and_json(tmp_path, name, content, text):
    fill(tmp_path)
    (tmp_path / name).write_text(content.replace("FOLDER", str(tmp_path)), encoding="utf-8")
    unreadable_for_all = text == "caption_damaged" and name.startswith("metadata")
    assert found(tmp_path) == {
        "b.jpg": "caption_damaged" if unreadable_for_all else "caption_missing", "one/a.jpg": text
    }  # fmt: skip


def test_the_nearest_table_counts(tmp_path):
    fill(tmp_path, "metadata")
    (tmp_path / "one" / "metadata.jsonl").write_text('{"file_name": "other.jpg", "text": "Of another image."}\n')
    assert found(tmp_path)["one/a.jpg"] == "Written in metadata."
    (tmp_path / "one" / "metadata.csv").write_text("file_name,text\na.jpg,Nearer.\n")
    assert found(tmp_path)["one/a.jpg"] == "Nearer."


def test_tables_that_lead_out_or_never_end_are_not_read(tmp_path):
    source = tmp_path / "source"
    fill(source)
    (tmp_path / "secret.jsonl").write_text('{"file_name": "one/a.jpg", "text": "Secret."}')
    (source / "metadata.jsonl").symlink_to(tmp_path / "secret.jsonl")
    assert found(source)["one/a.jpg"] == "caption_damaged"
    (source / "metadata.jsonl").unlink()
    os.mkfifo(source / "metadata.csv")
    assert found(source)["one/a.jpg"] == "caption_damaged"


def test_a_table_is_read_once_also_a_damaged_one(tmp_path, monkeypatch):
    reads: list[str] = []

    def counting(path, size, read=tables._read):
        reads.append(Path(path).parent.name)
        return read(path, size)

    monkeypatch.setattr(tables, "_read", counting)
    folders = [f"folder {number}" for number in range(6)]
    for number in range(24):
        write_image(tmp_path / "source" / folders[number % 6] / f"{number}.png", seed=number)
    lines = [f"{number}.png,Picture number {number}." for number in range(24)]
    for folder in folders:
        (tmp_path / "source" / folder / "metadata.csv").write_text("\n".join(["file_name,text", *lines]))
    damaged = tmp_path / "source" / folders[5] / "metadata.csv"
    damaged.write_bytes(damaged.read_bytes() + b"\n24.png,K\xfcste")  # as Excel writes it
    settings = config(tmp_path, captions={"on_missing": "reject"}, shard_size=24)
    plan = make_plan(settings)
    assert sum(reject.reason == "caption_damaged" for reject in plan.expected) == 4
    assert sorted(reads) == folders
    write_manifest(plan)
    reads.clear()
    tables._rows_or_problem.cache_clear()
    for task in plan.tasks(("px", "text")):
        LayerWorker(settings).run(task)
    assert sorted(reads) == folders


@pytest.mark.parametrize(
    ("suffix", "inside", "text"),
    [
        (".jpg", {"exif": "Grüne Wiese, Zürich."}, "Grüne Wiese, Zürich."),
        (".png", {"exif": "In a PNG."}, "In a PNG."),
        (".png", {"xmp": "In a PNG."}, "In a PNG."),
        (".webp", {"xmp": "In a &lt;WebP&gt;."}, "In a <WebP>."),
        (".tif", {"exif": "In a TIFF."}, "In a TIFF."),
        (".jpg", {"iptc": "Im Garten: Äpfel"}, "Im Garten: Äpfel"),
        (".jpg", {"exif": "OLYMPUS DIGITAL CAMERA         "}, "caption_missing"),
        (".jpg", {"exif": "SONY DSC"}, "caption_missing"),
        (".jpg", {"exif": "DCIM\\100MEDIA\\DJI_0123.JPG"}, "caption_missing"),
        (".jpg", {"exif": "IMG_0042.JPG"}, "caption_missing"),
        (".tif", {"exif": '{"shape": [64, 80, 3]}'}, "caption_missing"),
        (".tif", {"exif": "ImageJ=1.53t\nimages=1"}, "caption_missing"),
        (".jpg", {"exif": "   "}, "caption_missing"),
        (".jpg", {"xmp": "", "exif": "The next one."}, "The next one."),
        (".jpg", {"exif": "Camera day in Casio street"}, "Camera day in Casio street"),
    ],
)  # fmt: skip
def test_what_an_image_says_of_itself(tmp_path, suffix, inside, text):
    write_image(tmp_path / f"a{suffix}", **inside)
    assert found(tmp_path) == {f"a{suffix}": text}


@pytest.mark.parametrize(
    ("packet", "text"),
    [
        (XMP.format('<rdf:li xml:lang="de">Rot.</rdf:li>' + DEFAULT.format("Red.")), "Red."),
        (XMP.format('<rdf:li xml:lang="de">Rot.</rdf:li><rdf:li xml:lang="fr">Rouge.</rdf:li>'), "Rot."),
        (XMP.format(""), ""),
        ('<a xmlns:dc="http://purl.org/dc/elements/1.1/" dc:description="Short."/>', "Short."),
        ('<a xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:description>Plain.</dc:description></a>', "Plain."),
        ("<a>" * 100_000 + "</a>" * 100_000, ""),
    ],
)
def test_descriptions_in_xmp(packet, text):
    assert xmp_description(packet.encode()).strip() == text


LAUGHS = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))


@pytest.mark.parametrize(
    "packet",
    [
        f'<!DOCTYPE x [<!ENTITY l0 "ha">{LAUGHS}]>' + XMP.format(DEFAULT.format("&l2;")).partition("?>")[2],
        f'<!DOCTYPE x [<!ENTITY l0 "ha">{LAUGHS}]>' + XMP.format(DEFAULT.format("&l9;")).partition("?>")[2],
        "<a", "\0\1", XMP.format(DEFAULT.format("x" * MAX_BYTES)),
    ],
)  # fmt: skip
def test_packets_that_unfold_or_are_damaged_cost_the_description_only(tmp_path, packet):
    image = Image.fromarray(np.zeros((64, 80, 3), np.uint8))
    image.save(tmp_path / "a.webp", xmp=packet.encode())
    assert found(tmp_path) == {"a.webp": "caption_missing"}
    write_image(tmp_path / "b.webp")
    assert len(scan(tmp_path, 10**6).sources) == 2


def test_a_source_is_opened_once(tmp_path, monkeypatch):
    """What is inside an image comes from the hashing pass, and on the next scan from memory."""
    fill(tmp_path / "source", "exif")
    for path in (tmp_path / "source").rglob("*.jpg"):
        os.utime(path, (1, 1))
    (tmp_path / "out" / "runs").mkdir(parents=True)
    (tmp_path / "out" / "manifest.parquet").write_text("")
    opened: list[str] = []
    monkeypatch.setattr(
        "prep.images.scan.read_header", lambda folder, name, cap: opened.append(name) or read_header(folder, name, cap)
    )
    monkeypatch.setattr("prep.captions.sidecar.read_descriptions", lambda *_: pytest.fail("opened again"))
    for _ in range(2):
        with ScanCache(open_storage(tmp_path / "out"), tmp_path / "source", {}) as cache:
            cache._start += 10**10  # the files are older than ten seconds
            listed = scan(tmp_path / "source", 10**6, cache.look_all)
            planned = look_all_captions(SidecarCaptions(tmp_path / "source"), listed.sources, cache.look_all)
        assert [isinstance(caption, str) and caption.startswith("exif:") for caption in planned] == [False, True]
    assert opened == ["b.jpg", "one/a.jpg"]
    assert "described" not in describe_file(tmp_path / "source", "b.jpg", 10**6)


def plan_of(tmp_path: Path, **captions):
    fields = {"base": 64, "encoders": "demo", "layers": ["text"], "captions": {"on_missing": "reject"} | captions}
    return make_plan(PrepConfig(source=str(tmp_path / "source"), output=str(tmp_path / "out"), **fields))


def test_recipes_of_txt_files_are_as_they_always_were_and_others_name_their_origin(tmp_path):
    fill(tmp_path / "source", "txt", "exif")

    def captions(plan) -> set[str]:
        return {value for recipe in plan.recipes.values() for value in recipe.get("captions", {}).values()}

    assert captions(plan_of(tmp_path)) == {hashlib.sha256(b"Written in txt.").hexdigest(), "caption_missing"}
    inside = captions(plan_of(tmp_path, **{"from": ["exif"]}))
    assert inside == {"exif:" + hashlib.sha256(b"Written in exif.").hexdigest(), "caption_missing"}
    with pytest.raises(DataError, match=r"b.jpg has no caption .*captions.backend=ollama or openai"):
        plan_of(tmp_path, on_missing="error")
