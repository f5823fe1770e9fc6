"""The shape of the network."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from nanodit.config import Config
from nanodit.keypoints import JOINTS


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
