"""A sweep's page says what its finished trials carry and why it is silent on the rest, in the same bytes each time."""

import csv
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from evaluate.__main__ import main
from evaluate.statistics.looks import Looks
from evaluate.statistics.verdicts import Verdict, paired
from evaluate.sweep.analysis import at_equal, band, factorial, front, slope, split_cohorts
from evaluate.sweep.files import RecordedSweep, evaluated
from evaluate.sweep.report import render, sweep_json, write_sweep_report
from evaluate.sweep.words import more_words
from nanodit.errors import DataError
from tests.browser import chromium, look
from train.loop.visual import cut_out, lay_out

STEPS, EVERY = 600, 100
COHORT = {
    "commit": "0123abc",
    "dirty": False,
    "dataset_fingerprint": "fe" * 8,
    "torch": "2.15.0",
    "device": "cpu",
    "threads": 2,
}
ARMS = {
    "A": {"role": "baseline", "against": None, "factor": None, "overrides": {"optimizer.type": "adamw"}},
    "B": {"role": "arm", "against": "A", "factor": "tread", "differences": {"tread.enabled": [False, True]}},
    "C": {
        "role": "arm",
        "against": "B",
        "factor": "optimizer",
        "differences": {"optimizer.type": ["adamw", "muon"], "train.lr": [0.001, 0.0003]},
    },
    "D": {"role": "arm", "against": "C", "factor": "repa", "differences": {"repa.enabled": [False, True]}},
    "A/A": {"role": "a/a", "against": "A", "factor": None, "overrides": {"optimizer.type": "adamw"}},
}
FACTORS = {"tread": ["tread"], "optimizer": ["optimizer", "train.lr"], "repa": ["repa"]}
QUESTIONS = [
    {"arms": ["A", "B"], "ask": "What does TREAD save?", "measures": ["peak_memory", "iterations_per_second"]},
    {"arms": ["B", "C"], "ask": "What does Muon do to the slope of the loss?", "measures": ["slope"]},
    {
        "arms": ["C", "D"],
        "ask": "What of the reconstruction?",
        "measures": ["reconstruction/lpips", "reconstruction/psnr"],
    },
]
# what an arm's training is like: final loss, how fast it falls, steps a second, memory
KINDS = {
    "A": (0.50, 0.30, 4.0, 6.0),
    "B": (0.50, 0.30, 5.2, 4.4),
    "C": (0.41, 0.42, 4.9, 4.6),
    "D": (0.408, 0.43, 4.0, 5.0),
    "A/A": (0.50, 0.30, 4.0, 6.0),
}


def describe(arms=None, **changed):
    questions = [] if arms else QUESTIONS
    arms = {name: {"overrides": {}, "differences": {}, "undeclared": [], **arm} for name, arm in (arms or ARMS).items()}
    return {
        "schema": 1,
        "name": "ablation",
        "arms": arms,
        "factors": FACTORS,
        "seeds": [0, 1, 2],
        "aa_seeds": [100, 101, 102],
        "budget": {"steps": STEPS},
        "primary": {"metric": "heldout_loss", "mode": "min", "margin": 0.02},
        "questions": questions,
        "early_stopping": "none",
        "concurrent": 1,
        "fractional": False,
        "time_claims": True,
        **changed,
    }


def metric(name, value, better="lower", **settings):
    return {
        "name": name,
        "value": value,
        "low": value * 0.93,
        "high": value * 1.07,
        "n": 64,
        "baselines": {},
        "settings": {"conditions": "all", **settings},
        "better": better,
        "unit": "",
        "needed": None,
        "verdict": None,
        "reason": None,
    }


