"""Rules for which answers of a model are captions, and for what is asked next when an answer is none.

Reasoning that is closed (``prep/captions/phrases.py``) is cut away from an answer, and the rest is judged. It has at
most one flaw, the first that is found. A flaw of the kind "room" (empty, cut off, or nothing but thinking) leads to one
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
from functools import lru_cache
from typing import Any

from prep.captions.languages import second_language
from prep.captions.phrases import (
    CLOSING,
    CODE,
    FOREIGN_REFUSAL,
    INSTRUCTION,
    JSON,
    MARKDOWN,
    MARKUP,
    PREAMBLE,
    QUOTED,
    REFUSAL,
    TOKENS,
    UNCLOSED,
    WORD_COUNT,
    without_reasoning,
)
from prep.captions.sentences import first_sentence

CODE_VERSION = 2  # of the checks: raised when the same answers give other captions

# letters and digits with inner apostrophes and hyphens; scripts without spaces count every character
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+(?:['-][^\W_]+)*")
CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f\ufffd]")
SENTENCE_ENDS = tuple(".!?\"')]。！？」』”»")
LETTERS_PER_WORD = 40
ECHO_WORDS = 8  # of the prompt in a row
THINKING = "thinking"  # why an answer ended that has reasoning and nothing else
# the same eight words in a row three times: no prose, but a model that is caught in a loop
LOOP_WORDS, LOOP_TIMES = 8, 3
# ... or thirty that come twice, and shorter runs that follow each other at once: words of a run -> how often it comes
TWICE_WORDS = 30
STUTTERS = {1: 5, 2: 4, 3: 4, 4: 3, 5: 3, 6: 3, 7: 3}
SAME_LETTERS = re.compile(r"(\S)\1{19}|[!-~]{160}")


@dataclass(frozen=True)
class Answer:
    """The answer of a server: ``text``, and why it ended, in the servers' words.

    ``text`` has the lines of the answer, and its reasoning where the server does not keep that apart. ``end`` is
    "stop", "length" (cut off), "refused" (the server's own filter), "thinking" (reasoning, which the server kept apart,
    was all there was), None where the server does not say, and "failed" or "timeout" for a sample that servers could
    not answer for, with their words as ``text``. ``options`` are those of the question.
    """

    text: str
    end: str | None
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Turn:
    """What was asked about a picture, and what the model answered, before the question of now."""

    question: str
    answer: str


UNANSWERED = ("failed", "timeout")  # ends of an answer that a server did not give


@dataclass(frozen=True)
class CaptionRules:
    """The limits, the options of a first and of a further question, and the prompt: no answer repeats it.

    Without a prompt answers may be in any language. ``short``: they are short captions, each of one sentence.
    """

    min_words: int
    max_words: int
    options: Mapping[str, Any]
    reask_temperature: float
    prompt: str = ""
    short: bool = False


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


def readable(text: str) -> str:
    """Return the lines of an answer; what is not valid Unicode becomes U+FFFD, which :func:`find_flaw` refuses."""
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    lines = "\n".join(" ".join(line.split()) for line in text.splitlines()).strip()
    return re.sub(r"\n{3,}", "\n\n", lines)


def tidy(text: str) -> str:
    """Return :func:`readable` text as one line with single spaces."""
    return " ".join(readable(text).split())


def caption_text(answer: Answer) -> str:
    """Return an answer as the caption it would be: without closed reasoning, in one line."""
    return tidy(without_reasoning(answer.text))


def find_flaw(answer: Answer, rules: CaptionRules) -> Flaw | None:
    """Return the first flaw of an answer on its own; None where :func:`caption_text` is a caption."""
    return _judge(answer.text, answer.end, rules.min_words, rules.max_words, rules.prompt, rules.short)


@lru_cache(maxsize=1 << 13)  # an answer is judged when it comes, and when its shard is complete
def _judge(answer: str, end: str | None, min_words: int, max_words: int, prompt: str, short: bool) -> Flaw | None:
    keys = "captions.short_" if short else "captions."
    if end == "failed":
        return Flaw("caption_failed", f"servers that answered others failed on this image: {answer}", "final")
    if end == "timeout":
        return Flaw("caption_timeout", f"servers that answered others did not for this image: {answer}", "final")
    if end == "refused":
        return Flaw("caption_refused", "the server's filter withheld the answer", "quality")
    lines = without_reasoning(answer := readable(answer))
    cut = lines != answer
    lines = lines.replace("’", "'").replace("“", '"').replace("”", '"')
    text = tidy(lines)
    words = WORD.findall(text.lower())
    spoken = QUOTED.sub('""', _unwrapped(lines))  # what is written in the picture is no word of the model's own
    thinks = UNCLOSED.search(spoken)
    if end == THINKING or (cut and not words) or (thinks and end == "length"):
        return Flaw(
            "caption_only_thinking",
            "the model answered only in its thinking; set captions.options.think: false or a larger num_predict",
            "room",
        )
    if not words:
        return Flaw("caption_empty", "the model answered without a word", "room")
    if CONTROL.search(text):
        return Flaw("caption_garbled", "the answer holds control characters or invalid Unicode", "quality")
    if has_loop(words) or has_loop(words, TWICE_WORDS, 2) or has_stutter(words):
        return Flaw("caption_repeats", f"the answer repeats itself: {_short(' '.join(words[-LOOP_WORDS:]))}", "quality")
    if SAME_LETTERS.search(QUOTED.sub("", text)):
        return Flaw("caption_repeats", "the answer repeats letters, or has no spaces", "quality")
    if len(text) > LETTERS_PER_WORD * max_words:  # not worth looking at any closer
        return Flaw("caption_too_long", f"{len(text)} letters, {keys}max_words is {max_words}", "quality")
    if thinks:
        return _flaw("caption_reasoning", "the answer holds reasoning", thinks)
    for pattern in (REFUSAL, FOREIGN_REFUSAL):
        if match := pattern.search(spoken):
            return _flaw("caption_refused", "the model refused", match)
    if end == "length" or (end is None and not text.endswith(SENTENCE_ENDS)):
        return Flaw("caption_truncated", f"the answer was cut off after {len(words)} words", "room")
    for reason, detail, pattern, where in (
        ("caption_code", "the answer is code", CODE, lines),
        ("caption_json", "the answer is JSON", JSON, lines),
        ("caption_special_token", "the answer holds marks of the model's template", TOKENS, spoken),
        ("caption_word_count", "the answer counts its words", WORD_COUNT, spoken),
        ("caption_preamble", "the model talks to the reader", PREAMBLE, spoken),
        ("caption_closing", "the model talks to the reader", CLOSING, spoken),
        ("caption_echo", "the answer repeats instructions", INSTRUCTION, spoken),
        ("caption_markdown", "the answer is formatted", MARKDOWN, spoken),
        ("caption_markup", "the answer holds markup", MARKUP, spoken),
    ):
        if match := pattern.search(where):
            return _flaw(reason, detail, match)
    if echo := _echo(words, prompt):
        return Flaw("caption_echo", f"the answer repeats the prompt: {_short(echo)}", "quality")
    if other := second_language(spoken, prompt):
        detail = f"the answer is in a language that the prompt does not ask for: {_short(other)}"
        return Flaw("caption_language", detail, "quality")
    if len(words) < min_words:
        return Flaw("caption_too_short", f"{len(words)} words, {keys}min_words is {min_words}", "quality")
    if len(words) > max_words:
        return Flaw("caption_too_long", f"{len(words)} words, {keys}max_words is {max_words}", "quality")
    if short and (first := first_sentence(text)) != text:
        return Flaw("caption_sentences", f"more than the one sentence: {_short(first)}", "quality")
    return None


def _flaw(reason: str, detail: str, match: re.Match[str]) -> Flaw:
    """Return a flaw of quality with the place where it was found."""
    found = " ".join(match.string[match.start() :].split())
    return Flaw(reason, f"{detail}: {_short(found)}", "quality")


def _unwrapped(text: str) -> str:
    """Return a text without quotation marks around all of it."""
    inner = text.strip()[1:-1]
    return inner if text.strip() in (f'"{inner}"', f"“{inner}”") and not set('"“”').intersection(inner) else text


def _echo(words: Sequence[str], prompt: str) -> str:
    """Return the first ``ECHO_WORDS`` words in a row that stand in the prompt too; "" where there are none."""
    asked = WORD.findall(prompt.replace("’", "'").lower())
    known = set(zip(*(asked[start:] for start in range(ECHO_WORDS))))
    for run in zip(*(words[start:] for start in range(ECHO_WORDS))):
        if run in known:
            return " ".join(run)
    return ""


def has_loop(words: Sequence[str], length: int = LOOP_WORDS, times: int = LOOP_TIMES) -> bool:
    """Tell whether some ``length`` words in a row come ``times`` times."""
    runs = Counter(zip(*(words[start:] for start in range(length))))
    return any(count >= times for count in runs.values())


def has_stutter(words: Sequence[str]) -> bool:
    """Tell whether a run of a few words follows itself as often as ``STUTTERS`` says."""
    for length, times in STUTTERS.items():
        same = 0  # words in a row that are those ``length`` places before
        for word, before in zip(words[length:], words):
            same = same + 1 if word == before else 0
            if same >= length * (times - 1):
                return True
    return False


def next_step(
    answers: Sequence[Answer], rules: CaptionRules, taken: Mapping[str, str] | None = None
) -> Accepted | Flaw | Ask:
    """Return what follows from the answers so far: the caption, why there is none, or the next question.

    ``taken`` maps the captions of other images, :func:`normalised`, to their keys; none of them is one of this image.
    """
    met: list[Flaw] = []
    for answer in answers:
        flaw, text = find_flaw(answer, rules), caption_text(answer)
        if flaw is None and taken and (other := taken.get(normalised(text))):
            flaw = Flaw("caption_repeats", f"the same caption as that of image {other}", "quality")
        if flaw is None:  # whoever is asked for one sentence likes to quote it
            return Accepted(_unwrapped(text) if rules.short else text, answer.options)
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
