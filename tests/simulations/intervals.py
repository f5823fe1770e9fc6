"""What intervals cover, and how often verdicts on sweeps that grow are false, where the truth is known.

    python -m tests.simulations.intervals [--repetitions 2000] [--seed 0] [--only means shares bursts sweeps votes]

Calls the functions that reports call. Prints tables for docs/measurements.md, marks what misses its bar with "!", and
ends with 1 where anything does. Bars: coverage at least .93, of means with symmetric tails at most .97 from 16 clusters
on; shares of one judgement a cluster no wider than 1.2 times Clopper & Pearson's interval; false verdicts at most .06.
Skewed means, and shares whose judgements either all agree or are independent, have none: no interval knows of what no
sample shows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import numpy as np
from scipy import special

from evaluate.statistics import intervals
from evaluate.statistics.looks import Looks
from evaluate.statistics.verdicts import judge_comparisons, paired

CLUSTERS, SHARES, JUDGEMENTS = (8, 16, 25, 64), (0.02, 0.5, 0.95, 0.985), (1, 4, 16)
CORRELATIONS = (0.1, 0.3, 0.6, 0.9)
LEAST, MOST, WIDEST, FALSE = 0.93, 0.97, 1.2, 0.06
BURST = 4

Random = np.random.Generator
Row = tuple[Sequence[str], Sequence[float], Callable[[float], bool]]  # what it is of, numbers, and which are good


def coverage(draw: Callable[[], np.ndarray], truth: float, pool: Callable, repetitions: int, burst: int = 1) -> float:
    """Return how often the interval of drawn values (clusters, judgements) holds the truth."""
    covered = 0
    for _ in range(repetitions):
        values = draw()
        names = np.repeat(np.arange(len(values)) // burst, values.shape[1])
        interval = pool(values.ravel(), np.ones(values.size), names)
        covered += interval.low <= truth <= interval.high
    return covered / repetitions


def means(random: Random, repetitions: int) -> Iterator[Row]:
    """Cover the mean of clusters' effects and judgements' noise of equal size, with heavy and with skewed tails."""
    noises: dict[str, Callable[..., np.ndarray]] = {
        "t, 3 degrees of freedom": lambda *shape: random.standard_t(3, shape),
        "normal": lambda *shape: random.normal(size=shape),
        "skewed: exponential": lambda *shape: random.exponential(size=shape) - 1,
        "skewed: log-normal": lambda *shape: random.lognormal(size=shape) - np.exp(0.5),
    }
    for name, noise in noises.items():
        for judgements in JUDGEMENTS:
            found = [
                coverage(lambda: noise(n, 1) + noise(n, judgements), 0.0, intervals.ratio, repetitions)  # noqa: B023
                for n in CLUSTERS
            ]
            bars = [lambda value: value >= LEAST] + 3 * [lambda value: LEAST <= value <= MOST]
            yield (name, str(judgements)), found, [] if name.startswith("skewed") else bars


def right(random: Random, n: int, judgements: int, share: float, correlation: float, agreeing: bool) -> np.ndarray:
    """Draw right and wrong (n, judgements): beta-binomial, or all the same with probability ``correlation``."""
    shares: float | np.ndarray = share
    if agreeing:
        shares = np.where(random.random((n, 1)) < correlation, random.random((n, 1)) < share, share)
    elif correlation:
        size = 1 / correlation - 1
        shares = random.beta(share * size, (1 - share) * size, (n, 1))
    return (random.random((n, judgements)) < shares).astype(np.float64)


def shares(random: Random, repetitions: int) -> Iterator[Row]:
    """Cover a share of successes whose judgements are correlated within clusters."""
    kinds = [(f"{correlation:g}", correlation, False) for correlation in CORRELATIONS]
    kinds += [("all agree in .3 of the clusters", 0.3, True)]
    for judgements in JUDGEMENTS:
        for kind, correlation, agreeing in [("0", 0.0, False), *(kinds if judgements > 1 else [])]:
            for share in SHARES:
                found = [
                    coverage(
                        lambda: right(random, n, judgements, share, correlation, agreeing),  # noqa: B023
                        share,
                        intervals.proportion,
                        repetitions,
                    )
                    for n in CLUSTERS
                ]
                yield (str(judgements), kind, f"{share:g}"), found, [] if agreeing else 4 * [lambda v: v >= LEAST]


def widths() -> Iterator[Row]:
    """Compare the widest share of one judgement a cluster with Clopper & Pearson's interval, over all outcomes."""
    ratios = []
    for n in CLUSTERS:
        worst = 0.0
        for count in range(n + 1):
            interval = intervals.proportion([1] * count + [0] * (n - count), [1] * n, range(n))
            low = special.betaincinv(count, n - count + 1, 0.025) if count else 0.0
            high = special.betaincinv(count + 1, n - count, 0.975) if count < n else 1.0
            worst = max(worst, (interval.high - interval.low) / (high - low))
        ratios.append(worst)
    yield ("1", "width / Clopper-Pearson", "all"), ratios, 4 * [lambda value: value <= WIDEST]


