"""Bytes that elementwise operations move in a micro-step, and the peak of memory as `train plan` counts it.

    python -m tests.benchmarks.traffic [configs/train/production.yaml]

On the meta device, where nothing is computed: the largest micro-batch of the config, forwards and backwards, in
bfloat16 as a GPU would compute it, without the perceptual loss. Elementwise is everything but products of matrices,
convolutions, attention and views; each operation reads its inputs and writes its outputs once, as in blocks that are
not compiled. rms_norm is one kernel.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanodit.config import load_config
from train.config import TrainConfig
from train.loop.flops import META
from train.plan.memory import LikeGpu, estimate_memory, meta_trainer
from train.plan.rehearsal import Shapes, largest_batch, open_dataset

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "attend_each", "scaled_dot_product")


class Traffic(TorchDispatchMode):
    """Adds up what elementwise operations read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), keywords: dict | None = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        name = function.overloadpacket.__name__
        given = [value for value in tree_leaves((arguments, keywords)) if isinstance(value, Tensor)]
        made = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        storages = {tensor.untyped_storage()._cdata for tensor in given}
        written = [tensor for tensor in made if tensor.untyped_storage()._cdata not in storages]
        in_place = name.endswith("_") and not name.startswith("_")
        if not name.startswith(PRODUCTS) and (written or in_place) and not name.startswith(("empty", "new_empty")):
            self.bytes += sum(x.numel() * x.element_size() for x in [*given, *(written or made)])
        return result


def main() -> None:
    file = Path(sys.argv[1] if len(sys.argv) > 1 else "configs/train/production.yaml")
    config = load_config(TrainConfig, file, ["perceptual.every=0"])  # whose network is not the model's
    dataset, what = open_dataset(config, file, None)
    shapes = Shapes.of(dataset.info, dataset.rows("train"))
    trainer = meta_trainer(config, dataset)
    batch = largest_batch(trainer, shapes, META)
    with Traffic() as traffic, LikeGpu(bf16=True):
        trainer.micro_step(batch)
    trainer.optimizer.zero_grad()
    memory = estimate_memory(trainer, shapes)
    print(f"{file}, without the perceptual loss; {what}")
    print(f"{memory.largest}: elementwise operations move {traffic.bytes / 1e9:.1f} GB in a micro-step")
    print(f"peak {memory.peak / 1e9:.2f} GB, of which activations {memory.activations / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
