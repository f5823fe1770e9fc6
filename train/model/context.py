"""Conditions as context tokens: each modality normalised and projected, with its role and position.

Shape letters as in :mod:`train.model.network`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn

from train.model.conditions import Conditions
from train.model.config import ModelConfig
from train.model.layers import _layer_norm, _near_zero
from train.model.modalities import MODALITIES, Features, Grid, Row
from train.model.spans import Spans

# The first modalities share a table of null tokens and one of roles, whichever of them the data has. Later ones have
# parameters of their own, so that a network without them draws and names its weights as if they did not exist.
SHARED_ROWS = 4


@dataclass(frozen=True)
class Context:
    """Encoded conditions: the tokens (M, d) that count, whose they are, RoPE cos, sin (M, 1, k/2), CLS (b, d).

    ``kv`` holds each block's keys and values where they were asked for: they depend on neither t nor z.
    """

    tokens: Tensor
    spans: Spans
    cos: Tensor
    sin: Tensor
    cls: Tensor
    kv: tuple[tuple[Tensor, Tensor], ...] | None = None


def token_counts(conditions: Conditions, config: ModelConfig, row: Row) -> dict[str, int]:
    """Return how many tokens the features of each modality become; ``row`` is of the bucket of the images."""
    given = {name: tensor for name, tensor in conditions.tensors.items() if name in MODALITIES}
    return {name: MODALITIES[name].count(config, row, tensor.shape[1]) for name, tensor in given.items()}


def find_spans(conditions: Conditions, modalities: Sequence[str], counts: Mapping[str, int]) -> Spans:
    """Find the context tokens that count, wherever the conditions lie; their features are looked at, not computed with.

    ``modalities`` are the network's, ``counts`` says how many tokens the features of each become. On the meta device,
    where nothing can be looked at, all that is there counts.
    """
    b, masks = len(conditions), []
    if conditions.keep.device.type == "meta":
        return Spans.equal(b, sum(counts.get(name, 1) for name in modalities), "meta")
    for name in modalities:
        kept = conditions.keeps(name).unsqueeze(1)
        if name not in counts:
            masks.append(torch.ones_like(kept))  # the null token
            continue
        modality = MODALITIES[name]
        real = modality.real(conditions.tensors)
        counted = kept if real is None else kept & real
        masks += [~kept if modality.present is None else ~counted, counted.expand(b, counts[name])]
    return Spans.of(torch.cat(masks, 1))


class ContextEncoder(nn.Module):
    """Turns :class:`Conditions` into context tokens: each modality normalised, projected, with its role and position.

    A dropped modality is one learned null token, however many tokens it would have had. Modalities an image drops while
    others of its micro-batch keep them are left out. The layers of a modality are those of its record
    (:mod:`train.model.modalities`), as attributes.
    """

    def __init__(self, config: ModelConfig, features: Features) -> None:
        super().__init__()
        d = config.hidden_size
        self.config, self.modalities = config, features.modalities
        self.null = _near_zero(SHARED_ROWS, d)
        self.role = _near_zero(SHARED_ROWS, d)
        self._row = {name: row for row, name in enumerate(MODALITIES) if row < SHARED_ROWS}
        for name in self.modalities:
            for part, value in MODALITIES[name].parts(config, features.widths[name]).items():
                setattr(self, part, value)
            if name not in self._row:
                setattr(self, f"null_{name}", _near_zero(d))
                setattr(self, f"role_{name}", _near_zero(d))

    def forward(self, conditions: Conditions, rows: int, columns: int, base_grid: float) -> tuple[Tensor, ...]:
        """Return tokens (M, d), their positions (M, 2) in grid units, whose they are, and the CLS part of adaLN (b, d).

        Where the conditions do not say which tokens count, that is found here; then a GPU is waited for.
        """
        b, d, device = len(conditions), self.config.hidden_size, self.null.device
        grid, centre = Grid(rows, columns, base_grid), torch.zeros(1, 1, 2, device=device)
        tokens, positions, counts = [], [], {}

        def add(x_bmd: Tensor, position: Tensor | None = None) -> None:
            tokens.append(x_bmd)
            positions.append((centre if position is None else position).expand(b, x_bmd.shape[1], 2))

        for name in self.modalities:
            kept, features = conditions.keeps(name).unsqueeze(1), conditions.tensors.get(name)
            null, role = self._null_and_role(name)
            null = null.expand(b, 1, -1)
            if features is None:
                add(null + role)
                continue
            made = MODALITIES[name].tokens(self, features, grid)
            if made.nothing is not None:
                null = torch.where(kept.unsqueeze(2), made.nothing, null)  # where it is kept, it is there for this
            add(null + role)
            add(made.x + role, made.positions)
            counts[name] = made.x.shape[1]

        cls = torch.zeros(b, d, device=device)
        if "cls" in self.modalities:
            cls = self.null_cls_to_adaln.expand(b, -1)
            if conditions.cls is not None:
                kept = conditions.keeps("cls").unsqueeze(1)
                cls = torch.where(kept, self.cls_to_adaln(_layer_norm(conditions.cls)).float(), cls)
        dtype = reduce(torch.promote_types, (x.dtype for x in tokens))
        padded = torch.cat([x.to(dtype) for x in tokens], 1)
        spans = conditions.spans or find_spans(conditions, self.modalities, counts)
        x, places = (one.flatten(0, 1)[spans.index] for one in (padded, torch.cat(positions, 1)))
        return x, places, spans, cls

    def _null_and_role(self, name: str) -> tuple[Tensor, Tensor]:
        if (row := self._row.get(name)) is not None:
            return self.null[row], self.role[row]
        return getattr(self, f"null_{name}"), getattr(self, f"role_{name}")
