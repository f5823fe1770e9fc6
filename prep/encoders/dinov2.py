"""DINOv2 image features on DINOv3's grid: for everybody without access to DINOv3, which is gated.

DINOv2 has patches of 14 pixels instead of 16. The image is resized to 14 pixels per cell of the grid that DINOv3 would
have, so that patch (i, j) sees the same part of the picture and no feature is ever interpolated: averages of
neighbouring tokens are shorter than any token and blur the places that they are there for. What is given up is input
resolution, 14/16 per side; the cost is a little lower than DINOv3's.
"""

from __future__ import annotations

from typing import ClassVar

from prep.encoders.dinov3 import DINOv3Encoder


class DINOv2Encoder(DINOv3Encoder):
    """A DINOv2 vision transformer, with registers or without, in the place of a :class:`DINOv3Encoder`.

    Same inputs, outputs, grid and errors; preprocessing is the same too (ImageNet mean and deviation).
    """

    MODELS: ClassVar[dict[str, str]] = {
        "dinov2": "Dinov2Model",
        "dinov2_with_registers": "Dinov2WithRegistersModel",
    }
