"""Files of votes may come from anybody: what is not exactly a page's votes is refused, with the file's name."""

import json
import os
from copy import deepcopy

import pytest

from evaluate.votes import ballots
from evaluate.votes.ballots import page_id, read_all, read_votes
from nanodit.errors import DataError
from tests.evaluate.votes.made import answered, attentive, content, write

PAGE = content()
VOTES = answered(PAGE, attentive(["A", "B", "tie", None] * 4))


def test_votes_are_read_as_they_were_given(tmp_path):
    votes = read_votes(write(tmp_path / "votes.json", VOTES))
    assert [trial.chosen for trial in votes.trials_of("pair")] == ["A", "B", None] * 4
    assert [trial.chosen for trial in votes.trials_of("catch")] == ["real"] * 2
    assert votes.page == PAGE["page"]


def test_a_page_is_named_by_what_it_shows_and_not_by_answers():
    assert page_id(VOTES) == page_id(PAGE) == PAGE["page"]
    as_javascript = json.loads(json.dumps(VOTES).replace("2.0,", "2,").replace("0.0", "0"))
    assert as_javascript["drawn"]["guidance"] is not VOTES["drawn"]["guidance"]
    assert page_id(as_javascript) == PAGE["page"]
    for name, value in (("seed", "1"), ("dataset", "x"), ("pictures", "x")):
        assert page_id({**PAGE, name: value}) != PAGE["page"]


def changed(*path, to):
    """Votes in which the value at a path is another one."""
    votes = deepcopy(VOTES)
    place = votes
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = to
    return json.dumps(votes).encode()


FIRST_PAIR = next(place for place, trial in enumerate(PAGE["trials"]) if trial["kind"] == "pair")
FIRST_CATCH = next(place for place, trial in enumerate(PAGE["trials"]) if trial["kind"] == "catch")
PAIR, CATCH = VOTES["trials"][FIRST_PAIR], VOTES["trials"][FIRST_CATCH]
HOSTILE = {
    "empty": b"",
    "no object": b"[]",
    "cut off": json.dumps(VOTES).encode()[:-40],
    "not UTF-8": b'{"schema": 1, "page": "\xff"}',
    "deep": b"[" * 100_000,
    "deep in a setting": changed("drawn", "sampler", to={"x": "DEEP"}).replace(b'"DEEP"', b"[" * 5000 + b"]" * 5000),
    "another schema": changed("schema", to=2),
    "an unknown key": changed("extra", to=1),
    "NaN": changed("drawn", "guidance", to=float("nan")),
    "NaN in a setting": changed("drawn", "sampler", to={"x": float("nan")}),
    "infinity in a setting": changed("drawn", "sampler", to={"x": "BIG"}).replace(b'"BIG"', b"1e999"),
    "endless digits": changed("drawn", "sampler", to={"x": "BIG"}).replace(b'"BIG"', b"9" * 6000),
    "endless digits of a step": changed("runs", "A", "step", to="BIG").replace(b'"BIG"', b"9" * 4000),
    "a surrogate in a setting": changed("drawn", "sampler", to={"x": "\ud800"}),
    "a number as text": changed("runs", "A", "step", to="100"),
    "a negative step": changed("runs", "A", "step", to=-1),
    "a third run": changed("runs", "C", to=VOTES["runs"]["A"]),
    "a single run": changed("runs", to={"A": VOTES["runs"]["A"]}),
    "a lone surrogate": changed("runs", "A", "run", to="\ud800"),
    "long text": changed("runs", "A", "run", to="x" * 5000),
    "an odd ballot": changed("ballot", to="../../x"),
    "a ballot with a line break": changed("ballot", to="0" * 16 + "\n"),
    "an unknown answer": changed("trials", FIRST_PAIR, "answer", to="A"),
    "an answer without its time": changed("trials", FIRST_PAIR, "milliseconds", to=None),
    "negative time": changed("trials", FIRST_PAIR, "milliseconds", to=-1),
    "endless time": changed("trials", FIRST_PAIR, "milliseconds", to=10**30),
    "a fraction of a time": changed("trials", FIRST_PAIR, "milliseconds", to=1.5),
    "a pair of one run": changed("trials", FIRST_PAIR, "right", to=PAIR["left"]),
    "a catch without the truth": changed("trials", FIRST_CATCH, to={**CATCH, "left": "A", "right": "B"}),
    "sides exchanged": changed("trials", FIRST_PAIR, to={**PAIR, "left": PAIR["right"], "right": PAIR["left"]}),
    "another cluster": changed("trials", FIRST_PAIR, "cluster", to="x"),
    "a trial twice": changed("trials", to=[*VOTES["trials"], PAIR]),
    "a trial less": changed("trials", to=VOTES["trials"][1:]),
    "no trials": changed("trials", to=[]),
    "another dataset": changed("dataset", to="x"),
    "another page": changed("page", to="f" * 16),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_not_exactly_votes_is_refused(name, tmp_path):
    path = tmp_path / "votes.json"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(DataError) as refused:
        read_votes(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert len(str(refused.value)) < 500


def test_a_large_file_is_not_read(tmp_path, monkeypatch):
    path = write(tmp_path / "votes.json", VOTES)
    monkeypatch.setattr(ballots, "LARGEST", path.stat().st_size)
    read_votes(path)
    monkeypatch.setattr(ballots, "LARGEST", path.stat().st_size - 1)
    with pytest.raises(DataError, match="larger than"):
        read_votes(path)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # reading one would wait for ever
    for path in (tmp_path, tmp_path / "missing.json", tmp_path / "pipe"):
        with pytest.raises(DataError, match="is no file"):
            read_votes(path)


def test_votes_on_two_pages_are_not_counted_together(tmp_path):
    one = write(tmp_path / "one.json", VOTES)
    other = write(tmp_path / "other.json", answered(content(8), lambda trial: trial["left"], "1" * 16))
    with pytest.raises(DataError, match=f"other.json: these are votes on page .* but {one}"):
        read_all([one, other])


def test_one_voter_counts_once(tmp_path):
    paths = [write(tmp_path / name, VOTES) for name in ("early.json", "late.json")]
    with pytest.raises(DataError, match=r"late\.json and .*early\.json are of one voter"):
        read_all(paths)
    theirs = write(tmp_path / "theirs.json", {**VOTES, "ballot": "1" * 16})
    assert list(read_all([paths[0], theirs])) == [paths[0], theirs]
