"""Votes in the report: of these two runs and no others, under the report's letters, in page, JSON and CSV."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from evaluate.__main__ import main
from evaluate.report.report import write_report
from nanodit.errors import ConfigError, DataError
from nanodit.files import canonical_json
from tests.evaluate.report.test_report import References, write_evaluation
from tests.evaluate.votes.made import RUNS, answered, attentive, content, write


@pytest.fixture(scope="module")
def folders(models, figures, tmp_path_factory) -> list[Path]:
    """Evaluations of the two checkpoints that were voted on."""
    changes = {"tests": ["heldout_loss"], "conditions": {"text": 1.0}, "needed": {}, "heldout_loss": {"bins": 2}}
    made = write_evaluation(
        figures, models["truth"], tmp_path_factory.mktemp("first") / "validation_outputs" / "step-000100", changes
    )
    other = Path(shutil.copytree(made, tmp_path_factory.mktemp("second") / "step-000200"))
    for folder, run in zip((made, other), RUNS.values()):
        report = json.loads((folder / "report.json").read_text())
        report["provenance"] |= {"step": run["step"], "weights_sha256": run["weights_sha256"]}
        (folder / "report.json").write_text(canonical_json(report))
    return [made, other]


def cast(folder: Path, *chosen, name: str = "votes", **changes) -> list[Path]:
    page = content(**changes)
    return [
        write(folder / f"{name}{place}.json", answered(page, one, f"{place:016x}")) for place, one in enumerate(chosen)
    ]


def mostly(one: str, other: str):
    return attentive([one] * 14 + ["tie"] + [other])


def test_page_json_and_csv_say_the_same(folders, tmp_path):
    votes = cast(tmp_path, mostly("A", "B"), mostly("A", "B"), lambda trial: "A")
    page, record, table = write_report(folders, tmp_path / "out.html", votes)
    entry = json.loads(record.read_text())["votes"]
    assert (entry["over"], entry["under"], entry["wins"], entry["ties"], entry["losses"]) == ("A", "B", 28, 2, 2)
    assert (entry["win_rate"], entry["n"], entry["verdict"]) == (29 / 32, 16, "A preferred")
    assert 0.5 < entry["low"] < entry["high"] < 1
    assert [(voter["name"], voter["failed"], voter["left_out"]) for voter in entry["voters"]] == [
        ("votes0.json", 0, False), ("votes1.json", 0, False), ("votes2.json", 2, True),
    ]  # fmt: skip
    (row,) = [row for row in csv.DictReader(table.open(newline="")) if row["name"] == "votes/win_rate"]
    assert (row["run"], float(row["value"]), row["n"], row["verdict"]) == ("A", 29 / 32, "16", "A preferred")
    assert float(row["low"]) == entry["low"]
    assert json.loads(row["settings"])["voters"] == 3
    html = page.read_text()
    assert 'better">A preferred</span>' in html
    assert "A was preferred to B in 91 % of 32 answers of 2 voters, a tie being half" in html
    assert "28 for A, 2 for B, 2 ties." in html
    assert "votes2.json is left out: 2 of 2 catch trials failed" in html
    assert "given text, guidance 2, for prompts of the test part of the holdout, from the same noise" in html
    assert "for these voters, and for these two checkpoints" in html


def test_prompts_of_dev_and_short_captions_are_named(folders, tmp_path):
    drawn = content()["drawn"] | {"holdout": "dev", "captions": "short"}
    html = write_report(folders, tmp_path / "out.html", cast(tmp_path, mostly("A", "B"), drawn=drawn))[0].read_text()
    assert "given text, short captions, guidance 2, for prompts of the dev part of the holdout" in html


def test_letters_are_those_of_the_report(folders, tmp_path):
    votes = cast(tmp_path, mostly("A", "B"))
    _, record, _ = write_report(folders[::-1], tmp_path / "out.html", votes)
    entry = json.loads(record.read_text())["votes"]
    assert (entry["over"], entry["wins"], entry["losses"], entry["verdict"]) == ("A", 1, 14, "B preferred")


def test_an_open_question_says_what_would_settle_it(folders, tmp_path):
    votes = cast(tmp_path, attentive(["A", "B"] * 7 + ["A", "A"]))
    page, record, _ = write_report(folders, tmp_path / "out.html", votes)
    entry = json.loads(record.read_text())["votes"]
    assert (entry["verdict"], entry["win_rate"]) == ("undecided", 9 / 16)
    assert f"About {entry['more']} more prompts would settle it" in page.read_text()
    few = write_report(folders, tmp_path / "few.html", cast(tmp_path, lambda trial: None, name="none"))[0].read_text()
    assert "No interval: nobody has answered yet." in few


def test_without_votes_the_report_is_as_it_was(folders, tmp_path):
    page, record, table = write_report(folders, tmp_path / "out.html")
    assert "votes" not in json.loads(record.read_text())
    assert "Blind votes" not in page.read_text()
    assert "votes/" not in table.read_text()


def test_names_of_files_are_no_markup(folders, tmp_path):
    (votes,) = cast(tmp_path, lambda trial: "A", name="<script>alert(1)</script>".replace("/", "_"))
    html = write_report(folders, tmp_path / "out.html", [votes])[0].read_text()
    assert "script" not in References(html).tags
    assert "&lt;script&gt;alert(1)" in html


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"runs": {**RUNS, "B": {**RUNS["B"], "weights_sha256": "ff" * 32}}},
            "runs/second, step 200, ema weights f",
        ),
        ({"runs": {**RUNS, "A": {**RUNS["A"], "step": 7}}}, "runs/first, step 7, .* of which no evaluation is given"),
        ({"runs": {**RUNS, "A": {**RUNS["A"], "weights": "model"}}}, "no evaluation is given"),
        ({"runs": {**RUNS, "A": RUNS["B"]}}, "both sides are the same checkpoint"),
        ({"dataset": "12" * 32}, "the prompts are of dataset 1212121212121212, but .* on cdcdcdcdcdcdcdcd"),
    ],
)
def test_votes_of_other_runs_or_data_are_refused(folders, tmp_path, changes, says):
    votes = cast(tmp_path, lambda trial: "A", **changes)
    with pytest.raises(DataError, match=rf"votes0\.json: .*{says}"):
        write_report(folders, tmp_path / "out.html", votes)
    assert not (tmp_path / "out.html").exists()


def test_one_run_cannot_be_voted_on(folders, tmp_path):
    votes = cast(tmp_path, lambda trial: "A")
    with pytest.raises(ConfigError, match="two runs"):
        write_report(folders[0], tmp_path / "out.html", votes)


def test_the_command_counts_votes_and_names_bad_files(folders, tmp_path, capsys):
    votes = cast(tmp_path, mostly("A", "B"))
    command = ["report", *map(str, folders), "--votes", *map(str, votes), "--output", str(tmp_path / "out.html")]
    assert main(command) == 0
    assert "A preferred" in (tmp_path / "out.html").read_text()
    votes[0].write_text("{}")
    assert main(command) == 3
    assert f"error: {votes[0]}: these are no votes: schema: Field required" in capsys.readouterr().err
    (tmp_path / "sweep.json").write_text("{}")
    assert main(["report", str(tmp_path), "--votes", str(votes[0])]) == 2
