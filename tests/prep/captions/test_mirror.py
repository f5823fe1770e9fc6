"""Flipped captions: which words are directions, which captions are refused, and flipping twice changes nothing."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prep.captions.mirror import flip_caption
from prep.figures.figures import draw_figure


@pytest.mark.parametrize(
    ("text", "flipped"),
    [
        ("She lifts her left hand.", "She lifts her right hand."),
        ("Left arm raised, RIGHT arm down.", "Right arm raised, LEFT arm down."),
        ("A left-handed man.", "A right-handed man."),
        ("A Left-Handed man; the lefthand page.", "A Right-Handed man; the righthand page."),
        ("Turned to her left, on the left-hand side.", "Turned to her right, on the right-hand side."),
        ("The leftmost figure leans leftwards.", "The rightmost figure leans rightwards."),
        ("from left to right, left and right", "from right to left, right and left"),
        ("legs crossed, left over right", "legs crossed, right over left"),
        ("the viewer's right, the girls’ left hands", "the viewer's left, the girls’ right hands"),
        ("in the upper-left corner and top right", "in the upper-right corner and top left"),
        ("A man (left) and a woman (right).", "A man (right) and a woman (left)."),
        ("The light is to camera left.", "The light is to camera right."),
        ("with bent left elbow", "with bent right elbow"),
        ("just left of the middle", "just right of the middle"),
        ("A lefty.", "A righty."),
        ("looks slightly right.", "looks slightly left."),
    ],
)
def test_directions_change_places(text, flipped):
    assert flip_caption(text) == flipped
    assert flip_caption(flipped) == text


@pytest.mark.parametrize(
    "text",
    [
        "A woman stands in front of a wall.",
        "a bright copyright sign, upright; leftovers of a cleft rock by a playwright",
        "she is right now at a right angle to the right-angled wall",
        "some cake is left over",
        "the jacket is left open, hair left loose",
        "standing right behind him and right next to a tree",
        "all right",
        "right-side up",
        "",
    ],
)
def test_what_is_no_direction_stays(text):
    assert flip_caption(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "a man who left the room",
        "he left hand in hand",
        "what is left of the wall",
        "only one left",
        "at the right moment",
        "in the right direction",
        "that is right",
        "her left hand in front, right behind her",
        "her right behind the chair",
        "all rights reserved",
        "a leftist",
        "her lEFT hand",
        "the upperright corner",
        "turning clockwise",
        'a shirt with the words "go left"',
        "a logo on the left sleeve",
        "the left side up",  # which would become an idiom
    ],
)
def test_what_is_not_sure_is_not_flipped(text):
    assert flip_caption(text) is None


def test_captions_of_figures_are_flipped_word_by_word():
    other = {"left": "right", "right": "left", "Left": "Right", "Right": "Left"}
    for index in range(40):
        caption = draw_figure(3, index, 64).caption
        expected = re.sub(r"[A-Za-z]+", lambda word: other.get(word.group(), word.group()), caption)
        assert flip_caption(caption) == expected != caption


VOCABULARY = (
    "left right Left RIGHT lEFT her the is he it's camera hand side over under and to of now angle open behind next up "
    "leftmost righthand copyright rights moment all viewer's ( ) , . - / “ left-hand right-angled"
)
WORDS = st.sampled_from(VOCABULARY.split())


@settings(max_examples=1000)
@given(st.lists(st.tuples(WORDS, st.sampled_from([" ", "-", "", "\n", ", "])), max_size=12))
@example([("left", " "), ("side", " "), ("up", "")])
def test_flipping_twice_is_the_identity(parts):
    text = "".join(word + space for word, space in parts)
    flipped = flip_caption(text)
    if flipped is not None:
        assert flip_caption(flipped) == text
        assert re.sub("left|right", "*", flipped.lower()) == re.sub("left|right", "*", text.lower())


@settings(max_examples=300)
@given(st.text())
def test_any_text_is_flipped_or_refused(text):
    flipped = flip_caption(text)
    assert flipped is None or flip_caption(flipped) == text
