"""torch.compile of the blocks: when, and a word where torch stops.

The graphs are for all shapes: one of images, image tokens and context tokens, beside those for one image alone and for
contexts of equal length. After 256 graphs of a function torch runs further shapes uncompiled.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from nanodit.console import say
from train.hardware import can_compile
from train.model.network import NanoDiT


def compile_if_asked(model: NanoDiT, asked: bool | str, device: torch.device) -> None:
    """Compile the model's blocks where ``train.compile`` says so; where it is auto, as far as this machine can."""
    if asked is True or (asked == "auto" and can_compile(device.type)):
        say_where_it_stops()
        model.compile_blocks()
    elif asked == "auto":
        say("compile: no C++ compiler with Python's headers (or no Triton) here, so the blocks run uncompiled")


def say_where_it_stops() -> None:
    """Have it said in one line, with what to do, when torch has compiled as many graphs as it keeps."""
    logger = logging.getLogger("torch._dynamo.convert_frame")
    if not any(isinstance(one, _LimitHit) for one in logger.filters):
        logger.addFilter(_LimitHit())


class _LimitHit(logging.Filter):
    """Says in one line what torch says in five of its limit."""

    def filter(self, record: logging.LogRecord) -> bool:
        if not str(record.msg).startswith("torch._dynamo hit config."):
            return True
        limit: Any = record.args[0] if record.args else "recompile_limit"
        say(
            f"warning: compile: torch's {limit} is reached, so new shapes now run uncompiled, and slower. "
            "If most do (sys/images_per_sec falls), set train.compile to false"
        )
        return False
