"""Forward and backward of attention on a CPU: PyTorch's fused kernel, with and without a mask, against the explicit
form of train/model/attend.py; and for contexts of unequal length a mask against one call an image.

    python -m tests.benchmarks.attention

Interleaved in one process, one thread, process time, medians; the ratio is what counts.
"""

from __future__ import annotations

import statistics
import time

import torch
import torch.nn.functional as F

from train.model.attend import Seen, attend
from train.model.spans import Spans

REPEATS = 7


# images, heads, queries, size, context tokens of each image
UNEQUAL = (
    (4, 6, 256, 64, (283, 391, 136, 670)), (4, 6, 128, 64, (283, 391, 136, 670)),
    (32, 3, 64, 64, tuple(4 + i * 37 % 120 for i in range(32))),
)  # fmt: skip


def fused(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def explicit(q, k, v, mask):
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1).to(v.dtype) @ v


def seconds(attend, *tensors) -> float:
    start = time.process_time()
    output = attend(*tensors)
    output.backward(torch.ones_like(output))
    return time.process_time() - start


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'images x heads x queries x keys x size':<42}{'dtype':<10}{'fused ms':>9}{'explicit ms':>13}{'ratio':>7}")
    for shape in ((32, 3, 64, 220, 64), (32, 6, 64, 330, 32), (8, 6, 256, 500, 64)):
        images, heads, queries, keys, size = shape
        for dtype in (torch.float32, torch.bfloat16):
            q = torch.randn(images, heads, queries, size, dtype=dtype, requires_grad=True)
            k, v = (torch.randn(images, heads, keys, size, dtype=dtype, requires_grad=True) for _ in range(2))
            mask = torch.rand(images, 1, 1, keys) > 0.3
            pairs = [(seconds(fused, q, k, v, mask), seconds(explicit, q, k, v, mask)) for _ in range(REPEATS + 1)][1:]
            a, b = (1e3 * statistics.median(column) for column in zip(*pairs))
            ratio = statistics.median(one / other for one, other in pairs)
            name = " x ".join(map(str, shape))
            plain = statistics.median(seconds(fused, q, k, v, None) for _ in range(REPEATS)) * 1e3
            unmasked = statistics.median(seconds(explicit, q, k, v, None) for _ in range(REPEATS)) * 1e3
            print(
                f"{name:<42}{str(dtype).removeprefix('torch.'):<10}{a:>9.1f}{b:>13.1f}{ratio:>7.2f}"
                f"  without a mask {plain:.1f} and {unmasked:.1f}"
            )
    unequal()


def unequal() -> None:
    """Compare a mask over padding with one call an image, in float32."""
    for images, heads, tokens, size, lengths in UNEQUAL:
        spans = Spans.of(torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])
        shown = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        mask = F.pad(shown, (tokens, 0), value=True)[:, None, None]
        q, k, v = (torch.randn(images, tokens, heads, size, requires_grad=True) for _ in range(3))
        context = [torch.randn(sum(lengths), heads, size, requires_grad=True) for _ in range(2)]
        forms = Seen(slots=spans.slots, mask=mask), Seen(torch.tensor(lengths))
        pairs = [tuple(seconds(attend, q, k, v, context, form) for form in forms) for _ in range(REPEATS + 1)][1:]
        masked, each = (1e3 * statistics.median(column) for column in zip(*pairs))
        ratio = statistics.median(b / a for a, b in pairs)
        print(
            f"{images} x {heads} x {tokens} x {size}, {sum(lengths)} context tokens, {max(lengths)} at most: "
            f"mask {masked:.1f} ms, each {each:.1f} ms, ratio {ratio:.2f}"
        )


if __name__ == "__main__":
    main()
