"""T5 features of a batch of samples, as members and index columns: of captions, and of short ones.

Each text is stored once: what a flipped or a short caption shares with another one of its sample has no tokens
(``docs/dataset-format.md``). Texts of a kind are a batch of their own, so what is stored of captions does not depend on
whether others are stored beside them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from prep.dataset.codecs import npy_bytes

LONG = 3  # of a row with short captions: what a row without them is
Features = tuple[dict[str, bytes], dict[str, Any]]


def caption_features(encoder: Any, batch: Sequence[tuple[str, str, str | None]], flips: bool) -> Iterator[Features]:
    """Yield members and columns of each (key, caption, flipped caption)."""
    _, captions, flipped = zip(*batch)
    encoded = encoder.encode(captions)
    mirrored = _encode_some(encoder, (other for caption, other in zip(captions, flipped) if other != caption))
    for tokens, caption, other in zip(encoded, captions, flipped):
        members, columns = {"t5.npy": npy_bytes(tokens.embedding)}, {}
        columns |= {"t5_tokens": len(tokens.embedding), "t5_truncated": tokens.truncated}
        if flips:
            embedding = tokens.embedding[:0] if other in (None, caption) else mirrored[other]
            members["t5_flip.npy"], columns["t5_flip_tokens"] = npy_bytes(embedding), len(embedding)
        yield members, columns


def short_features(
    encoder: Any, batch: Sequence[tuple[str, str, str | None, str, str | None]], flips: bool
) -> Iterator[Features]:
    """Yield members and columns of the short captions of each (key, caption, flipped one, short one, flipped one)."""
    own = [(None, None) if short == caption else (short, other) for _, caption, _, short, other in batch]
    shorts = _encode_some(encoder, (short for short, _ in own))
    mirrored = _encode_some(encoder, (other for short, other in own if other != short))
    nothing = np.zeros((0, encoder.width), np.float16)
    for short, other in own:
        embedding = nothing if short is None else shorts[short]
        members, columns = {"t5_short.npy": npy_bytes(embedding)}, {"t5_short_tokens": len(embedding)}
        if flips:
            embedding = nothing if other in (None, short) else mirrored[other]
            members["t5_short_flip.npy"], columns["t5_short_flip_tokens"] = npy_bytes(embedding), len(embedding)
        yield members, columns


def _encode_some(encoder: Any, texts: Iterable[str | None]) -> dict[str, np.ndarray]:
    """Encode those that are not None as one batch; returns each with its features."""
    wanted = [text for text in texts if text is not None]
    encoded = encoder.encode(wanted) if wanted else []
    return {text: tokens.embedding for text, tokens in zip(wanted, encoded)}
