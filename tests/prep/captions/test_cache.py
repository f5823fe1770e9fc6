"""The cache of answers: one file per image and recipe, whole or not there."""

import pytest

from prep.captions.cache import CaptionCache, forget_captions
from prep.captions.quality import Answer

RECIPE = {"backend": "ollama", "model": "m", "digest": "d", "prompt": "p", "options": {"seed": 0, "image_side": 896}}
ANSWER = Answer("A man.", "stop", {"seed": 0})
KEY, OTHER = "0a" * 16, "0b" * 16


def test_answers_come_back_in_order(tmp_path):
    cache = CaptionCache(tmp_path, RECIPE)
    assert cache.read(KEY) == []
    answers = [Answer("", "length", {"seed": 0}), Answer("Ein Wort: \u4f60 \ufffd", None, {"seed": 1})]
    cache.write(KEY, answers)
    assert cache.read(KEY) == answers
    assert cache.read(OTHER) == []
    assert [path.name for path in (tmp_path / "captions" / "0a").iterdir()] == [cache.name(KEY).rpartition("/")[2]]


@pytest.mark.parametrize(
    "change",
    [{"backend": "openai"}, {"model": "n"}, {"digest": "e"}, {"prompt": "q"}, {"options": {"seed": 1}}],
)
def test_another_recipe_has_other_answers(tmp_path, change):
    CaptionCache(tmp_path, RECIPE).write(KEY, [ANSWER])
    assert CaptionCache(tmp_path, RECIPE | change).read(KEY) == []
    assert CaptionCache(tmp_path, RECIPE).read(KEY) == [ANSWER]


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"answers": [{"text": 1}]}', b"\xff"])
def test_a_damaged_entry_is_made_again(tmp_path, damage):
    cache = CaptionCache(tmp_path, RECIPE)
    cache.write(KEY, [ANSWER])
    (tmp_path / cache.name(KEY)).write_bytes(damage)
    assert cache.read(KEY) == []


def test_forgetting_takes_every_recipe_of_the_images_named(tmp_path):
    for recipe in (RECIPE, RECIPE | {"model": "n"}):
        for key in (KEY, OTHER):
            CaptionCache(tmp_path, recipe).write(key, [ANSWER])
    assert forget_captions(tmp_path, [KEY]) == 2
    assert CaptionCache(tmp_path, RECIPE).read(KEY) == []
    assert CaptionCache(tmp_path, RECIPE).read(OTHER) == [ANSWER]
    assert forget_captions(tmp_path / "nowhere", [KEY]) == 0
