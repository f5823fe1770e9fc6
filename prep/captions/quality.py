"""Rules for which answers of a model are captions, and for what is asked next when an answer is none.

An answer has at most one flaw, the first that is found. A flaw of the kind "room" (empty, or cut off) leads to one
further question with more room, one of the kind "quality" to one further question with another seed, and a flaw whose
kind was met before, or that asking cannot mend, to a reject. All of it follows from the answers alone, so that a run
that was killed goes on with the question it would have asked, and a changed limit asks nobody about what was answered
already.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# letters and digits with inner apostrophes and hyphens; scripts without spaces count every character
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+(?:['-][^\W_]+)*")
QUOTED = re.compile(r"\"[^\"]*\"")
CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f\ufffd]")
SENTENCE_ENDS = tuple(".!?\"')]。！？")

REFUSAL = re.compile(
    r"^(?:i(?:'m| am) (?:sorry|afraid|unable|not able)|i (?:cannot|can't|can not|won't|will not)|sorry\b"
    r"|unfortunately\b|i apologi[sz]e|my apologies|as an? (?:\w+ )?(?:ai|language)\b)"
    r"|\bas an? (?:ai|(?:large )?language model)\b"
    r"|\bi(?:'m| am) (?:unable|not able) to\b"
    r"|\bi (?:cannot|can't|can not) (?:provide|describe|assist|help|identify|comply|fulfill?|see|view|process)\b"
    r"|\bagainst my (?:guidelines|policy|policies|programming)\b",
    re.IGNORECASE,
)
PREAMBLE = re.compile(
    r"^(?:sure|certainly|of course|absolutely|okay|ok|great|alright)\s*[,.!:]"
    r"|^here(?:'s| is| are)\b[^.:]{0,80}\b(?:description|caption|paragraph|breakdown)\b"
    r"|^(?:below|the following) (?:is|are|paragraph|description)\b"
    r"|^\W*(?:description|caption|image description|answer)\W*:"
    r"|\b(?:let me know if|would you like me to|do you want me to|i hope this helps|feel free to)\b",
    re.IGNORECASE,
)
# the same eight words in a row three times: no prose, but a model that is caught in a loop
LOOP_WORDS, LOOP_TIMES = 8, 3


@dataclass(frozen=True)
class Answer:
    """The answer of a server: ``text``, and why it ended, in the servers' words.

    ``end`` is "stop", "length" (cut off), "refused" (the server's own filter), None where the server does not say, and
    "failed" or "timeout" for a sample that servers could not answer for. ``options`` are those of the question.
    """

    text: str
    end: str | None
    options: Mapping[str, Any]


@dataclass(frozen=True)
class CaptionRules:
    """The limits, and the options of a first and of a further question."""

    min_words: int
    max_words: int
    options: Mapping[str, Any]
    reask_temperature: float


@dataclass(frozen=True)
class Flaw:
    """The reason why an answer is no caption; ``kind`` is "room", "quality" or "final"."""

    reason: str
    detail: str
    kind: str


@dataclass(frozen=True)
class Accepted:
    """An answer that is the caption."""

    text: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Ask:
    """A question that is open, with its options."""

    options: Mapping[str, Any]


def tidy(text: str) -> str:
    """Return one line with single spaces; what is not valid Unicode becomes U+FFFD, which :func:`find_flaw` refuses."""
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return " ".join(text.split())


def find_flaw(answer: Answer, rules: CaptionRules) -> Flaw | None:
    """Return the first flaw of an answer on its own; None for a caption."""
    text = answer.text.replace("’", "'").replace("“", '"').replace("”", '"')
    words = WORD.findall(text.lower())
    if answer.end == "failed":
        return Flaw("caption_failed", "the server failed twice on this image (HTTP 500)", "final")
    if answer.end == "timeout":
        return Flaw("caption_timeout", "no server answered in time for this image", "final")
    if answer.end == "refused":
        return Flaw("caption_refused", "the server's filter withheld the answer", "quality")
    if not words:
        return Flaw("caption_empty", "the model answered without a word", "room")
    if CONTROL.search(text):
        return Flaw("caption_garbled", "the answer holds control characters or invalid Unicode", "quality")
    if has_loop(words):
        return Flaw("caption_repeats", f"the answer repeats itself: {_short(' '.join(words[-LOOP_WORDS:]))}", "quality")
    spoken = QUOTED.sub('""', text)  # what is written in the picture is no word of the model's own
    if match := REFUSAL.search(spoken):
        return Flaw("caption_refused", f"the model refused: {_short(spoken[match.start() :])}", "quality")
    if answer.end == "length" or (answer.end is None and not text.endswith(SENTENCE_ENDS)):
        return Flaw("caption_truncated", f"the answer was cut off after {len(words)} words", "room")
    if match := PREAMBLE.search(spoken):
        return Flaw("caption_preamble", f"the model talks to the reader: {_short(spoken[match.start() :])}", "quality")
    if len(words) < rules.min_words:
        return Flaw("caption_too_short", f"{len(words)} words, captions.min_words is {rules.min_words}", "quality")
    if len(words) > rules.max_words:
        return Flaw("caption_too_long", f"{len(words)} words, captions.max_words is {rules.max_words}", "quality")
    return None


def has_loop(words: Sequence[str]) -> bool:
    """Tell whether some ``LOOP_WORDS`` words in a row come ``LOOP_TIMES`` times."""
    runs = Counter(zip(*(words[start:] for start in range(LOOP_WORDS))))
    return any(count >= LOOP_TIMES for count in runs.values())


def next_step(
    answers: Sequence[Answer], rules: CaptionRules, taken: Mapping[str, str] | None = None
) -> Accepted | Flaw | Ask:
    """Return what follows from the answers so far: the caption, why there is none, or the next question.

    ``taken`` maps the captions of other images, :func:`normalised`, to their keys; none of them is one of this image.
    """
    met: list[Flaw] = []
    for answer in answers:
        flaw = find_flaw(answer, rules)
        if flaw is None and taken and (other := taken.get(normalised(answer.text))):
            flaw = Flaw("caption_repeats", f"the same caption as that of image {other}", "quality")
        if flaw is None:
            return Accepted(answer.text, answer.options)
        met.append(flaw)
    kinds = [flaw.kind for flaw in met]
    if kinds and (kinds[-1] == "final" or kinds.count(kinds[-1]) > 1):
        return met[-1]
    options = dict(rules.options)
    if "room" in kinds:
        options["num_predict"] *= 2
    if "quality" in kinds:  # at temperature 0 another seed changes nothing
        options |= {"seed": options["seed"] + 1, "temperature": rules.reask_temperature}
    return Ask(options)


def next_steps(answers: Mapping[str, Sequence[Answer]], rules: CaptionRules) -> dict[str, Accepted | Flaw | Ask]:
    """Return :func:`next_step` for all images of a shard, by key; of two with one caption the first in order keeps it.

    This finds a server that says the same of every picture, whatever the order in which answers came.
    """
    taken: dict[str, str] = {}
    steps = {}
    for key in sorted(answers):
        steps[key] = step = next_step(answers[key], rules, taken)
        if isinstance(step, Accepted):
            taken[normalised(step.text)] = key
    return steps


def normalised(text: str) -> str:
    """Return a caption without case and punctuation."""
    return " ".join(WORD.findall(text.lower()))


def _short(text: str, limit: int = 60) -> str:
    return repr(text if len(text) <= limit else text[: limit - 3] + "...")
