"""What votes say: how often one run's pictures were preferred, how sure that is, and who did not look."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from evaluate.statistics import intervals
from evaluate.statistics.intervals import Interval, more_samples
from evaluate.votes.ballots import Drawn, Votes
from evaluate.votes.trials import CATCH, PAIR, TRUTH, A, B

MOST_FAILED = 0.25  # of the catch trials: who fails more is left out; guessing fails half of them, or two thirds

UNDECIDED = "undecided"


@dataclass(frozen=True)
class Voter:
    """One file: answered pairs and catch trials, and the median time of an answer in seconds; None without any."""

    name: str
    pairs: int
    catches: int
    failed: int
    seconds: float | None

    @property
    def left_out(self) -> bool:
        """Whether too many catch trials were failed; a tie there is a failure, too."""
        return self.failed > MOST_FAILED * self.catches


@dataclass(frozen=True)
class Tally:
    """The answers to pairs of all voters who are not left out: of run ``over`` against run ``under``, on one page.

    ``interval`` is of the win rate of ``over``, where a tie is half a win; None without any answer.
    """

    over: str
    under: str
    wins: int
    ties: int
    losses: int
    interval: Interval | None
    voters: tuple[Voter, ...]
    page: str
    drawn: Drawn

    @property
    def counted(self) -> list[Voter]:
        """Those who are not left out."""
        return [voter for voter in self.voters if not voter.left_out]

    @property
    def verdict(self) -> str:
        """``A preferred``, ``B preferred`` or ``undecided``: whether the interval excludes one half."""
        if self.interval is None or self.interval.low is None or self.interval.low <= 0.5 <= self.interval.high:
            return UNDECIDED
        return f"{self.over if self.interval.value > 0.5 else self.under} preferred"

    @property
    def more(self) -> int | None:
        """About how many more prompts would tell, were the rate the truth; None where that cannot be said."""
        if self.interval is None or self.interval.low is None:
            return None
        one = self.interval
        return more_samples(Interval(one.value - 0.5, one.low - 0.5, one.high - 0.5, one.n))

    @property
    def reason(self) -> str | None:
        """Why there is no interval, or None."""
        if self.interval is None:
            return "nobody has answered yet" if self.counted else "every voter is left out"
        few = f"{self.interval.n} independent prompts, and below {intervals.MIN_CLUSTERS} there is no interval"
        return few if self.interval.low is None else None


def count(votes: Mapping[Path, Votes], letters: Mapping[str, str] = MappingProxyType({A: A, B: B})) -> Tally:
    """Count the votes on one page (:func:`evaluate.votes.ballots.read_all`).

    ``letters`` are what the page's runs A and B are called here; the win rate is of the one with the earlier letter.
    Answers to one prompt, and to its near duplicates, are one cluster. The interval is the exact one of shares, which
    covers rates with ties too, better than a bootstrap does (``tests/simulations/intervals.py``, votes).
    """
    over, under = sorted(letters, key=letters.__getitem__)
    voters, scores, clusters = [], [], []
    alike = len({path.name for path in votes}) < len(votes)  # as they are where everybody's has a folder of its own
    for path, own in votes.items():
        pairs, catches = own.trials_of(PAIR), own.trials_of(CATCH)
        times = [trial.milliseconds / 1000 for trial in (*pairs, *catches)]
        failed = sum(trial.chosen != TRUTH for trial in catches)
        seconds = statistics.median(times) if times else None
        voters.append(Voter(str(path) if alike else path.name, len(pairs), len(catches), failed, seconds))
        if not voters[-1].left_out:
            scores += [{over: 1.0, under: 0.0, None: 0.5}[trial.chosen] for trial in pairs]
            clusters += [trial.cluster for trial in pairs]
    interval = intervals.proportion(scores, [1.0] * len(scores), clusters) if scores else None
    first = next(iter(votes.values()))
    return Tally(
        letters[over], letters[under], scores.count(1.0), scores.count(0.5), scores.count(0.0), interval, tuple(voters),
        first.page, first.drawn,
    )  # fmt: skip
