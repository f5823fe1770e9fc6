"""Time and memory of the test `unpaired` beside its drawing, and how often its intervals hold the value they are for.

``python -m tests.benchmarks.manifolds [--pictures 10000] [--training 10000] [--holdout 4096] [--width 768]``: random
features. ``--repeat 300``: sets from a normal distribution instead, over and over; beside the jackknife the intervals
that hold the balls still.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from evaluate.metrics.distances import frechet, kid
from evaluate.metrics.manifolds import COUNT_K, SHARE_K, Balls, _blocks, fidelity
from evaluate.statistics import intervals

SETS = ((60, 60, 6, 0.0), (200, 200, 16, 0.0), (200, 200, 16, 0.5), (64, 400, 16, 0.3))  # n, m, width, shift


def alone(count: int) -> list[str]:
    return [f"{index:06d}" for index in range(count)]


def timed(what: str, compute: Callable[[], Any]) -> Any:
    start, cpu = time.monotonic(), time.process_time()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = compute()
    spent = f"{time.monotonic() - start:.1f} s, {time.process_time() - cpu:.1f} s of CPU"
    print(
        f"| {what} | {spent} | {(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024:.0f} MB |",
        flush=True,
    )
    return found


def costs(options: argparse.Namespace) -> None:
    random = np.random.default_rng(0)
    counts = {name: getattr(options, name) for name in ("pictures", "training", "holdout")}
    sets = {name: random.standard_normal((n, options.width), dtype=np.float32) for name, n in counts.items()}
    print("| of " + ", ".join(f"{n} {name}" for name, n in counts.items()) + " | time | memory more |")
    print("|---|---|---|")
    balls = {
        name: timed(f"balls, {name}", lambda own=own: Balls.of(own, alone(len(own)))) for name, own in sets.items()
    }
    for name in ("training", "holdout"):
        timed(f"pictures against {name}: the four", lambda name=name: fidelity(balls["pictures"], balls[name]))
    least = min(counts.values())
    for name in ("training", "holdout"):
        timed(f"pictures against {name}: KID", lambda name=name: kid(sets["pictures"], sets[name]))
    timed(f"FD at {least}", lambda: frechet(sets["pictures"][:least], sets["training"][:least]))


def still(pictures: np.ndarray, reference: np.ndarray) -> dict[str, intervals.Interval]:
    """Return the intervals of what is counted alone, over images."""
    ((_, squares),) = _blocks(np.float32(pictures), np.float32(reference))
    radii = [Balls.of(own, alone(len(own))).radii for own in (pictures, reference)]
    inside = (squares <= radii[1][SHARE_K][0]).any(1)
    reached = (squares <= radii[0][SHARE_K][0, :, None]).any(0)
    held = squares <= radii[1][COUNT_K][0]
    found = {"precision": inside, "recall": reached, "coverage": held.any(0)}
    shares = {name: intervals.proportion(own, np.ones(len(own)), alone(len(own))) for name, own in found.items()}
    return shares | {"density": intervals.mean(held.sum(1) / COUNT_K, alone(len(held)))}


def coverage(repeat: int) -> None:
    random = np.random.default_rng(0)
    print("| pictures, reference, width, shift | of | jackknife holds | length / of 1.96 sd | balls held still |")
    print("|---|---|---|---|---|")
    for n, m, width, shift in SETS:
        found: dict[str, list[list[float]]] = {}
        for _ in range(repeat):
            sets = random.standard_normal((n, width)) + shift, random.standard_normal((m, width))
            other = still(*sets)
            for name, one in fidelity(*(Balls.of(own, alone(len(own))) for own in sets)).items():
                found.setdefault(name, []).append([one.value, one.low, one.high, other[name].low, other[name].high])
        for name, rows in found.items():
            value, low, high, still_low, still_high = np.transpose(rows)
            mean = value.mean()
            holds, other = (np.mean((a <= mean) & (mean <= b)) for a, b in ((low, high), (still_low, still_high)))
            length = np.mean(high - low) / (2 * 1.96 * value.std())
            print(f"| {n}, {m}, {width}, {shift:g} | {name} | {holds:.3f} | {length:.2f} | {other:.3f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in (("pictures", 10_000), ("training", 10_000), ("holdout", 4096), ("width", 768)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--repeat", type=int, default=0, help="say what intervals hold instead")
    options = parser.parse_args()
    if options.repeat:
        coverage(options.repeat)
    else:
        costs(options)


if __name__ == "__main__":
    main()
