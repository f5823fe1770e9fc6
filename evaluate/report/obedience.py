"""Whether text and pose are obeyed, in words: the verdict of the arms that isolate them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from evaluate.records import ROUNDING
from evaluate.report.metrics import number, part_name
from evaluate.suite.gain import CEILING

GAINS = {"text": "attribute_gain", "pose": "pose_gain"}
MOSTLY = 0.5  # of what could be gained: from here on a condition is obeyed
HARDLY = 0.1  # below, whatever the interval says of zero, it is not

Word = Literal["obeyed", "partly obeyed", "not obeyed", "undecided"]


@dataclass(frozen=True)
class Obedience:
    """One condition's verdict, and the sentence that says it with its numbers."""

    condition: str
    word: Word
    words: str
    open: bool = False  # whether more images could decide it


def obedience(metrics: Sequence[Mapping[str, Any]]) -> list[Obedience]:
    """Return the verdict on each condition, from entries of report.json; none on what was not measured.

    From what the condition adds to the arm without it (:mod:`evaluate.suite.gain`) beyond luck, the best of no gain
    and what pictures of anybody would add, as a share of what it could add: ``obeyed`` where the interval is above luck
    and the share at least MOSTLY; ``partly obeyed`` below that; ``not obeyed`` where the interval reaches luck and ends
    below MOSTLY, or ends below HARDLY; otherwise ``undecided``.
    Texts of images whose truth is not known: by what an edit changes beyond a paraphrase, which can only deny.
    """
    found = []
    for condition, family in GAINS.items():
        gain = next((one for one in metrics if one["name"].startswith(f"{family}/")), None)
        if gain is not None:
            found.append(_of_gain(condition, gain))
        elif condition == "text":
            named = {one["name"]: one for one in metrics}
            effect = named.get("edit/effect") or named.get("edit/effect_pixels")
            found += [_of_edits(effect)] if effect else []
    return found


def _of_gain(condition: str, gain: Mapping[str, Any]) -> Obedience:
    if gain["value"] is None or gain["low"] is None:
        words = _sentence(condition, "undecided", gain["reason"] or "no interval")
        return Obedience(condition, "undecided", words, gain["value"] is not None)
    low, value, high = (gain[name] for name in ("low", "value", "high"))
    known = gain["baselines"]
    most, luck = known.get(CEILING, 0.0), max(0.0, *(known[name] for name in known if name != CEILING))
    span = most - luck
    if span <= 0:  # without the condition pictures are as right as real ones: nothing is left to add
        word: Word = "undecided"
    elif high - luck < HARDLY * span or (low <= luck and high - luck < MOSTLY * span):
        word = "not obeyed"
    elif low <= luck:
        word = "undecided"
    else:
        word = "obeyed" if value - luck >= MOSTLY * span else "partly obeyed"
    settings = gain["settings"]
    what = {"text": "named colours that are right", "pose": "joints that are in their place"}[condition]
    more = f"{number(value, gain)} [{number(low, gain)}, {number(high, gain)}] higher"
    given, without = (part_name(settings[name]) for name in ("conditions", "without"))
    why = f"given {given}, the share of {what} is {more} than given {without}; {number(most, gain)} is possible"
    why += f", {number(luck, gain)} is luck" if luck > 0 else ""
    return Obedience(condition, word, _sentence(condition, word, why), word == "undecided" and span > 0)


def _of_edits(effect: Mapping[str, Any]) -> Obedience:
    few = effect["low"] is None
    if few:
        word, why = "undecided", effect["reason"] or "no interval"
    elif effect["high"] <= 0 or max(abs(effect[name]) for name in ("low", "high")) <= ROUNDING:
        word, why = "not obeyed", "an edit changes no more than a paraphrase does"
    elif effect["low"] <= 0:
        word, why = "undecided", "whether an edit changes more than a paraphrase does cannot be told"
    else:
        word, why = "undecided", "an edit changes more than a paraphrase does, but that is not to say rightly"
    few = few or (word == "undecided" and effect["low"] <= 0)
    return Obedience("text", word, _sentence("text", word, why), few)


def _sentence(condition: str, word: Word, why: str) -> str:
    start = f"Whether the {condition} is obeyed is undecided" if word == "undecided" else f"The {condition} is {word}"
    return f"{start}: {why}."
