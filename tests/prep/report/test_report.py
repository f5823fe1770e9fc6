"""The dataset report says what the files say, trusts no string, loads nothing and fits a phone."""

import io
import json
import re
import shutil
import tarfile
from collections import Counter, defaultdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from nanodit.config import dump_config
from nanodit.errors import DataError
from nanodit.files import canonical_json, sha256_bytes, write_atomic
from nanodit.storage import open_storage
from prep.__main__ import main
from prep.config import PrepConfig
from prep.dataset.buckets import choose_bucket
from prep.dataset.layers import LAYERS
from prep.dataset.layout import parquet_bytes
from prep.dataset.reader import Dataset
from prep.passes.layers import LayerWorker
from prep.passes.plan import make_plan, write_manifest
from prep.passes.publish import REJECT_SCHEMA, publish
from prep.report import pictures as report_pictures
from prep.report.facts import read_runs
from prep.report.pictures import RejectThumbnails
from prep.report.report import moment, percent, render, size, write_report
from prep.run import current_parts
from tests.browser import chromium, look

HOSTILE = '<script>document.title="owned"</script><img src="https://example.org/x.png" onerror="alert(1)">'
RTL = "امرأة ترتدي قميصا أحمر 👩🏽‍🦰 \u202e reversed"
HOSTILE_NAME = "<img src=x onerror=alert(1)> & so on.jpg"


def write_source(folder: Path, figures: Path) -> None:
    """Figures and everything that can be wrong with them."""
    folder.mkdir(parents=True)
    names = sorted(path.name for path in figures.glob("*.png"))[:40]
    for name in names:
        shutil.copy(figures / name, folder)
        shutil.copy((figures / name).with_suffix(".txt"), folder)
    captions = [folder / name.replace(".png", ".txt") for name in names]
    for caption, text in zip(captions, (HOSTILE, RTL, "long " * 10_000, "x" * 5000)):
        caption.write_text(text)
    for caption in captions[5:9]:
        caption.write_text("A person before a wall, the same words four times.")
    captions[9].unlink()
    captions[10].write_text("   ")
    for number, name in enumerate(names[20:22]):
        with Image.open(folder / name) as image:
            image.convert("RGB").save(folder / f"near-{number}.jpg", quality=85)
        shutil.copy(folder / name.replace(".png", ".txt"), folder / f"near-{number}.txt")
    shutil.copy(folder / names[30], folder / "zz exact copy.png")
    Image.new("RGB", (40, 40), "red").save(folder / HOSTILE_NAME)
    (folder / "notes.jpg").write_bytes(b"%PDF-1.4")
    (folder / "cut.png").write_bytes((folder / names[12]).read_bytes()[:2000])
    (folder / "cut.txt").write_text("cut")
    sea = np.stack([np.full((80, 80), 40), np.full((80, 80), 90), np.arange(80)[None] + np.zeros((80, 1))], axis=-1)
    Image.fromarray(sea.astype(np.uint8)).save(folder / "sea.png")
    (folder / "sea.txt").write_text("The sea without anybody.")


def prepare(source: Path, output: Path, **changes) -> Path:
    """A dataset without Ray, with the log of a run."""
    fields = {"base": 64, "encoders": "demo", "shard_size": 8, "captions": {"on_missing": "reject"}} | changes
    config = PrepConfig(source=str(source), output=str(output), **fields)
    plan = make_plan(config)
    write_manifest(plan)
    worker, log = LayerWorker(config), [{"time": 1e9, "event": "start", "host": "secret-host", "pid": 1}]
    for task in plan.tasks(config.active_layers):
        log.append({"time": 1e9 + 60, "event": "shard", "units": worker.run(task)})
    publish(plan, current_parts(plan), "rejects")
    log.append({"time": 1e9 + 125, "event": "done"})
    write_atomic(output / "runs" / "0001" / "config.yaml", dump_config(config))
    write_atomic(output / "runs" / "0001" / "log.jsonl", "".join(json.dumps(event) + "\n" for event in log))
    return output


@pytest.fixture(scope="module")
def source(figures_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "source"
    write_source(folder, figures_folder)
    return folder


@pytest.fixture(scope="module")
def dataset(source) -> Path:
    return prepare(source, source.parent / "dataset")


@pytest.fixture(scope="module")
def html(dataset, source) -> str:
    return render(open_storage(dataset), source)


@pytest.fixture
def copy(dataset, tmp_path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "elsewhere" / "deeper"))


