"""The loop: what a step computes, that nothing which looks on changes it, and that stopping loses nothing."""

from __future__ import annotations

import json
import os
import random
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluate.validation import build_validation
from nanodit.errors import Interrupted
from nanodit.rng import generator
from prep.dataset.reader import Dataset
from tests.train.tiny import tiny_config, write_dataset
from train.check.waits import NoSync
from train.checkpoint.checkpoint import load_checkpoint
from train.data.buffers import Buffer
from train.loop.health import NonFiniteError, clip_gradients, gradient_norms
from train.loop.microbatch import deal_subsets, split
from train.loop.tracking import read_metrics
from train.loop.trainer import Trainer
from train.method.dropout import ConditioningConfig
from train.method.flow import flow_loss, interpolate, to_x
from train.model.modalities import MODALITIES

CPU = torch.device("cpu")
TEXT, POSE, ALL = frozenset({"text"}), frozenset({"text", "pose"}), frozenset(MODALITIES)


def make(dataset: Path, output: Path, *overrides: str) -> Trainer:
    config = tiny_config(dataset, output, *overrides)
    config.run_folder.mkdir(exist_ok=True)
    data = Dataset(dataset)
    return Trainer(config, data, CPU, build_validation(config, data) if config.validation.every_steps else None)


def weights_of(run: Path, step: int) -> dict[str, bytes]:
    folder = run / "checkpoints" / f"step-{step:06d}"
    return {part: (folder / f"{part}.safetensors").read_bytes() for part in ("model", "ema", "optimizer")}


