"""The layers of NanoDiT: rotary positions, times, attention, feed-forward, blocks.

Shape letters as in :mod:`train.model.network`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.hardware import autocast, for_matmul
from train.model.attend import Seen, attend

ROPE_THETA = 100.0


def _linear(inputs: int, outputs: int, *, bias: bool = False, zero: bool = False) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.zeros_(layer.weight) if zero else nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def _near_zero(*shape: int) -> nn.Parameter:
    """Return a parameter that begins as N(0, 0.02²)."""
    values = torch.empty(shape)
    if not values.is_meta:  # where either would import torch's compiler, which takes more than a second
        values.normal_().mul_(0.02)
    return nn.Parameter(values)


def _rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])


def _modulate(x_bnd: Tensor, shift_bd: Tensor, scale_bd: Tensor) -> Tensor:
    """Normalise, scale and shift, in the dtype of the matrices that follow: each of them would cast by itself."""
    return for_matmul(torch.addcmul(shift_bd.unsqueeze(1), _rms_norm(x_bnd), 1 + scale_bd.unsqueeze(1)))


def grid_positions(rows: int, columns: int, base_grid: float, device: torch.device | str = "cpu") -> Tensor:
    """Return the (y, x) centres of a grid's cells, float32 (rows * columns, 2).

    Centred on zero and scaled so that a grid of the same aspect ratio covers the same range however many cells it has,
    and a square one of ``base_grid`` cells has unit spacing: any aspect ratio and resolution, nothing sized to one.
    """
    half = base_grid / 2
    y = (torch.arange(rows, device=device) + 0.5) / rows * 2 - 1
    x = (torch.arange(columns, device=device) + 0.5) / columns * 2 - 1
    grid = torch.cartesian_prod(y * math.sqrt(rows / columns), x * math.sqrt(columns / rows)) * half
    return grid.float()


def rope(positions: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin of 2-D axial rotary embeddings, (..., head_size / 2) each, for positions (..., 2).

    A quarter of the channels per axis, frequencies ``theta^(-i / quarter)``. Source: Su et al., arXiv 2104.09864.
    """
    quarter = head_size // 4
    frequencies = ROPE_THETA ** (-torch.arange(quarter, device=positions.device, dtype=torch.float32) / quarter)
    angles = (positions.float().unsqueeze(-1) * frequencies).flatten(-2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel pairs (i, i + k/2) of x (..., h, k) by the angles of :func:`rope`; cos and sin broadcast."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class TimestepEmbedding(nn.Module):
    """Sinusoids of 1000 t (256 channels, float32) through an MLP."""

    CHANNELS = 256

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            _linear(self.CHANNELS, hidden_size, bias=True), nn.SiLU(), _linear(hidden_size, hidden_size, bias=True)
        )

    def forward(self, t_b: Tensor) -> Tensor:
        half = self.CHANNELS // 2
        frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t_b.device, dtype=torch.float32) / half)
        angles = 1000 * t_b.float().unsqueeze(1) * frequencies
        with autocast(t_b.device, None):  # neighbouring times differ by less than bf16 resolves
            return self.mlp(torch.cat((angles.cos(), angles.sin()), dim=1))


def _layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


class Attention(nn.Module):
    """Image queries attend to [image, context]; the context is read, never written, and has its own keys and values."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.out = (_linear(hidden_size, hidden_size) for _ in range(4))
        self.context_k, self.context_v = (_linear(hidden_size, hidden_size) for _ in range(2))
        head_size = hidden_size // num_heads
        self.q_norm, self.k_norm, self.context_k_norm = (nn.Parameter(torch.ones(head_size)) for _ in range(3))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))

    def context_kv(self, tokens_md: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the context, (M, h, k) each; they depend on neither t nor z."""
        tokens_md = for_matmul(tokens_md)
        k = _qk_norm(self._heads(self.context_k(tokens_md)), self.context_k_norm)
        return rotate(k, cos, sin), self._heads(self.context_v(tokens_md))

    def forward(self, x_bnd: Tensor, cos: Tensor, sin: Tensor, kv: tuple[Tensor, Tensor], seen: Seen) -> Tensor:
        """Read the image tokens (b, n, d) and the context's kv, of which each image sees its own."""
        q = rotate(_qk_norm(self._heads(self.q(x_bnd)), self.q_norm), cos, sin)
        k = rotate(_qk_norm(self._heads(self.k(x_bnd)), self.k_norm), cos, sin)
        v = self._heads(self.v(x_bnd))
        return self.out(attend(q, k, v, (kv[0].to(k.dtype), kv[1].to(v.dtype)), seen).flatten(2))


def _qk_norm(x: Tensor, weight: Tensor) -> Tensor:
    return for_matmul(F.rms_norm(x, x.shape[-1:], weight.to(x.dtype)))


class SwiGLU(nn.Module):
    """Gated feed-forward of hidden size 8/3 d, rounded to 64. Source: Shazeer, arXiv 2002.05202."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        inner = max(64, round(hidden_size * 8 / 3 / 64) * 64)
        self.gate, self.up = _linear(hidden_size, inner), _linear(hidden_size, inner)
        self.down = _linear(inner, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention and SwiGLU, each modulated by shift, scale and gate; the identity at initialisation (adaLN-zero).

    ``offset`` is the block's own part of the modulation; the rest comes from one MLP shared by all blocks.
    Source: Peebles & Xie, arXiv 2212.09748; sharing: Chen et al., arXiv 2310.00426.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.attention = Attention(hidden_size, num_heads)
        self.mlp = SwiGLU(hidden_size)
        self.offset = nn.Parameter(torch.zeros(6 * hidden_size))

    def forward(
        self,
        x_bnd: Tensor,
        modulation: Tensor,
        rope: tuple[Tensor, Tensor],
        context: tuple[Tensor, Tensor, Tensor],
        seen: Seen,
        kv: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        kv = self.attention.context_kv(*context) if kv is None else kv
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (modulation + self.offset).chunk(6, dim=1)
        attended = self.attention(_modulate(x_bnd, shift_a, scale_a), *rope, kv, seen)
        x_bnd = x_bnd + gate_a.unsqueeze(1) * attended
        return x_bnd + gate_m.unsqueeze(1) * self.mlp(_modulate(x_bnd, shift_m, scale_m))