class Page(HTMLParser):
    """The words of a page, and everything in it that could make a browser fetch or run something."""

    def __init__(self, html: str):
        super().__init__()
        self.references, self.tags, self.words, self._hidden = [], Counter(), [], False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self._hidden = tag == "style"
        for name, value in attributes:
            if name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href") or name.startswith("on"):
                self.references.append((tag, name, value))

    def handle_endtag(self, tag):
        self._hidden = False

    def handle_data(self, data):
        if not self._hidden:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def republish(root: Path, **columns) -> None:
    """Replace columns of the index and make dataset.json agree."""
    table = pq.read_table(root / "index.parquet")
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values, table[name].type))
    data = parquet_bytes(table)
    (root / "index.parquet").write_bytes(data)
    info = json.loads((root / "dataset.json").read_text())
    info["hashes"]["index.parquet"] = sha256_bytes(data)
    (root / "dataset.json").write_text(canonical_json(info))


# --- what it says -----------------------------------------------------------------------------------------------------


def share(value: float) -> str:
    return percent(value).replace("\u00a0", " ")


def bytes_of(value: float) -> str:
    return size(value).replace("\u00a0", " ")


def test_counts_are_those_of_the_tars_and_the_sidecars(dataset, source, html):
    """Everything here is counted without the index: from tars, sidecars and pictures."""
    members, keys = defaultdict(dict), {}
    for path in dataset.glob("bucket_*/*.tar"):
        with tarfile.open(path) as tar:
            for info in tar:
                key, _, member = info.name.partition(".")
                members[path.name.split(".")[1]][key, member] = (info.size, tar.extractfile(info).read())
    for layer, found in members.items():
        keys[layer] = {key for key, _ in found}
    complete = set.intersection(*keys.values())
    text, names = Page(html).text, {sha256_bytes(path.read_bytes())[:32]: path for path in source.iterdir()}
    assert f"{len(complete)} samples in" in text

    sizes = Counter()
    losses, buckets = [], Counter()
    for key in complete:
        with Image.open(names[key]) as image:
            width, height = image.size
        bucket = choose_bucket(width, height, 64)
        buckets[str(bucket)] += 1
        ratio = (width / height) / (bucket.width / bucket.height)
        losses.append(1 - min(ratio, 1 / ratio))
    for name, count in buckets.items():
        assert re.search(rf"{name} {count} {share(count / len(complete))} ", text), name
        assert f"{name} {min(count, 24)} of {count}" in text
    assert f"median {100 * np.median(losses):.1f} %" in text
    assert f"the worst {share(max(losses))}" in text

    for layer in LAYERS:
        of = [length for (key, _), (length, _) in members[layer].items() if key in complete]
        sizes[layer] = sum(of)
        sizes["framing"] += sum(512 + -length % 512 for length in of)
    total = sum(sizes.values())
    for layer in LAYERS:
        words = f"{layer} {bytes_of(sizes[layer] / len(complete))} per sample, {bytes_of(sizes[layer])}, "
        assert words + share(sizes[layer] / total) in text
    assert f"{bytes_of(total / len(complete))} per sample. Shares are of {bytes_of(total)}" in text

    captions = [" ".join(names[key].with_suffix(".txt").read_text().split()) for key in complete]
    words = [len(caption.split()) for caption in captions]
    assert f"{min(words)} to {max(words):,} words (separated by spaces), median {np.median(words):.0f}." in text
    assert f"{len(set(captions))} different texts for {len(complete)} images" in text
    repeated = {caption: count for caption, count in Counter(captions).items() if count > 1}
    assert f"{len(repeated)} texts shared by {sum(repeated.values())} images" in text
    lengths = [len(np.load(io.BytesIO(members["t5"][key, "t5.npy"][1]))) for key in complete]
    assert f"a median of {np.median(lengths):.0f} tokens and at most 512" in text
    assert f"{lengths.count(512)} captions were cut ({share(lengths.count(512) / len(complete))})" in text

    people = Counter(min(2, json.loads(members["pose"][key, "json"][1])["persons"]) for key in complete)
    for name, count in zip(("no people", "one person", "several people"), (people[0], people[1], people[2])):
        assert f"{name} {count} {share(count / len(complete))}" in text
    joints = np.array([np.load(io.BytesIO(members["pose"][key, "pose.npy"][1])) for key in complete])
    joints = joints[(joints[..., 2] > 0).any(axis=1)]
    assert f"nose {share((joints[:, 0, 2] >= 0.3).mean())} median {np.median(joints[:, 0, 2]):.2f}" in text
    assert f"over {len(joints)} of {len(joints)} images with people" in text


