"""The mirror image of a figure scene: the same person seen in a mirror, where left is right, in words and places."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from prep.figures.scene import Scene

_OPPOSITE = {"left": "right", "right": "left"}


def mirror_scene(scene: Scene) -> Scene:
    """Return the scene whose picture is the mirror image: x becomes aspect - x, and a left joint is a right one.

    A pure function of the scene, and its own inverse up to rounding. Keypoints and caption of the result are those of
    the mirror image. Its drawing is not, to the pixel: the parting of the hair and gleams of light are drawn on one
    side, the right arm is always drawn over the left, and Pillow fills the pixels on a polygon's left and right edge
    differently. So a mirrored figure is drawn by mirroring the picture (``draw_figure``).
    """
    points = {}
    for name, (x, y) in scene.points.items():
        side, _, part = name.partition("_")
        points[f"{_OPPOSITE[side]}_{part}" if side in _OPPOSITE else name] = np.array([scene.aspect - x, y])
    words = {
        name: _OPPOSITE.get(getattr(scene, name), getattr(scene, name))
        for name in ("light", "held_hand", "leading_leg", "gaze", "placement")
    }
    arms = {"left_arm": scene.right_arm, "right_arm": scene.left_arm}
    return replace(scene, **words, **arms, tilt=-scene.tilt, turn=-scene.turn, points=points)