def write_trial(folder, arm, seed, kind, started=0.0, status="finished", pictures=False, **changed):
    """A run folder as a sweep leaves it; what a seed does is shared by all arms."""
    final, fall, rate, memory = kind
    luck = np.random.default_rng(seed).normal(scale=0.02)
    own = np.random.default_rng([seed, sum(map(ord, arm))])
    final, fall = final + luck + own.normal(scale=0.003), fall * (1 + 0.03 * own.normal())
    steps = STEPS if status == "finished" else 250
    seconds = steps / rate
    trial = folder / "trials" / f"{arm.replace('/', '-')}-seed{seed}"
    trial.mkdir(parents=True)
    lines = []
    for step in range(10, steps + 1, 10):
        line = {"step": step, "train/loss": final * (STEPS / step) ** fall * (1 + 0.1 * own.normal())}
        line["sys/iter_per_sec"] = rate
        if step % EVERY == 0:
            line["validation/heldout_error"] = final * (STEPS / step) ** fall
        lines.append(json.dumps(line))
    (trial / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    record = {
        "schema": 1,
        "arm": arm,
        "seed": seed,
        "status": status,
        "reason": None,
        "attempts": 1,
        "started": 1.8e9 + started,
        "ended": 1.8e9 + started + 1.2 * seconds + 20,
        "seconds": seconds,
        "images": steps * 32,
        "steps": steps,
        "peak_memory_gb": memory + 0.01 * own.normal(),
        "cohort": COHORT,
        **changed,
    }
    (trial / "trial.json").write_text(json.dumps(record))
    if status == "finished":
        output = trial / "validation_outputs" / f"step-{steps:06d}"
        output.mkdir(parents=True)
        metrics = [
            metric("heldout_loss", final),
            metric("heldout_mse/all/0-0.1", final, t_low=0.0, t_high=0.1),
            metric("reconstruction/psnr", 14 - 5 * final, "higher"),
            metric("attribute_accuracy/all", 1 - final, "higher"),
        ]
        skipped = [{"name": "reconstruction/lpips", "reason": "no backbone weights"}]
        content = {"schema": 1, "metrics": metrics, "skipped": skipped, "provenance": {"step": steps}}
        (output / "report.json").write_text(json.dumps(content))
    if pictures:
        for step in range(200, steps + 1, 200):
            draw(trial / "visual_debug" / f"step-{step:06d}", step, own)
    return trial


def draw(folder, step, random):
    """A grid as train.loop.visual writes it, with pictures that get clearer."""
    folder.mkdir(parents=True)
    columns, sizes = [], [(64, 64), (48, 80), (64, 64)]
    for width, height in sizes:
        y, x = np.mgrid[:height, :width]
        clean = np.stack([4 * x % 256, 3 * y % 256, 128 + 0 * x], -1)
        noisy = clean + random.normal(scale=40_000 / step, size=clean.shape)
        columns.append([clean.astype(np.uint8), np.clip(noisy, 0, 255).astype(np.uint8)])
    info = PngInfo()
    keys = ["0a" * 16, "1b" * 16, "2c" * 16]
    info.add_text("layout", json.dumps({"rows": ["real", "all"], "keys": keys, "sizes": sizes}))
    Image.fromarray(lay_out(columns, ["real", "all"])).save(folder / "grid.png", pnginfo=info)


def write_sweep(folder: Path, content=None, leave_out=(), pictures=False, trials=None) -> Path:
    """A sweep's folder; ``trials`` (arm, seed) -> what is different about this one."""
    content, trials = content or describe(), trials or {}
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text(json.dumps(content))
    started = 0.0
    for arm, description in content["arms"].items():
        for seed in content["aa_seeds"] if description["role"] == "a/a" else content["seeds"]:
            if (arm, seed) not in leave_out:
                changed = {"kind": KINDS.get(arm, KINDS["A"]), **trials.get((arm, seed), {})}
                write_trial(folder, arm, seed, started=started, pictures=pictures, **changed)
                started += 200
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("sweeps") / "ablation", pictures=True)


@pytest.fixture(scope="module")
def html(folder) -> str:
    return render(RecordedSweep.read(folder))


def words(html) -> str:
    """The text of a page, without markup."""

    class Text(HTMLParser):
        def __init__(self):
            super().__init__()
            self.found, self.hidden = [], 0

        def handle_starttag(self, tag, attributes):
            self.hidden += tag == "style"

        def handle_endtag(self, tag):
            self.hidden -= tag == "style"

        def handle_data(self, data):
            self.found += [] if self.hidden else [data]

    parser = Text()
    parser.feed(html)
    return " ".join(" ".join(parser.found).split())


def verdicts(folder) -> dict[str, str]:
    return {one["arm"]: one["verdict"] for one in sweep_json(RecordedSweep.read(folder))["metrics"]}


def test_the_verdicts_are_those_of_the_arms(folder, html):
    assert verdicts(folder) == {"B": "equivalent", "C": "better", "D": "equivalent", "A/A": "inconclusive"}
    text = words(html)
    for part in (
        "✓ better",
        "= equivalent",
        "≈ inconclusive",
        "after Holm",
        "seeds of a new sweep",
        "not paired: Welch's t",
    ):
        assert part in text
    assert "Declared before the first trial: held-out flow loss" in text
    assert "±0.02" in text


def test_the_same_files_give_the_same_bytes_wherever_they_are(folder, html, tmp_path):
    assert render(RecordedSweep.read(folder)) == html
    copy = tmp_path / "elsewhere" / "deeper"
    shutil.copytree(folder, copy)
    page, record, table = write_sweep_report(copy, tmp_path / "out.html")
    assert page.read_text() == html
    assert (record, table) == (tmp_path / "out.json", tmp_path / "out.csv")
    again = write_sweep_report(folder, tmp_path / "again.html")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in (page, record, table)]


