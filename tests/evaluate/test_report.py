"""The page is a pure function of the files, says nothing that they do not, and trusts no string."""

import csv
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from evaluate import report, run
from evaluate.__main__ import main
from evaluate.config import EvaluateConfig
from evaluate.report import Files, find_output, number, write_report
from evaluate.subject import Subject
from prep.errors import ConfigError, DataError
from train.conditioning import ConditioningConfig
from train.flow import FlowConfig

HOSTILE = '<script>document.title="owned"</script><img src="https://example.org/x.png" onerror="alert(1)">'
RTL = "امرأة ترتدي قميصا أحمر 👩🏽‍🦰 \u202e reversed"


def provenance(config):
    return {
        "checkpoint": "step-000123",
        "step": 123,
        "weights": "ema",
        "weights_sha256": "ab" * 32,
        "parameters": 3_500_000,
        "dataset": {
            "fingerprint": "cd" * 32,
            "encoders": "demo",
            "base": 64,
            "counts": {"samples": 64, "train": 40, "holdout": 24, "rejects": 0},
        },
        "training": {"output": "runs/<b>bold</b>", "seed": 0},
        "evaluation": config.model_dump(mode="json"),
        "git": {"commit": "unknown", "dirty": "unknown"},
        "packages": {"torch": "2.15.0"},
        "python": "3.11",
        "machine": "Linux x86_64, cpu",
    }


@pytest.fixture(scope="module")
def folder(models, figures, tmp_path_factory) -> Path:
    """An evaluation of a model that draws other people, with hostile captions and curves."""
    config = EvaluateConfig.model_validate(
        {
            "tests": ["heldout_loss", "reconstruction", "attributes", "pose"],
            "conditions": {"all": 1.0, "text+pose": 2.0, "text": 2.0},
            "reconstruction": {"conditions": ["all"]},
            "sampler": {"method": "euler", "steps": 2},
            "grid_images": 3,
            "needed": {"attribute_accuracy/text": 0.5, "heldout_ratio/all": 0.5, "pose_pck/text": 0.5},
        }
    )
    rows = [dict(row) for row in figures.rows("holdout")]
    rows[0]["caption"], rows[1]["caption"], rows[2]["caption"] = HOSTILE, RTL, "long " * 200_000
    table = ConditioningConfig(preset="quickstart").resolve()
    subject = Subject(models["shuffled"], FlowConfig(), table, figures, tuple(rows))
    output = tmp_path_factory.mktemp("run") / "validation_outputs" / "step-000123"
    evidence = run.evaluate(subject, config, output)
    curves = [
        {"step": step, "train/loss": 1 / step, "train/grad_norm": 0.5, "train/learning_rate": 1e-3, "sys/time": 7.0}
        for step in range(1, 124)
    ]
    run.write(output, config, evidence, provenance(config), curves)
    return output


class References(HTMLParser):
    """Everything in a page that could make a browser fetch or run something."""

    def __init__(self, html: str):
        super().__init__()
        self.found, self.tags = [], set()
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        for name, value in attributes:
            if name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href") or name.startswith("on"):
                self.found.append((tag, name, value))


@pytest.fixture(scope="module")
def html(folder) -> str:
    return report.render(Files.read(folder))


def test_the_same_files_give_the_same_bytes(folder, html, tmp_path):
    assert report.render(Files.read(folder)) == html
    copy = tmp_path / "elsewhere" / "deeper"
    shutil.copytree(folder, copy)
    page, table = write_report(copy, tmp_path / "out.html")
    assert page.read_text() == html  # neither the place nor the time is in it
    assert table == tmp_path / "out.csv"


def test_every_string_is_escaped_and_nothing_is_loaded(html):  # fault E07
    references = References(html)
    assert "script" not in references.tags
    assert all(value.startswith("data:") for _, _, value in references.found)
    assert not any(name.startswith("on") for _, name, _ in references.found)
    assert "&lt;script&gt;document.title" in html
    assert "runs/&lt;b&gt;bold&lt;/b&gt;" in html
    assert "default-src &#39;none&#39;" in html or "default-src 'none'" in html
    assert not re.search(r"@import|url\(", html)


def test_long_and_foreign_captions_do_no_harm(html):  # fault E07
    assert len(html) < 2_000_000
    assert "long long …" in html
    assert "امرأة ترتدي قميصا أحمر 👩🏽‍🦰" in html
    assert html.count('dir="auto"') == 3


def test_what_was_measured_is_on_the_page(html):
    for words in ("Attribute accuracy", "inconclusive", "JPEG round trip", "judge on real", "chance", "PCK at 0.1"):
        assert words in html
    assert "small demo encoders" in html  # a dataset made with them says so
    assert "unknown" in html  # trap 32: what git could not say is not called clean
    assert "pose_pck/text" in html  # a bar without a metric
    assert html.count("<figure>") == 3 * (1 + 3 + 1)