def logged(run: Path) -> list[dict[str, float]]:
    """The deterministic part of metrics.jsonl."""
    return [
        {k: v for k, v in record.items() if not k.startswith(("sys/", "memory/"))}
        for record in read_metrics(run / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def straight(tiny_dataset, tmp_path_factory) -> Path:
    """The run that nothing disturbs."""
    trainer = make(tiny_dataset, tmp_path_factory.mktemp("straight") / "run")
    trainer.run()
    return trainer.config.run_folder


# What one step is


def test_a_micro_batch_is_a_pure_function_of_its_number(tiny_dataset, tmp_path):
    first, second = (make(tiny_dataset, tmp_path / name) for name in "ab")
    forwards = [first.batches.make(i) for i in range(6)]
    for i in reversed(range(6)):
        ours, theirs = forwards[i], second.batches.make(i)
        assert ours.keys == theirs.keys
        assert ours.subsets == theirs.subsets
        for name in ("x", "noise", "t"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert not torch.equal(forwards[0].noise[0], forwards[0].noise[1])
    assert not torch.equal(forwards[0].noise[0].flatten()[:99], forwards[2].noise[0].flatten()[:99])


def test_times_are_stratified_over_the_whole_step(tiny_dataset, tmp_path):
    trainer = make(
        tiny_dataset, tmp_path / "run", "train.grad_accumulation_steps=8", "flow.uniform_share=0", "flow.shift=1"
    )
    for step in range(3):
        t = np.concatenate([trainer.batches.make(step * 8 + i).t.numpy() for i in range(8)])
        flow = trainer.config.flow
        normal = torch.from_numpy((np.log(t / (1 - t)) - flow.logit_mean) / flow.logit_std).double()
        strata = (torch.special.ndtr(normal) * len(t)).floor().int()
        assert sorted(strata.tolist()) == list(range(32))
        assert t.tolist() != sorted(t.tolist())


def test_each_image_weighs_the_same(tiny_dataset, tmp_path):
    trainer = make(tiny_dataset, tmp_path / "run")
    _unfreeze(trainer)
    batches = [trainer.batches.make(i) for i in range(2)]
    for batch in batches:
        trainer.micro_step(batch)
    accumulated = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    for batch in batches:  # image by image, every condition masked or dropped by itself
        for i in range(len(batch.x)):
            part = next(p for p in batch.groups if p.images.start <= i < p.images.stop)
            one = slice(i, i + 1)
            z = interpolate(batch.x[one], batch.noise[one], batch.t[one])
            alone = part.conditions.select(slice(i - part.images.start, i - part.images.start + 1))
            output = trainer.model(z, batch.t[one], alone.keeping(batch.subsets[one]))
            x_hat = to_x(output, z, batch.t[one], "x")
            (flow_loss(x_hat, batch.x[one], batch.t[one], 0.05).sum() / 8).backward()
    for name, parameter in trainer.model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(accumulated[name], parameter.grad, rtol=2e-3, atol=2e-6)


def test_subsets_are_dealt_exactly_and_independently_of_the_micro_batch():
    table = ConditioningConfig(preset="quickstart").resolve()
    per_place = [Counter() for _ in range(4)]
    for step in range(500):
        dealt = [subset for chunk in deal_subsets(table, [10] * 4, generator(0, step)) for subset in chunk]
        assert len(dealt) == 40
        counts = Counter(dealt)
        assert all(abs(counts[subset] - 40 * share) < 1 for subset, share in table.items())
        changes = sum(
            a != b for place in range(4) for a, b in zip(dealt[place * 10 :][:9], dealt[place * 10 + 1 :][:9])
        )
        assert changes <= len(table) - 1, "equal subsets sit side by side, in few micro-batches"
        for place, counter in enumerate(per_place):
            counter.update(dealt[place * 10 : (place + 1) * 10])
    for counter in per_place:  # whichever bucket a micro-batch has, its shares are the table's
        for subset, share in table.items():
            assert counter[subset] / 5000 == pytest.approx(share, abs=0.05)


def test_runs_of_equal_subsets_get_a_forward_of_their_own():
    assert split([TEXT] * 3 + [POSE] * 8 + [ALL] * 9) == [slice(0, 3), slice(3, 11), slice(11, 20)]
    assert split([TEXT] * 2 + [POSE] * 3 + [ALL] * 1) == [slice(0, 6)]
    assert split([TEXT] * 8 + [POSE] * 1 + [ALL] * 2) == [slice(0, 8), slice(8, 11)]


def test_what_is_dropped_is_not_computed(tiny_dataset, tmp_path):
    trainer = make(tiny_dataset, tmp_path / "run", "train.batch_size=40", "train.grad_accumulation_steps=1")
    batch = trainer.batches.make(0)
    assert [part.images.stop - part.images.start for part in batch.groups] == [4, 10, 16, 10]
    nothing, text, pose, everything = (part.conditions for part in batch.groups)
    assert nothing.text is None
    assert text.text is not None
    assert text.pose is None
    assert pose.patches is None
    assert everything.keep.all()


EVERY_LOSS = (
    "conditioning.preset=default", "train.batch_size=24", "repa.enabled=true", "tread.enabled=true", "tread.start=0",
    "tread.end=-1", "perceptual.every=1", "perceptual.size=24", "perceptual.dino_weight=0.01",
    "train.gradient_checkpointing=2",
)  # fmt: skip


@pytest.mark.parametrize("view", ["crop", "pool"])
def test_trap_20_no_host_sync_inside_the_micro_step(tiny_dataset, tmp_path, vgg_home, dinov2_home, view):
    trainer = make(
        tiny_dataset, tmp_path / "run", *EVERY_LOSS, f"perceptual.view={view}", "data.flip=0.5", "data.noise=device"
    )
    # on the meta device tensors have no values, so that reading one or copying it to the host is an error
    trainer.device = torch.device("meta")
    trainer.model.to("meta")
    trainer.losses["lpips"].network.to("meta")
    trainer.losses["dino"].network.to("meta")
    batch = trainer.batches.pack(0, Buffer()).to(trainer.device)
    assert any("views" in part.prepared for part in batch.groups)
    assert batch.keep_ids is not None
    assert batch.mirror is not None
    assert any("teacher" in part.prepared for part in batch.groups)
    with NoSync():  # trap 20
        trainer.micro_step(batch.unpacked())
        gradient_norms(trainer.model)


@pytest.mark.parametrize(
    "wait",
    [lambda x: x.sum().item(), lambda x: bool((x > 0).any()), lambda x: x.cpu(), lambda x: x[x > 0], torch.nonzero,
     lambda x: x.new_tensor([1.0, 2.0]), lambda x: torch.tensor([1.0, 2.0], device=x.device),
     lambda x: x + torch.ones(4).to("meta"), lambda x: x[torch.tensor([0, 2])]],
)  # fmt: skip
def test_trap_20_what_waits_is_noticed(tiny_dataset, tmp_path, wait):
    trainer = make(tiny_dataset, tmp_path / "run")
    trainer.device = torch.device("meta")
    trainer.model.to("meta")
    batch = trainer.batches.make(0).to(trainer.device)
    real = trainer.model.timestep.forward
    trainer.model.timestep.forward = lambda t: (wait(t), real(t))[1]
    with pytest.raises((RuntimeError, NotImplementedError, AssertionError)), NoSync():
        trainer.micro_step(batch)


def test_every_kth_block_saves_its_share_of_memory(tiny_dataset, tmp_path):
    def saved(policy):
        trainer = make(tiny_dataset, tmp_path / "run", "model.depth=4", f"train.gradient_checkpointing={policy}")
        count = 0

        def pack(tensor):
            nonlocal count
            count += tensor.numel()
            return tensor

        batch = trainer.batches.make(0)
        trainer.model.train()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            trainer.model(batch.x, batch.t, batch.groups[0].conditions)
        return count

    none, every_other, every = saved("none"), saved(2), saved("all")
    assert saved("false") == none
    assert saved("true") == every
    assert none - every_other == pytest.approx((none - every) / 2, rel=0.02)
    assert every < 0.5 * none


def test_gradients_are_clipped_together(tiny_dataset, tmp_path):
    trainer = make(tiny_dataset, tmp_path / "run")
    _unfreeze(trainer)
    trainer.micro_step(trainer.batches.make(0))
    groups, total = gradient_norms(trainer.model)
    every = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    torch.testing.assert_close(total, every.norm())
    assert {"blocks.00", "blocks.01", "final", "context", "patch_embedding"} <= set(groups)
    clip_gradients(trainer.model, total, float(total) / 4)
    _, clipped = gradient_norms(trainer.model)
    torch.testing.assert_close(clipped, total / 4)
    clip_gradients(trainer.model, clipped, 1e9)
    torch.testing.assert_close(gradient_norms(trainer.model)[1], clipped)


def test_gradient_checkpointing_and_bf16_change_memory_not_the_step(tiny_dataset, tmp_path):
    def gradient(*overrides):
        trainer = make(tiny_dataset, tmp_path / "run", *overrides)
        _unfreeze(trainer)
        trainer.micro_step(trainer.batches.make(0))
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters()), "master weights stay float32"
        return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])

    plain = gradient()
    assert torch.equal(plain, gradient("train.gradient_checkpointing=all"))
    assert torch.equal(plain, gradient("train.gradient_checkpointing=2"))
    half = gradient("train.precision=bf16")
    assert not torch.equal(plain, half)
    assert torch.nn.functional.cosine_similarity(plain, half, dim=0) > 0.99


