"""Votes on two of the runs: which of them these are, and what the page, its JSON and its CSV say of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluate.report.files import HOLDOUTS, Run
from evaluate.report.metrics import guidance_words, part_name
from evaluate.statistics.intervals import Interval
from evaluate.votes.ballots import VotedRun, read_all
from evaluate.votes.tally import MOST_FAILED, UNDECIDED, Tally, count
from nanodit.errors import ConfigError, DataError

NAME = "votes/win_rate"


def tally_votes(paths: Sequence[Path], runs: Sequence[Run]) -> Tally | None:
    """Count the votes in ``paths``; None without any.

    Raises :class:`ConfigError` for a single run, and :class:`DataError` for files that are no votes, of several pages,
    or on other checkpoints than two of the runs.
    """
    if not paths:
        return None
    if len(runs) < 2:
        raise ConfigError("--votes are on two runs; give both: nanodit evaluate report RUN RUN --votes FILE")
    votes = read_all(paths)
    path, first = next(iter(votes.items()))
    letters = {side: _letter(voted, first.dataset, runs, path) for side, voted in first.runs.items()}
    if len(set(letters.values())) < 2:
        raise DataError(f"{path}: both sides are the same checkpoint. Make the page again: nanodit evaluate compare")
    return count(votes, letters)


def _letter(voted: VotedRun, dataset: str, runs: Sequence[Run], path: Path) -> str:
    """Return the letter of the run that was voted on: of the same weights, evaluated on the same dataset."""
    wanted = {"step": voted.step, "weights": voted.weights, "weights_sha256": voted.weights_sha256}
    for run in runs:
        given = run.files.provenance
        if all(given.get(name) == value for name, value in wanted.items()):
            known = (given.get("dataset") or {}).get("fingerprint")
            if known != dataset:
                raise DataError(
                    f"{path}: the prompts are of dataset {dataset[:16]}, but {run.files.folder} was evaluated on "
                    f"{str(known)[:16]}. Evaluate it on the dataset of the votes"
                )
            return run.letter
    raise DataError(
        f"{path}: these are votes on {voted.run}, step {voted.step}, {voted.weights} weights "
        f"{voted.weights_sha256[:16]}, of which no evaluation is given. Evaluate that checkpoint (nanodit evaluate run "
        "--checkpoint), or give other votes"
    )


def votes_section(tally: Tally | None) -> dict[str, Any] | None:
    """Return what the page shows of votes."""
    if tally is None:
        return None
    drawn = tally.drawn
    given = f"{'short captions, ' if drawn.captions == 'short' else ''}{guidance_words(drawn.guidance)}"
    given = f"{part_name(drawn.conditions)}, {given}, for prompts of {HOLDOUTS[drawn.holdout]}"
    return {"tally": tally, "given": given, "most_failed": MOST_FAILED, "open": tally.verdict == UNDECIDED}


def votes_json(tally: Tally) -> dict[str, Any]:
    """Return the entry ``votes`` of the JSON: the win rate of ``over`` with its interval, counts, and every voter."""
    rate = tally.interval or Interval(None, None, None, 0)
    return {
        **{name: getattr(tally, name) for name in ("page", "over", "under", "wins", "ties", "losses")},
        **{"win_rate": rate.value, "low": rate.low, "high": rate.high, "n": rate.n},
        **{name: getattr(tally, name) for name in ("verdict", "more", "reason")},
        "drawn": tally.drawn.model_dump(mode="json"),
        "most_failed": MOST_FAILED,
        "voters": [{**vars(voter), "left_out": voter.left_out} for voter in tally.voters],
    }


def votes_cells(tally: Tally) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return the row of the CSV: the run's letter, cells by column, and settings."""
    entry = votes_json(tally)
    cells = {"name": NAME, "value": entry["win_rate"], "better": "higher"}
    cells |= {name: entry[name] for name in ("low", "high", "n", "verdict", "reason")}
    beside = ("page", "under", "wins", "ties", "losses", "drawn")
    return entry["over"], cells, {name: entry[name] for name in beside} | {"voters": len(tally.voters)}
