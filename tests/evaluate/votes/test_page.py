"""A browser votes with keys and buttons: nothing is lost, nothing given away, nothing leaves the page."""

import asyncio
import json
import re
from pathlib import Path

import numpy as np
import pytest

from evaluate.votes import page as pages
from evaluate.votes.ballots import page_id, read_votes
from evaluate.votes.page import Shown, render
from nanodit.errors import ResourceError
from tests.browser import chromium, open_tab
from tests.evaluate.votes.made import content, shown

PAGE = content()
IDENTITY = PAGE["page"]


@pytest.fixture(scope="module")
def html() -> str:
    given = {name: value for name, value in PAGE.items() if name != "page"}
    return render(given, shown(PAGE))[0]


def test_the_same_trials_make_the_same_bytes(html):
    assert render(PAGE, shown(PAGE))[0] == html
    assert html.count("data:image/png;") == 2 * 12  # what is small stays as it is
    assert html.count("data:image/webp;") == 2 * 6


def test_the_file_does_not_say_what_is_where(html):
    without = re.sub(r"base64,[^\"]*|\"sealed\": \"[^\"]*\"", "", html)
    trial = PAGE["trials"][0]
    for word in (
        "runs/first",
        "runs/second",
        "aaaa",
        "bbbb",
        '"A"',
        '"B"',
        '"real"',
        '"catch',
        trial["key"],
        "cluster",
    ):
        assert word not in without, word


def test_one_script_may_run_and_words_are_no_markup(html):
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-")
    assert "'unsafe-inline'; script" in policy
    assert "unsafe-eval" not in policy
    assert len(re.findall(r"<script(?: type=\"application/json\" id=\"page\")?>", html)) == 2
    assert "<i>words" not in html
    assert r"\u003ci\u003ewords" in html
    hostile = [Shown('</script><script>document.title="owned"</script>', *[np.zeros((8, 8, 3), np.uint8)] * 2)]
    assert render({**PAGE, "trials": PAGE["trials"][:1]}, hostile)[0].count("</script>") == 2


def test_large_pages_get_smaller_pictures(monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (300, 600, 3), np.uint8)
    given, trials = {**PAGE, "trials": PAGE["trials"][:1]}, [Shown("x", pixels, pixels)]
    html, side = render(given, trials)
    assert side == 1024
    assert '"height": 300, "width": 600' in html
    monkeypatch.setattr(pages, "LIMIT", len(html) - 1)
    smaller, side = render(given, trials)
    assert side == 512
    assert '"height": 300, "width": 600' in smaller  # shown as large as before
    monkeypatch.setattr(pages, "LIMIT", 1000)
    with pytest.raises(ResourceError, match="--prompts"):
        render(given, trials)


WATCH = "document.getElementById('prompt').textContent + document.getElementById('count').textContent"
# what a curious voter can see: words and attributes, but for pictures and what is sealed
SEEN = r"""(() => {
  const copy = document.documentElement.cloneNode(true);
  copy.querySelectorAll('script, style').forEach(one => one.remove());
  copy.querySelectorAll('img').forEach(one => one.removeAttribute('src'));
  return copy.outerHTML;
})()"""
BUTTONS = "[...document.querySelectorAll('button')].map(one => one.textContent.trim())"
FOCUS = "document.querySelector('[data-answer=right]').focus()"


async def saved(folder: Path) -> Path:
    """The file of votes, once the browser has written it."""
    path = folder / f"votes-{IDENTITY}.json"
    for _ in range(200):
        if path.exists() and path.stat().st_size:
            return path
        await asyncio.sleep(0.05)
    raise AssertionError(f"{path} was not saved")