def test_trap_21_compiling_renames_nothing(tiny_dataset, tmp_path):
    plain, compiled = make(tiny_dataset, tmp_path / "a"), make(tiny_dataset, tmp_path / "b", "train.compile=true")
    assert list(compiled.model.state_dict()) == list(plain.model.state_dict())  # trap 21
    compiled.ema.update(compiled.model, 1)
    assert all(block._compiled_call_impl is not None for block in compiled.model.blocks)


def test_compiling_for_all_shapes_never_gives_up(tiny_dataset, tmp_path):
    # not monkeypatch, whose undoing hides the key from torch itself
    with torch._dynamo.config.patch(recompile_limit=8):
        make(tiny_dataset, tmp_path / "run", "train.compile=true")
        assert torch._dynamo.config.recompile_limit >= 256


@pytest.mark.parametrize("layers", [("px", "text", "t5"), ("px", "dino"), ("px", "pose")])
def test_modalities_may_be_absent(tmp_path, layers):
    dataset = write_dataset(tmp_path / "dataset", layers=layers)
    trainer = make(
        dataset, tmp_path / "run", "train.steps=2", "visual_debug.every_steps=2", "conditioning.preset=default"
    )
    trainer.run()
    assert sum(trainer.table.values()) == pytest.approx(1)
    assert np.isfinite([record["train/loss"] for record in logged(tmp_path / "run")]).all()


