"""NanoDiT: a diffusion transformer on pixel patches, conditioned on text, DINO features and pose.

Shape letters: b images, n image tokens, m context tokens, d hidden size, h heads, k head size, p patch size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanodit.config import Config
from train.hardware import autocast
from train.method.repa import RepaHead
from train.model.conditions import MODALITIES, Conditions
from train.model.tread import TreadConfig, put_back, take

JOINTS = 133
NULL_JOINT_CONFIDENCE = 0.05  # below it a joint counts as not found
MAX_TEXT_TOKENS = 512
POSE_FREQUENCIES = 6
ROPE_THETA = 100.0
TRAINING_ONLY = "repa_head."  # parameters of this prefix are neither averaged nor loaded for sampling


class ModelConfig(Config):
    """The shape of the network."""

    hidden_size: int = Field(default=384, gt=0)
    depth: int = Field(default=12, gt=0)
    num_heads: int = Field(default=6, gt=0)
    patch_size: int = Field(default=16, gt=0)
    in_channels: Literal[3] = 3
    bottleneck: int = Field(default=128, gt=0)
    context_patches: int | None = Field(default=256, gt=0)  # DINO patch tokens at most; null: all of them
    context_joints: int = Field(
        default=JOINTS, gt=0, le=JOINTS
    )  # the first so many: 17 body, 23 with feet, 91 with face
    output_conv: bool = False

    @model_validator(mode="after")
    def _check_heads(self) -> ModelConfig:
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 4:
            raise ValueError(f"hidden_size {self.hidden_size} must be num_heads {self.num_heads} x a multiple of 4")
        return self


@dataclass(frozen=True)
class Features:
    """What the data fixes: feature widths (None where a modality is absent) and the base bucket's side in pixels."""

    base: int
    text_width: int | None
    dino_width: int | None
    pose: bool

    @classmethod
    def from_dataset(cls, info: dict[str, Any]) -> Features:
        """Read them from the content of a dataset.json."""
        layers = info["layers"]
        width = lambda layer: layers[layer]["width"] if layer in layers else None  # noqa: E731
        return cls(base=info["base"], text_width=width("t5"), dino_width=width("dino"), pose="pose" in layers)

    @property
    def modalities(self) -> tuple[str, ...]:
        """The subset of MODALITIES that exists."""
        present = (self.text_width, self.dino_width, self.dino_width, self.pose or None)
        return tuple(name for name, exists in zip(MODALITIES, present) if exists is not None)


def _tag(module: nn.Module, group: str) -> None:
    """Name the optimiser group of a module's own parameters; :mod:`train.method.optim` refuses untagged ones."""
    for parameter in module.parameters():
        parameter.optimizer_group = group


def _linear(inputs: int, outputs: int, *, bias: bool = False, zero: bool = False) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.zeros_(layer.weight) if zero else nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def _rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])


def _modulate(x_bnd: Tensor, shift_bd: Tensor, scale_bd: Tensor) -> Tensor:
    return torch.addcmul(shift_bd.unsqueeze(1), _rms_norm(x_bnd), 1 + scale_bd.unsqueeze(1))


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


