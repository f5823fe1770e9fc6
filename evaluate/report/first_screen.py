"""The first screen of the page: four prompts, a line for each verdict, how far to trust them, and what to do next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evaluate.drawing.draw import PROMPTS, shown_first
from evaluate.metrics.distances import SPACE_NAMES
from evaluate.records import AGAIN, MODEL, REAL, cluster_of
from evaluate.report.files import HOLDOUTS, Run
from evaluate.report.files import TEST as TEST_PART
from evaluate.report.metrics import alarms, condition_order, metric_groups, number, part_name, roles
from evaluate.report.next_step import Line, next_step
from evaluate.report.obedience import obedience
from evaluate.report.pictures import EmbeddedImages, shorten
from evaluate.report.sections import Page
from evaluate.suite import TESTS
from nanodit.errors import DataError

STYLES = {"obeyed": "met", "not obeyed": "missed"}  # others are open
TOLD_BY = {"text": ("attributes", "edit"), "pose": ("pose",), "variety": ("divergence",), "copies": ("memorisation",)}
VARIED, LITTLE = 0.8, 0.5  # of what real images differ: above, pictures count as varied; below, as all alike
# what lies between a floor and a ceiling, by the first of the metrics that was measured
SCALES = {
    "colours": ("attribute_accuracy",),
    "joints": ("pose_pck",),
    "likeness": ("reconstruction/dino_similarity", "reconstruction/psnr"),
}
LIMIT = 200  # characters of a prompt


def first_screen(runs: Sequence[Run], images: EmbeddedImages, unscored: Sequence[str]) -> list[dict[str, Any]]:
    """Return of each run its pictures, lines, scales, trust and next step; ``unscored`` as the page says it of each."""
    keys = _keys(runs)
    shown = {run.files.folder.resolve() for run in runs}
    found = []
    for run, bad in zip(runs, unscored):
        lines = [*_obeyed(run), _variety(run), _copies(run)]
        own = keys or _keys([run])
        found.append(
            {
                "run": run,
                "prompts": _prompts(run, own, images),
                "lines": lines,
                "scales": _scales(run),
                "trust": _trust(run, shown),
                "next": next_step(lines, bool(bad), run.files.provenance, _prompt(run, own), len(runs) > 1),
            }
        )
    _keep_comparable([scale for one in found for scale in one["scales"]])
    return found


# --- pictures ---------------------------------------------------------------------------------------------------------


def _keys(runs: Sequence[Run]) -> list[str]:
    """Return the first samples of which all runs kept the real image."""
    kept = [[row["key"] for row in run.files.samples if row["kind"] == REAL and row["image"]] for run in runs]
    return [key for key in kept[0] if all(key in own for own in kept[1:])][:PROMPTS]


def _prompts(run: Run, keys: Sequence[str], images: EmbeddedImages) -> dict[str, Any] | None:
    """Return ``heads`` and ``rows`` of pictures: the real image, two conditions, and what is nearest in training."""
    plain = [
        row
        for row in run.files.samples
        if row["kind"] == MODEL and row["key"] in keys and not row["seed"] and row["image"]
        if row["donor"] is None and row["text"] is None and "/" not in row["condition"]
    ]
    conditions = shown_first(sorted({row["condition"] for row in plain}, key=condition_order))
    try:
        near = {one["key"]: one for one in run.files.extras.get("nearest", {}).get("pictures", [])}
        near = {key: one for key, one in near.items() if key in keys}
        conditions.sort(key=lambda name: any(one["condition"] == name for one in near.values()))
        page = Page(run, images)
        real = [key for key in keys if (REAL, "real", key, 0) in run.files.rows]
        rows = [
            {
                "shape": _shape(run.files.rows[REAL, "real", key, 0]),
                "caption": shorten(run.files.rows[REAL, "real", key, 0]["caption"], LIMIT),
                "pictures": [
                    page.real(key, "real", ""),
                    *(_drawn(page, plain, condition, key) for condition in conditions),
                    *([page.stored(near[key]["training_image"], "nearest in training")] if key in near else []),
                ],
            }
            for key in real
        ]
        told = {(one["condition"], run.files.extras["nearest"]["space"]) for one in near.values()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        path = run.files.folder / "extras.json"
        raise DataError(f"{path} is damaged (nearest: {type(error).__name__} {error}). {AGAIN}") from error
    if not rows or not conditions:
        return None
    heads = ["real", *(_head(name) for name in conditions), *(["nearest in training"] if near else [])]
    note = [f"nearest to the picture given {part_name(name)}, by {SPACE_NAMES.get(one, one)}" for name, one in told]
    return {"heads": heads, "rows": rows, "columns": len(heads), "note": "; ".join(note)}


def _drawn(page: Page, plain: Sequence[Mapping[str, Any]], condition: str, key: str) -> dict[str, Any]:
    if any(row["key"] == key and row["condition"] == condition for row in plain):
        return page.drawn(condition, key, 0, _head(condition))
    return {"title": _head(condition), "data": "", "note": "", "width": 1, "height": 1}


def _shape(row: Mapping[str, Any]) -> float:
    """Return width over height of the cells beside an image: never upright, so that all four rows fit on a screen."""
    return max(1.0, row["width"] / row["height"])


def _head(condition: str) -> str:
    return "text alone" if condition == "text" else part_name(condition)


def _prompt(run: Run, keys: Sequence[str]) -> str:
    """Return the first sentence of the first caption; empty where there is none, or one that is no word of a command.

    Such are long ones, those that would be read as an option, and those with characters that a terminal acts on.
    """
    rows = (run.files.rows.get((REAL, "real", key, 0)) for key in keys)
    captions = (row["caption"] for row in rows if row and row["caption"])
    sentence = " ".join(next(captions, "").split()).partition(". ")[0]
    plain = len(sentence) <= LIMIT and sentence.isprintable() and not sentence.startswith("-")
    return sentence if plain else ""


# --- lines ------------------------------------------------------------------------------------------------------------


def _obeyed(run: Run) -> list[Line]:
    told = {one.condition: one for one in obedience(run.files.metrics)}
    whole = _all_measured(run)
    return [
        Line(name, one.word, _why(one.words), STYLES.get(one.word, "inconclusive"), one.open and not whole)
        if (one := told.get(name))
        else _not_measured(run, name)
        for name in ("text", "pose")
    ]


def _why(sentence: str) -> str:
    """Return what follows the verdict in a sentence, which stands before it as a word of its own."""
    why = sentence.partition(": ")[2]
    return why[:1].upper() + why[1:]


def _variety(run: Run) -> Line:
    """Say how much pictures differ, over prompts and over noises, beside what real images do."""
    known = {one["name"]: one for one in run.files.metrics if one["value"] is not None}
    starts = [f"divergence/{name}{space}" for space in ("", "_pixels") for name in ("variety", "ratio")]
    found = [
        next((one for name, one in known.items() if name.split("/", 2)[:2] == start.split("/")), None)
        for start in starts
    ]
    variety, ratio = found[:2] if found[0] else found[2:]
    if variety is None:
        return _not_measured(run, "variety")
    fired = {one["name"]: one["fired"] for one in run.files.extras.get("divergence", {}).get("alarms", [])}
    low, high = variety["low"], variety["high"]
    value, *bounds = (number(one, variety) for one in (variety["value"], low, high))
    said = value if low is None else f"{value} [{', '.join(bounds)}]"
    words = f"Pictures of different prompts differ {said} times as much as real ones do"
    words += f"; those of one prompt from several noises, {number(ratio['value'], ratio)} times." if ratio else "."
    if fired.get("collapse"):
        return Line("variety", "collapsed", f"The noise makes next to no difference. {words}", "missed")
    if low is None:
        return Line("variety", "undecided", words, "inconclusive", not _all_measured(run))
    if high < LITTLE:
        return Line("variety", "little", words, "missed")
    return Line("variety", *(("as real", words, "met") if low >= VARIED else ("less than real", words, "inconclusive")))


def _copies(run: Run) -> Line:
    """Say whether pictures are copies of training images, and which share of them would have been found."""
    own = [one for one in alarms([run]) if one["test"] == "memorisation"]
    if not own:
        return _not_measured(run, "copies")
    shares = [one["detectable"] for one in own if one["detectable"]]
    found = (
        f" A share of {100 * max(shares):.1f} % or more would have been found, four times in five." if shares else ""
    )
    if fired := [one["given"] for one in own if one["fired"]]:
        given = f", given {'; '.join(filter(None, fired))}" if any(fired) else ""
        return Line(
            "copies", "alarm", f"Copies of training images, or more likely copies than by chance{given}.", "missed"
        )
    if any(one["fired"] is None for one in own):
        return Line(
            "copies",
            "undecided",
            f"Too few pictures, or some that cannot be scored.{found}",
            "inconclusive",
            not _all_measured(run),
        )
    return Line("copies", "none found", f"No more copies of training images than chance gives.{found}", "met")


def _not_measured(run: Run, name: str) -> Line:
    """Say why a line has nothing to say: its tests were skipped, or nobody asked for them."""
    asked = (run.files.provenance.get("evaluation") or {}).get("tests")
    tests = [TESTS[one] for one in TOLD_BY[name]]
    skipped = [one for one in run.files.report["skipped"] if not one["name"].endswith("/lpips")]  # which tells nothing
    reasons = [one["reason"] for one in skipped if any(test.owns(one["name"]) for test in tests)]
    if reasons:
        words = "; ".join(dict.fromkeys(reasons))
        few = any(reason.startswith("inconclusive") for reason in reasons) and not _all_measured(run)
        return Line(name, "not measured", f"Skipped: {shorten(words, LIMIT)}.", "plain", few)
    if asked is not None and not any(test.name in asked for test in tests):
        words = f"The test{'s' if len(tests) > 1 else ''} {' and '.join(TOLD_BY[name])} did not run."
        return Line(name, "not measured", words, "plain", True)
    # given one condition less, nothing at all for one, pictures are drawn by the test of reconstruction
    few = asked is not None and "reconstruction" not in asked
    return Line(name, "not measured", "No two sets of pictures were drawn that differ in it alone.", "plain", few)


def _all_measured(run: Run) -> bool:
    """Whether every image that may be tested on was, so that no tier has more: fewer were found than asked for."""
    given = run.files.provenance
    counts = (given.get("dataset") or {}).get("counts")  # "unknown" is possible
    held = given.get("holdout_images", counts.get("holdout") if isinstance(counts, dict) else None)
    asked = (given.get("evaluation") or {}).get("samples")
    measured = len({row["key"] for row in run.files.samples if row["kind"] == REAL})
    return (isinstance(held, int) and measured >= held) or (isinstance(asked, int) and measured < asked)


def _scales(run: Run) -> list[dict[str, Any]]:
    """Return where some headline metrics lie between their floor, 0, and their ceiling, 1."""
    heads = [row for group in metric_groups(run.files.metrics) for row in group["headline"]]
    found = []
    for name, starts in SCALES.items():
        rows = (
            row
            for start in starts
            for row in heads
            if row["name"].split("/")[: start.count("/") + 1] == start.split("/")
        )
        row = next((row for row in rows if row["value"] is not None and None not in roles(row)), None)
        if row is None:
            continue
        low, high = (row["baselines"][role] for role in roles(row))
        if low == high or (high > low) != (row["better"] == "higher"):
            continue  # the judge tells no skill from perfection
        share = (row["value"] - low) / (high - low)
        value, none, most = (number(one, row) for one in (row["value"], low, high))
        ends = f"{none} is no skill, {most} is perfect"
        words = f"{value} given {row['part']}; {ends}"
        measure = (row["name"], ends)
        found.append({"name": name, "share": min(1.0, max(0.0, share)), "words": words, "measure": measure})
    return found


def _keep_comparable(scales: Sequence[dict[str, Any]]) -> None:
    """Take the share from scales of one name that runs beside each other were not measured on alike."""
    measures: dict[str, set[tuple[str, str]]] = {}
    for scale in scales:
        measures.setdefault(scale["name"], set()).add(scale["measure"])
    for scale in scales:
        if len(measures[scale["name"]]) > 1:
            scale["share"] = None
            scale["words"] += "; other ends than beside it, so no bar"


# --- trust ------------------------------------------------------------------------------------------------------------


def _trust(run: Run, shown: set[Any]) -> list[dict[str, Any]]:
    """Return what the numbers rest on, a few words each; ``doubt`` where it is a reason to trust them less."""
    files, given = run.files, run.files.provenance
    evaluation, dataset = given.get("evaluation") or {}, given.get("dataset") or {}
    twins = (given.get("left_out") or {}).get("altered_twins", "unknown")
    found = []

    def say(words: str, doubt: bool = False, link: str = "") -> None:
        found.append({"words": words, "doubt": doubt, "link": link})

    if twins == "unknown":
        say("no holdout image is in training; whether an altered form of one is, nobody checked", True)
    else:
        left = f" ({len(twins)} left out, as training has them mirrored, brighter or cropped)" if twins else ""
        say(f"no holdout image is in training, nor an altered form of one{left}")
    real = [row for row in files.samples if row["kind"] == REAL]
    grouped = len({cluster_of(row) for row in real})
    several = f" in {grouped:,} groups of near duplicates" if grouped != len(real) else ", no near duplicates"
    several = several if all(row.get("cluster") for row in real) else ", near duplicates among them not known"
    part = given.get("holdout")
    whose = HOLDOUTS.get(part, "the whole holdout")
    say(f"{len(real):,} images of {whose}{several}" if real else f"no pictures were judged, of {whose}", not real)
    noises = evaluation.get("seeds")
    say(f"{noises or 'unknown'} noise{'s' if noises != 1 else ''} each, one training seed")
    if part == TEST_PART:
        before = len([folder for folder in files.same_test if folder.resolve() not in shown])
        evaluations = "evaluations" if before != 1 else "evaluation"
        say(f"{before} other {evaluations} kept beside it read the same test images", before > 0)
    if dataset.get("encoders") == "demo":
        say("demo encoders", True)
    skipped = len(files.report["skipped"])
    say(f"{skipped} skipped" if skipped else "nothing skipped", False, "#skips" if skipped else "")
    return found
