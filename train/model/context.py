"""Conditions as context tokens: each modality normalised and projected, with its role and position.

Shape letters as in :mod:`train.model.network`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn

from train.model.conditions import Conditions
from train.model.config import ModelConfig
from train.model.layers import _layer_norm
from train.model.modalities import MODALITIES, Features, Grid

# The first modalities share a table of null tokens and one of roles, whichever of them the data has. Later ones have
# parameters of their own, so that a network without them draws and names its weights as if they did not exist.
SHARED_ROWS = 4


@dataclass(frozen=True)
class Context:
    """Encoded conditions: tokens (b, m, d), mask (b, m) of tokens that count, RoPE cos, sin (b, 1, m, k/2), CLS (b, d).

    ``kv`` holds each block's keys and values where they were asked for: they depend on neither t nor z.
    """

    tokens: Tensor
    mask: Tensor
    cos: Tensor
    sin: Tensor
    cls: Tensor
    kv: tuple[tuple[Tensor, Tensor], ...] | None = None


class ContextEncoder(nn.Module):
    """Turns :class:`Conditions` into context tokens: each modality normalised, projected, with its role and position.

    A dropped modality is one learned null token, however many tokens it would have had. Modalities an image drops while
    others of its micro-batch keep them are masked. The layers of a modality are those of its record
    (:mod:`train.model.modalities`), as attributes.
    """

    def __init__(self, config: ModelConfig, features: Features) -> None:
        super().__init__()
        d = config.hidden_size
        self.config, self.modalities = config, features.modalities
        self.null = nn.Parameter(torch.randn(SHARED_ROWS, d) * 0.02)
        self.role = nn.Parameter(torch.randn(SHARED_ROWS, d) * 0.02)
        self._row = {name: row for row, name in enumerate(MODALITIES) if row < SHARED_ROWS}
        for name in self.modalities:
            for part, value in MODALITIES[name].parts(config, features.widths[name]).items():
                setattr(self, part, value)
            if name not in self._row:
                setattr(self, f"null_{name}", nn.Parameter(torch.randn(d) * 0.02))
                setattr(self, f"role_{name}", nn.Parameter(torch.randn(d) * 0.02))

    def forward(self, conditions: Conditions, rows: int, columns: int, base_grid: float) -> tuple[Tensor, ...]:
        """Return tokens (b, m, d), mask (b, m), positions (b, m, 2) in grid units and the CLS part of adaLN (b, d)."""
        b, d, device = len(conditions), self.config.hidden_size, self.null.device
        grid, centre = Grid(rows, columns, base_grid), torch.zeros(1, 1, 2, device=device)
        tokens, masks, positions = [], [], []

        def add(x_bmd: Tensor, mask: Tensor, position: Tensor | None = None) -> None:
            m = x_bmd.shape[1]
            tokens.append(x_bmd)
            masks.append(mask.expand(b, m))
            positions.append((centre if position is None else position).expand(b, m, 2))

        for name in self.modalities:
            kept, features = conditions.keeps(name).unsqueeze(1), conditions.tensors.get(name)
            null, role = self._null_and_role(name)
            null = null.expand(b, 1, -1)
            if features is None:
                add(null + role, ~kept)
                continue
            modality = MODALITIES[name]
            made = modality.tokens(self, features, conditions.tensors.get(modality.mask), grid)
            counts = kept if made.mask is None else kept & made.mask
            if made.nothing is None:
                add(null + role, ~kept)
            else:
                empty = kept & ~made.mask
                add(torch.where(empty.unsqueeze(2), made.nothing, null) + role, ~counts)
            add(made.x + role, counts, made.positions)

        cls = torch.zeros(b, d, device=device)
        if "cls" in self.modalities:
            cls = self.null_cls_to_adaln.expand(b, -1)
            if conditions.cls is not None:
                kept = conditions.keeps("cls").unsqueeze(1)
                cls = torch.where(kept, self.cls_to_adaln(_layer_norm(conditions.cls)).float(), cls)
        dtype = reduce(torch.promote_types, (x.dtype for x in tokens))
        return torch.cat([x.to(dtype) for x in tokens], 1), torch.cat(masks, 1), torch.cat(positions, 1), cls

    def _null_and_role(self, name: str) -> tuple[Tensor, Tensor]:
        if (row := self._row.get(name)) is not None:
            return self.null[row], self.role[row]
        return getattr(self, f"null_{name}"), getattr(self, f"role_{name}")
