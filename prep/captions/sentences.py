"""The sentences of a caption. The first is the short caption of an image whose caption nobody shortened.

When the same caption gets another first sentence, raise ``short.code`` of the text layer (``prep/dataset/layers.py``).

A sentence ends after ``.``, ``!``, ``?`` or ``…``, with the quotation marks and brackets that close there, where white
space follows and then a word with a capital letter, a digit or what opens a quotation. In a text without any capital
letter a word with a small one will do after a full stop. ``。``, ``！`` and ``？`` need nothing after them. No sentence
ends

- after an abbreviation that stands before what it belongs to ("Mr.", "No. 7", "e.g.") or a single letter ("J. Smith",
  "U.S. Army"),
- where a small letter follows in a text with capital ones ("approx. ten", "Wait... what?", "5 p.m. on"),
- before its first word ("1. A man ..."),
- within quotation marks or brackets that close later ("a sign that says "Stop. Go" in red"), unless they are around all
  of the text.

What ends nowhere is one sentence.
"""

from __future__ import annotations

import re
from bisect import bisect
from collections.abc import Iterator
from itertools import pairwise


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# from the first of several marks, or a long row of them would be looked at from each
_END = re.compile(r"(?<![.!?…])(?P<mark>[.!?…]+)[\"'”’»)\]]*(?=\s)|[。！？][」』”’）]*")
_NEXT = re.compile(r"\s+[\"'“‘«(\[¿¡]*(\S)")
# up to the next mark of the same kind: an inch or an apostrophe opens nothing
_ENCLOSED = re.compile(
    r"""(?<![^\s(\[])"[^"]*"|(?<![^\s(\[])'[^']*'(?!\w)|“[^“”]*”|‘[^‘’]*’(?!\w)|„[^„“”]*[“”]|«[^«»]*»|「[^「」]*」"""
    r"""|『[^『』]*』|（[^（）]*）|\([^()]*\)|\[[^\[\]]*\]"""
)
_BEFORE = re.compile(r"[^\s(\[\"'“‘«]+$")
# what they belong to follows; "etc.", "a.m." and their like may end a sentence
_LEADING = _words(
    "mr mrs ms mx dr prof st mt sgt capt lt col gen gov rev hon messrs mme mlle fr hr vs cf e.g i.e viz approx incl "
    "resp z.b bzw"
)
_NUMBERED = _words("no nos nr fig figs vol p pp c ca ch sec")  # likewise, where a number follows
_LETTERS = re.compile(r"(?:[^\W\d_]\.)*[^\W\d_]")  # "J", "U.S"
_WORD = re.compile(r"[^\W\d_]")
_LONGEST = 32  # letters of a word before a mark that are looked at: longer ones are no abbreviation


def first_sentence(text: str) -> str:
    """Return the first sentence of a text in one line, without white space around it; all of it where none ends."""
    text = text.strip()
    return text[: next(_sentence_ends(text), len(text))]


def sentences(text: str) -> list[str]:
    """Return all sentences of a text in one line, without the white space between them; none of an empty text."""
    text = text.strip()
    ends = [0, *_sentence_ends(text)]
    if ends[-1] < len(text):
        ends.append(len(text))
    return [text[start:end].strip() for start, end in pairwise(ends)]


def _sentence_ends(text: str) -> Iterator[int]:
    """Yield the places behind the sentences of a text that end at a mark."""
    small, begin = text == text.lower(), 0
    spans = [span for span in (match.span() for match in _ENCLOSED.finditer(text)) if span != (0, len(text))]
    starts = [start for start, _ in spans]
    while word := _WORD.search(text, begin):
        for match in _END.finditer(text, word.end()):
            place = bisect(starts, match.start()) - 1
            if (place < 0 or match.end() >= spans[place][1]) and _ends(text, match, small):
                begin = match.end()
                yield begin
                break
        else:
            return


def _ends(text: str, match: re.Match[str], small: bool) -> bool:
    """Tell whether a sentence ends at a mark; ``small``: the text has no capital letter."""
    mark = match["mark"]
    if mark is None:  # of a script without spaces
        return True
    following = _NEXT.match(text, match.end())
    if following is None:
        return True
    if mark == ".":
        found = _BEFORE.search(text, max(0, match.start() - _LONGEST), match.start())
        word = found[0] if found else ""
        if word.lower() in _LEADING or (_LETTERS.fullmatch(word) and word == word.upper()):
            return False
        if word.lower() in _NUMBERED and following[1].isdigit():
            return False
    return not following[1].islower() or (small and mark == ".")
