"""Histograms count every value once and stay in their frame; skeletons draw what was found."""

import re
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanodit.svg import BINS, HEIGHT, WIDTH, bin_values, histogram, skeleton

SVG = "{http://www.w3.org/2000/svg}"


def parse(markup):
    return ElementTree.fromstring(str(markup).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


@given(st.lists(st.one_of(st.integers(0, 600), st.integers(0, 200_000)), min_size=1, max_size=80), st.booleans())
def test_every_value_is_in_exactly_one_bin(values, whole):
    values = np.array(values) if whole else np.array(values) / 200_000
    bins = bin_values(values, whole)
    assert bins.counts.sum() + bins.beyond == len(values)
    assert len(bins.counts) == len(bins.edges) - 1 <= 2.5 * BINS
    for start, end, count in zip(bins.edges[:-1], bins.edges[1:], bins.counts):
        tolerance = 0 if whole else 1e-9
        assert count == ((values >= start - tolerance) & (values < end - tolerance)).sum()
    assert bins.beyond <= 0.02 * len(values) + 1


@given(st.lists(st.integers(0, 50_000), min_size=1, max_size=50))
def test_bars_stay_in_the_frame_and_say_how_many(values):
    svg = parse(histogram(np.array(values), "words"))
    total = 0
    for bar in svg.iter(f"{SVG}rect"):
        x, y, width, height = (float(bar.attrib[name]) for name in ("x", "y", "width", "height"))
        assert 0 <= x <= x + width <= WIDTH
        assert 0 <= y <= y + height <= HEIGHT
        assert height >= 1.5  # one among ten thousand is still to be seen
        total += int(bar.find(f"{SVG}title").text.rpartition(": ")[2].replace(",", ""))
    assert total == len(values)


@pytest.mark.parametrize("values", [[7] * 5, [0], [0, 1], [1, 2, 3], list(range(90, 200)), [5] * 99 + [10_000]])
def test_labels_of_an_axis_differ_and_do_not_collide(values):
    svg = parse(histogram(np.array(values), "words", [(float(np.median(values)), "median")]))
    base = [text for text in svg.iter(f"{SVG}text") if text.get("text-anchor") == "middle" and not text.get("class")]
    assert len({text.text for text in base}) == len(base) >= 1
    places = sorted(float(text.attrib["x"]) for text in base)
    assert all(right - left > 35 for left, right in pairwise(places))
    heights = [
        text.text for text in svg.iter(f"{SVG}text") if text.get("text-anchor") == "end" and not text.get("class")
    ]
    assert len(set(heights)) == len(heights) >= 2
    assert ("more" in heights) == (max(values) > 5000)


def test_names_are_escaped_and_nothing_is_no_chart():
    chart = str(histogram(np.array([1, 2]), "<i>&", [(1.0, "<b>")]))
    assert "<i>" not in chart
    assert "<b>" not in chart
    assert "&lt;b&gt;" in chart
    assert "nothing to draw" in histogram(np.array([]), "words")


def test_a_skeleton_draws_found_joints_by_confidence():
    joints = np.zeros((133, 3))
    joints[5], joints[7], joints[9] = (10, 20, 0.9), (30, 40, 0.4), (50, 60, 0.1)
    svg = parse(skeleton(joints, [[0, 0, 50, 80, 0.9], [9, 9, 5, 5, 0.4]], 64, 80))
    paths = {path.attrib["class"]: path.attrib["d"] for path in svg.iter(f"{SVG}path")}
    assert paths["bone fair"] == "M10 20L30 40"  # as sure as its weaker end
    assert paths["bone weak"] == "M30 40L50 60"
    assert paths["dot sure"] == "M10 20h0"
    assert "bone sure" not in paths
    assert len(list(svg.iter(f"{SVG}rect"))) == 2
    assert not re.search(r"<path", str(skeleton(np.zeros((133, 3)), [], 64, 64)))  # nobody: nothing is made up
