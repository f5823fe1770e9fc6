"""The dataset's page begins with pictures, then says what needs a decision, with the command that carries it out."""

import re

import pyarrow as pa
import pytest

from nanodit.storage import open_storage
from prep.__main__ import parser
from prep.dataset.reader import Dataset
from prep.passes.advice import Advice, advise
from prep.report.decisions import decisions
from prep.report.report import render
from tests.browser import chromium, look
from tests.prep.report.test_report import prepare

PLACES = """(() => {
  const ends = what => [...document.querySelectorAll(what)].map(one => one.getBoundingClientRect().bottom + scrollY);
  return {pictures: ends('.mosaic img'), heading: ends('#decisions h2')};
})()"""
NONE = {"split": 0}


@pytest.fixture(scope="module")
def dataset(figures_folder, tmp_path_factory):
    """Figures as they are drawn."""
    folder = tmp_path_factory.mktemp("decisions")
    source = folder / "source"
    source.mkdir()
    for path in sorted(figures_folder.glob("*"))[:44]:
        (source / path.name).write_bytes(path.read_bytes())
    return prepare(source, folder / "dataset")


@pytest.fixture(scope="module")
def html(dataset):
    return render(open_storage(dataset))


def test_pictures_come_first_then_decisions_then_the_rest(html):
    order = [html.index(part) for part in ('class="mosaic"', 'id="decisions"', 'class="tiles"', "<h2>Contact sheets")]
    assert order == sorted(order)
    assert html.partition('id="decisions"')[0].count("<img") == 18


def test_each_decision_has_its_command_and_its_place_on_the_page(html):
    part = re.sub("<span>([^<]*)</span>", r"\1", html.partition('id="decisions"')[2].partition("</section>")[0])
    assert len(re.findall("<li", part)) == len(re.findall('<pre class="command">[^<]', part)) > 0
    assert "--init-from CHECKPOINT</pre>" in part  # thirty are few
    for place in re.findall('href="#([a-z]+)"', part):
        assert f'id="{place}"' in html


def test_where_nothing_needs_a_decision_the_page_says_train(html, dataset, monkeypatch):
    monkeypatch.setattr("prep.passes.advice.FEW", 0)
    table = Dataset(open_storage(dataset)).table
    assert decisions([one for one in advise(table, {}) if "bucket" not in one.words], [], None, NONE) == []
    monkeypatch.setattr("prep.report.report.advise", lambda table, buckets: [])
    monkeypatch.setattr("prep.report.report.decisions", lambda *parts: [])
    quiet = re.sub("<span>([^<]*)</span>", r"\1", render(open_storage(dataset)))
    assert "<h2>Nothing needs a decision</h2>" in quiet
    assert "nanodit train run --config CONFIG.yaml dataset=DATASET output=RUN" in quiet


def test_a_leak_comes_first_and_refusals_are_named():
    rejects = [{"reason": name, "count": 3} for name in ("truncated", "duplicate", "blurred", "caption_empty")]
    captions = {"repeated": {"total": 1, "samples": 4}}
    leak, refused, repeated = decisions([], rejects, captions, {"split": 2})
    assert leak["bad"]
    assert leak["words"] == "The holdout leaks: 2 groups of near duplicates lie on both sides of the split"
    assert refused["words"].startswith("6 sources were refused: 3 truncated, 3 caption_empty. ")  # nobody chose these
    assert repeated["words"].startswith("1 text is shared by 4 images")


@pytest.mark.parametrize(
    ("words", "place"),
    [
        ("2 images lose more than 50% of their area to the crop: caption.png (60%), near duplicates.png", "crops"),
        ("1 holdout images are mirrored, brighter or cropped in train too: they were published before", ""),
        ("3 of 40 samples are near duplicates of each other (group 0f)", "duplicates"),
        ("3 captions were longer than t5.max_tokens and were cut", "captions"),
    ],
)
def test_a_decision_is_linked_to_what_it_is_about(words, place):
    assert decisions([Advice(words, "nanodit prep run")], [], None, NONE)[0]["place"] == place


def test_every_command_is_one_that_the_program_knows(dataset):
    table = Dataset(open_storage(dataset)).table
    count = len(table)
    spoilt = {
        "t5_truncated": [True] * count,
        "split": ["holdout"] + ["train"] * (count - 1),
        "duplicate_group": ["one"] * count,
        "altered_twin": ["one"] * count,
        "caption_flip": [None] * count,
        "crop_right": [left + 1 for left in table["crop_left"].to_pylist()],
    }
    for name, values in spoilt.items():
        own = table.column_names.index(name) if name in table.column_names else None
        column = pa.array(values, table[name].type if own is not None else pa.string())
        table = table.append_column(name, column) if own is None else table.set_column(own, name, column)
    buckets = {table["bucket"][0].as_py(): {"samples": 1}}
    said = decisions(advise(table, buckets), [{"reason": "truncated", "count": 1}], None, {"split": 1})
    commands = [one["command"].partition("&& ")[2] or one["command"] for one in said]
    assert len(commands) == 10  # few, alone, torn, altered, alike, cropped, cut, not mirrored; a leak and a refusal
    for command in commands:
        program, package, *arguments = command.split()
        assert program == "nanodit"
        if package == "prep":
            parser().parse_args(arguments)


@pytest.mark.slow
def test_pictures_and_the_first_decision_are_on_the_first_screen(html, tmp_path):
    page = tmp_path / "report.html"
    page.write_text(html)
    with chromium(tmp_path / "profile") as port:
        for width, height in ((1280, 800), (390, 844), (320, 844)):
            seen = look(port, page, width, "light", PLACES)
            assert seen["scroll"] <= width, seen["wide"]
            assert not seen["wide"]
            assert width == 320 or max(seen["asked"]["pictures"] + seen["asked"]["heading"]) < height