def test_one_command_writes_page_json_and_csv(folder, tmp_path, capsys):
    assert main(["report", str(folder), "--output", str(tmp_path / "report.html")]) == 0
    assert "report.json and report.csv" in capsys.readouterr().out
    record = json.loads((tmp_path / "report.json").read_text())
    assert record["schema"] == 1
    assert {one["test"] for one in record["metrics"]} == {"paired t", "Welch's t"}
    (better,) = (one for one in record["metrics"] if one["arm"] == "C")
    assert better["low"] < better["value"] < better["high"] < -0.02
    assert better["n"] == len(better["differences"]) == 3
    rows = list(csv.DictReader((tmp_path / "report.csv").open(newline="")))
    assert len(rows) == 15
    assert all(float(row["heldout_loss"]) > 0 and row["cohort"] == "1" for row in rows)
    assert main(["report", str(folder), str(folder)]) == 2


def test_nothing_is_loaded_or_run_and_every_string_is_escaped(folder, tmp_path):
    hostile = '<script>alert(1)</script><img src="https://example.org/x.png">'
    arms = {**ARMS, "B": {**ARMS["B"], "differences": {"tread.enabled": [hostile, True]}}}
    content = describe(arms, name=hostile)
    lost = {("B", 1): {"status": "failed", "reason": hostile}}
    page = render(RecordedSweep.read(write_sweep(tmp_path / "s", content, trials=lost)))
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert not re.search(r"@import|url\(", page)
    assert all(value.startswith("data:") for value in re.findall(r'(?:src|href)="([^"]*)"', page))
    assert re.search("default-src (&#39;|')none", page)


def test_failed_stopped_and_nan_trials_take_no_part_and_say_why(tmp_path):
    lost = {
        ("B", 0): {"status": "failed", "reason": "out of memory: 7.9 of 8.0 GB"},
        ("C", 1): {"status": "stopped", "reason": "stopped early by ASHA at step 250"},
        ("D", 2): {"status": "failed", "reason": "loss is NaN at step 31", "attempts": 3},
    }
    folder = write_sweep(tmp_path / "s", trials=lost)
    # values that a failed trial left would turn the verdict
    output = folder / "trials" / "B-seed0" / "validation_outputs" / "step-000250"
    output.mkdir(parents=True)
    found = {"schema": 1, "metrics": [metric("heldout_loss", 0.001)], "skipped": [], "provenance": {}}
    (output / "report.json").write_text(json.dumps(found))
    record = sweep_json(RecordedSweep.read(folder))
    counted = {one["arm"]: one["n"] for one in record["metrics"]}
    assert counted == {"B": 2, "C": 1, "D": 1, "A/A": 3}
    assert verdicts(folder)["C"] == "single run: no verdict"  # one trial of each failed
    assert verdicts(folder)["B"] == "no verdict"
    assert {one["name"]: one["reason"] for one in record["skipped"]} == {
        "B, seed 0": "failed: out of memory: 7.9 of 8.0 GB",
        "C, seed 1": "stopped: stopped early by ASHA at step 250",
        "D, seed 2": "failed: loss is NaN at step 31",
    }
    text = words(render(RecordedSweep.read(folder)))
    for part in ("out of memory: 7.9 of 8.0 GB", "by ASHA at step 250", "loss is NaN", "3 trials take no part"):
        assert part in text
    assert "single run: no verdict" in text


def test_survivors_of_an_arm_that_diverged_are_not_better(tmp_path):
    """Four of seven seeds are lost, and the other three are far better than the baseline's: no verdict, and why."""
    content = describe(seeds=list(range(7)), aa_seeds=[])
    content["arms"] = {name: content["arms"][name] for name in ("A", "B")}
    content["questions"] = []
    lost = {("B", seed): {"status": "failed", "reason": "loss is NaN at step 31"} for seed in (1, 3, 4, 6)}
    lost |= {("B", seed): {"kind": (0.3, 0.3, 5.2, 4.4)} for seed in (0, 2, 5)}
    folder = write_sweep(tmp_path / "s", content, trials=lost)
    (one,) = sweep_json(RecordedSweep.read(folder))["metrics"]
    assert one["high"] < -0.1
    assert one["p"] < 0.001
    assert one["verdict"] == "no verdict"
    assert one["failed"] == {"B": 4, "A": 0}
    assert one["p_ranks"] > 0.1
    text = words(render(RecordedSweep.read(folder)))
    assert "failed: 4 of 7 of B and 0 of 7 of A; with failures as the worst, 3 seeds better and 4 worse" in text
    assert "✓ better" not in text
    # a value that is no number is a failure as well
    degenerate = write_sweep(tmp_path / "d", content, trials={("B", 0): lost["B", 0]})
    path = next((degenerate / "trials" / "B-seed1").rglob("report.json"))
    found = json.loads(path.read_text())
    found["metrics"][0] |= {"value": None, "low": None, "high": None, "reason": "degenerate: 3 of 24"}
    path.write_text(json.dumps(found))
    assert verdicts(degenerate) == {"B": "no verdict"}
    # and where as many fail in either arm, the others are compared
    lost |= {("A", seed): {"status": "failed", "reason": "out of memory"} for seed in (1, 3, 4, 6)}
    assert verdicts(write_sweep(tmp_path / "e", content, trials=lost)) == {"B": "better"}


