"""What was measured on one card, scaled to the others: each kind of work by what bounds it on either card.

The time of a kind goes with the larger of FLOPs over a card's peak and bytes over its bandwidth
(:mod:`train.plan.work`). What a card reaches of its data sheet is taken to be the same on all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from train.check.report import table
from train.hardware import GPUS, Gpu, gpu_named
from train.plan.work import Work, kinds_on

Lines = Sequence[Mapping[str, Any]]


def scaled(lines: Lines) -> list[str]:
    """Return the table of images a second by card and preset, from lines of the parts ``card`` and ``speed``.

    The shares of the kinds are the profiler's where there are any, else those that the work would have here.
    """
    measured = [line for line in lines if "work" in line]
    here, name = _here(lines)
    if here is None or not measured:
        return ["no time to scale to other cards: it takes the parts card and speed"]
    profiled = _shares(lines)
    rows = [(f"images/s, scaled from {name}", *(line["preset"] for line in measured))]
    for card, there in GPUS.items():
        rates = [
            line["images"] / line["alone"] / factor(Work(*line["work"]), here, there, profiled) for line in measured
        ]
        rows.append((card, *(f"{rate:.4g}" for rate in rates)))
    return table(rows)


def factor(work: Work, here: Gpu, there: Gpu, shares: Mapping[str, float] | None = None) -> float:
    """Return how many times as long work takes on another card; ``shares`` are those of the kinds in the time here."""
    ours, theirs = kinds_on(here, work), kinds_on(there, work)
    known = {kind: share for kind, share in (shares or ours).items() if ours[kind]}
    return sum(share * theirs[kind] / ours[kind] for kind, share in known.items()) / sum(known.values())


def _here(lines: Lines) -> tuple[Gpu | None, str]:
    """Return the card that was measured as the table knows it, else by its own two ceilings."""
    values = {line["name"]: line["value"] for line in lines if line["part"] == "card"}
    name = values.get("card", "this CPU").partition(", capability")[0]
    if known := gpu_named(name):
        return known, name
    products = [_number(value) for what, value in values.items() if what.endswith(" products")]
    if not products or "copy" not in values:
        return None, name
    return Gpu(max(products), _number(values["copy"])), f"{name} ({max(products):.3g} TFLOP/s, {values['copy']})"


def _shares(lines: Lines) -> dict[str, float] | None:
    """Return the shares of the kinds, as the profiler saw them; None without it."""
    text = next((line["value"] for line in lines if line["name"] == "time by kind"), "")
    found = re.findall(r"([a-z ]+?) ([0-9]+)%", text)
    return {kind.strip(): int(share) / 100 for kind, share in found} or None


def _number(text: str) -> float:
    return float(text.split()[0])
