"""Forward and backward of attention on a CPU: PyTorch's fused kernel against the explicit form of
train/model/network.py.

    python tests/benchmarks/attention.py

Interleaved in one process, one thread, process time, medians; the ratio is what counts.
"""

from __future__ import annotations

import statistics
import time

import torch
import torch.nn.functional as F

REPEATS = 7


def fused(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def explicit(q, k, v, mask):
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return scores.masked_fill(~mask, float("-inf")).softmax(-1).to(v.dtype) @ v


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
            print(f"{name:<42}{str(dtype).removeprefix('torch.'):<10}{a:>9.1f}{b:>13.1f}{ratio:>7.2f}")


if __name__ == "__main__":
    main()
