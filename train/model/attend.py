"""Attention of image tokens to those of their own image and to its context, which has another length in each image.

Nothing is masked where all lengths are equal. Elsewhere the keys of each image lie side by side without padding, for
:mod:`torch.nn.attention.varlen` on a GPU in half precision and for a loop over the images on a CPU; where neither
serves, shorter contexts are padded and masked. What a compiled block sees are tensors, whose shapes depend on the
numbers of images, image tokens and context tokens alone, never on the lengths.
Shape letters as in :mod:`train.model.spans`; T is b n + M, the keys of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from train.model.spans import Spans

varlen_attn: Callable[..., Tensor] | None = None  # torch's, from the first time that a GPU takes it

# An image's scores that padding would add, at which a call of its own pays on a CPU (tests/benchmarks/attention.py)
WORTH_A_CALL = 1 << 16


class Seen(NamedTuple):
    """What the image tokens of a batch see of its context, beside one another; all None: equally long contexts.

    With ``lengths`` (b,), on the CPU, each image's keys lie side by side; on a GPU with ``queries`` and ``keys``
    (b + 1,), int32, where they begin and end, and a tensor as long as the longest. With ``mask`` (b, 1, 1, n +
    longest), True where a key counts, they are padded, and lie in ``slots`` (M,).
    """

    lengths: Tensor | None = None
    queries: Tensor | None = None
    keys: Tensor | None = None
    longest: Tensor | None = None
    slots: Tensor | None = None
    mask: Tensor | None = None


def reads_packed(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Return whether torch's varlen attention, which is FlashAttention, takes such queries: on a GPU, from Ampere on.

    Source: the checks of ``mha_varlen_fwd`` in torch's ``flash_api.cpp``; ``scaled_dot_product_attention`` has other
    kernels for what fails them, varlen attention has none.
    """
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or head_size % 8 or head_size > 256:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0) and _has_varlen()


def _has_varlen() -> bool:
    """Import torch's varlen attention, which takes a second or two; False: this torch is older than it."""
    global varlen_attn
    if varlen_attn is None:
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError:
            return False
    return True


def seen(spans: Spans, tokens: int, heads: int, head_size: int, dtype: torch.dtype, compiled: bool) -> Seen:
    """Choose how images of so many tokens see their contexts: by lengths, device and dtype, never by what came before.

    A compiled block on a CPU, where a graph takes ten seconds, has one form for everything.
    """
    device, images = spans.offsets.device, len(spans.lengths)
    one_graph = compiled and device.type == "cpu"
    if spans.are_equal and not one_graph:
        return Seen()
    half = dtype in (torch.float16, torch.bfloat16)
    varlen = reads_packed(device, dtype, head_size)
    padding = spans.longest - sum(spans.lengths) / images
    each = device.type == "cpu" and not half and not one_graph and padding * tokens * heads >= WORTH_A_CALL
    if varlen or each or device.type == "meta":
        lengths = torch.tensor(spans.lengths, device="cpu")
        if not varlen:
            return Seen(lengths)
        queries = torch.arange(images + 1, dtype=torch.int32, device=device) * tokens
        return Seen(lengths, queries, spans.offsets + queries, queries.new_empty(spans.longest))
    counts = spans.offsets.diff()[:, None]
    shown = torch.arange(spans.longest, device=device) < counts
    return Seen(slots=spans.slots, mask=F.pad(shown, (tokens, 0), value=True)[:, None, None])


def attend(q: Tensor, k: Tensor, v: Tensor, context: tuple[Tensor, Tensor], seen: Seen) -> Tensor:
    """Attend from q to k, v, (b, n, h, k) each, and to the context's keys and values, (M, h, k); return (b, n, h, k).

    All are of one dtype.
    """
    b, n = q.shape[:2]
    if seen.lengths is not None:
        keys, values = (interleave(*pair, seen.lengths) for pair in ((k, context[0]), (v, context[1])))
        if seen.keys is None:
            return attend_each(q, keys, values, seen.lengths)[0]
        limits = seen.queries, seen.keys, n, n + seen.longest.shape[0]
        return varlen_attn(q.flatten(0, 1), keys, values, *limits).unflatten(0, (b, n))
    k, v = (torch.cat((own, _padded(other, b, n, seen)), 1) for own, other in ((k, context[0]), (v, context[1])))
    return _attend_padded(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), seen.mask).transpose(1, 2)


