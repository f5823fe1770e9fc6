"""The floating-point operations of training: counted once per shape on the meta device, where nothing is computed.

A multiply-add is two; a forward pass and its backward pass count together. Context tokens count; tokens that routing or
a dropped condition leaves out do not. What activation checkpointing computes again counts once, as in model FLOPs
utilisation (Chowdhery et al., arXiv 2204.02311, appendix B); neither the optimiser nor elementwise arithmetic counts.
Of context tokens those count that an image has, not what it is padded with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_flop_count

from train.method.loss import Loss
from train.model.conditions import Conditions
from train.model.config import ModelConfig
from train.model.modalities import Features
from train.model.network import NanoDiT
from train.model.spans import Spans

META = torch.device("meta")
MOST_RESULTS = 1 << 14  # a network of one shape has a few hundred
Argument = Tensor | Conditions | None


_results: dict[Any, tuple[Any, ...]] = {}  # what operators give by what they are given: a network's blocks are alike


def call_on_meta(function: Any, arguments: tuple, keywords: dict) -> Any:
    """Call an operator on the meta device, or make the tensor that it gave for the same shapes before.

    torch finds shapes and dtypes there in Python, which takes several times as long.
    """
    given = (function, arguments, keywords, torch.get_default_dtype())
    key = None if function.is_view or function._schema.is_mutable else _described(given)
    if known := _results.get(key):
        size, stride, dtype = known
        return torch.empty_strided(size, stride, dtype=dtype, device=META)
    result = function(*arguments, **keywords)
    if key is not None and isinstance(result, Tensor) and result.device == META:
        storage, likeness = result.untyped_storage(), (result.shape, result.stride(), result.dtype)
        again = torch.empty_strided(*likeness[:2], dtype=result.dtype, device=META).untyped_storage()
        leaves = tree_leaves((arguments, keywords))
        read = {leaf.untyped_storage()._cdata for leaf in leaves if isinstance(leaf, Tensor)}
        if storage._cdata not in read and storage.nbytes() == again.nbytes():  # not a view, nor part of more
            if len(_results) == MOST_RESULTS:
                _results.clear()
            _results[key] = likeness
    return result


def _described(value: Any) -> Any:
    """Return all of an operator's arguments that its result depends on, to be compared."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, tuple | list):
        return tuple(map(_described, value))
    if isinstance(value, dict):
        return tuple((name, _described(one)) for name, one in value.items())
    return type(value), value  # 1, 1.0 and True are equal and make other dtypes


def count_flops(function: Callable[..., Tensor], *arguments: Argument) -> int:
    """Return the FLOPs of a call and its backward pass; arguments and parameters are on the meta device.

    There attention is two matrix products and their gradients: other devices' kernels, of which some compute the scores
    again in the backward pass, are not counted for that.
    """
    with _Operators() as counter:
        function(*arguments).sum().backward()
    return counter.flops


class _Operators(TorchDispatchMode):
    """Adds up torch's formulas, as ``torch.utils.flop_counter.FlopCounterMode`` does, which also tells modules apart.

    That takes half as long again.
    """

    flops = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), keywords: dict | None = None) -> Any:
        result = call_on_meta(function, arguments, keywords or {})
        if formula := flop_registry.get(function.overloadpacket):
            self.flops += formula(*arguments, **(keywords or {}), out_val=result)
        return result


class ModelFlops:
    """The FLOPs of NanoDiT, from three small ones: the dense blocks of a large one are alike, and the routed ones.

    ``count`` may be another function than :func:`count_flops`, of whose results there are sums and multiples.
    """

    _known: ClassVar[dict[Any, Any]] = {}  # whoever counts the same network again, routed or in another plan

    def __init__(
        self, config: ModelConfig, features: Features, route: range, count: Callable[..., Any] = count_flops
    ) -> None:
        self.depth, self.routed, self.count = config.depth, len(route), count
        with META:
            one, two = (config.model_copy(update={"depth": depth}) for depth in (1, 2))
            self.one, self.two = NanoDiT(one, features), NanoDiT(two, features)
            self.one_of_each = NanoDiT(two, features, range(1, 2))
        self._network = count, two.model_dump_json(), features.base, *sorted(features.widths.items())

    def __call__(self, z: Tensor, t: Tensor, conditions: Conditions, keep_ids: Tensor | None = None) -> Any:
        one, two = (self._counted(name, z, t, conditions) for name in ("one", "two"))
        dense = one + (self.depth - 1) * (two - one)
        if keep_ids is None:
            return dense
        return dense + self.routed * (self._counted("one_of_each", z, t, conditions, keep_ids) - two)

    def _counted(self, name: str, *arguments: Argument) -> Any:
        lengths = [spans.lengths for spans in _spans(arguments)]
        key = (*self._network, name, arguments[0].shape[0], *map(_shape, arguments), str(lengths))
        if key not in self._known:
            self._known[key] = self.count(getattr(self, name), *arguments)
        return self._known[key]


