"""The noise of training: drawn by the host, or by the device that computes, of a counter and an image's key alone.

A device draws by Philox 4x32-10: the counter is (k, 0, 0, 0) for the elements 4 k to 4 k + 3 of an image, and integers
become normals in pairs, as ``tl.randn4x`` of Triton makes them. Written in integers of torch, it gives the same ones on
every device; ``torch.randn``'s numbers depend on the card. Source: Salmon et al., "Parallel random numbers", SC 2011.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from nanodit.errors import ConfigError
from nanodit.rng import key_of

Kind = Literal["host", "device"]
VERSIONS: dict[Kind, int] = {"host": 1, "device": 1}  # raise one where the same names give other noise
MULTIPLIERS, INCREMENTS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
WORD = 0xFFFFFFFF
TO_UNIT = 4.6566127342e-10  # of 31 bits, as in Triton; a little less than 2 ** -31
SMALLEST = 1e-7  # whose logarithm is taken


def noise_record(asked: str, device: torch.device, state: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return what a state says of a run's noise: its kind and version.

    ``asked`` is the config's ``data.noise``; with the ``state`` of a checkpoint "auto" means what that has, and one
    from before there was a choice has the host's. Raises :class:`ConfigError` where the noise would be another.
    """
    if state is None:
        kind = asked if asked != "auto" else "host" if device.type == "cpu" else "device"
        return {"kind": kind, "version": VERSIONS[kind]}
    saved = state.get("noise", {"kind": "host", "version": 1})
    kind = saved["kind"] if asked == "auto" else asked
    here = {"kind": kind, "version": VERSIONS.get(kind)}
    if here != saved:
        raise ConfigError(
            f"data.noise: the run was begun with noise of kind {saved['kind']}, version {saved['version']}, and would "
            f"go on with {here['kind']}, version {here['version']}. Set data.noise=auto, with the code that began it"
        )
    return here


def noise_key(seed: int, step: int, image: int) -> tuple[int, int]:
    """Return the two 32-bit words that name an image's noise."""
    key = key_of(seed, "noise", step, image)
    return int.from_bytes(key[:4], "little"), int.from_bytes(key[4:8], "little")


def philox(key: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four 32-bit words, int64 (count,) each, of the counters 0 to ``count`` for a ``key`` (2,)."""
    c0 = torch.arange(count, device=key.device)
    c1 = c2 = c3 = torch.zeros_like(c0)
    k0, k1 = key
    for _ in range(ROUNDS):
        # the product of 64 bits may wrap around to below 0; its bits are right
        first, second = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c2 = (second >> 32 & WORD) ^ c1 ^ k0, (first >> 32 & WORD) ^ c3 ^ k1
        c1, c3 = second & WORD, first & WORD
        k0, k1 = k0 + INCREMENTS[0] & WORD, k1 + INCREMENTS[1] & WORD
    return c0, c1, c2, c3


def normal(keys: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the noise of each image: float32 (B, ``shape``) on the device of ``keys``, int64 (B, 2)."""
    size = math.prod(shape)
    out = torch.empty(len(keys), -(-size // 4), 4, device=keys.device)
    for key, image in zip(keys, out):  # one by one: what lies between takes eight times the memory of the noise
        words = philox(key, len(image))
        u = [(torch.where(word > WORD >> 1, WORD - word, word).float() * TO_UNIT) for word in words]
        for i in (0, 2):  # Box and Muller
            radius = (-2 * u[i].clamp_min(SMALLEST).log()).sqrt_()
            angle = 2 * math.pi * u[i + 1]
            torch.mul(radius, angle.cos(), out=image[:, i])
            torch.mul(radius, angle.sin(), out=image[:, i + 1])
    return out.flatten(1)[:, :size].view(-1, *shape)