def duel(**changed):
    """Two arms, of seven seeds."""
    return describe({name: ARMS[name] for name in ("A", "B")}, seeds=list(range(7)), aa_seeds=[], **changed)


def test_every_trial_that_ended_without_a_value_is_counted_once(tmp_path):
    # what goes on under other code and fails again is of no cohort, and failed all the same
    moved = {"status": "failed", "cohort": {**COHORT, "commit": "0123abc, then 9999fff"}}
    assert verdicts(write_sweep(tmp_path / "moved", duel(), trials={("B", 1): moved})) == {"B": "no verdict"}
    # a failure of another cohort is counted there
    trials = {("B", seed): {"cohort": {**COHORT, "commit": "9999fff"}} for seed in (0, 1)}
    trials["B", 1] |= {"status": "failed"}
    record = sweep_json(RecordedSweep.read(write_sweep(tmp_path / "other", duel(), trials=trials)))
    assert [one["failed"]["B"] for one in record["metrics"]] == [0, 1]
    # the last validation is no number
    folder = write_sweep(tmp_path / "nan", duel(primary={"metric": "validation/heldout_error", "mode": "min"}))
    log = folder / "trials" / "B-seed1" / "metrics.jsonl"
    log.write_text(log.read_text() + json.dumps({"step": STEPS + 1, "validation/heldout_error": math.nan}) + "\n")
    sweep = RecordedSweep.read(folder)
    assert verdicts(folder) == {"B": "no verdict"}
    assert "the value is not a number" in words(render(sweep))
    # at an equal step it has a value
    (one,) = at_equal(sweep, split_cohorts(sweep)[0], "step").contrasts
    assert (one.failed, one.ended) == ((1, 0), (7, 7))
    # one that is still running has not ended, whatever its evaluation says
    folder = write_sweep(tmp_path / "running", duel())
    trial = folder / "trials" / "B-seed1"
    record = json.loads((trial / "trial.json").read_text()) | {"status": "running"}
    (trial / "trial.json").write_text(json.dumps(record))
    path = next(trial.rglob("report.json"))
    found = json.loads(path.read_text())
    found["metrics"][0] |= {"value": None, "reason": "degenerate: 3 of 24"}
    path.write_text(json.dumps(found))
    assert verdicts(folder) == {"B": "equivalent"}


def test_what_is_to_be_done_about_failures_is_said(tmp_path):
    lost = {("B", seed): {"status": "failed", "reason": "loss is NaN"} for seed in range(7)}
    text = words(render(RecordedSweep.read(write_sweep(tmp_path / "all", duel(), trials=lost))))
    assert "Failed: 7 of 7 of B and 0 of 7 of A" in text
    assert "Finish three training seeds" not in text
    lost = {("B", seed): {"status": "stopped", "reason": "stopped early by asha"} for seed in range(6)}
    lost["B", 6] = {"kind": (0.3, 0.3, 5.2, 4.4)}
    text = words(render(RecordedSweep.read(write_sweep(tmp_path / "asha", duel(), trials=lost))))
    assert "failed or stopped early: 6 of 7 of B and 0 of 7 of A; with failures as the worst, 1 seed better" in text
    assert "Judge these arms in a sweep without early stopping." in text


def test_no_seed_is_asked_for_beyond_those_declared(tmp_path):
    unsteady = {("B", seed): {"kind": (0.45 + 0.1 * (seed % 2), 0.3, 5.2, 4.4)} for seed in range(7)}
    text = words(render(RecordedSweep.read(write_sweep(tmp_path / "s", duel(max_seeds=7), trials=unsteady))))
    assert "all 7 seeds declared are used: only a new sweep could settle it" in text


@pytest.mark.parametrize(
    ("seeds", "most", "said"),
    [
        ((6, 6), 6, "about 1 more seed would settle"),
        ((6, None), 6, "about 1 more seed, perhaps more than the 6 declared, would settle"),
        ((7, 9), 12, "about 2 to 4 more seeds would settle"),
        ((7, 9), None, "about 7 to 9 seeds of a new sweep would settle"),
        ((7, None), None, "about 7 seeds of a new sweep, perhaps more than 1,000, would settle"),
        (None, 12, "not even the 12 seeds declared would settle"),
    ],
)
def test_numbers_of_seeds_are_said_as_people_say_them(seeds, most, said):
    compared = paired(dict.fromkeys(range(5), 1.0), dict.fromkeys(range(5), 0.0))
    verdict = Verdict("inconclusive", 0.2, seeds, "different" if seeds else None)
    end = ", as different" if seeds else ""
    assert more_words(verdict, compared, Looks((5,), most)) == f"{said} it with a probability of 80 %{end}"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"max_seeds": 1}, "max_seeds 1 for 3 seeds"),
        ({"max_seeds": "12"}, "max_seeds '12' for 3 seeds"),
        ({"max_seeds": 12, "looks": [3, 6]}, "looks \\[3, 6\\] for 3 seeds"),
        ({"max_seeds": 12, "looks": "3"}, "looks '3' for 3 seeds"),
    ],
)
def test_a_plan_whose_seeds_cannot_be_is_damaged(changed, said, tmp_path):
    with pytest.raises(DataError, match=f"sweep.json is damaged .{said}"):
        RecordedSweep.read(write_sweep(tmp_path / "s", describe(**changed)))