# What a run is


def test_a_run_learns_and_records_it(straight):
    records = logged(straight)
    assert [record["step"] for record in records] == list(range(1, 13))
    assert records[-1]["train/loss"] < records[0]["train/loss"]
    for record in records:
        assert sum(v for k, v in record.items() if k.startswith("train/condition_share/")) == pytest.approx(1)
        groups = [v for k, v in record.items() if k.startswith("grad_norm/")]
        assert np.linalg.norm(groups) == pytest.approx(record["train/grad_norm"], rel=1e-5)
    # the zero model predicts x = 0: its velocity is z / t, of about sqrt(1 + E x^2) at t near 1
    assert 0.9 < records[0]["train/velocity_norm"] < 2
    last = read_metrics(straight / "metrics.jsonl")[-1]
    assert last["sys/images_per_sec"] == pytest.approx(8 * last["sys/iter_per_sec"])
    assert last["sys/active_tokens"] in range(8 * 60, 8 * 71)


def test_trap_27_28_what_looks_on_changes_nothing(tiny_dataset, straight, tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    watched = make(
        tiny_dataset, tmp_path / "run",
        "visual_debug.every_steps=1", "log_every=5", "checkpoint.every_steps=2", "data.prefetch=0", "data.cache_gb=0",
    )  # fmt: skip
    watched.run()
    assert weights_of(tmp_path / "run", 12) == weights_of(straight, 12)  # trap 27
    assert torch.equal(torch.get_rng_state(), before[0])  # trap 28: nobody draws from or seeds a global state
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert random.getstate() == before[2]
    kept = [record for record in logged(straight) if record["step"] % 5 == 0 or record["step"] == 12]
    assert logged(tmp_path / "run") == kept


def test_trap_27_the_averaged_model_shares_no_memory(tiny_dataset, tmp_path):
    trainer = make(tiny_dataset, tmp_path / "run")
    pointers = {p.data_ptr() for p in trainer.model.parameters()} | {v.data_ptr() for v in trainer.ema.state.values()}
    averaged = trainer.ema_model()
    assert not pointers & {p.data_ptr() for p in averaged.parameters()}  # trap 27
    assert not averaged.training


def test_the_picture_shows_the_arms_and_is_the_same_every_time(tiny_dataset, tmp_path):
    pictures = []
    for name in "ab":
        trainer = make(tiny_dataset, tmp_path / name, "train.steps=2", "visual_debug.every_steps=2")
        assert trainer.visual.arms == [ALL, POSE, TEXT]
        assert len({row["bucket"] for row in trainer.visual.rows}) > 1
        assert {row["split"] for row in trainer.visual.rows} == {"holdout"}
        trainer.run()
        pictures.append((tmp_path / name / "visual_debug" / "step-000002" / "grid.png").read_bytes())
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["between steps", "inside a step"])
def test_trap_30_stopped_and_continued_is_the_straight_run(tiny_dataset, straight, tmp_path, signal_number, moment):
    def interrupt(trainer, step):
        """Send the signal after ``step`` steps, or in the accumulation of the next, which must count for nothing."""
        real, micro_batches = trainer.micro_step, 2 * step + (moment == "inside a step")

        def micro_step(batch):
            nonlocal micro_batches
            result = real(batch)
            micro_batches -= 1
            if micro_batches == 0:
                os.kill(os.getpid(), signal_number)
            return result

        trainer.micro_step = micro_step

    run, step = tmp_path / "run", 0
    for more in (4, 1, 2):  # steps 4, 5 and 7: none is a multiple of the interval between checkpoints
        trainer = make(tiny_dataset, run)
        if step:
            trainer.load(load_checkpoint(run / "checkpoints" / f"step-{step:06d}"))
        interrupt(trainer, more)
        with pytest.raises(Interrupted, match="the same command continues"):
            trainer.run()
        step += more
        assert (run / "checkpoints" / f"step-{step:06d}" / "manifest.json").exists()
    trainer = make(tiny_dataset, run)
    trainer.load(load_checkpoint(run / "checkpoints" / f"step-{step:06d}"))
    trainer.run()
    assert weights_of(run, 12) == weights_of(straight, 12)  # trap 30
    assert logged(run) == logged(straight)
    assert load_checkpoint(run / "checkpoints" / "step-000012").state["slots"] == 24


