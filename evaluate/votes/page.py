"""The page on which people vote: one HTML file with all pictures, which runs from disk and sends nothing anywhere."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from evaluate.votes.ballots import page_id
from nanodit.errors import ResourceError
from nanodit.files import canonical_json
from nanodit.pages import open_template

LIMIT = 40_000_000  # bytes of the page
SIDES = (1024, 768, 512, 384, 256)  # pixels of the longer side, tried in turn until the page is small enough
LOSSLESS = 256  # pixels of the longer side up to which a picture stays as it is
QUALITY = 92
PROMPT = 2000  # characters shown


@dataclass(frozen=True)
class Shown:
    """What a trial shows: its prompt, and two pictures uint8 (H, W, 3)."""

    prompt: str
    left: np.ndarray
    right: np.ndarray


def render(content: Mapping[str, Any], shown: Sequence[Shown]) -> tuple[str, int]:
    """Return the page, and the longer side in pixels to which larger pictures were scaled down.

    ``content`` is what the page's JSON will hold beside the answers (:class:`evaluate.votes.ballots.Votes`); ``shown``
    belongs to its trials. Raises :class:`ResourceError` where the smallest pictures make more than LIMIT bytes.
    """
    identity = page_id(content)
    # for nobody to read by chance, not to keep it from somebody who wants to know
    sealed = base64.b64encode(canonical_json({**content, "page": identity}).encode()).decode()
    script = Path(__file__).with_name("vote.js").read_text(encoding="utf-8")
    template = open_template(Path(__file__).with_name("vote.html"), {})
    for side in SIDES:
        trials = [
            {
                "prompt": one.prompt if len(one.prompt) <= PROMPT else f"{one.prompt[:PROMPT]} …",
                "pictures": [_picture(pixels, side) for pixels in (one.left, one.right)],
            }
            for one in shown
        ]
        html = template.render(
            page={"id": identity, "sealed": sealed, "trials": trials}, script=script, script_hash=_hash(script)
        )
        if len(html.encode()) <= LIMIT:
            return html, side
    raise ResourceError(f"the page would be larger than {LIMIT / 1e6:.0f} MB; give fewer --prompts")


def _picture(pixels: np.ndarray, side: int) -> dict[str, Any]:
    """Return a picture as a data URI with its size; all are compressed alike, which tells no run from another."""
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    width, height = image.size
    if max(image.size) <= LOSSLESS:
        kind = "png"
        image.save(buffer, "PNG")
    else:
        kind = "webp"
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        image.save(buffer, "WEBP", quality=QUALITY, method=4)
    return {
        "data": f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}",
        "width": width,
        "height": height,
    }


def _hash(script: str) -> str:
    """Return the source expression of an inline script in a Content-Security-Policy (W3C, CSP Level 3, section 2.3)."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"