def test_seeds_that_are_added_are_looks_and_reading_is_none(tmp_path):
    declared = describe(max_seeds=6, seeds=list(range(6)), looks=[3, 6])
    record = sweep_json(RecordedSweep.read(write_sweep(tmp_path / "declared", declared)))
    assert {one["arm"]: one["verdict"] for one in record["metrics"]}["C"] == "better"
    assert record["provenance"]["sweep"]["looks"] == [3, 6]
    (c,) = (one for one in record["metrics"] if one["arm"] == "C")
    assert c["p_holm"] > 3 * c["p"]
    text = words(render(RecordedSweep.read(tmp_path / "declared")))
    assert "6 training seeds each (at most 6 declared)" in text
    assert "3, then 6 seeds of at most 6" in text
    grown = write_sweep(tmp_path / "grown", describe(seeds=list(range(6)), looks=[3, 6]))
    assert {*verdicts(grown).values()} == {"exploratory: no verdict"}
    text = words(render(RecordedSweep.read(grown)))
    assert "exploratory: no verdict" in text
    assert "✓ better" not in text
    assert "(exploratory: seeds were added" in text


def test_a_metric_that_is_no_number_is_never_best(tmp_path):
    folder = write_sweep(tmp_path / "s")
    path = next((folder / "trials" / "C-seed0").rglob("report.json"))
    content = json.loads(path.read_text())
    content["metrics"][0] |= {"value": None, "low": None, "high": None, "reason": "degenerate: 3 of 24"}
    path.write_text(json.dumps(content))
    sweep = RecordedSweep.read(folder)
    assert {one["name"]: one["reason"] for one in sweep_json(sweep)["skipped"]} == {"C, seed 0": "degenerate: 3 of 24"}
    assert "degenerate: 3 of 24" in words(render(sweep))
    path.rename(path.with_name("lost.json"))
    assert "never evaluated" in words(render(RecordedSweep.read(folder)))
    earlier = path.parent.with_name("step-000300")
    earlier.mkdir()
    content["metrics"][0] |= {"value": 0.01}
    (earlier / "report.json").write_text(json.dumps(content))
    assert "evaluated at step 300, not at its last step, 600" in words(render(RecordedSweep.read(folder)))


@pytest.mark.parametrize("said", ["step-000600", "step-000600-dev", None])
def test_a_sweep_is_judged_by_its_own_evaluations_and_not_by_others_of_the_same_step(tmp_path, said):
    """As by those of validation.tests, which measure dev on fewer images, or by what somebody looked at since."""
    folder = write_sweep(tmp_path / "s")
    of_test = next((folder / "trials" / "C-seed0").rglob("report.json"))
    content, record = (json.loads(path.read_text()) for path in (of_test, folder / "trials/C-seed0/trial.json"))
    of_test.with_name("samples.parquet").touch()
    for name, value in (("step-000600-dev", 0.5), ("step-000600-model", 0.7)):
        other = Path(shutil.copytree(of_test.parent, of_test.parent.with_name(name)))
        metrics = [content["metrics"][0] | {"value": value}, *content["metrics"][1:]]
        (other / "report.json").write_text(json.dumps(content | {"metrics": metrics}))
    if said:
        (folder / "trials/C-seed0/trial.json").write_text(json.dumps(record | {"measured_in": said}))
    sweep = RecordedSweep.read(folder)
    (trial,) = (one for one in sweep.trials if (one.arm, one.seed) == ("C", 0))
    expected = 0.5 if said == "step-000600-dev" else content["metrics"][0]["value"]
    assert trial.value("heldout_loss") == expected
    (kept,) = evaluated(trial.folder, trial.record, "samples.parquet").values()
    assert kept.parent.name == (said or "step-000600")


def test_trials_that_were_validated_by_the_loss_alone_are_not_said_to_be_without_validation(tmp_path):
    """As those of before the error was logged."""
    folder = write_sweep(tmp_path / "s")
    for log in (folder / "trials").glob("*/metrics.jsonl"):
        log.write_text(log.read_text().replace("validation/heldout_error", "validation/heldout_loss"))
    text = words(render(RecordedSweep.read(folder)))
    assert "Held-out error: no finished trial logged one." in text
    assert "No finished trial logged a held-out error" in text
    assert "logged a validation" not in text