def test_a_broken_sample_stops_the_run_and_is_named(tmp_path):
    dataset = write_dataset(tmp_path / "dataset")
    shard = dataset / "bucket_64x64" / "shard-000000.t5.tar"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    trainer = make(dataset, tmp_path / "run")
    with pytest.raises(Exception, match=r"bucket_64x64/shard-000000\.t5\.tar.*[0-9a-f]{32}"):  # trap 35
        trainer.run()


@pytest.mark.parametrize("where", ["input", "weights", "gradient"])
def test_nothing_finite_is_lost_to_what_is_not(tiny_dataset, tmp_path, monkeypatch, where):
    trainer = make(tiny_dataset, tmp_path / "run", "data.prefetch=0", "checkpoint.every_steps=1")
    real = trainer.batches.pack

    def poisoned(index, buffer):
        batch = real(index, buffer).unpacked()
        if index == 5 and where == "input":
            batch.x[2, 0, 0, 0] = float("inf")
        if index == 5 and where == "weights":
            with torch.no_grad():
                trainer.model.blocks[0].mlp.up.weight[0, 0] = float("nan")
        if index == 5 and where == "gradient":
            trainer.model.final.weight.register_hook(lambda gradient: gradient * float("nan"))
        return batch

    monkeypatch.setattr(trainer.batches, "pack", poisoned)
    with pytest.raises(NonFiniteError, match=r"step 3: .* is not finite\. Optimiser and EMA were not touched"):
        trainer.run()
    assert trainer.step == 2
    saved = load_checkpoint(tmp_path / "run" / "checkpoints" / "step-000002")
    for name, value in trainer.ema.state.items():
        assert torch.equal(value, saved.ema[name])
    for name, value in trainer.optimizer.tensors().items():
        assert torch.equal(value, saved.optimizer[name])
    if where != "weights":
        assert all(torch.equal(value, saved.model[name]) for name, value in trainer.model.state_dict().items())
    record = json.loads((tmp_path / "run" / "non-finite-step-000003.json").read_text())
    assert len(record["images"]) == 8
    assert all(0 < image["t"] < 1 and len(image["key"]) == 32 for image in record["images"])
    assert "nan" in json.dumps(record)
    assert all(float(image["velocity_norm"]) > 0 for image in record["images"] if image["loss"] not in ("inf", "nan"))
    assert {"blocks.00", "final"} <= record["grad_norms"].keys()
    if where == "input":
        assert [i for i, image in enumerate(record["images"]) if image["loss"] in ("inf", "nan")] == [6]


def test_the_state_is_in_the_checkpoint_and_nowhere_else(straight):
    checkpoint = load_checkpoint(straight / "checkpoints" / "step-000012")
    assert checkpoint.state["rng"].startswith("counter-based")
    assert checkpoint.state["config"]["train"]["steps"] == 12
    assert set(checkpoint.state["environment"]) == {
        "torch",
        "threads",
        "cpu_capability",
        "cpu_bf16",
        "device",
        "can_compile",
    }
    names = {name.rsplit("/", 1)[-1] for name in checkpoint.optimizer}
    assert names == set(checkpoint.model)


def _unfreeze(trainer: Trainer) -> None:
    """Move the zero-initialised layers away from zero, so that gradients reach every parameter."""
    with torch.no_grad():
        rng = torch.Generator().manual_seed(0)
        for parameter in trainer.model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.05, generator=rng)