def test_refused_sources_are_listed_by_reason_with_pictures(dataset, html):
    text, rejects = Page(html).text, pq.read_table(dataset / "rejects.parquet").to_pylist()
    for (stage, reason), count in Counter((row["stage"], row["reason"]) for row in rejects).items():
        assert f"{count} × {reason} {stage}" in text
    assert {row["reason"] for row in rejects} >= {
        "duplicate",
        "too_small",
        "not_an_image",
        "truncated",
        "caption_empty",
    }
    refused = html[html.index("<h2>Refused sources") :]
    shown = dict(re.findall(r'<img src="(data:[^"]+)" alt="([^"]*)"', refused))
    assert set(shown.values()) == {"&lt;img src=x onerror=alert(1)&gt; &amp; so on.jpg"} | {
        row["source"] for row in rejects if row["stage"] == "text"
    }


def test_duplicates_stand_side_by_side(html):
    part = html[html.index("<h2>Duplicates") : html.index("<h2>Refused")]
    text = Page(part).text
    assert "4 samples fall into 2 groups of near duplicates" in text
    assert "(checked here)" in text
    assert text.count("2 images") == 2
    assert {"near-0.jpg", "near-1.jpg", "zz exact copy.png"} <= set(re.findall(r'alt="([^"]*)"', part))
    assert "same bytes as" in text


def test_the_warning_of_near_duplicates_leads_to_their_section(html):
    warning = re.search(r"<li>(\d+) of \d+ samples are near duplicates[^<]*\(group (\w+),[^<]*<a href=\"#(\w+)\"", html)
    size, name, anchor = warning.groups()
    section = html[html.index(f'<section id="{anchor}">') : html.index("<h2>Refused")]
    assert f"{size} images" in Page(section).text
    assert f"group {name}" in Page(section).text


def test_both_parts_of_the_holdout_are_counted(dataset, html):
    parts = pq.read_table(dataset / "index.parquet", columns=["holdout_part"])["holdout_part"].to_pylist()
    assert parts.count("dev") > 0
    said = f"Of the holdout, {parts.count('dev')} are dev, by which you choose, and {parts.count('test')} are test"
    assert said in Page(html).text


def test_a_group_on_both_sides_is_an_alarm(copy, html):
    assert "The holdout leaks" not in html
    table = pq.read_table(copy / "index.parquet")
    groups, sides = (table[name].to_pylist() for name in ("duplicate_group", "split"))
    place = groups.index(next(name for name, count in Counter(groups).items() if count > 1))
    sides[place] = "holdout" if sides[place] == "train" else "train"
    republish(copy, split=sides, holdout_part=["test" if side == "holdout" else None for side in sides])
    page = render(open_storage(copy))
    assert "The holdout leaks" in page
    assert "(checked here)" not in page


def test_the_least_sharp_pictures_are_shown(dataset, html):
    table = pq.read_table(dataset / "index.parquet", columns=["source", "sharpness"]).to_pylist()
    least = sorted(table, key=lambda row: row["sharpness"])[:6]
    part = html[html.index("<h2>Sharpness") : html.index("<h2>Captions</h2>")]
    assert re.findall(r'alt="([^"]*)"', part) == [row["source"] for row in least]
    assert least[0]["source"] == "sea.png"


def test_demo_encoders_and_warnings_have_a_banner(copy, html):
    assert "Demo encoders" in html
    assert "captions were longer than t5.max_tokens and were cut" in Page(html).text
    info = json.loads((copy / "dataset.json").read_text()) | {"encoders": "production"}
    (copy / "dataset.json").write_text(canonical_json(info))
    assert "Demo encoders" not in render(open_storage(copy))


def test_models_and_fingerprints_are_named(dataset, html):
    info = json.loads((dataset / "dataset.json").read_text())
    for layer in info["layers"].values():
        assert layer["fingerprint"] in html
    assert info["fingerprint"] in html
    assert info["layers"]["pose"]["encoder"]["detector"] in html


