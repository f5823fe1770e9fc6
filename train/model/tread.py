"""TREAD: the middle blocks see a random half of an image's tokens, the others pass them by and come back unchanged.

Which tokens is data: drawn before the forward and passed to it as ``keep_ids``, so that a forward is a pure function
and a checkpointed block computes the same twice. No parameters. Source: Krause et al., arXiv 2501.04765.
Shape letters as in :mod:`train.model.network`; k kept tokens.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field
from torch import Tensor

from nanodit.config import Config
from nanodit.errors import ConfigError

MIN_TOKENS = 1024  # FID 17.4 -> 14.1 with 1024 tokens, 18.2 -> 21.6 with 256 (PRX, part 2)


class TreadConfig(Config):
    """Which blocks are routed, how many tokens they see, and when."""

    enabled: bool = False
    start: int = 1  # the first and the last block that see only the kept tokens; negative: from the end
    end: int = -2
    keep: float = Field(default=0.5, gt=0, le=1)  # share of an image's tokens
    dense_tail: float = Field(default=0.125, ge=0, le=1)  # share of the steps, at the end, that are dense ...
    tail_routed: float = Field(default=0.1, ge=0, le=1)  # ... but for this share of their micro-batches

    def route(self, depth: int) -> range:
        """Return the routed blocks of a model, none where routing is off: the one place that resolves negatives.

        Raises :class:`ConfigError` where there are no such blocks.
        """
        if not self.enabled:
            return range(0)
        first, last = (index + depth if index < 0 else index for index in (self.start, self.end))
        if not 0 <= first <= last < depth:
            raise ConfigError(
                f"tread: start {self.start} and end {self.end} are blocks {first} to {last}, of {depth} (0 to "
                f"{depth - 1}); set tread.start and tread.end so that at least one block lies between"
            )
        return range(first, last + 1)

    def routes(self, step: int, steps: int, rng: np.random.Generator) -> bool:
        """Return whether a micro-batch of optimiser step ``step`` (0-based) of ``steps`` is routed."""
        tail = step >= steps - round(self.dense_tail * steps)
        return self.enabled and (not tail or rng.random() < self.tail_routed)

    def kept(self, tokens: int) -> int:
        """Return how many of an image's tokens are kept: one number for each shape."""
        return max(1, round(self.keep * tokens))


def draw_keep_ids(rng: np.random.Generator, tokens: int, kept: int) -> np.ndarray:
    """Draw the kept tokens of one image, sorted int64 (kept,), every token equally likely."""
    return np.sort(rng.choice(tokens, kept, replace=False, shuffle=False))


def take(x_bnd: Tensor, keep_ids_bk: Tensor) -> Tensor:
    """Return each image's kept tokens, (b, k, d)."""
    return x_bnd.gather(1, keep_ids_bk.unsqueeze(2).expand(-1, -1, x_bnd.shape[2]))


def put_back(x_bnd: Tensor, kept_bkd: Tensor, keep_ids_bk: Tensor) -> Tensor:
    """Return all tokens, (b, n, d): the kept ones as the routed blocks left them, the others as they were."""
    return x_bnd.scatter(1, keep_ids_bk.unsqueeze(2).expand_as(kept_bkd), kept_bkd)
