"""The first sentence of a caption."""

import pytest

from prep.captions.sentences import first_sentence


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
    ],
)  # fmt: skip
def test_the_first_sentence(text, first):
    assert first_sentence(text) == first
    assert first_sentence(first) == first
