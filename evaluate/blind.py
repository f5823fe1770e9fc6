"""``evaluate compare``: two checkpoints draw the same prompts from the same noise, for people who do not know which is
which."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluate.config import EvaluateConfig
from evaluate.drawing.arms import DrawingArm, draw, named_arm
from evaluate.records import Skipped
from evaluate.run import open_subject
from evaluate.statistics.intervals import MIN_CLUSTERS
from evaluate.subject import Row, Subject, select_holdout
from evaluate.votes.ballots import LARGEST_COUNT, SCHEMA
from evaluate.votes.page import SIDES, Shown, render
from evaluate.votes.trials import PAIR, TRUTH, A, B, make_trials
from nanodit.console import Progress, say
from nanodit.errors import ConfigError, DataError
from nanodit.files import canonical_json, check_writable, read_json, sha256_bytes, sha256_file, write_atomic
from prep.dataset.readers import reading
from prep.dataset.rows import by_key
from train.checkpoint.checkpoint import resolve_checkpoint
from train.checkpoint.open import weights_file
from train.checkpoint.state import checked_state

NOISE = 0  # seed index of all pictures
Pictures = Mapping[str, np.ndarray]  # key -> uint8 (H, W, 3)


def compare(
    checkpoints: Sequence[Path],
    config: EvaluateConfig,
    page: Path,
    conditions: str = "text",
    dataset: Path | str | None = None,
    weights: str = "ema",
) -> tuple[int, int]:
    """Draw ``config.samples`` holdout prompts with both checkpoints and write the page; returns how many pairs and how
    many catch trials it has.

    ``conditions`` are what is given, text among them, with the guidance that ``config.conditions`` has for them.
    Raises :class:`ConfigError` where a checkpoint cannot be given them, where both have the same weights, and where all
    prompts are near duplicates, and :class:`DataError` where the two were not trained on one version of a dataset.
    """
    check_writable(page, "--page")
    if (config.seed or 0) > LARGEST_COUNT:  # the page would save another number, and its votes be refused
        raise ConfigError(f"seed={config.seed}: a page of votes holds no number above {LARGEST_COUNT}; give another")
    steps = [resolve_checkpoint(checkpoint) for checkpoint in checkpoints]
    states = [checked_state(read_json(step / "state.json"), step) for step in steps]
    fingerprints = [state["dataset"]["fingerprint"] for state in states]
    if fingerprints[0] != fingerprints[1]:
        raise DataError(
            f"{steps[0]} was trained on dataset {fingerprints[0][:16]}, {steps[1]} on {fingerprints[1][:16]}. Compare "
            "checkpoints that were trained on one version of one dataset"
        )
    dataset = dataset or states[0]["config"]["dataset"]
    subjects = [open_subject(step, config, dataset, weights)[0] for step in steps]
    hashes = [sha256_file(weights_file(step, weights)) for step in steps]
    if hashes[0] == hashes[1]:
        raise ConfigError(f"{steps[0]} and {steps[1]} have the same {weights} weights; give two different ones")
    if config.captions == "short":
        subjects = [subject.with_short_captions() for subject in subjects]
    arms = [_arm(subject, config, conditions, step) for subject, step in zip(subjects, steps)]
    with reading(subjects[0].dataset, page):
        drawn = _draw_both(subjects, arms, config)
        runs = [
            {"run": state["config"]["output"], "step": state["step"], "weights": weights, "weights_sha256": sha}
            for state, sha in zip(states, hashes)
        ]
        content = {
            "schema": SCHEMA,
            "runs": dict(zip((A, B), runs)),
            "dataset": fingerprints[0],
            "drawn": _drawn_with(arms[0], config),
            "pictures": _hash(drawn),
        }
        content["seed"] = sha256_bytes(canonical_json(content).encode())[:16]
        content["trials"], shown = _trials(subjects[0], dict(zip((A, B), drawn)), content["seed"])
    html, side = render(content, shown)
    write_atomic(page, html)
    if side < SIDES[0] and max(max(picture.shape) for picture in drawn[0].values()) > side:
        say(f"pictures are scaled down to {side} pixels, to keep the page small; fewer --prompts leave them larger")
    pairs = sum(trial["kind"] == PAIR for trial in content["trials"])
    if (independent := len({trial["cluster"] for trial in content["trials"] if trial["kind"] == PAIR})) < MIN_CLUSTERS:
        say(f"warning: {independent} independent prompts: below {MIN_CLUSTERS}, votes have no interval and no verdict")
    return pairs, len(shown) - pairs


def _arm(subject: Subject, config: EvaluateConfig, conditions: str, step: Path) -> DrawingArm:
    arm = named_arm(conditions, None, config.conditions, subject, "compare")
    if isinstance(arm, Skipped):
        raise ConfigError(f"--conditions {conditions}: {arm.reason} ({step}); name others")
    if "text" not in arm.subset:
        raise ConfigError(f"--conditions {conditions}: people judge by the prompt, so text must be among them")
    return arm


def _drawn_with(arm: DrawingArm, config: EvaluateConfig) -> dict[str, Any]:
    """Return all that a picture depends on beside the weights and the sample."""
    return {
        "conditions": arm.name,
        "guidance": arm.guidance.value,
        "sampler": config.sampler.model_dump(mode="json"),
        "captions": config.captions,
        "precision": config.precision,
        "noise": NOISE,
        "holdout": config.holdout,
        "holdout_seed": config.seed,
    }


def _draw_both(subjects: Sequence[Subject], arms: Sequence[DrawingArm], config: EvaluateConfig) -> list[Pictures]:
    """Draw all samples with each subject from the same noise; says how many pictures are broken."""
    found = []
    with Progress("pictures", sum(len(subject.rows) for subject in subjects), "pictures") as progress:
        for name, subject, arm in zip((A, B), subjects, arms):
            pictures: dict[str, np.ndarray] = {}
            broken: list[str] = []
            for batch in subject.batches():
                images, reasons = draw(subject, batch, arm, NOISE, config.sampler)
                pictures |= zip(batch.keys, images)
                broken += filter(None, reasons)
                progress.advance(len(batch))
            if broken:
                kinds = ", ".join(sorted(set(broken)))
                say(f"warning: {len(broken)} of {len(pictures)} pictures of {name} are {kinds}; they are shown as such")
            found.append(pictures)
    return found


def _hash(drawn: Sequence[Pictures]) -> str:
    """Return the hash of all pictures: of another machine they may differ, and then the page is another one."""
    return sha256_bytes(
        b"".join(sha256_bytes(one[key].tobytes()).encode() + key.encode() for one in drawn for key in sorted(one))
    )


def _trials(subject: Subject, drawn: Mapping[str, Pictures], seed: str) -> tuple[list[dict[str, Any]], list[Shown]]:
    """Return the trials, and what each shows."""
    rows = by_key(subject.dataset.rows("holdout"))
    compared = {row["key"] for row in subject.rows}
    all_rows = select_holdout(subject.dataset, sys.maxsize, part=subject.part)
    others = [row for row in all_rows if row["key"] not in compared]
    try:
        trials = make_trials([rows[row["key"]] for row in subject.rows], others, seed)
    except ValueError as error:
        raise ConfigError(
            f"--prompts {len(subject.rows)}: {error}, so no catch trial can be made; ask for more"
        ) from None

    def picture(trial: Mapping[str, Any], side: str) -> np.ndarray:
        what = trial[side]
        if what == TRUTH:
            return subject.dataset.pixels(rows[trial["key"]])
        return drawn[what][trial["donor"] or trial["key"]]

    return trials, [
        Shown(caption(rows[trial["key"]]), picture(trial, "left"), picture(trial, "right")) for trial in trials
    ]


def caption(row: Row) -> str:
    """Return the prompt as it is shown."""
    return (row.get("caption") or "").strip() or "(no words)"
