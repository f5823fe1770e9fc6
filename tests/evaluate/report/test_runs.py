"""Several runs on one page: side by side, compared picture by picture, and never over different settings."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from evaluate.__main__ import main
from evaluate.report import report
from evaluate.report.report import EvaluationFiles, write_report
from nanodit.errors import ConfigError
from nanodit.files import canonical_json
from tests.evaluate.report.test_report import write_evaluation


@pytest.fixture(scope="module")
def folders(models, figures, tmp_path_factory) -> list[Path]:
    """Evaluations of a model that draws other people, and of one that draws the truth."""
    found = []
    for name in ("shuffled", "truth"):
        output = tmp_path_factory.mktemp(name) / "validation_outputs" / "step-000123"
        changes = {"conditions": {"all": 1.0}, "heldout_loss": {"bins": 4, "conditions": ["all", "text"]}, "needed": {}}
        found.append(write_evaluation(figures, models[name], output, changes))
    return found


@pytest.fixture
def copies(folders, tmp_path) -> list[Path]:
    return [Path(shutil.copytree(folder, tmp_path / str(place))) for place, folder in enumerate(folders)]


def read(folders) -> list[EvaluationFiles]:
    return [EvaluationFiles.read(folder) for folder in folders]


def compared(folders) -> dict:
    return {entry["name"]: entry for entry in report.report_json(read(folders))["comparisons"]}


def change(folder: Path, **settings) -> None:
    content = json.loads((folder / "report.json").read_text())
    for metric in content["metrics"]:
        metric["settings"].update(settings)
    (folder / "report.json").write_text(canonical_json(content))


def test_differences_are_paired_and_know_which_way_is_better(folders):
    entries = compared(folders)
    gain = entries["reconstruction/psnr"]
    assert gain["difference"] > 10
    assert gain["verdict"] == "better"
    assert gain["low"] > 0
    assert gain["n"] == 24
    assert entries["heldout_loss"]["difference"] < 0
    assert entries["heldout_loss"]["verdict"] == "better"  # lower is
    assert entries["attribute_accuracy/all"]["verdict"] == "better"
    values = {metric["name"]: metric["value"] for metric in read(folders)[1].metrics}
    others = {metric["name"]: metric["value"] for metric in read(folders)[0].metrics}
    for name in ("reconstruction/psnr", "heldout_loss", "attribute_accuracy/all/hair", "heldout_loss/text"):
        assert entries[name]["difference"] == pytest.approx(values[name] - others[name])
    back = compared(folders[::-1])["reconstruction/psnr"]
    assert (back["difference"], back["verdict"]) == (pytest.approx(-gain["difference"]), "worse")


def test_a_run_is_no_better_than_itself(folders):
    entries = compared([folders[0]] * 2)
    told = [entry for entry in entries.values() if "verdict" in entry]
    assert len(told) > 10
    assert {(entry["difference"], entry["verdict"]) for entry in told} == {(0.0, "inconclusive")}


def test_metrics_of_other_settings_stand_side_by_side_and_are_not_compared(copies):  # trap 23, fault E05
    change(copies[1], steps=50)
    entries = compared(copies)
    assert {tuple(entry["not_compared"]) for entry in entries.values()} == {("steps 2, 50",), ("steps unknown, 50",)}
    page = report.render(read(copies))
    assert "not comparable: steps 2, 50" in page
    assert "✓ better</span> +" not in page  # no difference is printed
    assert page.count("Not drawn, because n or settings differ") == 1


def test_runs_on_other_data_share_nothing_but_the_page(copies):
    content = json.loads((copies[1] / "report.json").read_text())
    content["provenance"]["dataset"]["fingerprint"] = "ef" * 32
    (copies[1] / "report.json").write_text(canonical_json(content))
    page = report.render(read(copies))
    assert "B and A are not comparable:</b> dataset fingerprint cdcdcdcdcdcdcdcd and efefefefefefefef" in page
    assert all("not_compared" in entry for entry in compared(copies).values())


def test_one_seed_is_no_verdict_on_recipes(folders):
    assert "whether one recipe is better than another takes several training seeds" in report.render(read(folders))


def test_json_and_csv_name_the_run_of_every_metric(folders, tmp_path):
    page, record, table = write_report(folders, tmp_path / "both.html")
    content = json.loads(record.read_text())
    assert content["schema"] == 1
    assert sorted(content["provenance"]) == ["A", "B"]
    rows = list(csv.DictReader(table.open(newline="")))
    assert [(row["run"], row["name"]) for row in rows] == [(one["run"], one["name"]) for one in content["metrics"]]
    assert {row["run"] for row in rows} == {"A", "B"}
    assert page.stat().st_size < 10_000_000


def test_the_evidence_of_an_evaluation_is_never_overwritten(folders, copies, tmp_path):
    before = (copies[0] / "report.json").read_bytes()
    with pytest.raises(ConfigError, match="another name"):
        write_report(folders, copies[0] / "report.html")
    assert main(["report", str(copies[0])]) == 0  # its own page lies beside it
    assert (copies[0] / "report.json").read_bytes() == before
    assert (copies[0] / "report.html").is_file()


def test_the_command_takes_several_runs(folders, tmp_path, capsys):
    assert main(["report", *map(str, folders), "--output", str(tmp_path / "page.html")]) == 0
    assert "page.html, page.json and page.csv" in capsys.readouterr().out
    assert main(["report", *[str(folders[0])] * 27, "--output", str(tmp_path / "page.html")]) == 2
