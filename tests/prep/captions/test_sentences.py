"""The sentences of a caption, and the first of them."""

import time

import pytest

from prep.captions.sentences import first_sentence, sentences


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("A man stands. He waves.", "A man stands."),
        ("A man stands", "A man stands"),
        ("A man stands.", "A man stands."),
        ("Dr. Smith and J. R. Jones see a U.S. Army truck. It", "Dr. Smith and J. R. Jones see a U.S. Army truck."),
        ("A table of 3.5 m. It is brown.", "A table of 3.5 m."),
        ("A bus, no. 7, waits. It is red.", "A bus, no. 7, waits."),
        ("She says no. He leaves.", "She says no."),
        ("The clock shows 5 p.m. The sun is low.", "The clock shows 5 p.m."),
        ("Fruit, e.g. Boskoop apples, ca. 20 of them. They are red.", "Fruit, e.g. Boskoop apples, ca. 20 of them."),
        ("Chairs, tables, etc. Some are red.", "Chairs, tables, etc."),
        ('The sign says "Stop!" in red. It is round.', 'The sign says "Stop!" in red.'),
        ('The sign says "Stop." It is round.', 'The sign says "Stop."'),
        ("Who is it? Nobody knows.", "Who is it?"),
        ("A man (in red, see fig. 3) runs... and falls. He cries.", "A man (in red, see fig. 3) runs... and falls."),
        ("a man in a red shirt. he holds a ball.", "a man in a red shirt."),
        ("A shop of approx. ten people. They wait.", "A shop of approx. ten people."),
        ("1. A man stands. 2. He waves.", "1. A man stands."),
        ("1girl, red dress, outdoors", "1girl, red dress, outdoors"),
        ("一个男人站着。他穿红衣。", "一个男人站着。"),
        ("Version 2.0 of it.Nothing else", "Version 2.0 of it.Nothing else"),
        ("...", "..."),
        ('A sign reads "No entry. Keep out" in red. It is old.', 'A sign reads "No entry. Keep out" in red.'),
        ("A sign says “Stop. Go”. It is old.", "A sign says “Stop. Go”."),
        ("A sign says 'No. 1 Way' there. It's old.", "A sign says 'No. 1 Way' there."),
        ("A man (see the sign. It is red) waits. He reads.", "A man (see the sign. It is red) waits."),
        ("牌子上写着“禁止入内。请勿靠近”。它很旧。", "牌子上写着“禁止入内。请勿靠近”。"),
        ('A pipe of 5" is here. It is red, one of 6" is blue.', 'A pipe of 5" is here.'),
        ("The girls' dresses are red. It's summer, and the boys' are blue.", "The girls' dresses are red."),
        ('A sign that says "Stop. It is old.', 'A sign that says "Stop.'),
        ('"A man stands. He waves."', '"A man stands.'),
    ],
)  # fmt: skip
def test_the_first_sentence(text, first):
    assert first_sentence(text) == first
    assert first_sentence(first) == first
    assert sentences(text)[0] == first


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (" A man stands.  He waves! Why? ", ["A man stands.", "He waves!", "Why?"]),
        ("1. A man stands. 2. He waves.", ["1. A man stands.", "2. He waves."]),
        ("A sign says “Stop. Go”. Dr. Smith reads it, cf. fig. 3. It is old", [
            "A sign says “Stop. Go”.", "Dr. Smith reads it, cf. fig. 3.", "It is old"
        ]),
        ("a man in a red shirt. he holds a ball. 3", ["a man in a red shirt.", "he holds a ball.", "3"]),
        ("一个男人站着。他穿红衣。", ["一个男人站着。", "他穿红衣。"]),
        ("...", ["..."]),
        ("  ", []),
        ("", []),
    ],
)  # fmt: skip
def test_all_sentences(text, found):
    assert sentences(text) == found
    assert "".join("".join(found).split()) == "".join(text.split())  # nothing is lost


@pytest.mark.parametrize("part", [". ", "J. ", "Mr. X ", "e.g. a ", ".", "(", "“", '"', " 'a", '("a. B ', "(a. B) "])
def test_a_caption_of_any_length_takes_no_time(part):
    """Captions may have a megabyte, and those of scanned pages have rows of dots."""
    started = time.process_time()
    text = "a" + part * (200_000 // len(part))
    first_sentence(text)
    assert "".join("".join(sentences(text)).split()) == "".join(text.split())
    assert time.process_time() - started < 2
