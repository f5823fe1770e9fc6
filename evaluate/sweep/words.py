"""The numbers of a sweep's page as text: with as many digits as their intervals allow."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from evaluate.report.metrics import label
from evaluate.statistics.intervals import Interval
from evaluate.statistics.looks import Looks
from evaluate.statistics.verdicts import MOST_SEEDS, Comparison, Verdict
from evaluate.sweep.analysis import Contrast


def metric_title(metric: str) -> str:
    """Return how people say a metric: of report.json, of metrics.jsonl or of a trial's record."""
    if metric.startswith(("validation/", "train/", "sys/", "memory/")):
        return metric.partition("/")[2].replace("_", " ")
    title, part, detail = label(metric)
    title = title[:1].lower() + title[1:] if title[1:2].islower() else title  # within sentences; PSNR stays
    return ", ".join([title, *([part] if part != "all conditions" else []), *([detail] if detail else [])])


def digits(value: float | None, like: float | None = None, sign: bool = False) -> str:
    """Write a number with as many decimals as leave ``like`` (an interval's half width, say) two significant digits.

    Without it, or where it is rounding error, with three digits of its own.
    """
    if value is None or not math.isfinite(value):
        return "–"
    scale, wanted = (abs(like), 2) if like and abs(like) > 1e-6 * abs(value) else (abs(value), 3)
    decimals = max(0, min(9, wanted - 1 - math.floor(math.log10(scale) + 1e-9))) if scale else 2
    text = f"{value:{'+' if sign else ''},.{decimals}f}"
    if not float(text.replace(",", "")):
        text = text.lstrip("+-")
    return text.replace("-", "−")


def words_of(interval: Interval, sign: bool = True) -> str:
    """Write a difference with its interval: ``−0.031 [−0.044, −0.018]``."""
    if interval.low is None:
        return digits(interval.value, sign=sign)
    half = (interval.high - interval.low) / 2
    low, high = digits(interval.low, half, sign), digits(interval.high, half, sign)
    return f"{digits(interval.value, half, sign)} [{low}, {high}]"


def p_words(p: float | None) -> str:
    """Write a p-value."""
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def plural(count: int, word: str) -> str:
    """Write ``1 seed``, ``2 seeds``."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def more_words(verdict: Verdict, comparison: Comparison | None, looks: Looks) -> str:
    """Return what would settle an open verdict: more seeds of this sweep, or of a new one where no maximum was said."""
    if comparison is None or verdict.word not in ("inconclusive", "single run: no verdict"):
        return ""
    if comparison.interval.n < 2:
        return "run at least three training seeds"
    most = looks.most or MOST_SEEDS
    if verdict.seeds is None:
        if looks.most and looks.seeds[-1] >= looks.most:
            return f"all {most:,} seeds declared are used: only a new sweep could settle it"
        limit = f"the {most:,} seeds declared" if looks.most else f"{most:,} seeds"
        return f"not even {limit} would settle it with a probability of 80 %"
    least, largest = verdict.seeds
    done = comparison.interval.n if looks.most else 0
    span = f"about {least - done:,}" + ("" if largest == least else f" to {largest - done:,}" if largest else "")
    kind = "more seed" if looks.most else "seed"
    where = "" if looks.most else " of a new sweep"
    if largest is None:
        where += f", perhaps more than {f'the {most:,} declared' if looks.most else f'{most:,}'},"
    end = {"different": ", as different", "equivalent": ", as equivalent"}.get(verdict.toward or "", "")
    return f"{span} {kind}{'' if span == 'about 1' else 's'}{where} would settle it with a probability of 80 %{end}"


def failed_words(one: Contrast) -> str:
    """Return how many trials failed in either arm, and what ranks say of it; empty where none did."""
    if not any(one.failed):
        return ""
    names = (one.arm.name, one.against)
    counts = [f"{lost} of {ended} of {name}" for name, lost, ended in zip(names, one.failed, one.ended)]
    text = f"{'failed or stopped early' if one.stopped else 'failed'}: {' and '.join(counts)}"
    if one.ranks is None:
        return text
    counted = (
        f"{plural(one.ranks.better, 'seed')} better and {one.ranks.worse} worse, p {p_words(one.ranks.p)} by ranks"
    )
    return f"{text}; with failures as the worst, {counted}"


def answer(found: Sequence[Contrast], title: str, margin: float | None, looks: Looks) -> str:
    """Return what was found in a sentence or two, from an arm's comparisons by the metric called ``title``.

    What beats what by how much, what is equivalent, and what is undecided; the baseline's repeat makes no claim, but a
    difference of it is a doubt of all the others.
    """
    claims = [one for one in found if not one.repeat]
    if not claims:
        return "There is nothing to compare."
    decided = [one for one in claims if one.verdict.word in ("better", "worse")]
    sentences = []
    if decided:
        sentences.append(f"{'; '.join(_decided(one) for one in decided)}, in {title}.")
    if alike := [one for one in claims if one.verdict.word == "equivalent"]:
        within = f": any difference is within ±{margin:g}" if margin else ""
        sentences.append(f"{_pairs(alike, 'is equivalent to', False)}{within}.")
    if unclear := [one for one in claims if one.verdict.word not in ("better", "worse", "equivalent")]:
        seeds = ((one, more_words(one.verdict, one.comparison, looks)) for one in unclear)
        more = next((f"{_whose(one, unclear)}{words}" for one, words in seeds if words), "")
        more = more or next((one.verdict.note for one in unclear if one.verdict.note), "")
        tested = all(one.verdict.word == "inconclusive" for one in unclear)  # as a single run is not, or survivors
        start, word = ("Nothing separates", "from") if tested and not sentences else ("Undecided:", "against")
        sentences.append(f"{start} {_pairs(unclear, word, True)}{f'; {more}' if more else ''}.")
    if doubted := [one.arm.name for one in found if one.repeat and one.verdict.word in ("better", "worse")]:
        sentences.append(f"But the baseline differs from its own repeat ({doubted[0]}).")
    return " ".join(sentences)


def _whose(one: Contrast, among: Sequence[Contrast]) -> str:
    """Name the comparison that a remark is about, where there are several."""
    return f"for {one.arm.name} against {one.against}, " if len(among) > 1 else ""


def _decided(one: Contrast) -> str:
    """Write ``C beats B by 0.089 [0.071, 0.107]``, whichever way is better."""
    interval = one.comparison.interval
    if interval.value < 0:
        interval = Interval(-interval.value, -interval.high, -interval.low, interval.n)
    verb = "beats" if one.verdict.word == "better" else "loses to"
    more = " with more than its factor changed," if one.arm.undeclared else ""
    return f"{one.arm.name}{more} {verb} {one.against} by {words_of(interval, sign=False)}"


def _pairs(found: Sequence[Contrast], word: str, numbers: bool) -> str:
    """Write ``B from A (+0.01 [−0.02, +0.04]), D from C``."""
    return ", ".join(
        f"{one.arm.name} {word} {one.against}"
        + (f" ({words_of(one.comparison.interval)})" if numbers and one.comparison else "")
        for one in found
    )


def duration(seconds: float) -> str:
    """Write a span of time."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def setting(value: Any) -> str:
    """Write a config's value as YAML would have it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