@pytest.mark.parametrize("missing", [("text", "t5", "pose"), ("dino", "pose"), ("text", "t5", "dino")])
def test_missing_layers_leave_a_line_instead_of_a_section(source, tmp_path, missing):
    layers = [layer for layer in ("text", "dino", "pose") if layer not in missing]
    page = Page(render(open_storage(prepare(source, tmp_path / "out", layers=layers)))).text
    assert f"This dataset has no {', no '.join(missing)}:" in page
    for layer, section in (("text", "Captions"), ("pose", "Poses")):
        assert (f"{section} This dataset has no {layer} layer." in page) == (layer in missing)
    assert ("Skeletons" in page) == ("pose" not in missing)
    assert ("T5 tokens" in page) == ("text" not in missing)


# --- times ------------------------------------------------------------------------------------------------------------


def test_pictures_without_anybody_have_a_page(source, tmp_path):
    sea, folder = source / "sea.png", tmp_path / "source"
    folder.mkdir()
    for suffix in (".png", ".txt"):
        shutil.copy(sea.with_suffix(suffix), folder)
    text = Page(render(open_storage(prepare(folder, tmp_path / "dataset")))).text
    assert "no people 1 100 %" in text.replace("\u00a0", " ")
    assert "mirrored" not in text  # which this dataset has not


def test_times_come_from_the_logs_alone(copy, source, html):
    assert "0001 2001-09-09 01:46 UTC 2m 05s done px" in Page(html).text
    assert "secret-host" not in html
    (copy / "runs" / "0002").mkdir()
    lines = [
        '{"time": 1000000000, "event": "start"}',
        "[]",
        '{"event": "shard"}',
        "{",
        '{"time": NaN, "event": "done"}',
    ]
    lines += ['{"time": 1e999, "event": "done"}', '{"time": 1000000030, "event": "shard", "units": [{"layer": "px"}]}']
    lines += [
        '{"time": 1000000040, "event": "shard", "units": [{"layer": "new", "samples": 3, "seconds": 1.5}]}',
        '{"ti',
    ]
    (copy / "runs" / "0002" / "log.jsonl").write_bytes("\n".join(lines).encode() + b"\xff")
    page = render(open_storage(copy), source)
    assert "0002 2001-09-09 01:46 UTC 40s killed new 3" in Page(page).text
    assert page[: page.index("<h2>What it took")] == html[: html.index("<h2>What it took")]
    shutil.rmtree(copy / "runs")
    assert read_runs(open_storage(copy)) == []
    assert "No logs of runs here" in render(open_storage(copy))


def test_equal_datasets_give_equal_bytes(dataset, source, html, copy, tmp_path):
    assert write_report(copy, source=source) == copy / "report.html"
    assert (copy / "report.html").read_text() == html  # neither the place nor the time is in it
    assert write_report(copy, tmp_path / "out.html", source).read_text() == html  # nor the old report
    assert main(
        ["report", "--dataset", str(copy), "--output", str(tmp_path / "again.html"), "--source", str(source)]
    ) in (None, 0)
    assert (tmp_path / "again.html").read_text() == html


def test_an_object_store_gives_the_same_page(dataset, source, html):
    place = open_storage("memory://report/dataset")
    for path in dataset.rglob("*"):
        if path.is_file():
            place.write(path.relative_to(dataset).as_posix(), path.read_bytes())
    assert write_report("memory://report/dataset", source=source) == "memory://report/dataset/report.html"
    assert place.read("report.html").decode() == html


# --- what data may not do ---------------------------------------------------------------------------------------------


def test_every_string_is_escaped_and_nothing_is_loaded(html):  # fault E07
    page = Page(html)
    assert "script" not in page.tags
    assert all(value.startswith(("data:", "#")) for _, _, value in page.references)  # "#": a place in the page itself
    assert not any(name.startswith("on") for _, name, _ in page.references)
    assert "&lt;script&gt;document.title" in html
    assert "&lt;img src=x onerror=alert(1)&gt;" in html
    assert "default-src &#39;none&#39;" in html or "default-src 'none'" in html
    assert not re.search(r"@import|url\(", html)


def test_long_and_foreign_captions_do_no_harm(html):  # fault E07
    assert len(html) < 2_000_000
    assert "… (49,7" in html  # of 50,000 characters
    assert "امرأة ترتدي قميصا أحمر 👩🏽‍🦰" in html
    assert html.count("<blockquote") == html.count('<blockquote dir="auto">') > 10


