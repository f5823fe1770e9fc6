"""Named tensors in a .safetensors file: durable, equal bytes every time, and with errors that say what to do."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from nanodit.errors import DataError, ResourceError

Tensors = dict[str, Tensor]


def write_tensors(file: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> None:
    """Write ``tensors`` from any device; raises :class:`ResourceError` where the disk does not take them.

    At most one entry of ``metadata``: safetensors keeps them in a hash map, and several would come in another order
    every time.
    """
    try:
        save_file(on_host(tensors), file, metadata)
    except SafetensorError as error:
        if "I/O error" not in str(error):
            raise
        raise ResourceError(
            f"{file}: cannot be written: {error}. Make room, or choose another `output`; the checkpoints before it are "
            "intact"
        ) from None


def on_host(tensors: Tensors) -> Tensors:
    """Return tensors of any device as contiguous ones on the CPU; those that are so already share their memory."""
    return {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}


def read_tensors(file: Path) -> Tensors:
    """Read a file's tensors to the CPU; raises :class:`DataError`."""
    try:
        return load(file.read_bytes())  # not mapped: the file may be replaced while its tensors are in use
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file}: cannot be read as safetensors: {error}") from None


def sync_file(file: Path) -> None:
    """Make a file's content durable."""
    with open(file, "r+b") as opened:  # to be written: Windows syncs no other
        os.fsync(opened.fileno())
