"""The page is a pure function of the files, says nothing that they do not, and trusts no string."""

import csv
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from evaluate import run
from evaluate.__main__ import main
from evaluate.config import EvaluateConfig
from evaluate.report import report
from evaluate.report.curves import heldout_charts
from evaluate.report.files import Run, name_runs
from evaluate.report.report import EvaluationFiles, find_output, number, write_report
from evaluate.subject import Subject
from nanodit.errors import ConfigError, DataError, ResourceError
from nanodit.files import canonical_json
from tests.browser import chromium, look
from train.method.dropout import ConditioningConfig
from train.method.flow import FlowConfig

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


def write_evaluation(figures, model, output: Path, changes: dict | None = None) -> Path:
    """An evaluation with hostile captions and curves."""
    config = EvaluateConfig.model_validate(
        {
            "tests": ["heldout_loss", "reconstruction", "attributes", "pose"],
            "conditions": {"all": 1.0, "text+pose": 2.0, "text": 2.0},
            "reconstruction": {"conditions": ["all"]},
            "pose": {"conditions": [], "mirrored": 0},
            "sampler": {"method": "euler", "steps": 2},
            "grid_images": 3,
            "needed": {"attribute_accuracy/text": 0.5, "heldout_ratio/all": 0.5, "pose_pck/text": 0.5},
            **(changes or {}),
        }
    )
    rows = [dict(row) for row in figures.rows("holdout")]
    rows[0]["caption"], rows[1]["caption"], rows[2]["caption"] = HOSTILE, RTL, "long " * 200_000
    table = ConditioningConfig(preset="quickstart").resolve()
    subject = Subject(model, FlowConfig(), table, figures, tuple(rows))
    evidence = run.evaluate(subject, config, output)
    curves = [
        {"step": step, "train/loss": 1 / step, "train/grad_norm": 0.5, "train/learning_rate": 1e-3}
        for step in range(1, 124)
    ]
    run.write(output, config, evidence, provenance(config), curves)
    speed = [record | {"sys/iter_per_sec": 2.0} for record in curves]
    (output.parents[1] / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in speed))
    return output


@pytest.fixture(scope="module")
def folder(models, figures, tmp_path_factory) -> Path:
    """An evaluation of a model that draws other people."""
    output = tmp_path_factory.mktemp("run") / "validation_outputs" / "step-000123"
    return write_evaluation(figures, models["shuffled"], output)


