"""Noticing what makes the host wait for a GPU, without one: on the meta device, where tensors have no values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class WaitError(RuntimeError):
    """Something was called for which the host would wait."""


def _refuse(waits: bool, function: Any) -> None:
    if waits:
        raise WaitError(f"{function} makes the host wait for the device")


class _NoCopies(TorchFunctionMode):
    """Refuse tensors made of numbers on another device than the CPU, which some torch versions do not dispatch."""

    MAKERS = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)

    def __torch_function__(self, function: Any, types: Any, arguments: tuple = (), keywords: dict | None = None) -> Any:
        made = function(*arguments, **(keywords or {}))
        _refuse(function in self.MAKERS and made.device.type != "cpu", function)
        return made


class NoSync(TorchDispatchMode):
    """Refuse what makes the host wait for a GPU, and meta tensors do not refuse by themselves: :class:`WaitError`."""

    def __enter__(self) -> NoSync:
        self._copies = _NoCopies()
        self._copies.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._copies.__exit__(*exception)

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), keywords: dict | None = None) -> Any:
        name, keywords = function.overloadpacket, keywords or {}
        # our own operators (train/model/attend.py) read lengths that lie on the host;
        # a tensor made from numbers, or one of another device, is copied to the GPU while the host waits
        values = [value for one in arguments for value in (one if isinstance(one, (list, tuple)) else [one])]
        tensors = [value for value in values if isinstance(value, Tensor)]
        _refuse(name is torch.ops.aten.lift_fresh and arguments[0].device.type != "cpu", function)
        if name is torch.ops.aten._to_copy:
            _refuse(keywords.get("device", arguments[0].device) != arguments[0].device, function)
        elif function.namespace != "nanodit" and len({tensor.device for tensor in tensors}) > 1:
            _refuse(not all(tensor.device.type == "meta" or tensor.ndim == 0 for tensor in tensors), function)
        return function(*arguments, **keywords)
