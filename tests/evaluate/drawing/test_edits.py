"""Edits of captions: whole words, fitting articles, and nothing where no rule is sure."""

import pytest

from evaluate.drawing.edits import COLOURS, choose
from evaluate.metrics.colours import PALETTES
from prep.figures.figures import VOCABULARY, draw_figure

PHOTO = "A young man in an orange jacket stands on the left side of a small road, along a wall."


def every(caption, type):
    """All edits that any key gets."""
    found = [choose(caption, type, f"sample {number}") for number in range(60)]
    return {edit.text for edit in found if edit is not None}


def test_attributes_change_colour_and_article_and_nothing_else():
    found = every(PHOTO, "attribute")
    assert found == {PHOTO.replace("an orange", f"a {colour}") for colour in COLOURS if colour != "orange"}
    assert every("A woman in a red jacket.", "attribute") >= {"A woman in a white jacket."}
    assert every("In front of a mint wall.", "attribute") == {
        f"In front of {name} wall." for name in ("a cream", "an azure", "a lilac")
    }


def test_words_are_whole():  # trap 25
    for caption in (
        "He walks along a longboat, a shortcake in hand.",
        "A tired hair-dresser, off-white wall",
    ):
        assert every(caption, "attribute") == set()
        assert every(caption, "opposite") == set()
    assert every("A short man along the hall.", "opposite") == {"A tall man along the hall."}
    assert every("A blur of bright red, a red shirtfront", "attribute") == set()


@pytest.mark.parametrize(
    "caption",
    [
        "A man in a blue and white shirt.",  # of two colours
        "A red, white shirt.",
        "One in a red shirt, one in a blue shirt.",  # whose?
        "He left the room at the right moment.",  # no directions
        "Softly it comes from above the white whale.",
    ],
)
def test_where_no_rule_is_sure_there_is_no_edit(caption):
    assert every(caption, "attribute") | every(caption, "opposite") == set()


def test_the_same_thing_is_changed_wherever_it_is_named():
    found = every("His red shirt is new. A red shirt, red trousers.", "attribute")
    for text in found:
        assert text.count("red shirt") in (0, 2)
    assert "His blue shirt is new. A blue shirt, red trousers." in found
    assert "His red shirt is new. A red shirt, blue trousers." in found


def test_left_and_right_change_places_everywhere_at_once():
    caption = "Her left hand waves. In her right hand she holds a cup."
    assert every(caption, "opposite") == {"Her right hand waves. In her left hand she holds a cup."}


def test_opposites_need_what_they_are_said_of():
    assert every("A woman with long brown hair.", "opposite") == {"A woman with short brown hair."}
    assert every("A long walk.", "opposite") == set()
    assert every("An old lady.", "opposite") == {"A young lady."}
    assert every("Young women and a young boy.", "opposite") == {"Young women and an old boy."}


def test_a_paraphrase_is_one_surest_synonym():
    assert every("A man wears a jumper and red trousers. The Trousers are new.", "paraphrase") == {
        "A man wears a jumper and red pants. The Pants are new."
    }
    assert every("An image of a dog.", "paraphrase") == {"A picture of a dog."}
    assert every("A dog.", "paraphrase") == set()


def test_capitals_stay():
    assert every("Red trousers.", "attribute") >= {"Blue trousers.", "White trousers."}
    assert every("A RED SHIRT", "attribute") >= {"A BLUE SHIRT"}


def test_the_choice_is_the_keys_alone():
    caption = "A red shirt, blue trousers and black hair in front of a lilac wall."
    assert len(every(caption, "attribute")) > 15
    for key in ("a", "b"):
        assert choose(caption, "attribute", key) == choose(caption, "attribute", key)


def test_pieces_words_and_phrases():
    edit = next(
        edit
        for edit in (choose(f"He waves. {PHOTO}", "attribute", str(number)) for number in range(60))
        if edit.words == [("orange", "green")]
    )
    assert edit.diff == [
        ("same", "He waves. A young man in "), ("removed", "an"), ("added", "a"), ("same", " "),
        ("removed", "orange"), ("added", "green"),
        ("same", " jacket stands on the left side of a small road, along a wall."),
    ]  # fmt: skip
    assert "".join(part for kind, part in edit.diff if kind != "added") == edit.caption
    assert edit.phrases == (PHOTO, PHOTO.replace("an orange", "a green"))


@pytest.mark.parametrize("short", [True, False])
def test_every_caption_of_a_figure_has_every_edit(short):
    attributes = set()
    for index in range(60):
        figure = draw_figure(3, index, 32, short)
        edit = choose(figure.caption, "attribute", str(index))
        attributes.add(edit.attribute)
        ((old, new),) = edit.words
        assert figure.attributes[edit.attribute] == old.lower()
        assert new.lower() in PALETTES[edit.attribute]
        assert new.lower() != old.lower()
        assert choose(figure.caption, "opposite", str(index)).text != figure.caption
        null = choose(figure.caption, "paraphrase", str(index))
        assert len(null.words) == 1
        assert {null.words[0][1], new.lower()} <= set(VOCABULARY)  # words that a model of figures knows
    assert attributes == set(PALETTES)