def test_an_arm_that_changes_more_than_its_factor_is_flagged_in_red(tmp_path):
    two = {**ARMS["B"], "differences": {"tread.enabled": [False, True], "train.batch_size": [32, 16]}}
    content = describe({**ARMS, "B": {**two, "undeclared": ["train.batch_size"]}})
    page = render(RecordedSweep.read(write_sweep(tmp_path / "s", content)))
    (banner,) = re.findall(r'<p class="banner bad"[^>]*>(.*?)</p>', page)
    assert "B differs from A in more than its factor: train.batch_size" in banner
    text = words(page)
    assert "⚑ more than its factor" in text
    assert "(not declared)" in text
    assert "the verdict covers all of it together" in text


def test_cohorts_are_never_pooled(tmp_path):
    other = {"cohort": {**COHORT, "commit": "9999fff"}}
    # of another commit, and so much worse that pooling would show
    trials = {("B", seed): {**other, "kind": (5.0, 0.3, 4.0, 6.0)} for seed in (1, 2)}
    sweep = RecordedSweep.read(write_sweep(tmp_path / "s", trials=trials))
    first, second = split_cohorts(sweep)
    assert (len(first.trials), len(second.trials)) == (13, 2)
    assert second.traits == {"commit": "9999fff"}
    metrics = sweep_json(sweep)["metrics"]
    assert {one["cohort"]: one["n"] for one in metrics if one["arm"] == "B"} == {1: 1, 2: 0}
    text = words(render(sweep))
    assert "The finished trials are of 2 cohorts" in text
    assert "Cohort 2: commit 9999fff" in text


@pytest.mark.parametrize(
    ("cohort", "doubt"),
    [
        ({**COHORT, "commit": "unknown", "dirty": "unknown"}, "commit is unknown"),
        ({**COHORT, "dirty": True}, "the code had uncommitted changes"),
        ({"torch": "2.15.0"}, "the code is unknown"),
        (None, "the trials did not record them"),
        ({"code": "0123", "dataset": "fe", "torch": "2.15.0", "device": "cpu", "threads": 1}, ""),
    ],
)
def test_unknown_code_is_not_called_equal(cohort, doubt, tmp_path):  # trap 32
    trials = {(arm, seed): {"cohort": cohort} for arm in ARMS for seed in (0, 1, 2, 100, 101, 102)}
    text = words(render(RecordedSweep.read(write_sweep(tmp_path / "s", trials=trials))))
    assert ("environment cannot be told" in text) == bool(doubt)
    assert doubt in text


def test_trials_measured_in_different_ways_are_not_compared(tmp_path):
    folder = write_sweep(tmp_path / "s")
    for path in (folder / "trials").glob("D-*/validation_outputs/*/report.json"):
        content = json.loads(path.read_text())
        content["metrics"][0]["settings"] |= {"steps": 50}
        path.write_text(json.dumps(content))
    assert verdicts(folder)["D"] == "no verdict"
    assert "measured with different settings" in words(render(RecordedSweep.read(folder)))


def test_guidance_may_be_what_the_arms_differ_in(tmp_path):
    arms = {
        "g1": {"role": "baseline", "against": None},
        "g2": {
            "role": "arm",
            "against": "g1",
            "factor": "guidance",
            "differences": {"evaluate.conditions.text": [1.0, 2.0]},
        },
    }
    folder = write_sweep(tmp_path / "s", describe(arms, factors={"guidance": ["evaluate.conditions"]}))
    for path in (folder / "trials").glob("*/validation_outputs/*/report.json"):
        content = json.loads(path.read_text())
        content["metrics"][0]["settings"] |= {"guidance": 1.0 if "g1-" in str(path) else 2.0}
        path.write_text(json.dumps(content))
    assert verdicts(folder)["g2"] in ("equivalent", "inconclusive")


def test_concurrent_trials_make_no_claims_about_time(tmp_path):
    folder = write_sweep(tmp_path / "s", describe(concurrent=2, time_claims=False))
    text = words(render(RecordedSweep.read(folder)))
    assert "No claims about time" in text
    assert "over minutes" not in text
    assert "against minutes" not in text
    assert "Iterations per second. Not answered: trials ran at the same time" in text
    assert "Peak memory. A 5.99 GB, B 4.41 GB" in text  # of a process of its own
    shared = describe(concurrent=2, time_claims=False, fractional=True)
    text = words(render(RecordedSweep.read(write_sweep(tmp_path / "f", shared))))
    assert "Peak memory. Not answered: trials shared a device" in text
    assert "against peak memory" not in text