async def vote_in(port: str, page: Path, folder: Path) -> None:
    count = len(PAGE["trials"])
    async with open_tab(port) as tab:
        await tab.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
        await asyncio.sleep(3)  # in its first moments Chromium may lose what a page stores: 5 of 24 times without this
        await tab.load(page)
        assert await tab.evaluate(WATCH) == f"prompt 0 of <i>words</i>1 of {count}"
        seen = [await tab.evaluate(SEEN)]
        assert await tab.evaluate(BUTTONS) == ["Back", "Save", "1 is better", "Equal", "2 is better",
                                               "Save votes", "Let somebody else vote"]  # fmt: skip
        keys = ["ArrowLeft", "ArrowRight", " ", "1", "2", "ArrowDown"]
        await tab.press(*keys)
        assert await tab.evaluate(WATCH) == f"prompt 6 of <i>words</i>7 of {count}"
        await tab.load(page)  # nothing is lost
        assert await tab.evaluate(WATCH) == f"prompt 6 of <i>words</i>7 of {count}"
        await tab.press("Backspace", "Backspace")
        pressed = await tab.evaluate("document.querySelector('[aria-pressed=true]').textContent")
        assert pressed == "2 is better"
        await tab.press("1")  # thought better of
        await tab.press("ArrowDown")
        await tab.click("[data-answer=left]")
        await tab.press(" ")  # no button kept the focus: a tie
        await tab.evaluate(FOCUS)
        await tab.press(" ")  # presses the button that was chosen by hand
        assert await tab.evaluate(WATCH) == f"prompt 9 of <i>words</i>10 of {count}"
        await tab.click("#save")
        early = await saved(folder)
        votes = read_votes(early)
        answers = ["left", "right", "tie", "left", "left", "tie", "left", "tie", "right"]
        assert [trial.answer for trial in votes.trials] == answers + [None] * (count - 9)
        assert page_id(json.loads(early.read_text())) == IDENTITY
        early.unlink()
        for _ in range(count - 9):
            await tab.press("2")
            seen.append(await tab.evaluate(SEEN))
        assert await tab.evaluate("document.getElementById('count').textContent") == f"{count} of {count} answered"
        await tab.press("1", " ")  # at the end they do nothing
        await tab.click("#save-end")
        late = read_votes(await saved(folder))
        assert [trial.answer for trial in late.trials] == answers + ["right"] * (count - 9)
        assert late.ballot == votes.ballot
        content_of = late.model_dump(mode="json", by_alias=True)
        assert [trial["left"] for trial in content_of["trials"]] == [trial["left"] for trial in PAGE["trials"]]
        assert content_of["runs"] == PAGE["runs"]
        assert all(0 <= trial.milliseconds < 60_000 for trial in late.trials)
        (folder / f"votes-{IDENTITY}.json").unlink()
        await tab.press("Backspace", "1")  # the last answer is in no file
        await tab.load(page)
        await tab.evaluate("window.confirm = () => false")
        await tab.click("#again")
        assert await tab.evaluate("document.getElementById('count').textContent") == f"{count} of {count} answered"
        await tab.click("#save-end")
        assert read_votes(await saved(folder)).trials[-1].answer == "left"
        (folder / f"votes-{IDENTITY}.json").unlink()
        await tab.click("#again")  # nothing would be lost
        await tab.press("1")
        await tab.click("#save")
        other = read_votes(await saved(folder))
        assert other.ballot != votes.ballot
        assert [trial.answer for trial in other.trials] == ["left"] + [None] * (count - 1)
        for text in seen:
            assert not re.search(r"runs/|first|second|\breal\b|catch|cluster|key\d|\b[AB]\b|%", text), text
        local = ("data:", "blob:")
        assert {url for url in tab.requested if not url.startswith(local)} == {page.as_uri()}
        assert tab.complaints == []


async def vote_without_storage(port: str, page: Path) -> None:
    async with open_tab(port, 390, "dark") as tab:
        broken = "Object.defineProperty(window, 'localStorage', {get() { throw new Error('denied'); }})"
        await tab.call("Page.addScriptToEvaluateOnNewDocument", source=broken)
        await tab.load(page)
        await tab.press("1", "2")
        assert (await tab.evaluate(WATCH)).endswith(f"3 of {len(PAGE['trials'])}")
        assert "keeps nothing" in await tab.evaluate("document.body.innerText")
        assert await tab.evaluate("document.documentElement.scrollWidth") <= 390
        pictures = "[...document.images].map(one => one.getBoundingClientRect()).map(box => [box.top, box.bottom])"
        (top, bottom), (second, end) = await tab.evaluate(pictures)
        assert 0 < top < bottom <= second < end <= 800  # one below the other, both in view
        assert tab.complaints == []


async def click_twice(port: str, page: Path) -> None:
    async with open_tab(port) as tab:
        await tab.load(page)
        await tab.evaluate("window.confirm = () => true, document.getElementById('again').click()")
        await tab.click("[data-answer=left]", count=2)  # no vote on the next pair, which nobody has seen
        assert (await tab.evaluate(WATCH)).endswith(f"2 of {len(PAGE['trials'])}")
        await tab.click("[data-answer=left]")
        assert (await tab.evaluate(WATCH)).endswith(f"3 of {len(PAGE['trials'])}")


async def spoil_storage(port: str, page: Path) -> None:
    async with open_tab(port) as tab:
        for kept in ("{", "null", "[]", '{"ballot": "x", "at": -1, "answers": []}', '{"at": 1e9}'):
            await tab.load(page)
            await tab.evaluate(f"localStorage.setItem('nanodit-votes-{IDENTITY}', {json.dumps(kept)})")
            await tab.load(page)
            assert await tab.evaluate(WATCH) == f"prompt 0 of <i>words</i>1 of {len(PAGE['trials'])}", kept
        assert tab.complaints == []


def test_votes_are_kept_and_saved_as_they_were_given(html, tmp_path):
    page, folder = tmp_path / "page.html", tmp_path / "saved"
    page.write_text(html, encoding="utf-8")
    folder.mkdir()
    with chromium(tmp_path / "profile") as port:
        asyncio.run(vote_in(port, page, folder))
        asyncio.run(vote_without_storage(port, page))
        asyncio.run(click_twice(port, page))
        asyncio.run(spoil_storage(port, page))
