"""Counter-based randomness: a draw depends on its name alone, so prefetching, resuming or batching cannot shift it."""

from __future__ import annotations

import hashlib

import numpy as np


def generator(*parts: int | str) -> np.random.Generator:
    """Return the Philox generator named by ``parts``, e.g. ``generator(seed, "timesteps", step)``.

    The key is the first 128 bits of SHA-256 over the parts, each written as its type and text, so that ``("a", 1)`` and
    ``("a1",)`` differ. Equal on every machine. Source: Salmon et al., "Parallel random numbers", SC 2011.
    """
    return np.random.Generator(np.random.Philox(key=np.frombuffer(key_of(*parts), dtype="<u8")))


def key_of(*parts: int | str) -> bytes:
    """Return the 128 bits that ``parts`` name; see :func:`generator`."""
    name = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return hashlib.sha256(name.encode()).digest()[:16]


def noise(key: str, seed_index: int, height: int, width: int) -> np.ndarray:
    """Return the standard normal noise of one sample, float32 (3, height, width).

    A function of the sample's key and the seed index alone: equal over arms, batch sizes, order and machines.
    """
    return generator("noise", key, seed_index).standard_normal((3, height, width), dtype=np.float32)
