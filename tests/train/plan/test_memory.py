"""Bytes that are counted on the meta device: against real tensors on a CPU, and against its allocator."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import profile

from prep.dataset.reader import Dataset
from tests.train.tiny import tiny_config
from train.data.buffers import GROWTH, Buffer
from train.loop.flops import META
from train.loop.sending import SLOTS
from train.loop.trainer import Trainer
from train.plan.memory import LikeGpu, LiveBytes, Memory, estimate_memory, meta_trainer, sending_bytes, tensor_bytes
from train.plan.rehearsal import Shapes, changed, largest_batch

CPU = torch.device("cpu")
KINDS = [
    (),
    ("train.gradient_checkpointing=all",),
    ("train.gradient_checkpointing=2", "model.depth=4"),
    ("repa.enabled=true",),
    ("perceptual.every=1", "perceptual.size=32"),
    ("tread.enabled=true", "tread.start=0", "tread.end=-1", "tread.dense_tail=0"),
    ("model.patch_size=4", "model.output_conv=true", "train.token_budget=700", "optimizer.type=adamw"),
]


def shapes_of(dataset: Dataset) -> Shapes:
    return Shapes.of(dataset.info, dataset.rows("train"))


def estimate(config, dataset: Dataset) -> Memory:
    return estimate_memory(meta_trainer(config, dataset), shapes_of(dataset))


class Saved:
    """The bytes that autograd keeps, each storage once, parameters left out."""

    def __init__(self, *parameters: torch.Tensor) -> None:
        self.own = {parameter.untyped_storage()._cdata for parameter in parameters}
        self.kept: dict[int, torch.UntypedStorage] = {}  # alive, so that no address comes twice

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.own:
            self.kept[storage._cdata] = storage
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.kept.values())


@pytest.fixture
def dataset(tiny_dataset) -> Dataset:
    return Dataset(tiny_dataset)


@pytest.mark.usefixtures("vgg_home")
@pytest.mark.parametrize("overrides", KINDS, ids=lambda overrides: " ".join(overrides) or "plain")
def test_a_micro_step_lives_in_the_same_bytes_on_meta_and_on_the_cpu(dataset, tiny_dataset, tmp_path, overrides):
    config = tiny_config(tiny_dataset, tmp_path / "run", *overrides)
    counted = []
    for trainer in (meta_trainer(config, dataset), Trainer(config, dataset, CPU)):
        batch = largest_batch(trainer, shapes_of(dataset), trainer.device)
        saved = Saved(*trainer.model.parameters())
        with LiveBytes() as live, LikeGpu(bf16=False):
            trainer.micro_step(batch)
            after_first = live.now
            trainer.micro_step(batch)
            with saved.hooks():
                trainer.micro_step(batch)
        gradients = tensor_bytes(p.grad for p in trainer.model.parameters() if p.grad is not None)
        assert gradients <= after_first < live.peak
        counted.append((live.peak, live.now, after_first, gradients, saved.bytes))
    assert counted[0] == counted[1]
    assert all(counted[0])


def test_live_bytes_are_the_allocators(dataset, tiny_dataset, tmp_path):
    trainer = Trainer(tiny_config(tiny_dataset, tmp_path / "run"), dataset, CPU)
    batch = largest_batch(trainer, shapes_of(dataset), CPU)
    trainer.micro_step(batch)  # positions that stay are made once
    trainer.optimizer.zero_grad()
    with LiveBytes() as live:
        trainer.micro_step(batch)
    left = live.now
    trainer.optimizer.zero_grad()
    assert live.now == 0
    with profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.micro_step(batch)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    # beside tensors the kernels take some room for themselves
    assert live.peak <= peak <= 1.1 * live.peak
    assert left == pytest.approx(now, rel=0.01)


def attend(device: torch.device | str, fused: bool = True, b: int = 2, h: int = 3, n: int = 40, m: int = 56) -> int:
    """Bytes that attention keeps of its own input, heads being views of (b, n, h, k) as the model's are."""
    q, k, v = (torch.zeros(b, length, h, 8, device=device, requires_grad=True) for length in (n, m, m))
    mask = torch.ones(b, 1, 1, m, dtype=torch.bool, device=device)
    saved = Saved()
    with saved.hooks():
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask)
    assert out.transpose(1, 2).is_contiguous() == fused
    return saved.bytes


def test_attention_keeps_what_a_fused_kernel_keeps():
    with LikeGpu(bf16=False):
        counted = attend(META)
    assert counted == attend("cpu")
    scores = 4 * 2 * 3 * 40 * 56
    assert attend(META, fused=False) > counted + scores - 4 * 2 * 40 * 56, "which meta alone would keep"