class FlopCounter:
    """Adds up what was executed; ``counts`` tells by name what one image of a call's arguments costs."""

    def __init__(self, counts: Mapping[str, Callable[..., int]]) -> None:
        self._counts = counts
        self._noted: Counter[Any] = Counter()  # images by the shape of a call
        self._context: Counter[Any] = Counter()  # context tokens of these images, where the call says which count
        self._calls: dict[Any, tuple[str, list[Argument]]] = {}  # an example of each shape, of one image
        self._flops: dict[
            Any, tuple[int, int]
        ] = {}  # of one image: all that is counted grows with the images of a batch

    def note(self, name: str, images: int, *arguments: Argument) -> None:
        """Remember a forward and backward pass of ``images`` images; cheap, and never waits for a device."""
        shape = self._remember(name, arguments)
        self._noted[shape] += images
        for spans in _spans(arguments):
            self._context[shape] += sum(spans.lengths)

    def of_one(self, name: str, *arguments: Argument) -> int:
        """Return the FLOPs of one image of such a call, which is not added up."""
        return self._count(self._remember(name, arguments))[0]

    def take(self) -> int:
        """Return the FLOPs of what was noted since the last call; a shape not seen before costs some milliseconds."""
        total = 0
        for shape, images in self._noted.items():
            of_image, of_token = self._count(shape)
            total += of_image * images + of_token * self._context[shape]
        self._noted.clear()
        self._context.clear()
        return total

    def _remember(self, name: str, arguments: Sequence[Argument]) -> Any:
        shape = (name, *map(_shape, arguments))
        if shape not in self._calls:
            self._calls[shape] = name, [_on_meta(argument) for argument in arguments]
        return shape

    def _count(self, shape: Any) -> tuple[int, int]:
        """Return the FLOPs of an image, and those of a context token where the call says which count."""
        if shape not in self._flops:
            name, arguments = self._calls[shape]
            if any(_spans(arguments)):  # what a token adds is the same for each
                none, one = (self._counts[name](*_with_context(arguments, tokens)) for tokens in (0, 1))
                self._flops[shape] = none, one - none
            else:
                self._flops[shape] = self._counts[name](*arguments), 0
        return self._flops[shape]


def flop_counter(model: NanoDiT, losses: Iterable[Loss], count: Callable[..., Any] = count_flops) -> FlopCounter:
    """Return the counter of everything that a run computes forwards and backwards; ``count`` as in ModelFlops."""
    counts: dict[str, Callable[..., Any]] = {"model": ModelFlops(model.config, model.features, model.route, count)}
    for loss in losses:
        if function := loss.one_image():
            counts[loss.name] = partial(count, function)
    return FlopCounter(counts)


def _spans(arguments: Sequence[Argument]) -> list[Spans]:
    return [one.spans for one in arguments if isinstance(one, Conditions) and one.spans]


def _with_context(arguments: Sequence[Argument], tokens: int) -> list[Argument]:
    """Return the arguments with so many context tokens that count."""
    spans = Spans.equal(1, tokens, META)
    return [replace(one, spans=spans) if isinstance(one, Conditions) else one for one in arguments]


def _shape(argument: Argument) -> Any:
    if isinstance(argument, Conditions):
        shapes = tuple((name, tensor.shape[1:]) for name, tensor in argument.tensors.items())
        return shapes, argument.spans is not None
    return None if argument is None else argument.shape[1:]


def _on_meta(argument: Argument) -> Argument:
    if isinstance(argument, Conditions):
        return replace(argument.map(_on_meta), spans=argument.spans and Spans.equal(1, 1, META))
    if argument is None:
        return None
    size = (1, *argument.shape[1:])
    return torch.empty(size, dtype=argument.dtype, device=META, requires_grad=argument.requires_grad)


# Attention of one image after another, of which torch knows nothing


def _shapes(q: Any, keys: Any) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of which attention costs as much: every image has the mean number of keys, times images."""
    _, n, h, size = q
    return (1, h, n, size), (1, h, keys[0], size), (1, h, keys[0], size)


@register_flop_formula(torch.ops.nanodit.attend_each)
def _(q: Any, keys: Any, values: Any, lengths: Any, *, out_shape: Any = None, **_: Any) -> int:
    return sdpa_flop_count(*_shapes(q, keys))


@register_flop_formula(torch.ops.nanodit.attend_each_backward)
def _(gradient: Any, q: Any, keys: Any, *others: Any, out_shape: Any = None, **_: Any) -> int:
    return 2 * sdpa_flop_count(*_shapes(q, keys))  # scores that are computed again are not model FLOPs
