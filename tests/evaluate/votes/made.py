"""Pages and votes made up for tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluate.votes.ballots import page_id
from evaluate.votes.page import Shown
from evaluate.votes.trials import make_trials
from nanodit.rng import generator

RUNS = {
    "A": {"run": "runs/first", "step": 100, "weights": "ema", "weights_sha256": "aa" * 32},
    "B": {"run": "runs/second", "step": 200, "weights": "ema", "weights_sha256": "bb" * 32},
}


def rows(count: int, start: int = 0, group: int = 1) -> list[dict[str, Any]]:
    """Rows of an index, ``group`` near duplicates at a time."""
    return [
        {
            "key": f"key{index:04d}",
            "bucket": "64x64" if index % 3 else "80x48",
            "caption": f"picture {index} of a {('dog', 'cat', 'horse')[index % 3]} & <b>more</b>",
            "duplicate_group": f"group{index // group}" if group > 1 else None,
        }
        for index in range(start, start + count)
    ]


def content(pairs: int = 16, group: int = 1, **changes: Any) -> dict[str, Any]:
    """What a page holds beside its answers."""
    made = {
        "schema": 1,
        "runs": RUNS,
        "dataset": "cd" * 32,
        "drawn": {
            "conditions": "text", "guidance": 2.0, "sampler": {"method": "euler", "steps": 12, "interval": [0.0, 0.5]},
            "captions": "long", "precision": "fp32", "noise": 0, "holdout": "test",
            "holdout_seed": None,
        },
        "pictures": "ee" * 32,
        "seed": "0123456789abcdef",
        "trials": make_trials(rows(pairs, group=group), rows(8, 1000), "0123456789abcdef"),
        **changes,
    }  # fmt: skip
    return {**made, "page": page_id(made)}


def shown(page: dict[str, Any]) -> list[Shown]:
    """Pictures for a page: flat, of as many shades as sides."""
    random = generator("pictures", page["page"])
    sizes = [(48, 80), (64, 64), (300, 200)]
    return [
        Shown(f"prompt {place} of <i>{trial['key']}</i>".replace(trial["key"], "words"), *(
            np.full((*sizes[place % 3], 3), random.integers(0, 256, 3), np.uint8) for _ in range(2)
        ))
        for place, trial in enumerate(page["trials"])
    ]  # fmt: skip


def answered(page: dict[str, Any], answer: Callable[[dict[str, Any]], str | None], ballot: str = "0" * 16) -> dict:
    """The page's JSON, where ``answer`` says what was preferred: A, B, real, another name for a tie, None for none."""
    trials = []
    for trial in page["trials"]:
        chosen = answer(trial)
        side = next((side for side in ("left", "right") if trial[side] == chosen), "tie")
        given = {"answer": None, "milliseconds": None} if chosen is None else {"answer": side, "milliseconds": 2500}
        trials.append({**trial, **given})
    return {**page, "ballot": ballot, "trials": trials}


def attentive(chosen: Sequence[str | None]) -> Callable[[dict[str, Any]], str | None]:
    """Answer pairs in their order with ``chosen``, and every catch trial rightly."""
    left = iter(chosen)
    return lambda trial: "real" if trial["kind"] == "catch" else next(left)


def write(path: Path, votes: dict[str, Any]) -> Path:
    """Write votes as the page saves them."""
    path.write_text(json.dumps(votes, indent=1), encoding="utf-8")
    return path
