"""Ties are half a win, near duplicates one prompt, catch trials in no rate, and who fails them is left out."""

from pathlib import Path

import pytest

from evaluate.statistics import intervals
from evaluate.votes.ballots import Votes
from evaluate.votes.tally import MOST_FAILED, count
from tests.evaluate.votes.made import answered, attentive, content


def votes(*chosen, group=1, pairs=16):
    page = content(pairs, group)
    return {
        Path(f"voter{place}.json"): Votes.model_validate(answered(page, one, f"{place:016x}"))
        for place, one in enumerate(chosen)
    }


def test_without_ties_the_interval_is_the_exact_one():
    tally = count(votes(attentive(["A"] * 14 + ["B"] * 2)))
    assert (tally.wins, tally.ties, tally.losses) == (14, 0, 2)
    exact = intervals.proportion([1] * 14 + [0] * 2, [1] * 16, [str(place) for place in range(16)])
    assert (tally.interval.value, tally.interval.n) == (14 / 16, 16)
    assert (tally.interval.low, tally.interval.high) == (exact.low, exact.high)
    assert tally.interval.low == pytest.approx(0.6165, abs=1e-4)  # Clopper and Pearson for 14 of 16
    assert tally.verdict == "A preferred"


def test_a_tie_is_half_a_win():
    tally = count(votes(attentive(["A"] * 4 + ["tie"] * 8 + ["B"] * 4)))
    assert (tally.wins, tally.ties, tally.losses) == (4, 8, 4)
    assert tally.interval.value == 0.5
    assert tally.interval.low < 0.5 < tally.interval.high
    assert (tally.verdict, tally.more) == ("undecided", None)


def test_ties_alone_decide_nothing():
    tally = count(votes(attentive(["tie"] * 16)))
    assert tally.interval.value == 0.5
    assert tally.interval.low < 0.5 < tally.interval.high  # no width of zero
    assert tally.verdict == "undecided"


def test_the_other_run_may_be_preferred_and_letters_are_those_of_the_report():
    mostly = votes(attentive(["B"] * 15 + ["A"]))
    assert count(mostly).verdict == "B preferred"
    turned = count(mostly, {"A": "D", "B": "C"})
    assert (turned.over, turned.under, turned.wins, turned.verdict) == ("C", "D", 15, "C preferred")
    assert turned.interval.value == 15 / 16


def test_near_duplicates_are_one_prompt():
    order = [trial["cluster"] for trial in content(32, 2)["trials"] if trial["kind"] == "pair"]
    groups = sorted(set(order))
    chosen = ["A" if groups.index(cluster) < 12 else "B" for cluster in order]
    tally = count(votes(attentive(chosen), group=2, pairs=32))
    alone = count(votes(attentive(["A"] * 24 + ["B"] * 8), pairs=32))
    assert tally.interval.value == alone.interval.value == 24 / 32
    assert (tally.interval.n, alone.interval.n) == (16, 32)
    assert tally.interval.low < alone.interval.low
    assert (tally.verdict, alone.verdict) == ("undecided", "A preferred")
    assert tally.more > 0


def test_two_voters_of_one_mind_are_no_more_prompts():
    one = count(votes(attentive(["A"] * 13 + ["B"] * 3)))
    two = count(votes(*(attentive(["A"] * 13 + ["B"] * 3) for _ in range(2))))
    assert two.wins == 2 * one.wins
    assert two.interval.n == one.interval.n == 16
    assert two.interval.high - two.interval.low > 0.8 * (one.interval.high - one.interval.low)


def test_few_prompts_have_no_interval():
    tally = count(votes(attentive(["A"] * 7), pairs=7))
    assert (tally.interval.low, tally.verdict) == (None, "undecided")
    assert "7 independent prompts" in tally.reason


def test_a_voter_who_does_not_look_is_left_out_and_named():
    careless = votes(attentive(["B"] * 16), lambda trial: "A" if trial["kind"] == "pair" else "tie")
    tally = count(careless)
    good, bad = tally.voters
    assert (bad.name, bad.catches, bad.failed, bad.left_out) == ("voter1.json", 2, 2, True)
    assert (good.failed, good.left_out, good.seconds) == (0, False, 2.5)
    assert (tally.wins, tally.losses) == (0, 16)
    assert tally.counted == [good]


@pytest.mark.parametrize(("failed", "out"), [(2, False), (3, True)])
def test_more_than_a_quarter_of_the_catch_trials_is_too_many(failed, out):
    places = iter(range(8))

    def answer(trial):
        if trial["kind"] == "pair":
            return "A"
        return "real" if next(places) >= failed else ({trial["left"], trial["right"]} - {"real"}).pop()

    voter = count(votes(answer, pairs=56)).voters[0]
    assert MOST_FAILED == 0.25
    assert (voter.catches, voter.failed, voter.left_out) == (8, failed, out)


def test_files_of_one_name_are_told_apart():
    (own,) = votes(attentive(["A"] * 16)).values()
    names = [voter.name for voter in count({Path("ann/votes.json"): own, Path("bob/votes.json"): own}).voters]
    assert names == [str(Path("ann/votes.json")), str(Path("bob/votes.json"))]


def test_nobody_left_is_no_verdict():
    tally = count(votes(lambda trial: "A"))
    assert (tally.interval, tally.wins, tally.verdict) == (None, 0, "undecided")
    assert tally.reason == "every voter is left out"
    assert count(votes(lambda trial: None)).reason == "nobody has answered yet"