@pytest.mark.parametrize("reason", ["crashes_worker", "hangs_worker", "out_of_memory"])
def test_what_killed_a_worker_is_never_decoded_again(copy, source, monkeypatch, reason):
    decoded, decode = [], report_pictures.decode
    monkeypatch.setattr(report_pictures, "decode", lambda data, limit: decoded.append(data) or decode(data, limit))
    rows = [{"source": "sea.png", "stage": stage, "reason": reason, "detail": ""} for stage in ("source", "px", "dino")]
    rows.append({"source": HOSTILE_NAME, "stage": "source", "reason": "too_small", "detail": ""})
    (copy / "rejects.parquet").write_bytes(parquet_bytes(pa.Table.from_pylist(rows, REJECT_SCHEMA)))
    page = render(open_storage(copy), source)
    assert decoded == [(source / HOSTILE_NAME).read_bytes()]
    # our own crop of it is safe to show
    assert page[page.index("<h2>Refused") :].count('alt="sea.png"') == 1


def test_pictures_come_from_the_source_folder_alone(copy, source, tmp_path):
    Image.new("RGB", (30, 30), "blue").save(source.parent / "private.png")
    (source / "link.png").symlink_to(source.parent / "private.png")
    names = ["../private.png", str(source.parent / "private.png"), "link.png", "gone.png", "", "a\0b.png", "sea.png"]
    rows = [{"source": name, "stage": "source", "reason": "too_small", "detail": ""} for name in names]
    (copy / "rejects.parquet").write_bytes(parquet_bytes(pa.Table.from_pylist(rows, REJECT_SCHEMA)))
    try:
        pictures = RejectThumbnails(Dataset(copy), source).make(rows)
        assert [bool(data) for data in pictures] == [False] * 6 + [True]
    finally:
        (source / "link.png").unlink()


def test_no_folder_that_a_dataset_names_is_looked_into(copy, source, html):
    """That of a stranger could name the pictures of whoever opens it."""
    page = render(open_storage(copy))
    refused, theirs = (text[text.index("<h2>Refused sources") :] for text in (page, html))
    assert "data:image" in theirs
    assert refused.count("data:image") < theirs.count("data:image")
    assert "--source FOLDER" in refused


def test_what_is_missing_or_damaged_is_named(copy, tmp_path):
    (copy / "manifest.parquet").unlink()
    (copy / "runs" / "0001" / "config.yaml").write_text("- not\n- a config")
    render(open_storage(copy))
    (copy / "rejects.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match=r"rejects\.parquet is damaged"):
        write_report(copy)
    (copy / "rejects.parquet").unlink()
    assert "has no rejects.parquet" in render(open_storage(copy))
    with pytest.raises(DataError, match="not a finished dataset"):
        write_report(tmp_path / "nothing")
    tar = next(copy.glob("bucket_*/*.px.tar"))
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 3])
    with pytest.raises(DataError, match=re.escape(tar.name)):
        write_report(copy)


def test_numbers_read_well():
    assert [bytes_of(value) for value in (0, 999, 1000, 999_700, 1_034_000, 2.5e12, 4e15)] == [
        "0 bytes", "999 bytes", "1.00 kB", "1.00 MB", "1.03 MB", "2.50 TB", "4000 TB",
    ]  # fmt: skip
    assert [share(value) for value in (0, 1e-5, 0.042, 0.42, 0.995, 0.99999, 1)] == [
        "0 %", "< 0.1 %", "4.2 %", "42 %", "99.5 %", "> 99.9 %", "100 %",
    ]  # fmt: skip
    assert moment(None) == "unknown"


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_browser_opens_it_from_disk_and_on_a_phone(html, tmp_path):
    """Chromium renders every picture without another request, in light and dark, and nothing is wider than a phone."""
    page = tmp_path / "report.html"
    page.write_text(html)
    papers = set()
    with chromium(tmp_path / "profile") as port:
        for width, scheme in ((1280, "light"), (390, "light"), (390, "dark")):
            seen = look(port, page, width, scheme)
            assert re.fullmatch(r"\d+ samples · [0-9a-f]{12} · nanodit dataset", seen["title"])  # no script ran
            assert seen["pictures"] > 60
            assert seen["broken"] == 0
            assert seen["inner"] == width
            assert seen["scroll"] <= width, seen["wide"]
            assert not seen["wide"]
            assert {url.partition(":")[0] for url in seen["requested"]} <= {"file", "data"}
            assert [url for url in seen["requested"] if url.startswith("file:")] == [page.as_uri()]
            papers.add(seen["paper"])
    assert len(papers) == 2
