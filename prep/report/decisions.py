"""What a dataset asks its owner to decide, each with the command that carries the decision out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prep.images.filters import CHOICES
from prep.passes.advice import MEND, RUN, Advice
from prep.report.views import DUPLICATE

REASONS = 4  # for which sources were refused, named in a decision
# where the page shows what a decision is about, by words of it; altered twins, cropped or not, it does not show
PLACES = {
    "near duplicates": "duplicates", "in train too": "", "caption": "captions", "crop": "crops", "bucket": "crops",
}  # fmt: skip


def decisions(
    advice: Sequence[Advice],
    rejects: Sequence[Mapping[str, Any]],
    captions: Mapping[str, Any] | None,
    duplicates: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Return the decisions, what spoils most first: ``words``, ``command``, ``place`` of the page, and whether ``bad``.

    ``advice`` is that of :mod:`prep.passes.advice`; the others are views of :mod:`prep.report.views`.
    """
    found = []

    def decide(words: str, command: str, place: str = "", bad: bool = False) -> None:
        found.append({"words": words, "command": command, "place": place, "bad": bad})

    if split := duplicates["split"]:
        groups = f"{split:,} group{'s' if split != 1 else ''} of near duplicates lie{'s' if split == 1 else ''}"
        words = f"The holdout leaks: {groups} on both sides of the split"
        decide(words, "nanodit prep verify --dataset DATASET", "duplicates", True)
    for one in advice:
        about = one.words.partition(": ")[0]  # names of files follow
        decide(one.words, one.command, next((place for word, place in PLACES.items() if word in about), ""))
    refused = [one for one in rejects if one["reason"] not in (DUPLICATE, *CHOICES)]  # nobody chose these
    if refused:
        named = ", ".join(f"{one['count']:,} {one['reason']}" for one in refused[:REASONS])
        more = " and others" if len(refused) > REASONS else ""
        total = sum(one["count"] for one in refused)
        words = f"{total:,} source{'s were' if total != 1 else ' was'} refused: {named}{more}"
        decide(f"{words}. Mend or replace what should be in, or leave it out", f"{RUN} --retry-rejects", "rejects")
    if captions and (repeated := captions["repeated"])["total"]:
        texts = f"{repeated['total']:,} text{'s are' if repeated['total'] != 1 else ' is'}"
        words = f"{texts} shared by {repeated['samples']:,} images: a captioner that repeats itself has not looked"
        decide(words, f"{MEND} --flagged", "captions")
    return found
