"""Charts are well-formed SVG, show what they were given and stay within their frame."""

import re
from xml.etree import ElementTree

import pytest

from evaluate.charts import HEIGHT, Axes, Series, line_chart, smooth, thin

SVG = "{http://www.w3.org/2000/svg}"


def parse(markup):
    return ElementTree.fromstring(str(markup).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


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
    assert all(0 <= x <= 460 and 0 <= y <= HEIGHT for x, y in shown)
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


def test_names_are_escaped_and_nothing_is_no_chart():
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
