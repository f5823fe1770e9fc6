"""The first sentence of a caption: the short caption of an image whose caption nobody shortened.

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
    small, word = text == text.lower(), _WORD.search(text)
    spans = [span for span in (match.span() for match in _ENCLOSED.finditer(text)) if span != (0, len(text))]
    starts = [start for start, _ in spans]
    for match in _END.finditer(text, word.end() if word else len(text)):
        place = bisect(starts, match.start()) - 1
        if (place < 0 or match.end() >= spans[place][1]) and _ends(text, match, small):
            return text[: match.end()]
    return text


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
