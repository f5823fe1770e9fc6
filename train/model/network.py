"""NanoDiT: a diffusion transformer on pixel patches, conditioned on text, DINO features and pose.

Shape letters: b images, n image tokens, m context tokens of an image with padding, M those of the batch that count, d
hidden size, h heads, k head size, p patch size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from train.hardware import matmul_dtype
from train.model.attend import Seen, seen
from train.model.conditions import Conditions
from train.model.config import ModelConfig
from train.model.context import Context, ContextEncoder
from train.model.layers import Block, TimestepEmbedding, _linear, _modulate, grid_positions, rope
from train.model.modalities import Features
from train.model.tread import TreadConfig, put_back, take

TRAINING_ONLY = "repa_head."  # parameters of this prefix are neither averaged nor loaded for sampling


def _tag(module: nn.Module, group: str) -> None:
    """Name the optimiser group of a module's own parameters; :mod:`train.method.optim` refuses untagged ones."""
    for parameter in module.parameters():
        parameter.optimizer_group = group


class NanoDiT(nn.Module):
    """z (b, 3, H, W), t (b,) and conditions to x (or v), float32 (b, 3, H, W); H, W are multiples of the patch size.

    With ``keep_ids`` (b, k) the blocks of ``route`` see these image tokens only (:mod:`train.model.tread`).
    """

    def __init__(self, config: ModelConfig, features: Features, route: range = range(0)) -> None:
        super().__init__()
        d, p = config.hidden_size, config.patch_size
        self.config, self.features, self.route = config, features, route
        self.base_grid = features.base / p
        self.checkpoint_every = 0  # in training, blocks 0, k, 2 k, ... are recomputed in the backward pass
        self.compiled = False
        self.repa_head: nn.Module | None = None  # the trainer's
        self._rope_cache: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor]] = {}

        self.patch_bottleneck = _linear(p * p * config.in_channels, config.bottleneck)
        self.patch_embedding = _linear(config.bottleneck, d, bias=True)
        self.timestep = TimestepEmbedding(d)
        self.context = ContextEncoder(config, features)
        self.modulation = _linear(d, 6 * d, bias=True, zero=True)
        self.blocks = nn.ModuleList(Block(d, config.num_heads) for _ in range(config.depth))
        self.final_modulation = _linear(d, 2 * d, bias=True, zero=True)
        self.final = _linear(d, p * p * config.in_channels, bias=True, zero=True)
        self.output_conv = None
        if config.output_conv:
            self.output_conv = nn.Conv2d(config.in_channels, config.in_channels, 3, padding=1)
            nn.init.zeros_(self.output_conv.weight)
            nn.init.zeros_(self.output_conv.bias)

        _tag(self, "adamw")
        for block in self.blocks:  # the matrices of the blocks, and nothing else, are orthogonalised
            for layer in block.modules():
                if isinstance(layer, nn.Linear):
                    layer.weight.optimizer_group = "muon"

    def compile_blocks(self, *, dynamic: bool = True) -> None:
        """Compile each block's forward in place, for all shapes from the first; parameter names stay as they are.

        Never torch's default, which decides about dynamic shapes from the shapes seen before, so that a resumed run
        would compute with other kernels than an uninterrupted one. ``dynamic=False`` is for measurements: a graph for
        every shape.
        """
        # after 8 graphs torch would run new shapes uncompiled: what computes a shape would depend on its turn
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit
        self.compiled = True
        for block in self.blocks:
            block.compile(dynamic=dynamic)

    def encode_context(self, conditions: Conditions, height: int, width: int, *, cache: bool = False) -> Context:
        """Encode conditions for images of this size; with ``cache`` (sampling) also every block's keys and values."""
        rows, columns = height // self.config.patch_size, width // self.config.patch_size
        tokens, positions, spans, cls = self.context(conditions, rows, columns, self.base_grid)
        cos, sin = rope(positions.unsqueeze(1), self.config.hidden_size // self.config.num_heads)
        kv = tuple(block.attention.context_kv(tokens, cos, sin) for block in self.blocks) if cache else None
        return Context(tokens, spans, cos, sin, cls, kv)

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        conditions: Conditions | Context,
        keep_ids: Tensor | None = None,
        *,
        project: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """With ``project`` return also what the REPA head makes of the tokens at its place, (b, n or k, c)."""
        height, width = z.shape[2:]
        p = self.config.patch_size
        rows, columns = height // p, width // p
        context = conditions
        if isinstance(context, Conditions):
            context = self.encode_context(context, height, width)
        image_rope = self._image_rope(rows, columns, z.device)
        everything = image_rope, self._seen(context, rows * columns)
        routed = range(0)
        if keep_ids is not None:
            if not self.route:
                raise ValueError("keep_ids: this model was built without routed blocks")
            routed = self.route
            kept = tuple(wave[keep_ids] for wave in image_rope), self._seen(context, keep_ids.shape[1])

        x = F.pixel_unshuffle(z.float(), p).flatten(2).transpose(1, 2)  # (b, n, 3 p p)
        # the residual stream stays in float32; autocast would start it in bfloat16 and the first gate would end that
        x = self.patch_embedding(self.patch_bottleneck(x)).float()
        condition = F.silu(self.timestep(t) + context.cls)
        modulation = self.modulation(condition)
        encoded = (context.tokens, context.cos, context.sin)
        for i, block in enumerate(self.blocks):
            if routed and i == routed[0]:
                passing, x = x, take(x, keep_ids)
            token_rope, visible = kept if i in routed else everything
            arguments = (x, modulation, token_rope, encoded, visible, context.kv[i] if context.kv else None)
            if self.training and self.checkpoint_every and i % self.checkpoint_every == 0:
                x = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x = block(*arguments)
            if project and i + 1 == self.repa_head.blocks:
                projected = self.repa_head(x)
            if routed and i == routed[-1]:
                x = put_back(passing, x, keep_ids)
        shift, scale = self.final_modulation(condition).chunk(2, dim=1)
        x = self.final(_modulate(x, shift, scale)).float()
        x = F.pixel_shuffle(x.transpose(1, 2).unflatten(2, (rows, columns)), p)
        if self.output_conv is not None:
            x = x + self.output_conv(x).float()
        return (x, projected) if project else x

    def _seen(self, context: Context, tokens: int) -> Seen:
        dtype = matmul_dtype(context.tokens.device, self.patch_embedding.weight.dtype)
        heads = self.config.num_heads
        return seen(context.spans, tokens, heads, self.config.hidden_size // heads, dtype, self.compiled)

    def _image_rope(self, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
        key = (rows, columns, device)
        if key not in self._rope_cache:
            positions = grid_positions(rows, columns, self.base_grid, device)
            self._rope_cache[key] = rope(positions.unsqueeze(1), self.config.hidden_size // self.config.num_heads)
        return self._rope_cache[key]


def build_model(config: ModelConfig, features: Features, tread: TreadConfig | None = None) -> NanoDiT:
    """Build the network: the one path for training, sampling and evaluation, which therefore route the same blocks."""
    return NanoDiT(config, features, range(0) if tread is None else tread.route(config.depth))
