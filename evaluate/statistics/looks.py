"""How the looks at a sweep that grows share one error rate: a spending function over the seeds declared as the most.

A look is an extension of the sweep's seeds, which somebody decided on with the verdicts so far in view; reading a page
again is none. At each look the part of the error rate that the spending function allows by then is spent, so that
verdicts at all looks together are false about as often as a single one (Lan & DeMets 1983, "Discrete sequential
boundaries for clinical trials", Biometrika 70). p-values of Student's t are held against the levels of Brownian motion
(Jennison & Turnbull 2000, "Group Sequential Methods", section 4.4). How many seeds are added depends on what the last
look showed, which these levels do not allow for (6 to 7 % false verdicts): they are therefore those of a look after
every seed from the first look on, whichever of them are taken. Pure functions of their inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import optimize, special

WIDEST = 37.0  # standard deviations; beyond them a float64 knows no probability
STEPS = 24  # looks that stand for all in between, where there are more
SPARED = 1.1  # Student's t at neighbouring looks differs more than Brownian motion does: so much more would be false
FEWEST = 3  # seeds below which nothing is judged
GRID = 201  # points of the density between two looks
ALPHAS = np.unique([*np.geomspace(1e-6, 0.999, 60), 0.05])  # error rates whose levels are tabled


def spent(share: float, alpha: float) -> float:
    """Return how much of ``alpha`` may be spent at a share of the seeds: little at first, after O'Brien & Fleming.

    ``2 - 2 Phi(z / sqrt(share))`` on either side, half of alpha each (Lan & DeMets 1983, section 4).
    """
    return 4 * special.ndtr(special.ndtri(alpha / 4) / np.sqrt(share))


@lru_cache(maxsize=4096)
def level(shares: tuple[float, ...], alpha: float) -> float:
    """Return the p-value that a test may have at the last of several looks, at rising ``shares`` of the seeds.

    The probability to cross the bounds of all looks is then ``spent`` at each, for Brownian motion: its density between
    the bounds is carried from look to look (Armitage, McPherson & Rowe 1969).
    """
    places = density = None
    past = before = 0.0
    bound = 0.0
    for share in shares:
        due, widest = spent(share, alpha) - past, WIDEST * share**0.5
        if places is None:
            bound = -special.ndtri(max(due / 2, 1e-300)) * share**0.5
        else:
            step = (share - before) ** 0.5
            given = (places, density, step, due)
            within = _crossed(widest, *given) < 0 < _crossed(0.0, *given)
            bound = optimize.brentq(_crossed, 0.0, widest, given) if within else widest
        edge = min(bound, 8 * share**0.5)  # nothing is beyond eight standard deviations
        points, width = np.linspace(-edge, edge, GRID, retstep=True)
        if places is None:
            values = np.exp(-(points**2) / (2 * share)) / np.sqrt(2 * np.pi * share)
        else:
            values = np.exp(-(((points[:, None] - places) / step) ** 2) / 2) @ density / (step * np.sqrt(2 * np.pi))
        weights = np.full(GRID, width)
        weights[[0, -1]] /= 2  # trapezoidal rule
        places, density = points, values * weights
        past, before = spent(share, alpha), share
    return float(2 * special.ndtr(-bound / shares[-1] ** 0.5))


def _crossed(bound: float, places: np.ndarray, density: np.ndarray, step: float, due: float) -> float:
    """Return the probability to be beyond +-bound one ``step`` after ``places`` with their density, less ``due``."""
    tails = special.ndtr((places - bound) / step) + special.ndtr((-bound - places) / step)
    return float(density @ tails) - due


def _sparing(shares: tuple[float, ...], alpha: float) -> float:
    """Return the level of Student's t at the last of the looks; of a single one that of Brownian motion, both exact."""
    return level(shares, alpha if len(shares) == 1 else alpha / SPARED)


@lru_cache(maxsize=64)
def _table(shares: tuple[float, ...]) -> np.ndarray:
    """Return the quantiles of the levels at ALPHAS, which rise with them."""
    return np.maximum.accumulate([special.ndtri(_sparing(shares, float(alpha)) / 2) for alpha in ALPHAS])


@dataclass(frozen=True)
class Looks:
    """The numbers of ``seeds`` at which a sweep could be judged, rising, and the ``most`` that it declared.

    Verdicts depend on the first of them, the last and the most. Without a declared maximum there is one look; more of
    them make the sweep exploratory.
    """

    seeds: Sequence[int] = ()
    most: int | None = None

    @property
    def exploratory(self) -> bool:
        """Whether seeds were added without a maximum that would say what this costs."""
        return self.most is None and len(self.seeds) > 1

    def adjust(self, p: float) -> float:
        """Return the smallest error rate over all looks at which a p-value of the last look is significant.

        A p-value for any correction over several arms; p itself for a single look at all the seeds declared.
        """
        if self.most is None or not self.seeds:
            return p
        z = special.ndtri(max(min(p, 1.0), 1e-300) / 2)
        table = _table(self._shares(self.seeds[-1]))
        if z < table[0]:
            return float(ALPHAS[0])
        return 1.0 if z >= table[-1] else float(2 * special.ndtr(np.interp(z, table, special.ndtri(ALPHAS / 2))))

    def level_at(self, seeds: int, alpha: float) -> float:
        """Return the level of a look at so many ``seeds``."""
        return alpha if self.most is None or not self.seeds else _sparing(self._shares(seeds), alpha)

    def _shares(self, seeds: int) -> tuple[float, ...]:
        """Return all looks up to one at ``seeds`` as shares of the most, both less the one that the mean takes.

        Counted so, Brownian motion is nearer to Student's t: with a look after every seed from 3 on, 5.4 % of sweeps of
        6 seeds and 5.5 % of 12 are false, not 5.7 %; SPARED does the rest.
        """
        first = max(self.seeds[0], FEWEST)
        counts = np.arange(first, max(first, seeds) + 1)
        if len(counts) > STEPS:
            counts = np.unique(np.geomspace(first, seeds, STEPS).round())
        return tuple((float(count) - 1) / (self.most - 1) for count in counts)