def test_autocast_is_the_cpus_for_matrices():
    def run(device: str) -> tuple[int, list[torch.dtype]]:
        weight, kernel = torch.zeros(32, 16, device=device), torch.zeros(4, 3, 3, 3, device=device)
        x, image = torch.zeros(5, 7, 16, device=device), torch.zeros(2, 3, 9, 9, device=device)
        tensors = [tensor.requires_grad_() for tensor in (weight, kernel, x, image)]
        saved = Saved(*tensors)
        with saved.hooks():
            y = F.silu(F.linear(x, weight))
            z = F.relu(F.conv2d(image, kernel))
        return saved.bytes, [y.dtype, z.dtype]

    with LikeGpu(bf16=True):
        counted = run("meta")
    with torch.autocast("cpu", torch.bfloat16):
        assert run("cpu") == counted
    assert counted[1] == [torch.bfloat16] * 2


def test_norms_are_float32_in_a_gpus_autocast():
    # torch lists them in autocast_mode.h for GPUs alone
    x = torch.zeros(2, 8, device=META, dtype=torch.bfloat16)
    with LikeGpu(bf16=True):
        assert F.rms_norm(x, (8,)).dtype == F.layer_norm(x, (8,)).dtype == x.pow(2).dtype == torch.float32
    with LikeGpu(bf16=False):
        assert F.rms_norm(x, (8,)).dtype == torch.bfloat16


def test_what_always_stays_is_the_trainers_tensors(dataset, tiny_dataset, tmp_path):
    config = tiny_config(tiny_dataset, tmp_path / "run", "ema.snapshots=8", "repa.enabled=true")
    memory = estimate(config, dataset)
    trainer = Trainer(config, dataset, CPU)
    assert memory.weights == memory.gradients == tensor_bytes(trainer.model.parameters())
    assert memory.optimizer == tensor_bytes(trainer.optimizer.tensors().values())
    assert memory.averages == 3 * tensor_bytes(trainer.ema.state.values())
    assert memory.averages < 3 * memory.weights, "the head is in no average"
    assert memory.peak > max(memory.phases.values()) > memory.standing > 0


@pytest.mark.parametrize("noise", ["host", "device"])
def test_the_slots_hold_micro_batches_as_they_are_stored(dataset, tiny_dataset, tmp_path, noise):
    trainer = Trainer(tiny_config(tiny_dataset, tmp_path / "run", f"data.noise={noise}"), dataset, CPU)
    buffer, used = Buffer(), []
    for number in islice(trainer.batches.numbers(0), 60):
        trainer.batches.pack(number, buffer.reset())
        used.append(buffer.used)
    counted = sending_bytes(trainer, shapes_of(dataset))
    assert max(used) <= counted / (SLOTS * GROWTH) < 1.15 * max(used)
    assert len(buffer.bytes) * SLOTS <= counted
    on_gpu = meta_trainer(trainer.config, dataset)
    assert estimate_memory(on_gpu, shapes_of(dataset)).sending == counted


def test_the_micro_batch_itself_takes_memory(dataset, tiny_dataset, tmp_path):
    trainer = meta_trainer(tiny_config(tiny_dataset, tmp_path / "run", "repa.enabled=true"), dataset)
    batch = largest_batch(trainer, shapes_of(dataset), META)
    (part,) = batch.groups
    spans = part.conditions.spans  # whose slots are the indices: all lengths are equal
    given = [part.conditions.keep, *part.conditions.tensors.values(), spans.index, spans.offsets]
    size = tensor_bytes([batch.x, batch.noise, batch.t, part.prepared["teacher"], *given])
    with LiveBytes() as live, LikeGpu(bf16=False):
        for _ in range(2):
            trainer.micro_step(batch)
    gradients = tensor_bytes(p.grad for p in trainer.model.parameters() if p.grad is not None)
    memory = estimate(changed(trainer.config, {"train.precision": "fp32"}), dataset)
    assert memory.activations == live.peak - gradients + size


def test_what_saves_memory_is_seen_to_save_it(dataset, tiny_dataset, tmp_path):
    config = tiny_config(tiny_dataset, tmp_path / "run", "model.depth=6", "train.batch_size=8", "train.precision=bf16")

    def activations(**overrides):
        other = changed(config, {key.replace("__", "."): value for key, value in overrides.items()})
        return estimate(other, dataset).activations

    plain = activations()
    assert activations(train__gradient_checkpointing="all") < 0.5 * plain
    some = activations(train__gradient_checkpointing=2)
    assert activations(train__gradient_checkpointing="all") < some < plain
    tokens = 88 * 48 // 64 * 4
    assert activations(train__token_budget=tokens) < 0.7 * plain
    assert activations(train__precision="fp32") > 1.1 * plain
    routed = {"tread__enabled": True, "tread__start": 0, "tread__end": -1}
    assert activations(**routed, tread__dense_tail=0.0) < 0.9 * plain
    assert activations(**routed, tread__dense_tail=0.5) >= plain, "the last steps are dense"
    lpips = activations(perceptual__every=1, perceptual__size=64)
    assert activations(perceptual__every=1, perceptual__size=64, perceptual__dino_weight=0.01) > lpips > plain
    assert activations(repa__enabled=True) > plain
