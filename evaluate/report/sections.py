"""What the tests leave beside metrics, for the page: matrices, pairs of words and pictures, strips, overlays, copies.

Every function takes one evaluation and returns plain values, or None where the test left nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from evaluate.metrics.colours import PALETTES
from evaluate.records import AGAIN, ATTRIBUTES, MODEL, REAL
from evaluate.report.files import Run
from evaluate.report.metrics import condition_order, part_name
from evaluate.report.pictures import Thumbnails, picture, real_of, shorten
from nanodit.errors import DataError
from nanodit.keypoints import BONES
from nanodit.svg import joints_overlay

Section = dict[str, Any] | None

# bones of COCO-WholeBody's body and feet; its other joints are drawn as specks
LINKS = (*BONES, (15, 17), (15, 18), (15, 19), (16, 20), (16, 21), (16, 22))
PAIRS = 12  # edits shown
WORDS = 160  # characters of a caption beside a small picture


def swap(run: Run, thumbnails: Thumbnails) -> Section:
    """The matrix of texts (rows) and DINO features (columns), and for each mode whose features a picture shows."""
    extra = run.files.extras.get("swap")
    if not extra:
        return None
    matrix = extra["matrix"]
    result: dict[str, Any] = {"candidates": extra["candidates"], "matrix": None, "examples": []}
    if matrix:
        keys = matrix["keys"]
        rows = [
            {
                "caption": _caption(run, key),
                "real": real_of(run, key, thumbnails, "real"),
                "cells": [
                    picture(run, (MODEL, one["condition"], one["key"], one["seed"]), thumbnails, "")
                    | {"own": place == column}
                    for column, one in enumerate(cells)
                ],
            }
            for place, (key, cells) in enumerate(zip(keys, matrix["cells"]))
        ]
        result["matrix"] = {"mode": _mode(matrix["mode"]), "rows": rows}
    unswapped = {mode["mode"]: mode["unswapped"] for mode in extra["modes"]}
    for example in extra["examples"]:
        key, seed, donor = example["key"], example["seed"], example["donor"]
        drawn = []
        for mode, condition in example["pictures"].items():
            taken = example.get("nearest", {}).get(mode, {})
            right = sum(found == donor for found in taken.values())
            note = f"donor told in {right} of {len(taken)} spaces" if taken else ""
            drawn.append(picture(run, (MODEL, condition, key, seed), thumbnails, f"donor's {_mode(mode)}", note))
        before = next((unswapped[mode] for mode in example["pictures"] if mode in unswapped), None)
        own = [picture(run, (MODEL, before, key, seed), thumbnails, "unswapped", "own DINO")] if before else []
        sides = [
            real_of(run, key, thumbnails, "real", "gives the text"),
            real_of(run, donor, thumbnails, "donor", "gives DINO"),
        ]
        pictures = [one | {"judged": []} for one in (*sides, *own, *drawn)]
        result["examples"].append({"caption": _caption(run, key), "pictures": pictures})
    return result


def edits(run: Run, thumbnails: Thumbnails) -> Section:
    """Pairs of pictures before and after an edit of the text, with the words that differ."""
    extra = run.files.extras.get("edit")
    if not extra:
        return None
    pairs = []
    # of every type in turn, in the order in which the test chose them
    by_type: dict[str, list[dict[str, Any]]] = {}
    for pair in extra["pairs"]:
        by_type.setdefault(pair["type"], []).append(pair)
    room = max(1, PAIRS // max(1, len(by_type)))
    for pair in (one for own in by_type.values() for one in own[:room]):
        judged = pair["judged"] or {}
        seen = {side: f"{pair['attribute']}: {judged[side] or 'not found'}" for side in judged}
        names = {side: (MODEL, condition, pair["key"], pair["seed"]) for side, condition in _sides(extra, pair).items()}
        pictures = [
            picture(run, name, thumbnails, side, seen.get(side, "")) | {"judged": []} for side, name in names.items()
        ]
        distances = [
            {"space": _space(space), "value": value, "null": (pair["null_distance"] or {}).get(space)}
            for space, value in sorted(pair["distance"].items())
        ]
        diff = [(kind, shorten(text, 4 * WORDS)) for kind, text in pair["diff"]]
        pairs.append({"type": pair["type"], "pictures": pictures, "diff": diff, "distances": distances})
    counts = [{"type": name, **count} for name, count in extra["counts"].items()]
    return {"condition": part_name(extra["condition"]), "pairs": pairs, "counts": counts, "total": len(extra["pairs"])}


def _sides(extra: dict[str, Any], pair: dict[str, Any]) -> dict[str, str]:
    return {"unedited": extra["condition"], "edited": pair["condition"]}


def poses(run: Run, thumbnails: Thumbnails) -> Section:
    """Pictures at quantiles of OKS with the pose given and the joints found, and how many people there were."""
    extra = run.files.extras.get("pose")
    if not extra:
        return None
    overlays = []
    for one in extra["overlays"]:
        note = f"OKS {one['oks']:.2f}, {one['hits']} of {one['joints']} joints"
        shown = picture(run, (MODEL, one["condition"], one["key"], one["seed"]), thumbnails, one["label"], note)
        found = [joint if joint[2] >= extra["confidence"] else (0, 0, 0) for joint in one["found"] or ()]
        drawing = joints_overlay(one["given"], found, LINKS, (one["width"], one["height"]))
        overlays.append({**shown, "condition": one["condition"], "drawing": drawing, "judged": []})
    conditions = sorted({one["condition"] for one in overlays}, key=condition_order)
    grouped = [
        {"condition": part_name(name), "pictures": [one for one in overlays if one["condition"] == name]}
        for name in conditions
    ]
    counts = [{"condition": part_name(name), **extra["counts"][name]} for name in extra["counts"]]
    return {name: extra.get(name) for name in ("rule", "detector", "alpha")} | {"groups": grouped, "counts": counts}


def strips(run: Run, thumbnails: Thumbnails) -> Section:
    """Pictures of a few prompts from several noises each."""
    extra = run.files.extras.get("divergence")
    if not extra or not extra["strips"]:
        return None
    found = []
    for key in extra["strips"]:
        drawn = [
            picture(run, (MODEL, label, key, seed), thumbnails, f"noise {seed}") | {"judged": []}
            for seed, label in enumerate(extra["labels"])
        ]
        real = [real_of(run, key, thumbnails) | {"judged": []}] if run.files.rows[REAL, "real", key, 0]["image"] else []
        found.append({"caption": _caption(run, key), "pictures": [*real, *drawn]})
    return {"condition": part_name(extra["condition"]), "prompts": len(extra["prompts"]), "strips": found}


def neighbours(run: Run, thumbnails: Thumbnails) -> Section:
    """The closest pairs of a drawn picture and a training image."""
    extra = run.files.extras.get("memorisation")
    if not extra or not extra["closest"]:
        return None
    pairs = []
    for one in extra["closest"]:
        name = (MODEL, one["condition"], one["key"], one["seed"])
        drawn = picture(run, name, thumbnails, "drawn", f"given {part_name(one['condition'])}")
        path = run.files.folder / _below(one["training_image"])
        width, height = thumbnails.size(path)
        training = {
            **{"title": "training image", "note": "", "judged": [], "data": thumbnails.make(path)},
            **{"width": width, "height": height, "stretch": math.sqrt(width / height)},
        }
        relative = [
            {"space": _space(space), "value": value} for space, value in one["relative"].items() if value is not None
        ]
        pairs.append({"pictures": [drawn | {"judged": []}, training], "relative": relative})
    return {name: extra[name] for name in ("wording", "training_images")} | {"pairs": pairs}


def confusions(run: Run, thumbnails: Thumbnails) -> Section:
    """For each condition and attribute, how often a colour of the caption (row) was judged to be which (column)."""
    named = [metric for metric in run.files.metrics if metric["name"].startswith("attribute_accuracy/")]
    result = []
    for condition in dict.fromkeys(metric["settings"]["conditions"] for metric in named):
        rows = [row for row in run.files.samples if row["kind"] == MODEL and row["condition"] == condition]
        tables = []
        for name in ATTRIBUTES:
            pairs = [(row[f"{name}_true"], row[f"{name}_judged"]) for row in rows if not row["degenerate"]]
            columns = [*PALETTES[name], *([None] if any(judged is None for _, judged in pairs) else [])]
            lines = []
            for true in PALETTES[name]:
                counts = [pairs.count((true, judged)) for judged in columns]
                lines.append({"true": true, "counts": counts, "total": sum(counts)})
            right = sum(true == judged for true, judged in pairs)
            tables.append({"name": name, "columns": columns, "lines": lines, "right": right, "n": len(pairs)})
        result.append({"condition": part_name(condition), "tables": tables})
    return {"blocks": result} if result else None


def colour(attribute: str, name: str) -> str:
    """The CSS colour of a palette name."""
    return "#{:02x}{:02x}{:02x}".format(*PALETTES[attribute][name])


SECTIONS: dict[str, Callable[[Run, Thumbnails], Section]] = {
    "swap": swap,
    "edit": edits,
    "pose": poses,
    "divergence": strips,
    "memorisation": neighbours,
    "attributes": confusions,
}


def sections(runs: Sequence[Run], thumbnails: Thumbnails) -> dict[str, list[dict[str, Any]]]:
    """By test, what each run has of it: ``run`` and ``shown``, or why there is nothing."""
    found: dict[str, list[dict[str, Any]]] = {}
    for test, make in SECTIONS.items():
        for run in runs:
            try:
                shown = make(run, thumbnails)
            except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
                path = run.files.folder / "extras.json"
                raise DataError(f"{path} is damaged ({test}: {type(error).__name__} {error}). {AGAIN}") from error
            found.setdefault(test, []).append({"run": run, "shown": shown, "why": "" if shown else why(run, test)})
    return {test: own for test, own in found.items() if any(one["shown"] or one["why"] for one in own)}


def why(run: Run, test: str) -> str:
    """Why a run has nothing to show of a test, empty where the test was not asked for."""
    asked = (run.files.provenance.get("evaluation") or {}).get("tests")
    if asked is not None and test not in asked:
        return ""
    stem = {"attributes": "attribute"}.get(test, test)
    reasons = [one["reason"] for one in run.files.report["skipped"] if one["name"].startswith(stem)]
    return "skipped: " + "; ".join(dict.fromkeys(reasons)) if reasons else ""


def _caption(run: Run, key: str) -> str:
    return shorten(run.files.rows[REAL, "real", key, 0]["caption"], WORDS)


def _mode(mode: str) -> str:
    return {"both": "CLS and patches", "cls": "CLS alone", "patches": "patches alone"}.get(mode, mode)


def _space(space: str) -> str:
    return {"feature": "DINO", "feature_pixels": "mean colours"}.get(space, space)


def _below(name: str) -> Path:
    """A path of extras.json, which must not lead out of its folder."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name} leads out of the folder")
    return path
