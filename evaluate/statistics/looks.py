"""How the looks at a sweep that grows share one error rate: a spending function over the seeds declared as the most.

A look is an extension of the sweep's seeds, which somebody decided on with the verdicts so far in view; reading a page
again is none. At each look the part of the error rate that the spending function allows by then is spent, so that
verdicts at all looks together are false about as often as a single one (Lan & DeMets 1983, "Discrete sequential
boundaries for clinical trials", Biometrika 70). p-values of Student's t are held against the levels of Brownian motion
(Jennison & Turnbull 2000, "Group Sequential Methods", section 4.4). Pure functions of their inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import optimize, special

WIDEST = 37.0  # standard deviations; beyond them a float64 knows no probability
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


@lru_cache(maxsize=64)
def _table(shares: tuple[float, ...]) -> np.ndarray:
    """Return the quantiles of the levels at ALPHAS, which rise with them."""
    return np.maximum.accumulate([special.ndtri(level(shares, float(alpha)) / 2) for alpha in ALPHAS])


@dataclass(frozen=True)
class Looks:
    """The numbers of ``seeds`` at which a sweep could be judged, rising, and the ``most`` that it declared.

    Without a declared maximum there is one look; more of them make the sweep exploratory.
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
        if self.most is None or not self.seeds or tuple(self.seeds) == (self.most,):
            return p
        shares = tuple(count / self.most for count in self.seeds)
        z = special.ndtri(max(min(p, 1.0), 1e-300) / 2)
        table = _table(shares)
        if z < table[0]:
            return float(ALPHAS[0])
        return 1.0 if z >= table[-1] else float(2 * special.ndtr(np.interp(z, table, special.ndtri(ALPHAS / 2))))

    def level_at(self, seeds: int, alpha: float) -> float:
        """Return about the level of a next look at more ``seeds``: what is left to spend by then, and so a least."""
        if self.most is None or not self.seeds:
            return alpha
        return spent(seeds / self.most, alpha) - spent(self.seeds[-1] / self.most, alpha)
