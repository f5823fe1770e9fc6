"""The judge of emoji: right pictures are found, those of other texts by chance, styles by their palettes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from evaluate.metrics.likeness import pixel_features
from nanodit.errors import DataError
from tests.datasets.judge_emoji import COLUMNS, Shown, colours, found, judged, other_style, probe

STYLES, EMOJI = ("a", "b", "c"), 60
PALETTES = np.array([[200, 30, 40], [40, 200, 90], [60, 80, 220]])


def drawings(noise: float = 0.0) -> Shown:
    """Sixty patterns of 4 x 4 cells, white or of the style's colour, in each of three styles."""
    random = np.random.default_rng(0)
    shapes = np.kron(random.integers(0, 2, (EMOJI, 4, 4, 1)), np.ones((4, 4, 1)))
    pictures = np.concatenate([shapes * colour + (1 - shapes) * 255 for colour in PALETTES])
    pictures = np.clip(pictures + noise * random.standard_normal(pictures.shape), 0, 255).astype(np.uint8)
    names = np.array([f"{number:x}" for number in range(EMOJI)] * len(STYLES))
    return Shown(pictures, names, np.repeat(STYLES, EMOJI))


JUDGE = SimpleNamespace(features=lambda pictures: pixel_features(pictures, 4) - 0.5)  # an encoder of the colours


def test_right_pictures_are_found_and_others_by_chance():
    real, drawn = drawings(), drawings(noise=40)
    held = np.random.default_rng(1).random(len(real)) < 0.2
    table = judged(drawn[held], real[~held], real[held], JUDGE, 20)
    assert [interval.value for interval in table["real"]] == [1] * len(COLUMNS)
    assert all(interval.value > 0.9 for interval in table["drawn"])
    elsewhere = table["same emoji, another style"]
    assert elsewhere[0].value > 0.5
    assert elsewhere[2].value == elsewhere[3].value == 0  # all are of another style
    other = table["drawn for another text"]
    assert other[0].value < 0.25
    assert other[0].low < 1 / 20 < other[0].high


def test_candidates_are_the_same_each_time_and_of_the_style_asked_for():
    real = drawings()
    features = pixel_features(real.pictures)
    asked = real[np.arange(10)]
    wrong = features.copy()
    wrong[real.style != "a"] = features[0]  # were those candidates, they would be as near
    first = found(asked, features[:10], real, features, 20)
    assert first.all()
    assert (found(asked, features[:10], real, wrong, 20) == first).all()
    with pytest.raises(DataError, match="a 0: the real pictures lack it, or 60 others of its style"):
        found(asked, features[:10], real, features, 61)


def test_the_probe_is_linear_and_colours_are_shares():
    real = drawings()
    shares = np.square(colours(real.pictures))
    np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-5)
    assert (probe(colours(real.pictures[::2]), real.style[::2], colours(real.pictures[1::2])) == real.style[1::2]).all()


def test_another_style_is_another_style_of_the_same_emoji():
    real = drawings()
    drawn = real[np.flatnonzero(real.emoji == "5")]
    places, at = other_style(drawn, real)
    assert at.tolist() == [0, 1, 2]
    assert (real.emoji[places] == "5").all()
    assert (real.style[places] != drawn.style).all()
    alone = real[np.flatnonzero(real.style == "a")]
    assert not len(other_style(alone, alone)[0])
