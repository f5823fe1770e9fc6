"""Sources by their sizes: what is refused, which bucket the others fit, and what the crop costs them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from prep.config import PrepConfig
from prep.dataset.buckets import choose_bucket, reduction
from prep.images.filters import CROPPED, Problem, header_problem, lost_area
from prep.images.scan import Reject
from prep.images.sources import Source


@dataclass(frozen=True)
class Fitting:
    """Sources by what their sizes say.

    ``sources`` has the usable ones by key, ``buckets`` the bucket of each, ``rejects`` what is refused; ``cropped`` are
    those that lose most of their area to the crop, with the share, and ``large`` the keys of those whose JPEG is
    decoded at a reduced scale.
    """

    sources: dict[str, Source] = field(default_factory=dict)
    buckets: dict[str, str] = field(default_factory=dict)
    rejects: list[Reject] = field(default_factory=list)
    cropped: list[tuple[float, str]] = field(default_factory=list)
    large: set[str] = field(default_factory=set)


def judge_sizes(config: PrepConfig, found: Iterable[Source]) -> Fitting:
    """Judge sources by their sizes."""
    result = Fitting()
    sizes: dict[tuple[int, int], tuple[Problem | None, str, float, bool]] = {}
    for source in found:
        size = source.width, source.height
        if size not in sizes:
            problem = header_problem(*size, config.filters, config.base, config.image.max_upscale)
            bucket = choose_bucket(*size, config.base)
            sizes[size] = problem, str(bucket), lost_area(*size, bucket), reduction(*size, bucket) > 1
        problem, name, lost, reduced = sizes[size]
        if problem:
            result.rejects.append(Reject(source.name, "source", *problem))
            continue
        result.sources[source.key], result.buckets[source.key] = source, name
        if reduced:
            result.large.add(source.key)
        if lost > CROPPED:
            result.cropped.append((lost, source.name))
    return result