def test_a_null_metric_is_shown_with_its_reason(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    content = json.loads((copy / "report.json").read_text())
    for metric in content["metrics"]:
        if metric["name"] == "attribute_accuracy/text":
            metric |= {
                "value": None,
                "low": None,
                "high": None,
                "reason": "degenerate: 3 of 24",
                "verdict": "inconclusive",
            }
    (copy / "report.json").write_text(json.dumps(content))
    page = report.render(Files.read(copy))
    assert "degenerate: 3 of 24" in page
    assert "no interval" in page


def test_the_csv_holds_every_metric(folder, tmp_path):
    _, table = write_report(folder, tmp_path / "report.html")
    rows = list(csv.DictReader(table.open(newline="")))
    metrics = Files.read(folder).report["metrics"]
    assert [row["name"] for row in rows] == [metric["name"] for metric in metrics]
    assert [float(row["value"]) for row in rows] == [metric["value"] for metric in metrics]


def test_a_run_folder_means_its_newest_evaluation(folder, tmp_path):
    root = folder.parent.parent
    assert find_output(root) == folder
    older = folder.parent / "step-000099"
    older.mkdir()
    (older / "report.json").write_text("{}")
    assert find_output(root) == folder
    older = older.rename(folder.parent / "step-000099-old")  # not a name that evaluate gives
    assert find_output(root) == folder
    shutil.rmtree(older)
    with pytest.raises(ConfigError, match="evaluate run first"):
        find_output(tmp_path)
    (tmp_path / "report.json").write_text('{"schema": 99}')
    with pytest.raises(DataError, match="schema 99"):
        Files.read(tmp_path)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("report.json", lambda path: path.write_text(path.read_text()[:1000])),
        ("report.json", lambda path: path.write_text("[]")),
        ("report.json", lambda path: path.write_text('{"schema": 1}')),
        ("report.json", lambda path: path.write_text(path.read_text().replace('"verdict"', '"vErdict"'))),
        ("samples.parquet", Path.unlink),
        ("samples.parquet", lambda path: path.write_bytes(path.read_bytes()[:1000])),
        ("samples.parquet", lambda path: pq.write_table(pq.read_table(path).drop_columns("caption"), path)),
        ("training.jsonl", Path.unlink),
        ("training.jsonl", lambda path: path.write_text("{\n" + path.read_text())),
        ("images", lambda path: min(path.iterdir()).unlink()),
        ("images", lambda path: min(path.iterdir()).write_bytes(b"no picture")),
        ("images", lambda path: min(path.iterdir()).write_bytes(min(path.iterdir()).read_bytes()[:300])),
    ],
)
def test_missing_and_damaged_files_are_named(folder, tmp_path, name, damage, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    damage(copy / name)
    assert main(["report", str(copy), "--output", str(tmp_path / "report.html")]) == 3
    error = capsys.readouterr().err
    assert str(copy / name) in error
    assert "Run python -m evaluate run again" in error
    assert not (tmp_path / "report.html").exists()


def test_numbers_carry_no_more_digits_than_they_deserve():
    accuracy, loss = {"unit": "", "better": "higher"}, {"unit": "", "better": "lower"}
    assert number(0.7421, accuracy) == "0.74"
    assert number(0.0042, loss) == "0.00420"
    assert number(100.4, loss) == "100"
    assert number(12.3456, loss) == "12.3"
    assert number(-1.04, {"unit": "dB", "better": "higher"}) == "−1.0"
    assert number(None, accuracy) == "–"


@pytest.mark.slow
def test_a_browser_opens_it_from_disk(folder, tmp_path):
    """Chromium renders the page without running anything in it and without any request but the file itself."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        if os.environ.get("CI") == "true":
            pytest.fail("Chromium is not installed; CI must have it")
        pytest.skip("Chromium is not installed")
    page, _ = write_report(folder, tmp_path / "report.html")
    log = tmp_path / "net.json"
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1280,2400",
        f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}",
    ]  # fmt: skip
    opened = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120)
    assert (
        "<title>runs/&lt;b&gt;bold&lt;/b&gt; · step-000123 · nanodit</title>" in opened.stdout
    )  # the script did not run
    assert opened.stdout.count("<figure>") == 15
    assert "example.org" not in log.read_text(errors="replace")

    picture = tmp_path / "page.png"
    subprocess.run([*command, f"--screenshot={picture}", page.as_uri()], capture_output=True, timeout=120, check=True)
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    assert pixels.shape == (2400, 1280, 3)
    assert pixels.std() > 5  # not an empty page
