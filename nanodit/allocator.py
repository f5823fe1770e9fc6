"""How torch takes memory of a GPU, said in the environment before torch is imported."""

from __future__ import annotations

import os
import platform
import sys

# read in this order by torch 2.11 and later; the last is AMD's
VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
GROWING = "expandable_segments:True"


def let_segments_grow() -> None:
    """Let torch's blocks of memory grow instead of taking new ones: less then lies idle between tensors of many sizes.

    Where any of ``VARIABLES`` is set, it stays as it is. So it does on Windows, whose torch cannot do it, and in WSL2:
    there drivers before 615 fail at it with some workstation cards (github.com/pytorch/pytorch/issues/192330).
    """
    if any(name in os.environ for name in VARIABLES) or sys.platform != "linux" or "microsoft" in platform.release():
        return
    os.environ["PYTORCH_ALLOC_CONF"] = GROWING
