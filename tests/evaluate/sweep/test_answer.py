"""A sweep's page begins with its answer, and the baseline's repeat comes last."""

import json
import re

import pytest

from evaluate.sweep.files import RecordedSweep
from evaluate.sweep.report import render
from tests.evaluate.sweep.test_report import KINDS, describe, write_sweep


def answer(folder) -> str:
    html = render(RecordedSweep.read(folder))
    assert html.index('class="answer"') < html.index("<h2>")
    return re.search('<p class="answer">(.*?)</p>', html, re.S)[1]


def pair(kind, **changed):
    """A sweep of A and B, where the trainings of B are of another ``kind``."""
    arms = {"A": {"role": "baseline", "against": None}, "B": {"role": "arm", "against": "A", "factor": "tread"}}
    trials = {("B", seed): {"kind": kind, **changed} for seed in (0, 1, 2)}
    return {"content": describe(arms, aa_seeds=[]), "trials": trials}


def test_what_beats_what_by_how_much_is_the_first_sentence(tmp_path):
    said = answer(write_sweep(tmp_path / "sweep"))
    assert re.match(r"C beats B by 0\.0\d+ \[0\.0\d+, 0\.0?\d+\], in held-out flow loss\. ", said)
    assert said.endswith("B is equivalent to A, D is equivalent to C: any difference is within ±0.02.")


def test_an_arm_that_is_worse_loses(tmp_path):
    said = answer(write_sweep(tmp_path / "sweep", **pair((0.62, *KINDS["A"][1:]))))
    assert re.match(r"B loses to A by 0\.1\d+ \[", said)
    folder = write_sweep(tmp_path / "flagged", **pair((0.62, *KINDS["A"][1:])))
    content = json.loads((folder / "sweep.json").read_text())
    content["arms"]["B"]["undeclared"] = ["train.lr"]
    (folder / "sweep.json").write_text(json.dumps(content))
    assert answer(folder).startswith("B with more than its factor changed, loses to A by")


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_where_nothing_separates_the_arms_that_is_the_answer(seeds, tmp_path):
    given = pair(KINDS["A"])
    given["content"] |= {"seeds": list(range(seeds)), "primary": {"metric": "heldout_loss", "mode": "min"}}
    said = answer(write_sweep(tmp_path / "sweep", **given))
    assert said.startswith("Nothing separates B from A (" if seeds > 1 else "Undecided: B against A (")
    assert ("; run at least three training seeds." in said) == (seeds == 1)


def test_a_remark_on_seeds_names_the_comparison_that_it_is_about(tmp_path):
    arms = {"A": {"role": "baseline", "against": None}}
    arms |= {name: {"role": "arm", "against": "A", "factor": "tread"} for name in ("B", "C")}
    trials = {(name, seed): {"kind": KINDS["A"]} for name in ("B", "C") for seed in range(3)}
    content = describe(arms, aa_seeds=[]) | {"primary": {"metric": "heldout_loss", "mode": "min"}}
    said = answer(write_sweep(tmp_path / "sweep", content=content, trials=trials))
    assert said.startswith("Nothing separates B from A (")
    assert "C from A (" in said
    assert "; for B against A, " in said


def test_where_nothing_could_be_tested_nothing_is_said_of_a_difference(tmp_path):
    given = pair((0.62, *KINDS["A"][1:]))
    given["trials"]["B", 1] |= {"status": "failed", "reason": "out of memory"}
    said = answer(write_sweep(tmp_path / "sweep", **given))
    assert said.startswith("Undecided: B against A (")
    assert said.endswith("; unequally many trials failed, and the others are what survived.")


def test_an_answer_that_may_change_says_so(tmp_path):
    assert answer(write_sweep(tmp_path / "sweep", leave_out=[("D", 2)])).startswith("Not finished; so far: C beats B")
    lonely = describe({"A": {"role": "baseline", "against": None}}, aa_seeds=[])
    assert answer(write_sweep(tmp_path / "one", lonely)).startswith("There is nothing to compare")


def test_the_repeat_of_the_baseline_comes_last_and_its_difference_is_a_doubt(tmp_path):
    content = describe()
    content["arms"] = {name: content["arms"][name] for name in ("A", "A/A", "B", "C", "D")}  # as sweep.json has them
    folder = write_sweep(tmp_path / "sweep", content)
    html = render(RecordedSweep.read(folder))
    arms = re.findall(r'<div class="who"><span class="arm [^"]*"><i></i>([^<]*)</span>', html)
    assert arms == ["B", "C", "D", "A/A"]
    assert list(RecordedSweep.read(folder).arms)[-1] == "A/A"
    trials = {("A/A", seed): {"kind": (0.9, *KINDS["A"][1:])} for seed in (100, 101, 102)}
    said = answer(write_sweep(tmp_path / "other", trials=trials))
    assert said.endswith("But the baseline differs from its own repeat (A/A).")
