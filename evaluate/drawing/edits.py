"""Edits of captions, by whole words: another attribute, the opposite, or a paraphrase that changes nothing.

What an edit replaces is known place by place, so that reports can show it. Captions for which no rule is sure of
anything have no edit: a wrong one would be measured as an effect of the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from evaluate.drawing.vocabulary import VOCABULARY, ChangeType, Swap
from evaluate.metrics.colours import PALETTES
from nanodit.rng import generator
from prep.captions.mirror import flip_caption
from prep.figures.figures import VOCABULARY as FIGURE_WORDS

EditType = ChangeType | Literal["paraphrase"]
Replacement = tuple[int, int, str]  # start and end in the caption, what stands there instead

OWN = "own pair"
_FIGURE_WORDS = {word.lower() for words in FIGURE_WORDS for word in re.findall(r"[^\W\d_]+", words)}
_WORD = re.compile(r"[^\W\d_]+")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")

# Colours that may be given, and names of further ones with that which they must not be replaced by: hardly another one.
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white", "black", "brown", "grey")
_NEARLY = {
    "gray": "grey", "silver": "grey", "violet": "purple", "lilac": "purple", "navy": "blue", "azure": "blue",
    "turquoise": "blue", "teal": "green", "olive": "green", "mint": "green", "maroon": "red", "crimson": "red",
    "gold": "yellow", "beige": "brown", "tan": "brown", "cream": "white", "blonde": "blond", "ginger": "orange",
    "blond": "yellow",
}  # fmt: skip

# What has a colour: the attribute of a figure that it is, and its nouns; None: nothing that can be judged
_THINGS = {
    "top": "jumper sweater shirt t-shirt top tee blouse hoodie jacket coat cardigan",
    "trousers": "trousers pants jeans leggings shorts",
    "background": "wall background backdrop",
    "hair": "hair",
    None: "dress skirt gown suit tie hat cap scarf gloves socks shoes boots sneakers bag backpack sofa couch curtain "
    "curtains door car bicycle bike",
}
_NOUNS = {noun: attribute for attribute, nouns in _THINGS.items() for noun in nouns.split()}
_KNOWN = sorted({*COLOURS, *_NEARLY, *(name for palette in PALETTES.values() for name in palette)})
_COLOURED = re.compile(rf"(?<![\w-])({'|'.join(_KNOWN)})\s+({'|'.join(sorted(_NOUNS))})(?![\w-])", re.IGNORECASE)
_ANOTHER_COLOUR = re.compile(rf"\b({'|'.join(_KNOWN)})(\s+(and|or)|,)\s+$", re.IGNORECASE)  # "blue and white shirt"

_AT = "on in at by near beside next behind"
_PEOPLE = "man woman person people boy girl child lady gentleman figure"
# Word, its opposite, and the words that must follow it, directly or with one between; None: anything.
# "left" and "right" have rules of their own, and change places everywhere at once.
_OPPOSITES = (
    ("long", "short", "hair sleeves beard skirt dress coat grass"),
    ("short", "long", "hair sleeves beard skirt dress coat grass"),
    ("tall", "short", f"{_PEOPLE} building tree tower"),
    ("short", "tall", f"{_PEOPLE} building tree tower"),
    ("young", "old", _PEOPLE),
    ("old", "young", _PEOPLE),
    ("slim", "broad", "build"),
    ("broad", "slim", "build"),
    ("light", "dark", "skin hair background sky wood room"),
    ("dark", "light", "skin hair background sky wood room"),
    ("open", "closed", "door window mouth eyes book umbrella"),
    ("closed", "open", "door window mouth eyes book umbrella"),
    ("small", "large", None),
    ("large", "small", None),
    ("big", "small", None),
    ("happy", "sad", None),
    ("sad", "happy", None),
    ("smiling", "frowning", None),
    ("standing", "sitting", _AT),
    ("sitting", "standing", _AT),
    ("sunny", "rainy", None),
    ("rainy", "sunny", None),
    ("indoors", "outdoors", None),
    ("outdoors", "indoors", None),
)

# Words that mean the same, the surest first. Those of clothes lead: every caption of a figure has one of them, and
# both are words that figures are described with, while the other pairs would bring in new ones.
_SYNONYMS = (
    ("trousers", "pants"),
    ("jumper", "sweater"),
    ("background", "backdrop"),
    ("sofa", "couch"),
    ("bicycle", "bike"),
    ("photo", "photograph"),
    ("image", "picture"),
    ("large", "big"),
    ("small", "little"),
    ("road", "street"),
    ("child", "kid"),
    ("wears", "is wearing"),
    ("holds", "is holding"),
    ("stands", "is standing"),
    ("sits", "is sitting"),
)


@dataclass(frozen=True)
class Edit:
    """One edit of one caption: what is replaced, in order of the text, without overlaps.

    ``attribute`` is the part of a figure (top, trousers, background, hair) that gets another colour, if one does.
    """

    type: EditType
    caption: str
    replacements: tuple[Replacement, ...]
    attribute: str | None = None
    kind: str = ""  # of what is replaced, in words: hair colour, light, ...

    @property
    def text(self) -> str:
        """The caption after the edit."""
        return "".join(part for kind, part in self.diff if kind != "removed")

    @property
    def words(self) -> list[tuple[str, str]]:
        """What was replaced by what; articles that follow suit are left out."""
        pairs = [(self.caption[start:end], new) for start, end, new in self.replacements]
        return [pair for pair in pairs if pair[0].lower() not in ("a", "an")]

    @property
    def diff(self) -> list[tuple[str, str]]:
        """The caption in pieces: ``same``, ``removed`` and ``added``."""
        pieces, end = [], 0
        for start, stop, new in self.replacements:
            pieces += [("same", self.caption[end:start]), ("removed", self.caption[start:stop]), ("added", new)]
            end = stop
        return [piece for piece in [*pieces, ("same", self.caption[end:])] if piece[1]]

    @property
    def phrases(self) -> tuple[str, str]:
        """The sentences that the edit changes, before and after."""
        sides = [_SENTENCE_END.split(text) for text in (self.caption, self.text)]
        changed = [pair for pair in zip(*sides, strict=True) if pair[0] != pair[1]]
        return tuple(" ".join(side) for side in zip(*changed))  # type: ignore[return-value]


def choose(caption: str, type: EditType, key: str, own: Sequence[Swap] = ()) -> Edit | None:
    """Choose one edit of a type, always the same for a sample's ``key``; None where no rule is sure of one.

    ``own`` are the user's pairs, which go before all rules where any of them applies.
    """
    if type == "paraphrase":
        edits = list(_paraphrases(caption))
    else:
        edits = list(_swapped(caption, [swap for swap in own if swap.type == type]))
        edits = edits or list({"attribute": _attributes, "opposite": _opposites}[type](caption))
    if type != "paraphrase" and not of_figure(caption) and not (edits and edits[0].kind == OWN):
        swaps = [swap for swap in VOCABULARY if swap.type == type]
        edits += _unlike(_swapped(caption, [swap for swap in swaps if not swap.last]), edits)
        edits = edits or list(_swapped(caption, [swap for swap in swaps if swap.last]))
    places: dict[tuple[Replacement, ...], list[Edit]] = {}
    for edit in edits:  # every place is as likely as another, however many words could stand there
        places.setdefault(tuple((start, end, "") for start, end, _ in edit.replacements), []).append(edit)
    if not places:
        return None
    if type == "paraphrase":
        return next(iter(places.values()))[0]
    dice = generator("edit", type, key)
    own = list(places.values())[int(dice.random() * len(places))]
    return own[int(dice.random() * len(own))]


def of_figure(caption: str) -> bool:
    """Return whether a caption has no word that captions of the built-in figures do not have."""
    return all(word.lower() in _FIGURE_WORDS for word in _WORD.findall(caption))


def _unlike(edits: Iterable[Edit], others: Sequence[Edit]) -> list[Edit]:
    """Return the edits of words that none of ``others`` touches."""
    taken = {span[:2] for other in others for span in other.replacements}
    return [edit for edit in edits if taken.isdisjoint(span[:2] for span in edit.replacements)]


def _swapped(caption: str, swaps: Sequence[Swap]) -> Iterator[Edit]:
    """Yield each other word for a word of the vocabulary, in every place where it may stand."""
    for swap in swaps:
        follows = rf"(?=\s+(?:[\w-]+\s+)?(?:{'|'.join(swap.follows.split())})\b)" if swap.follows else ""
        words = r"\s+".join(map(re.escape, swap.word.split()))
        found = re.finditer(rf"(?<![\w-]){words}(?![\w-]){follows}", caption, re.IGNORECASE)
        spans = [match.span() for match in found if swap.kind != "colour" or not _one_of_several(caption, match)]
        for other in swap.others if spans else ():
            yield Edit(swap.type, caption, _replace(caption, spans, [other] * len(spans)), kind=swap.kind)


def _one_of_several(caption: str, match: re.Match[str]) -> bool:
    """Whether a colour is one of two, as in "blue and white shirt"."""
    return bool(_ANOTHER_COLOUR.search(caption[: match.start()]))


def _attributes(caption: str) -> Iterator[Edit]:
    """Yield another colour for each coloured thing, wherever the caption names both."""
    found: dict[tuple[str, str], list[re.Match[str]]] = {}
    for match in _COLOURED.finditer(caption):
        if not _ANOTHER_COLOUR.search(caption[: match.start()]):
            found.setdefault((match.group(1).lower(), match.group(2).lower()), []).append(match)
    for (old, noun), matches in found.items():
        attribute = _NOUNS[noun]
        if sum(other == noun for _, other in found) > 1:
            continue  # a red and a blue shirt: whose is it to be?
        palette = PALETTES.get(attribute, {})
        colours = palette if old in palette or noun == "hair" else COLOURS
        for new in colours:
            if new not in (old, _NEARLY.get(old, old)) and _NEARLY.get(new, new) != old:
                spans = [match.span(1) for match in matches]
                yield Edit(
                    "attribute", caption, _replace(caption, spans, [new] * len(spans)), attribute, f"colour of {noun}"
                )


def _opposites(caption: str) -> Iterator[Edit]:
    """Yield left and right changed round, and each single word replaced by its opposite."""
    flipped = flip_caption(caption)
    if flipped is not None and flipped != caption:
        pairs = zip(_WORD.finditer(caption), _WORD.finditer(flipped), strict=True)
        changed = [(old.span(), new.group()) for old, new in pairs if old.group() != new.group()]
        yield Edit("opposite", caption, tuple((*span, new) for span, new in changed), kind="left and right")
    for word, opposite, nouns in _OPPOSITES:
        follows = "" if nouns is None else rf"(?=\s+(?:\w+\s+)?(?:{'|'.join(nouns.split())})\b)"
        for match in re.finditer(rf"(?<![\w-]){word}(?![\w-]){follows}", caption, re.IGNORECASE):
            yield Edit("opposite", caption, _replace(caption, [match.span()], [opposite]), kind=word)


def _paraphrases(caption: str) -> Iterator[Edit]:
    """Yield a synonym in every place of a word."""
    for pair in _SYNONYMS:
        for word, synonym in (pair, pair[::-1]):
            spans = [match.span() for match in re.finditer(rf"(?<![\w-]){word}(?![\w-])", caption, re.IGNORECASE)]
            if spans:
                yield Edit("paraphrase", caption, _replace(caption, spans, [synonym] * len(spans)))


def _replace(caption: str, spans: Sequence[tuple[int, int]], words: Iterable[str]) -> tuple[Replacement, ...]:
    """Put other words in their places, capital where the old one was, each with the article that goes with it."""
    found: list[Replacement] = []
    for (start, end), word in zip(spans, words):
        article = re.search(r"(?<![\w-])(an?)\s+$", caption[:start], re.IGNORECASE)
        if article:
            fitting = "an" if word[0] in "aeiou" else "a"
            if fitting != article.group(1).lower():
                found.append((*article.span(1), _as(article.group(1), fitting)))
        found.append((start, end, _as(caption[start:end], word)))
    return tuple(found)


def _as(old: str, new: str) -> str:
    """Return ``new`` with a capital where ``old`` has one."""
    return new.upper() if old.isupper() and len(old) > 1 else new.capitalize() if old[0].isupper() else new