def test_the_declared_questions_are_answered(html):
    text = words(html)
    assert "A–B: What does TREAD save?" in text
    assert re.search(r"Peak memory\. A 5.99 GB, B 4.41 GB: 0.73\d* \[.*?\] times as much; less, over 3 seeds", text)
    assert re.search(r"Iterations per second\. A 4.00 a second, B 5.20 a second: 1.30 \[1.30, 1.30\] times", text)
    assert re.search(r"Slope of ln\(held-out error\).*?; steeper, over 3 seeds", text)
    assert "C–D: What of the reconstruction? LPIPS. Not answered: skipped: no backbone weights." in text
    assert re.search(r"PSNR\. C 11\.\d+, D 11\.\d+: difference .*?; 3 seeds do not tell them apart", text)


def test_a_sweep_planned_before_questions_has_none(tmp_path):
    content = describe()
    del content["questions"]
    page = render(RecordedSweep.read(write_sweep(tmp_path / "s", content)))
    assert "The questions" not in page


def test_other_metrics_are_bold_only_where_their_interval_excludes_zero(html):
    (row,) = re.findall(r"<tr><th scope=\"row\">PSNR.*?</tr>", html)
    cells = re.findall(r"<td.*?</td>", row)
    assert ["<b>" in cell for cell in cells] == [False, False, True, False, False]


def test_slopes_and_equal_steps_and_time_are_what_they_say(folder, tmp_path):
    sweep = RecordedSweep.read(folder)
    (cohort,) = split_cohorts(sweep)
    for trial in cohort.trials:
        (first, low), *_, (last, high) = trial.curve("validation/heldout_error")
        assert slope(trial) == pytest.approx(np.log(high / low) / np.log(last / first))  # a pure power law
    steps, minutes = (at_equal(sweep, cohort, axis) for axis in ("step", "minutes"))
    assert steps.at == STEPS
    assert minutes.at == pytest.approx(STEPS / 5.2 / 60)  # arm B is the first to end
    trial = next(one for one in cohort.trials if (one.arm, one.seed) == ("A", 1))
    points = trial.curve("validation/heldout_error")
    expected = np.interp(STEPS / 5.2 * 4.0, *zip(*points))
    assert minutes.values["A"][1] == pytest.approx(expected)
    assert minutes.values["A"][1] > steps.values["A"][1]
    (first,) = (one for one in minutes.contrasts if one.arm.name == "B")
    assert first.comparison.interval.value == pytest.approx(
        np.mean([minutes.values["B"][seed] - minutes.values["A"][seed] for seed in range(3)])
    )


def factorial_arms():
    arms = {"A": {"role": "baseline", "against": None}}
    settings = {
        "tread": {"tread.enabled": [False, True]},
        "optimizer": {"optimizer.type": ["adamw", "muon"]},
        "repa": {"repa.enabled": [False, True]},
    }
    names = {"T": "A", "M": "A", "TM": "T", "R": "A", "TR": "T", "MR": "M", "TMR": "TM"}
    of = {"T": "tread", "M": "optimizer", "R": "repa"}
    for name, against in names.items():
        factor = of[next(letter for letter in name if letter not in (against if against != "A" else ""))]
        arms[name] = {"role": "arm", "against": against, "factor": factor, "differences": settings[factor]}
    return arms


def test_a_full_factorial_has_effects_and_interactions(tmp_path):
    kinds = {"A": 0.50, "T": 0.45, "M": 0.40, "TM": 0.30, "R": 0.50, "TR": 0.45, "MR": 0.40, "TMR": 0.30}
    trials = {(arm, seed): {"kind": (loss, 0.3, 4, 6)} for arm, loss in kinds.items() for seed in range(3)}
    folder = write_sweep(tmp_path / "s", describe(factorial_arms(), aa_seeds=[]), trials=trials)
    effects = {tuple(one["factors"]): one for one in sweep_json(RecordedSweep.read(folder))["effects"]}
    assert len(effects) == 7
    assert effects["tread",]["value"] == pytest.approx(-0.075, abs=0.005)
    assert effects["optimizer",]["value"] == pytest.approx(-0.125, abs=0.005)
    assert effects["repa",]["value"] == pytest.approx(0, abs=0.005)
    assert effects["optimizer", "tread"]["value"] == pytest.approx(-0.025, abs=0.005)
    text = words(render(RecordedSweep.read(folder)))
    assert "optimizer × tread interaction" in text


def test_a_chain_has_no_interactions_and_says_so(folder, html):
    sweep = RecordedSweep.read(folder)
    assert factorial(sweep, split_cohorts(sweep)[0]).effects == ()
    assert "4 of the 8 combinations of optimizer, repa, tread are arms" in words(html)


