"""Charts are well-formed SVG, show what they were given and stay within their frame; skeletons draw what was found."""

import re
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanodit.svg import BINS, HISTOGRAM, LINES, Axes, Series, bin_values, histogram, line_chart, skeleton, smooth, thin

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
        assert 0 <= x <= x + width <= HISTOGRAM.width
        assert 0 <= y <= y + height <= HISTOGRAM.height
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


def coordinates(element):
    return [tuple(map(float, pair.split(","))) for pair in element.attrib["points"].split()]


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", [[1, 2, 3], [1e-4, 0.5, 7e3], [5, 5, 5], [0.002, 0.0015, 0.001], [0.61, 0.64, 0.66]])
def test_points_stay_in_the_frame_and_axes_have_ticks(values, log):
    points = list(enumerate(map(float, values)))
    svg = parse(line_chart([Series("one", points, "c1", markers=True)], Axes("step", "loss", log=log)))
    (line,) = svg.iter(f"{SVG}polyline")
    shown = coordinates(line)
    assert len(shown) == 3
    assert all(0 <= x <= LINES.width and 0 <= y <= LINES.height for x, y in shown)
    heights = [y for _, y in shown]
    assert sorted(heights, reverse=True) == [y for _, y in sorted(zip(values, heights))]  # larger is higher
    labels = [text.text for text in svg.iter(f"{SVG}text") if text.get("text-anchor") == "end"]
    assert len(labels) >= 3
    assert len(labels) == len(set(labels))  # no two ticks print alike


def test_a_log_axis_leaves_out_what_it_cannot_show():
    svg = parse(line_chart([Series("one", [(0, 0.0), (1, 1.0), (2, 10.0)], "c1")], Axes("t", "error", log=True)))
    (line,) = svg.iter(f"{SVG}polyline")
    assert len(coordinates(line)) == 2


def test_bands_lines_and_shades_are_drawn():
    band = [(0.0, 0.5, 2.0), (1.0, 1.5, 3.0)]
    axes = Axes("t", "ratio", line=0.5, line_name="needed", shaded=(0.3, 1.0), span=(0.0, 1.0))
    svg = parse(line_chart([Series("one", [(0.0, 1.0), (1.0, 2.0)], "c1", band)], axes))
    (polygon,) = svg.iter(f"{SVG}polygon")
    assert len(coordinates(polygon)) == 4
    assert "needed" in [text.text for text in svg.iter(f"{SVG}text")]
    assert [rect.attrib["class"] for rect in svg.iter(f"{SVG}rect")] == ["shade"]


def test_names_of_lines_are_escaped_and_nothing_is_no_chart():
    chart = str(line_chart([Series("<b>&", [(0, 1), (1, 2)], "c1")], Axes("<i>", '"y"')))
    assert "<b>" not in chart
    assert "<i>" not in chart
    assert re.search(r"&lt;b&gt;&amp;", chart)
    assert "nothing to draw" in line_chart([Series("one", [(0, float("nan"))], "c1")], Axes("t", "y"))


def test_smoothing_keeps_lines_and_thinning_keeps_the_end():
    line = [(float(x), 2.0 * x) for x in range(100)]
    assert [y for _, y in smooth(line, 11)][5:94] == pytest.approx([y for _, y in line][5:94])
    assert smooth(line, 11)[0] == line[0]
    short = thin(line, 30)
    assert len(short) <= 30
    assert short[-1] == line[-1]