def _padded(context: Tensor, images: int, tokens: int, seen: Seen) -> Tensor:
    """Return the context (M, h, k) as (b, longest, h, k)."""
    if seen.mask is None:
        return context.reshape(images, context.shape[0] // images, *context.shape[1:])
    longest = seen.mask.shape[-1] - tokens
    room = context.new_zeros(images * longest, *context.shape[1:])
    return room.index_copy(0, seen.slots, context).unflatten(0, (images, longest))


def _attend_padded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # in bfloat16 on a CPU the fused kernel is the slower one, and torch.compile cannot fuse into it
    # (tests/benchmarks/attention.py)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1).to(v.dtype) @ v


# Keys of each image side by side


@torch.library.custom_op("nanodit::interleave", mutates_args=())
def interleave(image: Tensor, context: Tensor, lengths: Tensor) -> Tensor:
    """Lay the context tokens (M, h, k) of each image behind its image tokens (b, n, h, k): (T, h, k).

    ``lengths`` (b,), on the CPU, says how many context tokens each image has.
    """
    parts = context.split(lengths.tolist())
    return torch.cat([part for pair in zip(image, parts) for part in pair])


@interleave.register_fake
def _(image: Tensor, context: Tensor, lengths: Tensor) -> Tensor:
    return context.new_empty(image.shape[0] * image.shape[1] + context.shape[0], *context.shape[1:])


@torch.library.custom_op("nanodit::separate", mutates_args=())
def separate(packed: Tensor, lengths: Tensor, images: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Undo :func:`interleave`: return the image tokens (b, n, h, k) and the context tokens (M, h, k)."""
    sizes = [size for length in lengths.tolist() for size in (tokens, length)]
    parts = packed.split(sizes)
    return torch.cat(parts[::2]).unflatten(0, (images, tokens)), torch.cat(parts[1::2])


@separate.register_fake
def _(packed: Tensor, lengths: Tensor, images: int, tokens: int) -> tuple[Tensor, Tensor]:
    shape = packed.shape[1:]
    return packed.new_empty(images, tokens, *shape), packed.new_empty(packed.shape[0] - images * tokens, *shape)


def _interleave_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    image, _, lengths = inputs
    ctx.sizes = image.shape[:2]
    ctx.save_for_backward(lengths)


def _interleave_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return *separate(gradient, *ctx.saved_tensors, *ctx.sizes), None


interleave.register_autograd(_interleave_backward, setup_context=_interleave_setup)


# One image after another, on a CPU


@torch.library.custom_op("nanodit::attend_each", mutates_args=())
def attend_each(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Attend from q (b, n, h, k) to each image's own keys and values of (T, h, k) each, on a CPU.

    Returns (b, n, h, k) and, for the backward pass, the logarithms of the sums (b, h, n).
    """
    b, n, h, _ = q.shape
    out, sums = torch.empty_like(q), q.new_empty(b, h, n, dtype=torch.float32)
    for i, pair in enumerate(_images(keys, values, lengths, n)):
        one, sums[i : i + 1] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(_heads(q[i]), *pair)
        out[i] = one[0].transpose(0, 1)
    return out, sums


@attend_each.register_fake
def _(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)


@torch.library.custom_op("nanodit::attend_each_backward", mutates_args=())
def attend_each_backward(
    gradient: Tensor, q: Tensor, keys: Tensor, values: Tensor, out: Tensor, sums: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, keys and values."""
    results = [torch.empty_like(x) for x in (q, keys, values)]
    parts = zip(*(x.split(_sizes(lengths, q.shape[1])) for x in results[1:]))
    for i, (pair, places) in enumerate(zip(_images(keys, values, lengths, q.shape[1]), parts)):
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _heads(gradient[i]), _heads(q[i]), *pair, _heads(out[i]), sums[i : i + 1], 0.0, False
        )
        for place, one in zip((results[0][i], *places), found):
            place.copy_(one[0].transpose(0, 1))
    return tuple(results)


@attend_each_backward.register_fake
def _(gradient: Tensor, q: Tensor, keys: Tensor, values: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(keys), torch.empty_like(values)


def _sizes(lengths: Tensor, tokens: int) -> list[int]:
    return [tokens + length for length in lengths.tolist()]


def _heads(x_nhk: Tensor) -> Tensor:
    return x_nhk.transpose(0, 1).unsqueeze(0)


def _images(keys: Tensor, values: Tensor, lengths: Tensor, tokens: int) -> list[tuple[Tensor, Tensor]]:
    """Return the keys and values of each image, (1, h, n + m, k)."""
    sizes = _sizes(lengths, tokens)
    return [(_heads(k), _heads(v)) for k, v in zip(keys.split(sizes), values.split(sizes))]


def _each_setup(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    q, keys, values, lengths = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, keys, values, *output, lengths)


def _each_backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *attend_each_backward(gradient, *ctx.saved_tensors), None


attend_each.register_autograd(_each_backward, setup_context=_each_setup)
