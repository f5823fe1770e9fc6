"""Numbers of unlike settings are never set against each other; like ones are, picture by picture."""

import numpy as np
import pytest

from evaluate.records import MODEL, Metric
from evaluate.report.compare import Difference, differing, objections, paired


def metric(n=64, **settings):
    return Metric("reconstruction/psnr", 20.0, n=n, settings={"steps": 10, "guidance": 1.0, **settings}).to_dict()


def report(schema=1, **dataset):
    facts = {"fingerprint": "ab" * 32, "base": 64, "encoders": "demo", **dataset}
    return {"schema": schema, "provenance": {"dataset": facts}}


def test_equal_settings_may_be_compared():
    assert differing([metric(), metric(), metric()]) == []


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"n": 256}, "n 64, 256"),
        ({"steps": 16}, "steps 10, 16"),
        ({"guidance": 2.0}, "guidance 1.0, 2.0"),
        ({"judge": "demo"}, "judge unknown, demo"),
    ],
)
def test_whatever_differs_is_named(other, said):  # trap 23, fault E05
    assert differing([metric(), metric(**other)]) == [said]


def test_reports_on_other_data_or_of_another_version_share_nothing():
    assert objections(report(), report()) == []
    assert objections(report(), report(base=256)) == ["dataset base 64 and 256"]
    assert objections(report(), report(schema=2)) == ["schema 1 and 2"]
    (said,) = objections(report(), report(fingerprint="cd" * 32))
    assert said == "dataset fingerprint abababababababab and cdcdcdcdcdcdcdcd"
    assert objections(report(fingerprint=None), report(fingerprint=None))  # unknown is not equal to unknown


def rows(values, seeds=2, condition="all"):
    return [
        {"key": f"{index // seeds:02d}", "seed": index % seeds, "kind": MODEL, "condition": condition, "psnr": value}
        for index, value in enumerate(values)
    ]


def test_the_same_pictures_are_compared_one_by_one():
    """Noise that both share cancels: the interval is that of the difference, whatever the order of the rows."""
    base = np.random.default_rng(0).normal(20, 5, 40)
    interval = paired(rows(base + 0.5)[::-1], rows(base), "all", "psnr")
    assert (interval.value, interval.low, interval.high) == (pytest.approx(0.5),) * 3
    assert interval.n == 20


def test_only_pictures_that_both_have_are_compared():
    values = [20.0] * 40
    assert paired(rows(values), rows(values[:38]), "all", "psnr").n == 19
    assert paired(rows(values), [], "all", "psnr") is None
    assert paired(rows(values), rows(values, condition="text"), "all", "psnr") is None
    assert paired(rows(values), rows([None, *values[1:]]), "all", "psnr") is None


@pytest.mark.parametrize(("gap", "verdict"), [(1e-8, "inconclusive"), (1e-3, "worse")])
def test_a_difference_of_rounding_is_none(gap, verdict):
    interval = paired(rows([20.0 - gap] * 40), rows([20.0] * 40), "all", "psnr")
    assert interval.high < 0
    assert Difference(interval, "higher").verdict == verdict


def test_near_duplicates_differ_together():
    """Bursts of four are one cluster: over the samples, as it was, the interval is half as wide."""
    base = np.random.default_rng(0).normal(size=64)
    change = np.repeat(np.random.default_rng(1).normal(size=16), 4)
    first, second = rows(base + change, seeds=1), rows(base, seeds=1)
    alone = paired(first, second, "all", "psnr")
    for one in (first, second):
        for index, row in enumerate(one):
            row["cluster"] = f"burst {index // 4}"
    together = paired(first, second, "all", "psnr")
    assert (alone.n, together.n) == (64, 16)
    assert together.high - together.low > 1.7 * (alone.high - alone.low)


def test_an_evaluation_without_clusters_takes_those_of_the_other():
    """Which of two evaluations comes first, and which of them is older, moves no bound."""
    base = np.random.default_rng(0).normal(size=64)
    change = np.repeat(np.random.default_rng(1).normal(size=16), 4)
    grouped, old = rows(base + change, seeds=1), rows(base, seeds=1)
    for index, row in enumerate(grouped):
        row["cluster"] = f"burst {index // 4}"
    there, back = paired(grouped, old, "all", "psnr"), paired(old, grouped, "all", "psnr")
    assert (there.n, back.n) == (16, 16)
    assert (-back.high, -back.low) == pytest.approx((there.low, there.high), abs=0.05)