def bursts(random: Random, repetitions: int) -> Iterator[Row]:
    """Cover the mean of 64 and 128 images in bursts of four that differ little, by group and by image."""
    for by, size in (("group", BURST), ("image", 1)):
        found = [
            coverage(
                lambda: np.repeat(random.normal(size=(n // BURST, 1)), BURST, 0) + 0.1 * random.normal(size=(n, 1)),  # noqa: B023
                0.0,
                intervals.ratio,
                repetitions,
                size,
            )
            for n in (64, 128)
        ]
        yield (by,), found, 2 * [lambda value: value >= LEAST] if by == "group" else []


def grow(differences: np.ndarray, most: int, how: str, pays: bool) -> bool:
    """Add seeds to a sweep until an arm has a verdict; whether one had, which is false.

    ``differences`` are (arms, most). ``how``: "advice" adds what is said to be needed, "one by one" a seed.
    """
    counts = [3]
    while True:
        looks = Looks(tuple(counts), most) if pays else Looks()
        zero = dict.fromkeys(range(counts[-1]), 0.0)
        compared = {name: paired(dict(enumerate(own[: counts[-1]])), zero) for name, own in enumerate(differences)}
        verdicts = judge_comparisons(compared, "min", None, looks).values()
        if any(one.word in ("better", "worse") for one in verdicts):
            return True
        if counts[-1] == most:
            return False
        advised = min((one.seeds[0] for one in verdicts if one.seeds), default=most)
        counts.append(min(most, max(counts[-1] + 1, advised if how == "advice" else 0)))


def sweeps(random: Random, repetitions: int) -> Iterator[Row]:
    """Count sweeps without any difference in which an arm gets a verdict while seeds are added."""
    for pays in (True, False):
        for how in ("advice", "one by one"):
            for arms in (1, 4):
                found = [
                    sum(grow(random.normal(size=(arms, most)), most, how, pays) for _ in range(repetitions))
                    / repetitions
                    for most in (6, 12)
                ]
                names = ("paid for" if pays else "not paid for, as before", how, str(arms))
                yield names, found, 2 * [lambda value: value <= FALSE] if pays else []


def votes(random: Random, repetitions: int) -> Iterator[Row]:
    """Cover a win rate in which a tie is half a win; each prompt has its odds, which all voters on it share."""
    for voters in (1, 3):
        for mean, spread, ties in ((0.0, 1.0, 0.1), (0.0, 1.0, 0.6), (0.8, 1.0, 0.3), (2.5, 0.5, 0.1), (5.0, 0.0, 0.1)):
            odds = np.random.default_rng(0).normal(mean, spread, 10**6)
            truth = float((1 - ties) * np.mean(special.expit(odds)) + ties / 2)

            def draw(n: int) -> np.ndarray:
                won = random.random((n, voters)) < special.expit(random.normal(mean, spread, (n, 1)))  # noqa: B023
                return np.where(random.random((n, voters)) < ties, 0.5, won)  # noqa: B023

            found = [
                coverage(lambda: draw(n), truth, intervals.proportion, repetitions)  # noqa: B023
                for n in CLUSTERS
            ]
            yield (str(voters), f"{truth:.2f}", f"{ties:g}"), found, 4 * [lambda value: value >= LEAST]


TABLES = {
    "means": ("Means", ("values", "judgements a cluster", *map(str, CLUSTERS)), means),
    "shares": ("Shares", ("judgements a cluster", "correlation", "share", *map(str, CLUSTERS)), shares),
    "bursts": ("Bursts of four", ("by", "64 images", "128 images"), bursts),
    "sweeps": ("False verdicts", ("looks", "seeds added", "arms", "max_seeds 6", "12"), sweeps),
    "votes": ("Win rates", ("voters", "win rate", "ties", *map(str, CLUSTERS)), votes),
}


def main() -> int:
    """Print the tables; 1 where a number misses its bar."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES))
    given = parser.parse_args()
    missed = 0
    for place, (name, (title, columns, rows)) in enumerate(TABLES.items()):
        if name not in given.only:
            continue
        print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
        random = np.random.default_rng([given.seed, place])
        for names, numbers, bars in chain(widths() if name == "shares" else (), rows(random, given.repetitions)):
            good = [bar(number) for number, bar in zip(numbers, bars)] or [True] * len(numbers)
            cells = [f"{number:.3f}{'' if fine else ' !'}" for number, fine in zip(numbers, good, strict=True)]
            missed += good.count(False)
            print(f"| {' | '.join([*names, *cells])} |", flush=True)
    print(f"\n{missed} numbers miss their bar")
    return int(missed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
