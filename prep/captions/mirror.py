"""The caption of a mirrored image: left and right change places where they are directions.

A small set of rules, and strict: a word that could be a direction or something else ("left the room", "the right
moment", "right at the edge") makes the whole caption one that cannot be flipped safely, and so does writing in the
image, which would be mirrored, too. Sure idioms ("right now", "right-angled", "copyright") stay as they are.
"""

from __future__ import annotations

import re


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_WORD = re.compile(r"[^\W\d_]+")
_SUFFIXES = ("most", "hand", "handed", "hander", "handers", "ward", "wards", "side", "facing")
_OPPOSITE = {"left": "right", "lefty": "righty", "lefties": "righties"}
_OPPOSITE |= {f"left{suffix}": f"right{suffix}" for suffix in _SUFFIXES}
_OPPOSITE |= {right: left for left, right in _OPPOSITE.items()}

# They begin or end like a direction and are none; what else does is not known to be harmless.
_HARMLESS = re.compile(
    r"leftovers?|cleft|right(?:eous(?:ly|ness)?|ful(?:ly)?|ly)|\w*wright|(?:b|f|up|out|down|forth|birth|copy|a|al)right"
)
# What a mirror changes although nothing in the caption can say so: turning, sides of a ship, hands, writing.
_MIRRORED_OTHERWISE = _words(
    "clockwise counterclockwise anticlockwise starboard larboard southpaw southpaws text texts lettering letters "
    "inscription inscriptions inscribed handwriting handwritten slogan slogans logo logos watermark watermarked "
    "signage typography subtitle subtitles"
)
_QUOTED = re.compile('["“”„«»]')  # words that are read off the image

# The words beside "left" and "right" decide. Before a direction:
_BEFORE = _words(
    "the his her its their my your our whose a to on at from toward towards upper lower top bottom far near extreme "
    "middle mid rear outer inner facing faces looking looks turned turns turning leaning leans tilted tilts tilting "
    "pointing points angled slightly further farther"
)
_BEFORE_AN_END = _words("stage camera screen frame front back center centre")  # "camera left."
# After one:
_AFTER = _words(
    "hand hands handed hander arm arms leg legs foot feet footed knee knees elbow elbows wrist wrists shoulder "
    "shoulders hip hips ankle ankles thigh thighs calf shin heel heels toe toes thumb thumbs finger fingers "
    "forefinger palm fist forearm ear ears earlobe eye eyes eyed eyebrow brow cheek cheekbone temple nostril breast "
    "chest ribs side sided sides half third quarter edge corner border margin part portion section panel page "
    "profile foreground background sleeve sleeves cuff boot boots shoe shoes sock socks glove gloves pocket pockets "
    "lapel strap wing wings paw paws hoof most facing aligned justified of"
)
# ... unless somebody left it, or it is what is left of something.
_VERB_BEFORE = _words(
    "he she it they who i we you that which is are was were be been being has have had having what all none nothing "
    "little much remains"
)
_NOT_POSSESSIVE = _words("it's that's he's she's what's there's who's where's here's let's")
# "The right ..." of these is not the opposite of a left one.
_QUALITY = _words(
    "moment time place size amount balance choice way direction answer mix tone thing kind person people conditions "
    "words idea fit spot mood proportion proportions reasons reason attitude"
)
_IDIOM = re.compile(r"right(?:\s+|-)(?:now|away|angles?|angled|triangles?|side[\s-]+(?:up|out))\b", re.IGNORECASE)
# No direction in the middle of a clause, but one in "an arm in front, the right behind": unsure after a comma.
_ADVERB = {
    "right": _words(
        "next in behind beside above below beneath under underneath over before after at against along alongside by "
        "here there where into onto through across inside outside"
    ),
    "left": _words(
        "open unbuttoned undone untied untucked loose bare exposed visible uncovered unzipped untouched blank empty "
        "unadorned natural"
    ),
}
_PAIR = re.compile(
    r"(left|right)(?:\s+(?:and|or|to|versus|vs|over|under|above)\s+|\s*/\s*|-(?:to|and|or)-)(left|right)\b",
    re.IGNORECASE,
)
_NEAR = 40  # characters around a word that are looked at


def flip_caption(text: str) -> str | None:
    """The caption of the mirrored image, or None where no rule is sure of it; an image of that is never mirrored.

    Flipping what was flipped gives ``text`` again: captions for which the rules would not are refused.
    """
    flipped = _swap(text)
    return flipped if flipped is not None and _swap(flipped) == text else None


def _swap(text: str) -> str | None:
    if _QUOTED.search(text):
        return None
    pieces, end = [], 0
    for match in _WORD.finditer(text):
        word = match.group().lower()
        if word in _MIRRORED_OTHERWISE:
            return None
        if word in ("left", "right"):
            if (direction := _is_direction(text, match)) is None:
                return None
        elif word in _OPPOSITE:
            direction = True
        elif word.startswith(("left", "right")) or word.endswith(("left", "right")):
            if not _HARMLESS.fullmatch(word):
                return None
            direction = False
        else:
            direction = False
        if direction:
            if (opposite := _in_the_case_of(match.group(), _OPPOSITE[word])) is None:
                return None
            pieces += [text[end : match.start()], opposite]
            end = match.end()
    return "".join([*pieces, text[end:]])


def _in_the_case_of(word: str, other: str) -> str | None:
    for case in (str.lower, str.upper, str.capitalize):
        if word == case(word):
            return case(other)
    return None


def _is_direction(text: str, match: re.Match[str]) -> bool | None:
    """Whether the "left" or "right" of ``match`` is one of the two sides; None where that is not sure."""
    word = match.group().lower()
    before, after = text[max(0, match.start() - _NEAR) : match.start()], text[match.end() : match.end() + _NEAR]
    if _IDIOM.match(text, match.start()):
        return False
    if _in_a_pair(text, match):
        return True
    if before.endswith("(") and after.startswith(")"):
        return True
    neighbour = re.search(r"([^\W\d_]+(?:['’]s?)?)(\s+|-)$", before)
    previous, joint = (neighbour.group(1).lower().replace("’", "'"), neighbour.group(2)) if neighbour else ("", "")
    neighbour = re.match(r"(?:\s+|-)([^\W\d_]+)", after)
    following = neighbour.group(1).lower() if neighbour else ""
    possessive = previous.endswith(("'s", "'")) and previous not in _NOT_POSSESSIVE
    led = possessive or previous in _BEFORE
    if following in _QUALITY:
        return None
    if word == "right" and previous == "all" and following not in _AFTER:
        return False
    if word == "left" and following == "over" and previous in ("is", "are", "was", "were", "be", "been"):
        return False
    if following in _ADVERB[word]:
        of_hers = previous != "her" or re.search(
            r"\b(?:to|on|at|from|with|by|in|over|towards?)\s+her\s+$", before.lower()
        )
        if led and word == "right" and of_hers:
            return True
        return None if led or not previous else False
    if led:
        return True
    if previous in _BEFORE_AN_END and (joint == "-" or not following or following in _AFTER):
        return True
    if following in _AFTER and previous not in _VERB_BEFORE | _NOT_POSSESSIVE:
        return True
    return None


def _in_a_pair(text: str, match: re.Match[str]) -> bool:
    """Whether the word is one of "left and right", "right to left" and the like."""
    for pair in _PAIR.finditer(text, max(0, match.start() - _NEAR), match.end() + _NEAR):
        if match.start() in (pair.start(1), pair.start(2)):
            return pair.group(1).lower() != pair.group(2).lower()
    return False
