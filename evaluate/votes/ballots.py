"""The votes of one voter as the page saves them, ``votes-PAGE.json``: their schema, and reading them with distrust."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, ValidationError, model_validator

from evaluate.votes.trials import CATCH, PAIR, TRUTH, A, B
from nanodit.config import Config
from nanodit.errors import DataError
from nanodit.files import canonical_json, sha256_bytes

SCHEMA = 1
LARGEST = 8_000_000  # bytes of a file: about 20,000 trials
VOTERS_OWN = {"page", "ballot"}  # beside the answers: what is no part of the page's content
ANSWERS = {"answer", "milliseconds"}
SAVE_AGAIN = "Save the votes on the page again"

Text = Annotated[str, Field(max_length=4096)]
LARGEST_COUNT = 2**53  # to which JavaScript counts exactly
Count = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
Side = Literal["A", "B", "real"]


class VotedRun(Config):
    """One of the two checkpoints: the run's folder, the step, and which weights of it."""

    run: Text
    step: Count
    weights: Text
    weights_sha256: Text


class Drawn(Config):
    """What the pictures depend on beside the weights and the prompt."""

    conditions: Text
    guidance: float | Text
    sampler: dict[Text, JsonValue]
    captions: Text
    precision: Text
    noise: Count
    holdout: Literal["test", "dev"]
    holdout_seed: Count | None


class Trial(Config):
    """What was asked and answered; ``answer`` is None where it was not."""

    key: Text
    cluster: Text
    kind: Literal["pair", "catch"]
    left: Side
    right: Side
    donor: Text | None
    answer: Literal["left", "right", "tie"] | None
    milliseconds: Count | None

    @model_validator(mode="after")
    def _check(self) -> Trial:
        sides = {self.left, self.right}
        if self.kind == PAIR and sides != {A, B}:
            raise ValueError("a pair shows one picture of each run")
        if self.kind == CATCH and (TRUTH not in sides or len(sides) != 2):
            raise ValueError("a catch trial shows one real image")
        if (self.answer is None) != (self.milliseconds is None):
            raise ValueError("an answer and its time come together")
        return self

    @property
    def chosen(self) -> str | None:
        """What the voter preferred: A, B or TRUTH; None for a tie and without an answer."""
        return {"left": self.left, "right": self.right}.get(self.answer)


class Votes(Config):
    """One file of votes: the page's content, with the answers in its trials; ``ballot`` tells voters apart."""

    version: Literal[1] = Field(alias="schema")
    page: Text
    ballot: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    runs: dict[Literal["A", "B"], VotedRun]
    dataset: Text
    drawn: Drawn
    pictures: Text
    seed: Text
    trials: list[Trial]

    @model_validator(mode="after")
    def _check(self) -> Votes:
        if self.runs.keys() != {A, B}:
            raise ValueError("runs must be A and B")
        pairs = [trial.key for trial in self.trials if trial.kind == PAIR]
        if len(set(pairs)) < len(pairs):
            raise ValueError("a prompt is compared twice")
        return self

    def trials_of(self, kind: str) -> list[Trial]:
        """Return the answered trials of one kind."""
        return [trial for trial in self.trials if trial.kind == kind and trial.answer is not None]


def page_id(content: Mapping[str, Any]) -> str:
    """Return the name of a page, 16 hexadecimal digits: the hash of all that the page shows and asks.

    ``content`` may hold answers, a ballot and a name already; they do not count. Numbers are hashed by value, as
    JavaScript writes 2.0 as 2.
    """
    page = {name: value for name, value in content.items() if name not in VOTERS_OWN}
    asked = [{name: trial[name] for name in trial if name not in ANSWERS} for trial in content["trials"]]
    text = json.dumps({**page, "trials": asked}, allow_nan=False)
    plain = json.loads(text, parse_float=lambda digits: int(float(digits)) if float(digits) % 1 == 0 else float(digits))
    return sha256_bytes(canonical_json(plain).encode())[:16]


def read_votes(path: Path) -> Votes:
    """Read a file of votes, which may come from anybody; raises :class:`DataError` naming it for anything doubtful."""
    try:
        if not path.is_file():
            raise DataError(f"{path}: is no file. Give files of votes that the page saved")
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    if len(data) > LARGEST:
        raise DataError(f"{path}: is larger than {LARGEST / 1e6:.0f} MB, so these are no votes. {SAVE_AGAIN}")
    try:
        votes = Votes.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{path}: these are no votes: {where and f'{where}: '}{first['msg']}. {SAVE_AGAIN}") from None
    try:
        page = page_id(votes.model_dump(mode="json", by_alias=True))
    except ValueError as error:  # NaN, or a number of thousands of digits
        raise DataError(f"{path}: these are no votes: {error}. {SAVE_AGAIN}") from None
    if page != votes.page:
        raise DataError(f"{path}: the trials are not those of its page: the file was changed. {SAVE_AGAIN}")
    return votes


def read_all(paths: Sequence[Path]) -> dict[Path, Votes]:
    """Read the votes on one page; raises :class:`DataError` where they are of several, or one voter's twice."""
    found: dict[Path, Votes] = {}
    for path in paths:
        votes = read_votes(path)
        for other, theirs in found.items():
            if votes.page != theirs.page:
                raise DataError(
                    f"{path}: these are votes on page {votes.page}, but {other} has those on {theirs.page}. Give those "
                    "on one page"
                )
            if votes.ballot == theirs.ballot:
                raise DataError(f"{path} and {other} are of one voter. Give the file that was saved last")
        found[path] = votes
    return found
