"""Sides are balanced and drawn by the seed, and catch trials cannot be mistaken."""

import pytest

from evaluate.votes.trials import catches_for, make_trials
from tests.evaluate.votes.made import rows


def of(kind, trials):
    return [trial for trial in trials if trial["kind"] == kind]


@pytest.mark.parametrize("count", [2, 3, 16, 64])
def test_every_prompt_is_asked_once_and_sides_are_balanced(count):
    trials = make_trials(rows(count), rows(20, 1000), "seed")
    pairs = of("pair", trials)
    assert sorted(trial["key"] for trial in pairs) == [row["key"] for row in rows(count)]
    left = [trial["left"] for trial in pairs]
    assert left.count("A") == (count + 1) // 2
    assert all({trial["left"], trial["right"]} == {"A", "B"} and trial["donor"] is None for trial in pairs)
    assert len(of("catch", trials)) == catches_for(count) >= 2


def test_one_trial_in_eight_is_a_catch():
    assert catches_for(56) / (56 + catches_for(56)) == 1 / 8


def test_the_seed_alone_decides():
    assert make_trials(rows(16), rows(5, 1000), "a") == make_trials(rows(16), rows(5, 1000), "a")
    one, other = (make_trials(rows(16), rows(5, 1000), seed) for seed in "ab")
    assert {trial["key"]: trial["left"] for trial in one} != {trial["key"]: trial["left"] for trial in other}


def test_who_stops_early_has_met_catch_trials():
    trials = make_trials(rows(64), rows(20, 1000), "seed")
    places = [place for place, trial in enumerate(trials) if trial["kind"] == "catch"]
    assert all(place <= (number + 1) * len(trials) / len(places) for number, place in enumerate(places))
    assert len({trials[place]["left"] for place in places} & {"real"}) == 1
    assert len({trials[place]["right"] for place in places} & {"real"}) == 1  # on either side


def test_a_catch_shows_the_truth_beside_a_picture_of_a_foreign_prompt():
    prompts = rows(16, group=2)
    groups = {row["key"]: row["duplicate_group"] for row in prompts}
    buckets = {row["key"]: row["bucket"] for row in (*prompts, *rows(8, 1000))}
    catches = of("catch", make_trials(prompts, rows(8, 1000), "seed"))
    assert {trial["key"] for trial in catches} <= {row["key"] for row in rows(8, 1000)}  # none that is compared
    shown = [{trial["left"], trial["right"]} for trial in catches]
    assert all("real" in sides for sides in shown)
    assert {"A", "B"} <= set().union(*shown)  # both runs stand in for what is wrong
    for trial in catches:
        assert groups[trial["donor"]] != trial["cluster"]
        assert buckets[trial["donor"]] == buckets[trial["key"]]


def test_without_other_samples_catches_are_of_compared_prompts():
    prompts = rows(16, group=2)
    groups = {row["key"]: row["duplicate_group"] for row in prompts}
    twin = {**rows(1, 1000)[0], "duplicate_group": "group3"}  # shown already, but for its near duplicate
    for trial in of("catch", make_trials(prompts, [twin], "seed")):
        assert trial["key"] in groups
        assert groups[trial["donor"]] != groups[trial["key"]]


def test_the_foreign_prompt_has_the_fewest_words_in_common():
    captions = ("a red dog", "a red dog runs", "blue sky")
    prompts = [{**row, "caption": caption, "bucket": "64x64"} for row, caption in zip(rows(3), captions)]
    asked = {**rows(1, 1000)[0], "caption": "a red dog", "bucket": "64x64"}
    catches = of("catch", make_trials(prompts, [asked], "seed"))
    assert [trial["donor"] for trial in catches if trial["key"] == asked["key"]] == [prompts[2]["key"]]


def test_near_duplicates_alone_make_no_catch():
    with pytest.raises(ValueError, match="near duplicates"):
        make_trials(rows(4, group=4), [], "seed")