@pytest.fixture(scope="module")
def truthful(models, figures, tmp_path_factory) -> Path:
    """The same of a model that draws the truth."""
    output = tmp_path_factory.mktemp("other") / "validation_outputs" / "step-000123"
    return write_evaluation(figures, models["truth"], output)


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    """The files of the evaluation without the run around them."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(canonical_json(content))


class References(HTMLParser):
    """Everything in a page that could make a browser fetch or run something."""

    def __init__(self, html: str):
        super().__init__()
        self.found, self.tags, self.bare = [], set(), []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        names = dict(attributes)
        if (tag == "img" and not names.get("alt")) or (tag == "th" and "scope" not in names):
            self.bare.append(self.get_starttag_text())
        for name, value in attributes:
            if name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href") or name.startswith("on"):
                self.found.append((tag, name, value))


@pytest.fixture(scope="module")
def html(folder) -> str:
    return report.render(EvaluationFiles.read(folder))


def test_the_same_files_give_the_same_bytes(folder, truthful, html, tmp_path):
    assert report.render(EvaluationFiles.read(folder)) == html
    run_folder = tmp_path / "elsewhere" / "deeper"
    shutil.copytree(folder.parents[1], run_folder)
    written = write_report(run_folder, tmp_path / "out.html")
    assert written == [tmp_path / name for name in ("out.html", "out.json", "out.csv")]
    assert written[0].read_text() == html  # neither the place nor the time is in it
    assert json.loads(written[1].read_text()) == EvaluationFiles.read(folder).report
    both = [EvaluationFiles.read(one) for one in (folder, truthful)]
    assert report.render(both) == report.render([EvaluationFiles.read(one) for one in (folder, truthful)])


def test_every_string_is_escaped_and_nothing_is_loaded(html):  # fault E07
    references = References(html)
    assert "script" not in references.tags
    assert all(value.startswith(("data:", "#")) for _, _, value in references.found)  # "#": a place of the page
    assert not any(name.startswith("on") for _, name, _ in references.found)
    assert "&lt;script&gt;document.title" in html
    assert "runs/&lt;b&gt;bold&lt;/b&gt;" in html
    assert "default-src &#39;none&#39;" in html or "default-src 'none'" in html
    assert not re.search(r"@import|url\(", html)


def test_long_and_foreign_captions_do_no_harm(html):  # fault E07
    assert len(html) < 2_000_000
    assert "long long …" in html
    assert "امرأة ترتدي قميصا أحمر 👩🏽‍🦰" in html
    assert "long " * 100 not in html


def test_each_noise_level_has_its_share_of_the_loss_beside_its_error(folder):
    html = report.render(EvaluationFiles.read(folder))
    table = html.partition('aria-label="held-out error by noise level"')[2].partition("</table>")[0]
    cells = re.findall(r"<td>([^<]*)</td>", table)
    lines = table.count("of its loss")
    assert table.count("<tr>") == 11
    for line in range(lines):
        shares = [int(cell.removesuffix(" %")) for cell in cells[2 * line + 1 :: 2 * lines]]
        assert len(shares) == 10
        assert sum(shares) == pytest.approx(100, abs=5)  # rounded


def test_what_was_measured_is_on_the_page(html):
    for words in ("Attribute accuracy", "inconclusive", "JPEG round trip", "judge on real", "chance", "PCK at 0.1"):
        assert words in html
    assert "small demo encoders" in html  # a dataset made with them says so
    assert "unknown" in html  # trap 32: what git could not say is not called clean
    assert "Not fully traceable" in html
    assert "evaluate run --checkpoint" in html
    assert "pose_pck/text" in html  # a bar without a metric
    assert "worst: " in html
    assert "Picked by rule: worst, median and best PSNR of the 24 pictures given all conditions" in html


def test_all_pictures_and_headers_can_be_read_aloud(html):
    assert References(html).bare == []


def test_curves_are_over_steps_and_over_time(folder, html, copy):
    assert "training loss, over time" in html
    assert "minutes of training" in html
    alone = report.render(EvaluationFiles.read(copy))  # without the run's metrics.jsonl nobody knows how long it took
    assert "minutes of training" not in alone
    assert "No curves over time for this run" in alone


def test_earlier_evaluations_are_drawn_where_settings_are_equal(folder, tmp_path):
    run_folder = Path(shutil.copytree(folder.parents[1], tmp_path / "run"))
    earlier = Path(shutil.copytree(folder, run_folder / "validation_outputs" / "step-000060"))
    edit_json(earlier / "report.json", lambda content: content["provenance"].update(step=60))
    assert "Over the evaluations of the run" in report.render(EvaluationFiles.read(run_folder))

    def steps(content):
        for metric in content["metrics"]:
            metric["settings"]["weights"] = "others"

    edit_json(earlier / "report.json", steps)
    assert "Over the evaluations of the run" not in report.render(EvaluationFiles.read(run_folder))


def test_a_null_metric_is_shown_with_its_reason(copy):
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
    page = report.render(EvaluationFiles.read(copy))
    assert "degenerate: 3 of 24" in page
    assert "no interval" in page


def test_a_bin_without_a_value_moves_no_error_to_another_t(copy):
    def lose(report):
        own = [metric for metric in report["metrics"] if metric["name"].startswith("heldout_mse/all/")]
        for bin, metric in enumerate(own):
            other = {
                **metric,
                "name": f"heldout_mse/other/{bin}",
                "settings": {**metric["settings"], "conditions": "pose"},
            }
            report["metrics"].append(other)
            if bin in (0, 9):  # the first bin of one condition is lost, and the last one of the other
                (metric, other)[bin == 9].update(value=None, low=None, high=None, reason="non-finite")

    edit_json(copy / "report.json", lose)
    (run,) = name_runs([EvaluationFiles.read(copy)])
    (block,) = heldout_charts([run])["blocks"]
    assert len(block["table"]) == 10
    for row in block["table"]:
        cells = [one["metric"]["settings"] for one in row["cells"] if one]
        assert {f"{one['t_low']:.2g} to {one['t_high']:.2g}" for one in cells} == {row["t"]}
    assert report.render(EvaluationFiles.read(copy))


def test_the_csv_holds_every_metric(folder, tmp_path):
    _, _, table = write_report(folder, tmp_path / "report.html")
    rows = list(csv.DictReader(table.open(newline="")))
    metrics = EvaluationFiles.read(folder).report["metrics"]
    assert [row["name"] for row in rows] == [metric["name"] for metric in metrics]
    assert [float(row["value"]) for row in rows] == [metric["value"] for metric in metrics]


def test_evaluations_of_one_checkpoint_on_both_parts_are_told_apart(folder):
    files = EvaluationFiles.read(folder)
    plain = Run(files, "", "c1").title
    for part, end in (("test", ""), ("dev", ", on dev")):
        provenance = files.provenance | {"holdout": part}
        assert Run(replace(files, report=files.report | {"provenance": provenance}), "", "c1").title == plain + end


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
    of_the_last = tmp_path / "validation_outputs" / "step-000123-model"
    of_the_last.mkdir(parents=True)
    (of_the_last / "report.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"other weights than ema; give the folder: .*step-000123-model"):
        find_output(tmp_path)
    (tmp_path / "report.json").write_text('{"schema": 99}')
    with pytest.raises(DataError, match="schema 99"):
        EvaluationFiles.read(tmp_path)


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
        ("extras.json", Path.unlink),
        ("extras.json", lambda path: path.write_text('{"swap": {"modes": []}}')),
        ("heldout_loss.parquet", lambda path: path.write_bytes(path.read_bytes()[:100])),
        ("training.jsonl", Path.unlink),
        ("training.jsonl", lambda path: path.write_text("{\n" + path.read_text())),
        ("images", lambda path: min(path.glob("*-real.png")).unlink()),
        ("images", lambda path: min(path.glob("*-real.png")).write_bytes(b"no picture")),
        (
            "images",
            lambda path: min(path.glob("*-real.png")).write_bytes(min(path.glob("*-real.png")).read_bytes()[:300]),
        ),
    ],
)
def test_missing_and_damaged_files_are_named(copy, tmp_path, name, damage, capsys):
    damage(copy / name)
    assert main(["report", str(copy), "--output", str(tmp_path / "report.html")]) == 3
    error = capsys.readouterr().err
    assert str(copy / name) in error
    assert "Run nanodit evaluate run again" in error
    assert not (tmp_path / "report.html").exists()


def test_numbers_carry_no_more_digits_than_they_deserve():
    accuracy, loss = {"unit": "", "better": "higher"}, {"unit": "", "better": "lower"}
    assert number(0.7421, accuracy) == "0.74"
    assert number(0.0042, loss) == "0.00420"
    assert number(100.4, loss) == "100"
    assert number(12.3456, loss) == "12.3"
    assert number(-1.04, {"unit": "dB", "better": "higher"}) == "−1.0"
    assert number(-0.0002, accuracy) == "0.000"
    assert number(None, accuracy) == "–"


def test_an_evaluation_that_was_killed_is_not_taken_for_finished(folder, copy, tmp_path):  # fault E06
    run_folder = Path(shutil.copytree(folder.parents[1], tmp_path / "run"))
    newer = run_folder / "validation_outputs" / "step-000200"
    (newer / "parts").mkdir(parents=True)
    page = report.render(EvaluationFiles.read(run_folder))
    assert "A newer evaluation was not finished and is not shown: step-000200" in page
    with pytest.raises(ConfigError, match="not finished"):
        find_output(newer)
    newer.rename(newer.with_name("step-000200-model"))  # of other weights, which a run folder does not mean
    assert "was not finished" not in report.render(EvaluationFiles.read(run_folder))


def test_skipped_tests_leave_their_reasons_and_no_empty_sections(copy):
    def skip(content):
        content["metrics"] = [one for one in content["metrics"] if one["name"].startswith("heldout")]
        content["skipped"] = [{"name": "swap/gain", "reason": "subset <text+dino> never trained"}]
        content["provenance"]["evaluation"]["tests"] = ["heldout_loss", "swap"]

    edit_json(copy / "report.json", skip)
    edit_json(copy / "extras.json", dict.clear)
    page = report.render(EvaluationFiles.read(copy))
    assert page.count("subset &lt;text+dino&gt; never trained") == 2  # in its section, and in the list
    for heading in ("Text edits", "Poses", "Diversity", "Nearest training images", "Which colours come out"):
        assert f"<h2>{heading}</h2>" not in page


def test_provenance_that_is_not_there_is_unknown(copy):  # trap 32
    def forget(content):
        content["provenance"] = {"step": 123, "dataset": {}, "git": {}}

    edit_json(copy / "report.json", forget)
    page = report.render(EvaluationFiles.read(copy))
    said = "the commit is unknown; the hash of the weights is unknown; the dataset&#39;s fingerprint is unknown"
    assert said in page
    assert "whether the code was changed is unknown" in page


def test_what_intervals_are_over_is_said_of_old_evaluations_and_of_those_without_pictures(copy):
    def said():
        return report.clusters(report.name_runs([EvaluationFiles.read(copy)])[0])

    samples, heldout = (copy / name for name in ("samples.parquet", "heldout_loss.parquet"))
    tables = {path: pq.read_table(path).drop_columns("cluster") for path in (samples, heldout)}
    for path, table in tables.items():
        pq.write_table(table, path)
    assert said() == "over images, each alone: groups of near duplicates are not known"
    assert said() in report.render(EvaluationFiles.read(copy))
    pq.write_table(tables[samples].slice(0, 0), samples)
    grouped = tables[heldout].append_column("cluster", tables[heldout]["key"])  # of training images, too
    pq.write_table(grouped, heldout)
    assert said() == "over 24 groups of near duplicates, one image or more each"


def test_a_page_too_large_gets_smaller_pictures_and_says_so(folder, html, monkeypatch):
    assert "scaled down" not in html
    monkeypatch.setattr(report, "LIMIT", len(html.encode()) - 100_000)
    small = report.render(EvaluationFiles.read(folder))
    assert len(small.encode()) <= report.LIMIT
    assert "Pictures are scaled down to at most 384 pixels and compressed" in small
    monkeypatch.setattr(report, "LIMIT", 10_000)
    with pytest.raises(ResourceError, match="give fewer runs"):
        report.render(EvaluationFiles.read(folder))


def test_text_stands_out_from_what_is_behind_it(html):
    """WCAG 2.2, 1.4.3: at least 4.5 to 1, in light and dark."""

    def luminance(colour: str) -> float:
        colour = "".join(2 * digit for digit in colour) if len(colour) == 3 else colour
        parts = [int(colour[place : place + 2], 16) / 255 for place in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    schemes = [block for block in re.findall(r":root \{(.*?)\}", html, re.S) if "--paper" in block]
    assert len(schemes) == 2
    for block in schemes:
        colours = {name: luminance(value) for name, value in re.findall(r"--([\w-]+): #([0-9a-f]+)", block)}
        pairs = [(ink, on) for ink in ("ink", "soft", "faint") for on in ("paper", "card", "wash")]
        pairs += [(name, f"{name}-wash") for name in ("met", "missed", "open")]
        pairs += [("card", f"c{index}") for index in range(1, 7)]
        for ink, on in pairs:
            light, dark = sorted((colours[ink], colours[on]), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, on)


@pytest.mark.slow
def test_a_browser_opens_it_from_disk_and_on_a_phone(folder, truthful, tmp_path):
    """Chromium renders one run and two in light and dark: no script, no request, no complaint, nothing too wide."""
    pages = [write_report(folder, tmp_path / "one.html")[0], write_report([folder, truthful], tmp_path / "two.html")[0]]
    with chromium(tmp_path / "profile") as port:
        for page, title in zip(pages, ("runs/<b>bold</b>, step 123 · nanodit", "2 runs side by side · nanodit")):
            papers = set()
            for width, scheme in ((1280, "light"), (360, "light"), (390, "dark")):
                seen = look(port, page, width, scheme)
                assert seen["title"] == title  # the script did not run
                assert seen["pictures"] > 15
                assert seen["broken"] == 0
                assert (seen["inner"], seen["scroll"] <= width) == (width, True), seen["wide"]
                assert not seen["wide"]
                assert [url for url in seen["requested"] if not url.startswith("data:")] == [page.as_uri()]
                assert seen["complaints"] == []
                papers.add(seen["paper"])
            assert len(papers) == 2
