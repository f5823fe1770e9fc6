"""The one thing to do after an evaluation, with its command."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evaluate.records import folder_name
from evaluate.report.files import OUTPUTS, UNKNOWN

LARGER = {"pulse": 64, "table": 256, "full": 4096}  # samples of each tier


@dataclass(frozen=True)
class Line:
    """One line of the first screen: what it is about, the verdict in a word, and why.

    ``style`` is the pill's: met, missed, inconclusive or plain. ``open``: another evaluation could tell what this one
    does not.
    """

    name: str
    word: str
    words: str
    style: str
    open: bool = False


@dataclass(frozen=True)
class NextStep:
    """What to do next, as a sentence and as a command."""

    words: str
    command: str


def next_step(
    lines: Sequence[Line], unscored: bool, provenance: Mapping[str, Any], prompt: str = "", compared: bool = False
) -> NextStep:
    """Return what to do next: the first of what stands in the way, in the order in which it spoils what follows.

    Pictures that cannot be scored, copies, a condition that is not obeyed, too little variety, what was not measured or
    is undecided; then nothing does. ``provenance`` is that of report.json, ``prompt`` a text to draw; ``compared``: the
    page has another run beside it.
    """
    known = {line.name: line for line in lines}
    unlike = [name for name in ("text", "pose") if known[name].word in ("not obeyed", "partly obeyed")]
    if unscored:
        return NextStep("Some pictures cannot be scored: train on, and evaluate again.", _train_on(provenance))
    if known["copies"].word == "alarm":
        words = (
            "There are copies: look at the pairs under “Nearest training images”, then for what the dataset holds more "
            "than once. It is copied first, the longer the training the more."
        )
        return NextStep(words, shlex.join(["nanodit", "prep", "report", "--dataset", _training(provenance, "dataset")]))
    if unlike:
        partly = "only partly " if all(known[name].word == "partly obeyed" for name in unlike) else "not "
        subject = "Text and pose are" if len(unlike) == 2 else f"The {unlike[0]} is"
        return NextStep(f"{subject} {partly}obeyed yet: train on.", _train_on(provenance))
    sample = ["nanodit", "train", "sample", "--checkpoint", checkpoint(provenance), *_weights(provenance)]
    sample += ["--prompt", prompt or "TEXT", "--output", "drawn.png"]
    if known["variety"].style == "missed":
        words = "Pictures vary too little, and guidance narrows them: draw several of one prompt without it, and look."
        return NextStep(words, shlex.join([*sample, "--count", "8", "--grid", "--guidance", "1"]))
    if unclear := [line for line in (known[name] for name in ("text", "pose", "copies")) if line.open]:
        command = _evaluate(provenance, _tier(unclear, provenance))
        names = _listed([line.name for line in unclear])
        if any(line.word == "not measured" for line in unclear):
            return NextStep(f"Measure {names}: this evaluation did not look.", shlex.join(command))
        return NextStep(f"Measure {names} on more images: too few to decide.", shlex.join(command))
    told = [known[name] for name in ("text", "pose", "copies")]
    lacking = [line.name for line in (*told, known["variety"]) if line.word == "not measured"]
    if len(lacking) == len(known):
        words = "None of this could be measured: see to what is missing, and evaluate again."
        return NextStep(words, shlex.join(_evaluate(provenance, _tier([], provenance))))
    if any(line.style not in ("met", "plain") for line in told):
        start = "More images would decide nothing here: look for yourself"
    elif lacking:
        start = f"What was measured is well; {_listed(lacking)} could not be"
    else:
        start = "All well"
    other = "" if compared else ", or set another run beside it (nanodit evaluate report RUN OTHER_RUN)"
    words = f"{start}: draw from it{other}."
    return NextStep(words, shlex.join(sample))


def _listed(names: Sequence[str]) -> str:
    *others, last = (f"“{name}”" for name in names)
    return f"{', '.join(others)} and {last}" if others else last


def checkpoint(provenance: Mapping[str, Any]) -> str:
    """Return the step folder, as the run's config has its place."""
    return f"{_training(provenance, 'output')}/checkpoints/{provenance.get('checkpoint', UNKNOWN)}"


def _train_on(provenance: Mapping[str, Any]) -> str:
    """Return the command that continues a run: to its end, or from there twice as far."""
    command = ["nanodit", "train", "run", "--config", f"{_training(provenance, 'output')}/config.yaml"]
    steps = ((provenance.get("training") or {}).get("train") or {}).get("steps")
    if isinstance(steps, int) and provenance.get("step", 0) >= steps:
        command.append(f"train.steps={2 * provenance['step']}")
    return shlex.join(command)


def _evaluate(provenance: Mapping[str, Any], tier: str) -> list[str]:
    """Return the command that evaluates by a tier, into a folder of its own: the page's evaluation stays as it is."""
    dev, (kind,) = provenance.get("holdout") == "dev", _weights(provenance)[1:] or ("ema",)
    own = folder_name(str(provenance.get("checkpoint", UNKNOWN)), kind, "dev" if dev else "test")
    place = f"{_training(provenance, 'output')}/{OUTPUTS}/{own}-{tier}"
    command = ["nanodit", "evaluate", "run", "--checkpoint", checkpoint(provenance), *_weights(provenance)]
    return [*command, "--tier", tier, "--output", place, *(["holdout=dev"] if dev else [])]


def _tier(unclear: Sequence[Line], provenance: Mapping[str, Any]) -> str:
    """Return the smallest tier with as many images where nobody looked, and with more where they were too few."""
    had = (provenance.get("evaluation") or {}).get("samples", 0)
    few = any(line.word != "not measured" for line in unclear)
    return next((tier for tier, samples in LARGER.items() if samples > had or (samples == had and not few)), "full")


def _training(provenance: Mapping[str, Any], name: str) -> str:
    return str((provenance.get("training") or {}).get(name, {"output": "RUN", "dataset": "DATASET"}[name]))


def _weights(provenance: Mapping[str, Any]) -> list[str]:
    kind = provenance.get("weights", "ema")
    return [] if kind in ("ema", UNKNOWN) else ["--weights", kind]
