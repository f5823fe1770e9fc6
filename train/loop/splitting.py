"""A micro-batch that does not fit into a GPU's memory: computed in parts, of the same images, to the same gradients.

Images share nothing in a micro-step: each has its own noise, time, conditions and kept tokens, and every loss is a sum
of values of single images. So the gradients of the parts add up to those of the whole, and only rounding tells them
apart (docs/measurements.md): a step in parts is equal, but not to the bit. Which parts there were is a fact of the
memory at that moment and not of the config, so no checkpoint knows of it: for the rest of the process micro-batches
that large are computed in parts at once, and a run that goes on from a checkpoint tries them whole again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from nanodit.errors import first_line, gpu_is_full
from train.config import TrainConfig
from train.loop.microbatch import Group
from train.method.loss import Loss

T = TypeVar("T")
# a group of images, and the parameters whose gradients it is to be added to; None: all
Compute = Callable[[Group, "Sequence[nn.Parameter] | None"], T]


class OneImageTooLarge(RuntimeError):
    """A single image does not fit into the free memory of the GPU; made from the GPU's own error."""


class Splitter:
    """Runs the groups of micro-batches, and parts of those that do not fit, and remembers how much did not.

    ``limit`` is how many pixels go at once, with which a group's memory grows; None until some did not fit. Until it is
    ``active``, which a run makes it after its start, a lack of memory is an error: what asks whether a micro-batch fits
    wants to know.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], losses: Collection[Loss], device: torch.device) -> None:
        self._parameters, self._losses, self._device = list(parameters), losses, device
        self.active = False
        self.limit: int | None = None
        self._note = ""

    def run(
        self,
        compute: Compute[T],
        group: Group,
        size: tuple[int, int],
        parameters: Sequence[nn.Parameter] | None = None,
    ) -> Iterator[T]:
        """Yield ``compute`` of a group, or of its parts in order, whose images have ``size`` (width, height) in pixels.

        Raises :class:`OneImageTooLarge` where a single image does not fit.
        """
        images, pixels, start = len(group.conditions), size[0] * size[1], 0
        while start < images:
            most = images if self.limit is None else max(1, self.limit // pixels)
            part = part_of(group, start, min(images, start + most), self._losses)
            count = len(part.conditions)
            before = [(parameter, parameter.grad, _changes(parameter)) for parameter in self._parameters]
            result, reason = self._attempt(partial(compute, part, parameters), count)
            if reason is None:
                yield result
            else:  # outside the handler: the error's traceback holds the tensors of the attempt
                self._halve(count, size, reason)
                # Where it broke off in the backward pass, the parameters that it had come to have their whole gradient
                # of this part, and may not get it again.
                lacking = [one for one, grad, changes in before if one.grad is grad and _changes(one) == changes]
                if parameters is not None:
                    wanted = {*map(id, parameters)}
                    lacking = [one for one in lacking if id(one) in wanted]
                yield from self.run(compute, part, size, lacking)
            start += count

    def take_note(self) -> str | None:
        """Return what there is to say of what did not fit, once; None where nothing is new."""
        note, self._note = self._note, ""
        return note or None

    def _attempt(self, compute: Callable[[], T], images: int) -> tuple[T | None, str | None]:
        """Return the result, or why there is none."""
        try:
            return compute(), None
        except Exception as error:
            if not (self.active and gpu_is_full(error)):
                raise
            if images == 1:
                raise OneImageTooLarge(first_line(error)) from error
            return None, first_line(error) or type(error).__name__

    def _halve(self, tried: int, size: tuple[int, int], reason: str) -> None:
        half = tried // 2
        self.limit = half * size[0] * size[1]
        self._note = (
            f"{tried} images of {size[0]}x{size[1]} do not fit into the free memory of {self._device} ({reason}): they "
            f"are computed {half} at a time, and from now on what is as large; weights differ by rounding alone"
        )
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def part_of(group: Group, start: int, stop: int, losses: Iterable[Loss]) -> Group:
    """Return some of a group's images, by their places in it, with all that belongs to them."""
    if (start, stop) == (0, len(group.conditions)):
        return group
    kinds = {loss.needs: loss for loss in losses}
    prepared = {name: kinds[name].part(value, start, stop) for name, value in group.prepared.items()}
    return Group(
        images=slice(group.images.start + start, group.images.start + stop),
        conditions=group.conditions.select(slice(start, stop)),
        prepared={name: value for name, value in prepared.items() if value is not None},
    )


def remedy(config: TrainConfig, limit: int, largest: int) -> str:
    """Say what spares a run the attempts that fail; ``limit`` is :attr:`Splitter.limit`.

    A micro-batch holds at least an image, of which the largest has ``largest`` tokens.
    """
    tokens = max(largest, limit // config.model.patch_size**2)
    blocks = "train.gradient_checkpointing=all when the run is continued, or "
    return (
        f"To avoid the attempts that fail: close other programs on the card (nvidia-smi), set "
        f"{blocks if config.train.checkpoint_every != 1 else ''}train.token_budget={tokens} in a new run"
    )


def _changes(parameter: nn.Parameter) -> int | None:
    """Return how often its gradient was changed in place; None without one."""
    return None if parameter.grad is None else parameter.grad._version