def rotate(x_bhnk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel pairs (i, i + k/2) by the angles of :func:`rope`; cos and sin broadcast over (b, h, n, k/2)."""
    a, b = x_bhnk.chunk(2, dim=-1)
    cos, sin = cos.to(x_bhnk.dtype), sin.to(x_bhnk.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


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


def _key_mask(context_mask: Tensor, tokens: int) -> Tensor:
    """Return (b, 1, 1, n + m), True where a key counts: every image token, and the context tokens of the mask."""
    return F.pad(context_mask, (tokens, 0), value=True)[:, None, None]


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


class ContextEncoder(nn.Module):
    """Turns :class:`Conditions` into context tokens: each modality normalised, projected, with its role and position.

    A dropped modality is one learned null token, however many tokens it would have had. Modalities an image drops while
    others of its micro-batch keep them are masked.
    """

    def __init__(self, config: ModelConfig, features: Features) -> None:
        super().__init__()
        d = config.hidden_size
        self.context_patches, self.context_joints = config.context_patches, config.context_joints
        self.modalities = features.modalities
        self.null = nn.Parameter(torch.randn(len(MODALITIES), d) * 0.02)
        self.role = nn.Parameter(torch.randn(len(MODALITIES), d) * 0.02)
        if "text" in self.modalities:
            self.text = _linear(features.text_width, d, bias=True)
            self.text_order = nn.Parameter(torch.randn(MAX_TEXT_TOKENS, d) * 0.02)
        if "cls" in self.modalities:
            self.cls = _linear(features.dino_width, d, bias=True)
            self.cls_to_adaln = _linear(features.dino_width, d, bias=True)
            self.null_cls_to_adaln = nn.Parameter(torch.randn(d) * 0.02)
            self.patches = _linear(features.dino_width, d, bias=True)
        if "pose" in self.modalities:
            self.pose = nn.Sequential(_linear(3, d, bias=True), nn.GELU(), _linear(d, d, bias=True))
            self.pose_position = _linear(4 * POSE_FREQUENCIES, d)
            self.joint = nn.Parameter(torch.randn(config.context_joints, d) * 0.02)
            self.null_joint = nn.Parameter(torch.randn(d) * 0.02)
            self.no_person = nn.Parameter(torch.randn(d) * 0.02)

    def forward(self, conditions: Conditions, rows: int, columns: int, base_grid: float) -> tuple[Tensor, ...]:
        """Return tokens (b, m, d), mask (b, m), positions (b, m, 2) in grid units and the CLS part of adaLN (b, d)."""
        b, device = len(conditions), self.null.device
        keep = conditions.keep
        tokens, masks, positions = [], [], []

        def add(x_bmd: Tensor, mask_bm: Tensor, position: Tensor | None = None) -> None:
            tokens.append(x_bmd)
            masks.append(mask_bm)
            centre = torch.zeros(1, 1, 2, device=device) if position is None else position
            positions.append(centre.expand(b, x_bmd.shape[1], 2))

        for i, name in enumerate(MODALITIES):
            if name not in self.modalities:
                continue
            kept = keep[:, i : i + 1]
            null = self.null[i].expand(b, 1, -1)
            if name == "pose" and conditions.pose is not None:
                person = (conditions.pose[..., 2] > 0).any(1, keepdim=True)
                # "no person" is a statement about the image, a dropped pose is not
                add(torch.where((kept & ~person).unsqueeze(2), self.no_person, null) + self.role[i], ~(kept & person))
                x, position = self._pose(conditions.pose[:, : self.context_joints], rows, columns, base_grid)
                add(x + self.role[i], (kept & person).expand(b, self.context_joints), position)
                continue
            add(null + self.role[i], ~kept)
            if name == "text" and conditions.text is not None:
                x = self.text(_layer_norm(conditions.text)) + self.text_order[: conditions.text.shape[1]]
                add(x + self.role[i], kept & conditions.text_mask)
            elif name == "cls" and conditions.cls is not None:
                add(self.cls(_layer_norm(conditions.cls)).unsqueeze(1) + self.role[i], kept)
            elif name == "patches" and conditions.patches is not None:
                grid = _pool(conditions.patches, self.context_patches)
                x = self.patches(_layer_norm(grid.flatten(1, 2))) + self.role[i]
                cells = _cells(grid.shape[1:3], rows, columns, base_grid, device)
                add(x, kept.expand(b, x.shape[1]), cells.unsqueeze(0))

        cls = torch.zeros(b, self.null.shape[1], device=device)
        if "cls" in self.modalities:
            cls = self.null_cls_to_adaln.expand(b, -1)
            if conditions.cls is not None:
                cls = torch.where(keep[:, 1:2], self.cls_to_adaln(_layer_norm(conditions.cls)).float(), cls)
        dtype = torch.promote_types(tokens[0].dtype, tokens[-1].dtype)
        return torch.cat([x.to(dtype) for x in tokens], 1), torch.cat(masks, 1), torch.cat(positions, 1), cls

    def _pose(self, pose: Tensor, rows: int, columns: int, base_grid: float) -> tuple[Tensor, Tensor]:
        xy, confidence = pose[..., :2], pose[..., 2:].clamp(0, 1)
        found = confidence >= NULL_JOINT_CONFIDENCE
        xy = torch.where(found, xy, 0)
        x = torch.where(found, self.pose(torch.cat((xy, confidence), -1)).float(), self.null_joint)
        octaves = math.pi * 2.0 ** torch.arange(-1, POSE_FREQUENCIES - 1, device=pose.device)
        angles = (xy.unsqueeze(-1) * octaves).flatten(-2)
        waves = torch.where(found, torch.cat((angles.cos(), angles.sin()), -1), 0)
        # on the same normalised grid as the image tokens, as (y, x)
        ratio = math.sqrt(rows / columns)
        # filled and not copied from a list, for which the GPU would have to wait
        span = torch.stack((xy.new_full((), ratio), xy.new_full((), math.sqrt(columns / rows)))) * base_grid / 2
        return x + self.pose_position(waves) + self.joint, xy.flip(-1) * span


def _layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def _pool(patches_bhwc: Tensor, limit: int | None) -> Tensor:
    """Average a patch grid down to at most ``limit`` cells of about its aspect ratio; (b, h, w, c) in and out."""
    size = pooled_grid(*patches_bhwc.shape[1:3], limit)
    if patches_bhwc.shape[1:3] == size:
        return patches_bhwc
    return F.adaptive_avg_pool2d(patches_bhwc.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)


def pooled_grid(h: int, w: int, limit: int | None) -> tuple[int, int]:
    """Return the rows and columns that a patch grid becomes as context."""
    if limit is None or h * w <= limit:
        return h, w
    factor = math.sqrt(limit / (h * w))
    return max(1, int(h * factor)), max(1, int(w * factor))


def _cells(grid: tuple[int, int], rows: int, columns: int, base_grid: float, device: torch.device) -> Tensor:
    """Positions of another grid over the same image: its cells' centres on the image tokens' axes."""
    y = ((torch.arange(grid[0], device=device) + 0.5) / grid[0] * 2 - 1) * math.sqrt(rows / columns)
    x = ((torch.arange(grid[1], device=device) + 0.5) / grid[1] * 2 - 1) * math.sqrt(columns / rows)
    return torch.cartesian_prod(y, x) * (base_grid / 2)


class Attention(nn.Module):
    """Image queries attend to [image, context]; the context is read, never written, and has its own keys and values."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.out = (_linear(hidden_size, hidden_size) for _ in range(4))
        self.context_k, self.context_v = (_linear(hidden_size, hidden_size) for _ in range(2))
        head_size = hidden_size // num_heads
        self.q_norm, self.k_norm, self.context_k_norm = (nn.Parameter(torch.ones(head_size)) for _ in range(3))

    def _heads(self, x_bnd: Tensor) -> Tensor:
        return x_bnd.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def context_kv(self, tokens_bmd: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the context, (b, h, m, k) each; they depend on neither t nor z."""
        k = _qk_norm(self._heads(self.context_k(tokens_bmd)), self.context_k_norm)
        return rotate(k, cos, sin), self._heads(self.context_v(tokens_bmd))

    def forward(self, x_bnd: Tensor, cos: Tensor, sin: Tensor, kv: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """Read the image tokens (b, n, d) and the context's kv; mask (b, 1, 1, n + m) is True where a key counts."""
        q = rotate(_qk_norm(self._heads(self.q(x_bnd)), self.q_norm), cos, sin)
        k = rotate(_qk_norm(self._heads(self.k(x_bnd)), self.k_norm), cos, sin)
        v = self._heads(self.v(x_bnd))
        k, v = torch.cat((k, kv[0].to(k.dtype)), dim=2), torch.cat((v, kv[1].to(v.dtype)), dim=2)
        return self.out(_attend(q, k, v, mask).transpose(1, 2).flatten(2))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # in bfloat16 on a CPU the fused kernel is the slower one, and torch.compile cannot fuse into it
    # (tests/benchmarks/attention.py)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return scores.masked_fill(~mask, float("-inf")).softmax(-1).to(v.dtype) @ v


def _qk_norm(x_bhnk: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x_bhnk, x_bhnk.shape[-1:], weight.to(x_bhnk.dtype))


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
        mask: Tensor,
        kv: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        kv = self.attention.context_kv(*context) if kv is None else kv
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (modulation + self.offset).chunk(6, dim=1)
        attended = self.attention(_modulate(x_bnd, shift_a, scale_a), *rope, kv, mask)
        x_bnd = x_bnd + gate_a.unsqueeze(1) * attended
        return x_bnd + gate_m.unsqueeze(1) * self.mlp(_modulate(x_bnd, shift_m, scale_m))


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
        self.repa_head: RepaHead | None = None  # the trainer's
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

    def compile_blocks(self, *, dynamic: bool) -> None:
        """Compile each block's forward in place; parameter names stay as they are.

        Never torch's default, which decides about dynamic shapes from the shapes seen before, so that a resumed run
        would compute with other kernels than an uninterrupted one. Static shapes need room for a graph each
        (:func:`train.loop.compiling.allow_graphs`).
        """
        if dynamic:
            # after 8 graphs torch would run new shapes uncompiled: what computes a shape would depend on its turn
            torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit
        for block in self.blocks:
            block.compile(dynamic=dynamic)

    def encode_context(self, conditions: Conditions, height: int, width: int, *, cache: bool = False) -> Context:
        """Encode conditions for images of this size; with ``cache`` (sampling) also every block's keys and values."""
        rows, columns = height // self.config.patch_size, width // self.config.patch_size
        tokens, mask, positions, cls = self.context(conditions, rows, columns, self.base_grid)
        cos, sin = rope(positions.unsqueeze(1), self.config.hidden_size // self.config.num_heads)
        kv = tuple(block.attention.context_kv(tokens, cos, sin) for block in self.blocks) if cache else None
        return Context(tokens, mask, cos, sin, cls, kv)

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
        everything = image_rope, _key_mask(context.mask, rows * columns)
        routed = range(0)
        if keep_ids is not None:
            if not self.route:
                raise ValueError("keep_ids: this model was built without routed blocks")
            routed = self.route
            kept = tuple(wave[keep_ids].unsqueeze(1) for wave in image_rope), _key_mask(context.mask, keep_ids.shape[1])

        x = F.pixel_unshuffle(z.float(), p).flatten(2).transpose(1, 2)  # (b, n, 3 p p)
        # the residual stream stays in float32; autocast would start it in bfloat16 and the first gate would end that
        x = self.patch_embedding(self.patch_bottleneck(x)).float()
        condition = F.silu(self.timestep(t) + context.cls)
        modulation = self.modulation(condition)
        encoded = (context.tokens, context.cos, context.sin)
        for i, block in enumerate(self.blocks):
            if routed and i == routed[0]:
                passing, x = x, take(x, keep_ids)
            token_rope, mask = kept if i in routed else everything
            arguments = (x, modulation, token_rope, encoded, mask, context.kv[i] if context.kv else None)
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

    def _image_rope(self, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
        key = (rows, columns, device)
        if key not in self._rope_cache:
            positions = grid_positions(rows, columns, self.base_grid, device)
            self._rope_cache[key] = rope(positions, self.config.hidden_size // self.config.num_heads)
        return self._rope_cache[key]


def build_model(config: ModelConfig, features: Features, tread: TreadConfig | None = None) -> NanoDiT:
    """Build the network: the one path for training, sampling and evaluation, which therefore route the same blocks."""
    return NanoDiT(config, features, range(0) if tread is None else tread.route(config.depth))