def test_pictures_are_arm_by_step_of_the_same_samples(html, folder, tmp_path):
    cells = re.findall(r'<img src="(data:image/webp[^"]*)" height="104" alt="([^"]*)"', html)
    assert len(cells) == 2 * 5 * 3
    assert "A/A at step 600" in {alt for _, alt in cells}
    with Image.open(folder / "trials" / "A-seed0" / "visual_debug" / "step-000600" / "grid.png") as sheet:
        cut = cut_out(sheet)
    assert list(cut) == ["real", "all"]
    assert cut["real"]["1b" * 16].size == (96, 160)  # enlarged as on the sheet
    y, x = np.mgrid[:80, :48]
    clean = np.stack([4 * x % 256, 3 * y % 256, 128 + 0 * x], -1).repeat(2, 0).repeat(2, 1)
    assert np.array_equal(np.asarray(cut["real"]["1b" * 16]), clean)
    none = words(render(RecordedSweep.read(write_sweep(tmp_path / "s"))))
    assert "set visual_debug.every_steps" in none


def test_an_unfinished_sweep_says_so(tmp_path):
    leave_out = [("D", 0), ("D", 1), ("D", 2)]
    sweep = RecordedSweep.read(
        write_sweep(tmp_path / "s", leave_out=leave_out, trials={("C", 2): {"status": "running"}})
    )
    text = words(render(sweep))
    assert "This sweep is not finished: 11 of 15 trials have finished, 1 running, 3 not started" in text
    assert verdicts(sweep.folder)["D"] == "no verdict"
    empty = words(
        render(RecordedSweep.read(write_sweep(tmp_path / "e", leave_out=[(a, s) for a in ARMS for s in range(103)])))
    )
    assert "No trial has finished" in empty


def test_a_repeat_that_differs_is_an_alarm(tmp_path):
    trials = {("A/A", seed): {"kind": (0.9, 0.3, 4, 6)} for seed in (100, 101, 102)}
    page = render(RecordedSweep.read(write_sweep(tmp_path / "s", trials=trials)))
    assert "The baseline differs from its own repeat" in words(page)
    assert 'class="banner bad"' in page


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("sweep.json", lambda path: path.write_text(path.read_text()[:100])),
        ("sweep.json", lambda path: path.write_text('{"schema": 1}')),
        ("sweep.json", lambda path: path.write_text('{"schema": 99}')),
        ("sweep.json", lambda path: path.write_text(path.read_text().replace('["A", "B"]', '["A", "Z"]'))),
        ("trials/B-seed1/trial.json", lambda path: path.write_text("[]")),
        ("trials/B-seed1/trial.json", lambda path: path.write_text("{}")),
        ("trials/B-seed1/metrics.jsonl", lambda path: path.write_text("{\n" + path.read_text())),
        ("trials/B-seed1/validation_outputs/step-000600/report.json", lambda path: path.write_text("{}")),
        ("trials/B-seed1/visual_debug/step-000600/grid.png", None),
    ],
)
def test_damaged_files_are_named(folder, tmp_path, name, damage):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    name = name if damage else name.replace("seed1", "seed0")  # the one that is shown
    (damage or (lambda path: path.write_bytes(path.read_bytes()[:300])))(copy / name)
    with pytest.raises(DataError, match=re.escape(str(copy / name))):
        render(RecordedSweep.read(copy))


def test_bands_span_the_seeds_and_fronts_are_not_beaten():
    line, spread = band([[(0, 1.0), (10, 3.0)], [(0, 2.0), (10, 5.0)]])
    assert line == [(0, 1.5), (10, 4.0)]
    assert spread == [(0, 1.0, 2.0), (10, 3.0, 5.0)]
    line, spread = band([[(0, 0.0), (10, 10.0)], [(5, 5.0), (20, 20.0)]])  # only where both have values
    assert line == [(5, 5.0), (10, 10.0)]
    assert band([[(0, 0.0), (1, 1.0)], [(5, 5.0), (6, 6.0)]]) == ([], [])
    points = {"a": (1.0, 5.0), "b": (2.0, 4.0), "c": (3.0, 4.5), "d": (4.0, 1.0)}
    assert front(points, "min") == ["a", "b", "d"]
    assert front(points, "max") == ["a"]


@pytest.mark.slow
def test_a_browser_opens_it_from_disk_and_on_a_phone(folder, tmp_path):
    """Chromium renders it in light and dark: no request, no complaint, nothing too wide."""
    lost = {("B", 0): {"status": "failed", "reason": "x" * 300}}
    pages = [write_sweep_report(folder, tmp_path / "a.html")[0]]
    pages += [write_sweep_report(write_sweep(tmp_path / "s", trials=lost), tmp_path / "b.html")[0]]
    with chromium(tmp_path / "profile") as port:
        for page in pages:
            papers = set()
            for width, scheme in ((1280, "light"), (360, "light"), (390, "dark")):
                seen = look(port, page, width, scheme)
                assert seen["title"] == "ablation · sweep · nanodit"
                assert seen["broken"] == 0
                assert (seen["inner"], seen["scroll"] <= width) == (width, True), seen["wide"]
                assert not seen["wide"]
                assert [url for url in seen["requested"] if not url.startswith("data:")] == [page.as_uri()]
                assert seen["complaints"] == []
                papers.add(seen["paper"])
            assert len(papers) == 2
