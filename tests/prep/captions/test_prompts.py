"""Prompts that ship with the package, and those of users."""

import re
from pathlib import Path

import pytest

from nanodit.errors import ConfigError
from prep.captions.config import CaptionConfig
from prep.captions.languages import expected
from prep.captions.prompts import SHIPPED, prompt_text
from prep.captions.quality import Answer, CaptionRules, find_flaw
from prep.config import PrepConfig
from prep.passes.captions import caption_recipe

GOOD = (Path(__file__).parent / "answers" / "good.txt").read_text(encoding="utf-8").strip().split("\n\n")


def test_each_domain_has_a_prompt_of_its_own_that_leaves_good_captions_alone():
    texts = {name: prompt_text(name) for name in SHIPPED}
    assert prompt_text(None) == texts["people"]
    assert len(set(texts.values())) == len({"people", "art", "product", "landscape"} | set(texts)) == 4
    for text in texts.values():
        assert "150 to 200 words" in text
        assert re.search("Do not [^.]*(interpret|advertise)", text)
        assert expected(text) == ({"LATIN"}, {"en"})
        rules = CaptionRules(60, 300, {}, 0.5, text)
        assert sum(find_flaw(Answer(good, "stop", {}), rules) is not None for good in GOOD) <= 2
        echo = find_flaw(Answer(f"{GOOD[0]} {text.split('. ')[-1]}", "stop", {}), rules)
        assert echo.reason == "caption_echo"


def test_a_prompt_is_a_shipped_one_by_name_or_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("landscape").write_text("My own.")
    assert prompt_text("./landscape") == "My own."
    assert prompt_text("landscape") != "My own."
    with pytest.raises(ConfigError, match=r"captions.prompt landscapes is no file.*people, art, product, landscape"):
        prompt_text("landscapes")

    def recipe(prompt: str | None) -> str:
        captions = CaptionConfig(backend="ollama", digest="d", prompt=prompt)
        return caption_recipe(PrepConfig(source="s", output="o", captions=captions))["prompt"]

    assert recipe("people") == recipe(None)
    assert len({recipe(name) for name in (None, "art", "product", "landscape", "./landscape")}) == 5
